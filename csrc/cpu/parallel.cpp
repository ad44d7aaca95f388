#include "parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace longrope {
namespace {

// The entry point that GCC emits for `#pragma omp parallel`; libgomp exports it, and so do LLVM's and Intel's runtimes.
using ParallelFunction = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNumberFunction = int (*)();

struct OpenMp {
    ParallelFunction parallel;
    ThreadNumberFunction thread_number;
    pid_t owner;
};

std::string loader_of(pid_t process) {
    std::ifstream file("/proc/" + std::to_string(process) + "/auxv", std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Whether this process was forked from its parent and has not loaded a program since. What the kernel told the program
// when it was loaded (addresses drawn at random among it) is then the same, word for word.
bool forked() {
    const std::string own = loader_of(getpid());
    return !own.empty() && own == loader_of(getppid());
}

// A pool's threads do not survive a fork, and its owner cannot tell: in a child no pool is used that may be older.
OpenMp find_openmp() {
    // torch loads its runtime with global visibility, so it is found by name without linking any.
    return {reinterpret_cast<ParallelFunction>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
            reinterpret_cast<ThreadNumberFunction>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
            forked() ? -1 : getpid()};
}

const OpenMp& openmp() {
    static const OpenMp found = find_openmp();
    return found;
}

// The runtime is looked up when the module loads, so that `owner` is the process that may use its pool.
const OpenMp& at_load = openmp();

bool usable() {
    return at_load.parallel != nullptr && at_load.thread_number != nullptr && at_load.owner == getpid();
}

void call_body(void* argument) {
    (*static_cast<const std::function<void(int)>*>(argument))(at_load.thread_number());
}

}  // namespace

const char* thread_pool_name() {
    return usable() ? "openmp" : "threads";
}

void run_workers(int workers, const std::function<void(int)>& body) {
    if (workers <= 1) {
        body(0);
        return;
    }
    std::exception_ptr failure;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    const std::function<void(int)> guarded = [&](int worker) {
        try {
            body(worker);
        } catch (...) {  // must not leave the thread: it is thrown again where the caller waits
            if (!failed.test_and_set()) failure = std::current_exception();
        }
    };
    if (usable()) {
        at_load.parallel(call_body, const_cast<std::function<void(int)>*>(&guarded), static_cast<unsigned>(workers), 0);
    } else {
        std::vector<std::thread> team;
        team.reserve(workers - 1);
        int started = 1;
        try {
            for (; started < workers; ++started) team.emplace_back(guarded, started);
        } catch (const std::system_error&) {  // no more threads: this one does their part too
        }
        guarded(0);
        for (int worker = started; worker < workers; ++worker) guarded(worker);
        for (std::thread& thread : team) thread.join();
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace longrope
