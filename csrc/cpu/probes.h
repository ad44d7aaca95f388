// What the machine can do at most: loops that a benchmark's figures are given as shares of.
#pragma once

#include <cstdint>

namespace longrope {

double probe_fma(int threads, double seconds);
double probe_bf16(int threads, double seconds);
double probe_read(int threads, int64_t bytes);
double probe_read_multiply(int threads, int64_t bytes, int multiplications);

}  // namespace longrope
