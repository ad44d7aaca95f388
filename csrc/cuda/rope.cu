// Rotation of queries and keys, forward, backward (conjugate) and in place.
//
// A thread takes one unit of a token (8 pairs in two 16-byte chunks where the pairs allow it), computes its cos and sin
// once, and turns that unit of every head.
//
// Bytes: every element is read and written once. Operations: about 30 per pair and token for the angle, shared by the
// heads, and 8 per pair and head. Bound by memory from about four heads on.
#include "kernels.h"
#include "rotate.cuh"
#include "sequence.cuh"

namespace longrope {
namespace {

constexpr int kThreads = 128;

template <class T, bool kChunks>
LONGROPE_DEVICE void rotate_tokens(const RopeParams& p, const RopeOperand& x, int64_t first) {
    const int head_dim = static_cast<int>(p.head_dim);
    const int units = kChunks ? head_dim / 8 - p.rotation.pairs / 8 : head_dim - p.rotation.pairs;
    const int64_t token = first / units % x.tokens, b = first / units / x.tokens;
    if (b >= p.batch) return;
    const int unit = static_cast<int>(first % units);
    const Regime regime = regime_of(p.rotation, b);
    const int64_t position = load_global(x.positions + b * x.positions_batch_stride + token);
    const Angles<kChunks> angles = angles_of<kChunks>(regime, unit, position, p.conjugate != 0);
    for (int64_t head = 0; head < x.heads; ++head)
        rotate_unit(regime, unit, angles, GlobalRow<T>{row_of<T>(x.input, b, head, token)},
                    GlobalRow<T>{row_of<T>(x.output, b, head, token)});
}

template <class T, bool kChunks>
int64_t blocks_of(const RopeParams& p, const RopeOperand& x) {
    const int64_t units = kChunks ? p.head_dim / 8 - p.rotation.pairs / 8 : p.head_dim - p.rotation.pairs;
    return x.heads == 0 ? 0 : (p.batch * x.tokens * units + kThreads - 1) / kThreads;
}

struct RopeLaunch {
    RopeParams params;
    int64_t query_blocks;
};

template <class T, bool kChunks>
LONGROPE_KERNEL(kThreads)
rope_kernel(const RopeLaunch launch) {
    const bool key = block_index() >= launch.query_blocks;
    const int64_t block = block_index() - (key ? launch.query_blocks : 0);
    rotate_tokens<T, kChunks>(launch.params, launch.params.operands[key], block * kThreads + thread_index());
}

template <class T, bool kChunks>
void run(const RopeParams& p, Stream stream) {
    const int64_t query_blocks = blocks_of<T, kChunks>(p, p.operands[0]);
    launch(rope_kernel<T, kChunks>, query_blocks + blocks_of<T, kChunks>(p, p.operands[1]), kThreads, 0,
           RopeLaunch{p, query_blocks}, stream);
}

// 16-byte chunks need whole groups of pairs, whole chunks in a row, and rows that begin at multiples of 16 bytes.
bool in_chunks(const RopeParams& p) {
    if (p.rotation.pairs % 8 != 0 || p.head_dim % 8 != 0) return false;
    for (const RopeOperand& x : p.operands)
        for (const Operand& o : {x.input, x.output})
            if ((reinterpret_cast<uintptr_t>(o.data) % 16 | o.batch_stride % 8 | o.head_stride % 8 |
                 o.token_stride % 8) != 0)
                return false;
    return true;
}

template <class T>
void run_16_bits(const RopeParams& p, Stream stream) {
    if (in_chunks(p)) return run<T, true>(p, stream);
    run<T, false>(p, stream);
}

}  // namespace

void apply_rope(const RopeParams& params, Stream stream) {
    switch (params.dtype) {
        case Dtype::kFloat32:
            return run<float, false>(params, stream);
        case Dtype::kFloat16:
            return run_16_bits<Half>(params, stream);
        case Dtype::kBFloat16:
            return run_16_bits<BFloat16Bits>(params, stream);
    }
}

}  // namespace longrope
