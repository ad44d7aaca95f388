// What marks a function for both sides: nvcc compiles it for host and device, other compilers see a plain function.
#pragma once

#if defined(__CUDACC__)
#define LONGROPE_HOST_DEVICE __host__ __device__
#else
#define LONGROPE_HOST_DEVICE
#endif
