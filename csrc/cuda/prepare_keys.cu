// Keys as the attention kernels read them: rotated once, out of an operand or a cache's pages, into a scratch copy; the
// values of a cache are gathered with them.
//
// A thread takes one unit of one key (rotate.cuh) of every key head, so that angles are computed once for all heads.
// Bytes: every key is read and written once. Bound by memory. Beside an attention of n rows that is 1 part in n / 2 of
// the products' operations; a pass that rotated the keys of every row block anew would cost 30 operations a pair each
// time.
#include "kernels.h"
#include "rotate.cuh"
#include "sequence.cuh"

namespace longrope {
namespace {

constexpr int kThreads = 128;

struct PrepareLaunch {
    AttentionParams params;
    AttentionScratch scratch;
};

template <bool kChunks>
LONGROPE_HOST_DEVICE int units_of(const AttentionParams& p) {
    return static_cast<int>(kChunks ? p.head_dim / 8 - p.rotation.pairs / 8 : p.head_dim - p.rotation.pairs);
}

template <class T, bool kChunks>
LONGROPE_KERNEL(kThreads)
prepare_keys_kernel(const PrepareLaunch launch) {
    const AttentionParams& p = launch.params;
    const int units = units_of<kChunks>(p);
    const int64_t of_sequence = (launch.scratch.key_tokens * units + kThreads - 1) / kThreads;
    const Sequence s(p, block_index() / of_sequence);
    const int64_t at = block_index() % of_sequence * kThreads + thread_index();
    const int64_t index = at / units;
    if (index >= s.key_length) return;
    const int unit = static_cast<int>(at % units);
    const Regime regime = regime_of(p.rotation, s.b);
    const Angles<kChunks> angles = angles_of<kChunks>(regime, unit, s.key_position(p, index), false);
    const Slot slot = slot_of(p, s, index);
    for (int64_t head = 0; head < p.key_heads; ++head) {
        const GlobalRow<T> to{row_of<T>(launch.scratch.key, s.b, head, s.key_start + index)};
        if (!quantised(p))
            rotate_unit(regime, unit, angles, GlobalRow<T>{row_of<T>(p.key, slot.outer, head, slot.token)}, to);
        else if (index >= quantised_keys(s))
            rotate_unit(regime, unit, angles, GlobalRow<T>{row_of<T>(p.pages.key_tail, s.b, head, index % kKeyGroup)},
                        to);
        else
            with_format(p.pages, [&](auto q) {
                using Q = decltype(q);
                const QuantisedRow<Q> from{row_of<Q>(p.key, slot.outer, head, slot.token), key_scale(p, slot, head)};
                rotate_unit(regime, unit, angles, from, to);
            });
    }
}

struct QueryLaunch {
    AttentionParams params;
    Operand rotated;
};

// The same for queries.
template <class T, bool kChunks>
LONGROPE_KERNEL(kThreads)
prepare_queries_kernel(const QueryLaunch launch) {
    const AttentionParams& p = launch.params;
    const int units = units_of<kChunks>(p);
    const int64_t of_sequence = (p.query_tokens * units + kThreads - 1) / kThreads;
    const Sequence s(p, block_index() / of_sequence);
    const int64_t at = block_index() % of_sequence * kThreads + thread_index();
    const int64_t i = at / units;
    if (i >= s.query_count) return;
    const int unit = static_cast<int>(at % units);
    const Regime regime = regime_of(p.rotation, s.b);
    const Angles<kChunks> angles = angles_of<kChunks>(regime, unit, s.query_position(p, i), false);
    for (int64_t head = 0; head < p.query_heads; ++head)
        rotate_unit(regime, unit, angles, GlobalRow<T>{s.query_row<T>(p.query, head, i)},
                    GlobalRow<T>{s.query_row<T>(launch.rotated, head, i)});
}

// Values of a cache as rows of T: a thread takes one chunk of one value of every key head.
template <class T>
LONGROPE_KERNEL(kThreads)
gather_values_kernel(const PrepareLaunch launch) {
    const AttentionParams& p = launch.params;
    const int chunks = static_cast<int>(p.head_dim) / 8;
    const int64_t of_sequence = (launch.scratch.key_tokens * chunks + kThreads - 1) / kThreads;
    const Sequence s(p, block_index() / of_sequence);
    const int64_t at = block_index() % of_sequence * kThreads + thread_index(), index = at / chunks;
    if (index >= s.key_length) return;
    const int chunk = static_cast<int>(at % chunks);
    const Slot slot = slot_of(p, s, index);
    for (int64_t head = 0; head < p.key_heads; ++head) {
        const GlobalRow<T> to{row_of<T>(launch.scratch.value, s.b, head, s.key_start + index)};
        if (!quantised(p)) {
            to.store8(chunk, GlobalRow<T>{row_of<T>(p.value, slot.outer, head, slot.token)}.load8(chunk));
            continue;
        }
        const Vec8 bytes = load_global(
            reinterpret_cast<const Vec8*>(row_of<int8_t>(p.value, slot.outer, head, slot.token) + 8 * chunk));
        Float8 x = with_format(p.pages, [&](auto q) { return Quantised<decltype(q)>::unpack8(bytes); });
        const float scale = load_global(value_scale(p, slot, head));
#pragma unroll
        for (int i = 0; i < 8; ++i) x.at[i] *= scale;
        to.store8(chunk, x);
    }
}

template <class T, bool kChunks>
void run(const AttentionParams& p, const AttentionScratch& scratch, Stream stream) {
    const int64_t of_sequence = (scratch.key_tokens * units_of<kChunks>(p) + kThreads - 1) / kThreads;
    launch(prepare_keys_kernel<T, kChunks>, of_sequence * p.batch, kThreads, 0, PrepareLaunch{p, scratch}, stream);
    if (scratch.value.data == nullptr) return;
    const int64_t value_blocks = (scratch.key_tokens * (p.head_dim / 8) + kThreads - 1) / kThreads;
    launch(gather_values_kernel<T>, value_blocks * p.batch, kThreads, 0, PrepareLaunch{p, scratch}, stream);
}

template <class T>
void run_of(const AttentionParams& p, const AttentionScratch& scratch, Stream stream) {
    if (p.rotation.pairs % 8 == 0) return run<T, true>(p, scratch, stream);
    run<T, false>(p, scratch, stream);
}

template <class T, bool kChunks>
void run_queries(const AttentionParams& p, const Operand& rotated, Stream stream) {
    const int64_t of_sequence = (p.query_tokens * units_of<kChunks>(p) + kThreads - 1) / kThreads;
    launch(prepare_queries_kernel<T, kChunks>, of_sequence * p.batch, kThreads, 0, QueryLaunch{p, rotated}, stream);
}

template <class T>
void run_queries_of(const AttentionParams& p, const Operand& rotated, Stream stream) {
    if (p.rotation.pairs % 8 == 0) return run_queries<T, true>(p, rotated, stream);
    run_queries<T, false>(p, rotated, stream);
}

}  // namespace

void prepare_queries(const AttentionParams& params, const Operand& rotated, Stream stream) {
    if (params.dtype == Dtype::kFloat16) return run_queries_of<Half>(params, rotated, stream);
    run_queries_of<BFloat16Bits>(params, rotated, stream);
}

void prepare_keys(const AttentionParams& params, const AttentionScratch& scratch, Stream stream) {
    if (params.dtype == Dtype::kFloat16) return run_of<Half>(params, scratch, stream);
    run_of<BFloat16Bits>(params, scratch, stream);
}

}  // namespace longrope
