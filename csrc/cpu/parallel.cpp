#include "parallel.h"

#include <dlfcn.h>
#include <unistd.h>

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

OpenMp find_openmp() {
    // torch loads its runtime with global visibility, so it is found by name without linking any.
    return {reinterpret_cast<ParallelFunction>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
            reinterpret_cast<ThreadNumberFunction>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")), getpid()};
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
    if (usable()) {
        at_load.parallel(call_body, const_cast<std::function<void(int)>*>(&body), static_cast<unsigned>(workers), 0);
        return;
    }
    std::vector<std::thread> team;
    team.reserve(workers - 1);
    for (int worker = 1; worker < workers; ++worker) team.emplace_back(body, worker);
    body(0);
    for (std::thread& thread : team) thread.join();
}

}  // namespace longrope
