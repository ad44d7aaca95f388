// Threads. torch brings its own OpenMP runtime, and a second pool spins against it: half of the speed of both is lost.
#pragma once

#include <cstdint>
#include <functional>

namespace longrope {

// Calls body(worker) for each worker in [0, workers), at once. Runs on the OpenMP pool already in the process (torch's)
// where there is one, else on threads of its own; in a child of fork(2), where that pool is gone, on threads of its
// own.
void run_workers(int workers, const std::function<void(int)>& body);

// Name of the pool that run_workers would use now: "openmp" or "threads".
const char* thread_pool_name();

}  // namespace longrope
