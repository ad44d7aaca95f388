// apply_rope for one instruction set: cos and sin once per position, for all heads of queries and keys.
//
// Bytes: every element is read and written once. Operations: about 30 per pair and position for the angle, shared by
// the heads, and 6 per pair and head. Bound by memory from about four heads on.
#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace longrope {
namespace {

constexpr int64_t kTokenBlock = 32;

template <class T>
void rotate_tokens(const RopeParams& p, const RopeOperand& x, int64_t b, int64_t first, int64_t last) {
    const int pairs = p.rotation.pairs;
    std::vector<float> angles(2 * (last - first) * std::max(pairs, 1));
    float* sines = angles.data() + (last - first) * pairs;
    for (int64_t t = first; t < last; ++t) {
        float* sine = sines + (t - first) * pairs;
        rotation_row(p.rotation, b, x.positions[b * x.positions_batch_stride + t], &angles[(t - first) * pairs], sine);
        if (p.conjugate)
            for (int pair = 0; pair < pairs; ++pair) sine[pair] = -sine[pair];
    }
    for (int64_t head = 0; head < x.heads; ++head)
        for (int64_t t = first; t < last; ++t)
            rotate_row(static_cast<const T*>(x.input.data) + b * x.input.batch_stride + head * x.input.head_stride +
                           t * x.input.token_stride,
                       p.head_dim, pairs, p.rotation.interleaved, &angles[(t - first) * pairs],
                       sines + (t - first) * pairs,
                       static_cast<T*>(x.output.data) + b * x.output.batch_stride + head * x.output.head_stride +
                           t * x.output.token_stride);
}

template <class T>
void apply_rope(const RopeParams& p) {
    std::atomic<int64_t> next{0};
    int64_t blocks[2];
    for (int i = 0; i < 2; ++i)
        blocks[i] = p.operands[i].heads == 0 ? 0 : (p.operands[i].tokens + kTokenBlock - 1) / kTokenBlock * p.batch;
    const int64_t tasks = blocks[0] + blocks[1];
    if (tasks == 0) return;
    run_workers(static_cast<int>(std::min<int64_t>(p.threads, tasks)), [&](int) {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
            const RopeOperand& x = p.operands[task >= blocks[0]];
            const int64_t block = (task - (task >= blocks[0] ? blocks[0] : 0));
            const int64_t b = block % p.batch, first = block / p.batch * kTokenBlock;
            rotate_tokens<T>(p, x, b, first, std::min(first + kTokenBlock, x.tokens));
        }
    });
}

}  // namespace

void LONGROPE_LEVEL(apply_rope)(const RopeParams& p) {
    switch (p.dtype) {
        case Dtype::kFloat32:
            return apply_rope<float>(p);
        case Dtype::kFloat16:
            return apply_rope<_Float16>(p);
        case Dtype::kBFloat16:
            return apply_rope<BFloat16>(p);
    }
}

}  // namespace longrope
