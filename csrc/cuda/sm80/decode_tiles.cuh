// The tiles of the split-key decode: what lies where in shared memory, and how keys and values get there.
//
// A thread copies the same chunks of rows that are a fixed step apart, of every tile. What does not change from tile to
// tile (its chunks' places, the strides) is computed once; a row costs a step through the pages and two products in 64
// bits, and a 16-byte copy one instruction. Pages are looked up a tile ahead.
#pragma once

#include "../kernels.h"
#include "../rotate.cuh"
#include "../sequence.cuh"
#include "../softmax.cuh"
#include "../tile.cuh"

namespace longrope {

constexpr int kBlockRows = 16;  // as many as one product has

// Q: what keys and values are stored as; T: nothing is quantised.
template <class T, int kHeadDim, class Q>
struct DecodeShape {
    static constexpr bool kQuantised = !std::is_same_v<Q, T>;
    static constexpr int kKeys = kHeadDim <= 128 ? 64 : 32, kWarps = kKeys / 16, kThreads = 32 * kWarps;
    static constexpr int kSteps = kHeadDim / 16, kPairs = kHeadDim / 2;
    using QueryTile = Tile<kBlockRows, kHeadDim>;
    using KeyTile = Tile<kKeys, kHeadDim>;
    // Quantised rows, in chunks of 16 bytes.
    using ByteTile = Tile<kKeys, (kHeadDim / 2 + 31) / 32 * 32>;
    using StoredTile = std::conditional_t<kQuantised, ByteTile, KeyTile>;

    // Half the frequencies; angles of 8 distances from the middle of 16 keys; angles of the middles, a warp each.
    static constexpr int kHalfTurns = QueryTile::kBytes, kDistances = kHalfTurns + kPairs * 8;
    static constexpr int kMiddles = kDistances + 8 * kPairs * 8, kStages = kMiddles + kWarps * kPairs * 8;
    // A stage: keys (quantised ones fill half of their place), values, scales of channels and of values.
    static constexpr int kScaleBytes = kQuantised ? (kHeadDim + kKeys) * 4 : 0;
    static constexpr int kStageBytes = KeyTile::kBytes + StoredTile::kBytes + kScaleBytes;
    static constexpr int kSharedBytes = kStages + 2 * kStageBytes;
    // The warps' sums, in the place of the stages: fp32 [warps][16][head_dim + 2].
    static constexpr int kSumStride = kHeadDim + 2;
    // Blocks on a multiprocessor of Hopper: what shared memory leaves room for, less where registers would not suffice.
    static constexpr int kResident = kQuantised || kHeadDim > 128 ? 2 : 3;
    static_assert(kResident * (kSharedBytes + 1024) <= 228 << 10, "the blocks do not fit a multiprocessor");
    static_assert(kWarps * kBlockRows * kSumStride * 4 <= kSharedBytes - kStages, "the sums do not fit the stages");
    static_assert(kSharedBytes <= kSharedLimit, "the tiles do not fit sm_86");
    static_assert(kSplitKeys % kKeys == 0 && kKeyGroup % kKeys == 0, "a tile lies in one run and one group");
    static_assert(kStages % 128 == 0 && kStageBytes % 128 == 0, "tiles begin at the first bank");

    static LONGROPE_DEVICE SharedAddress stage(int i) { return kStages + i * kStageBytes; }
    static LONGROPE_DEVICE SharedAddress values(int i) { return stage(i) + KeyTile::kBytes; }
    static LONGROPE_DEVICE SharedAddress channel_scales(int i) { return values(i) + StoredTile::kBytes; }
    static LONGROPE_DEVICE SharedAddress value_scales(int i) { return channel_scales(i) + 4 * kHeadDim; }
    static LONGROPE_DEVICE SharedAddress sum(int warp, int row, int column) {
        return kStages + ((warp * kBlockRows + row) * kSumStride + column) * 4;
    }
};

// The column of a key tile that a dim has. The two dims of a pair are half a tile apart, so that one lane gets both in
// its fragments, whatever part of a head rotates; interleaved pairs are side by side and stay where they are. Whole
// chunks move where the pairs come in whole chunks.
template <int kHeadDim>
struct Columns {
    static constexpr int kHalf = kHeadDim / 2;
    int pairs;
    bool interleaved;

    LONGROPE_DEVICE explicit Columns(const Rotation& r) : pairs(r.pairs), interleaved(r.interleaved != 0) {}

    LONGROPE_DEVICE int column(int dim) const {
        if (interleaved || dim < pairs || dim >= kHalf + pairs) return dim;
        return dim < 2 * pairs ? dim - pairs + kHalf : dim - pairs;
    }
    LONGROPE_DEVICE int dim(int column) const {
        if (interleaved || column < pairs || column >= kHalf + pairs) return column;
        return column < kHalf ? column + pairs : column - kHalf + pairs;
    }
    // Whether the dims of a chunk of so many stay together.
    LONGROPE_DEVICE bool move_chunks_of(int dims) const { return interleaved || pairs % dims == 0; }
};

// Strides of keys or values in bytes, as the host has them: a kernel then multiplies by constants.
struct ByteStrides {
    int64_t outer, token;  // outer is a page, or the sequence

    ByteStrides(const Operand& x, int64_t element) : outer(x.batch_stride * element), token(x.token_stride * element) {}
};

struct DecodeLaunch {
    AttentionParams params;
    AttentionScratch scratch;
    ScoreScale scale;
    ByteStrides key, value;
    int32_t group;                     // query heads that share a key head
    int32_t row_blocks;                // of a sequence and key head with the most rows
    uint32_t step_pages, step_tokens;  // from a row that a thread copies to its next
};

// Walks the keys of a sequence through its pages, in steps of `launch.step_pages` pages and `launch.step_tokens`.
struct PageWalk {
    uint32_t page, token;

    LONGROPE_DEVICE void step(const DecodeLaunch& launch) {
        const uint32_t size = static_cast<uint32_t>(launch.params.pages.page_tokens);
        page += launch.step_pages;
        token += launch.step_tokens;
        if (token >= size) {
            token -= size;
            ++page;
        }
    }
};

template <class T, int kHeadDim, class Q, class S = DecodeShape<T, kHeadDim, Q>>
class TileCopies {
    static constexpr int kDims = S::kQuantised ? 16 : 8;  // of 16 bytes
    static constexpr int kChunks = kHeadDim / kDims;      // of a row
    static constexpr int kLine = kChunks % 8 == 0   ? 8   // of them side by side, for as many threads
                                 : kChunks % 4 == 0 ? 4
                                                    : 2;

  public:
    static constexpr int kRowStep = S::kThreads / kLine;

    LONGROPE_DEVICE TileCopies(const DecodeLaunch& launch, const Sequence& s, uint32_t head, int first)
        : launch_(launch),
          p_(launch.params),
          head_(head),
          b_(static_cast<uint32_t>(s.b)),
          length_(static_cast<int>(s.key_length)),
          paged_(p_.pages.block_table != nullptr),
          key_(bytes_of(p_.key, launch.key, s.key_start)),
          value_(bytes_of(p_.value, launch.value, s.key_start)) {
        const Me me;
        const Columns<kHeadDim> columns(p_.rotation);
        if (paged_) {
            const uint32_t size = static_cast<uint32_t>(p_.pages.page_tokens);
            walk_ = {(first + me.row) / size, (first + me.row) % size};
        }
        const uintptr_t any = reinterpret_cast<uintptr_t>(key_) | reinterpret_cast<uintptr_t>(value_) |
                              launch.key.outer | launch.key.token | launch.value.outer | launch.value.token;
        whole_ = !S::kQuantised || (p_.head_dim % kDims == 0 && columns.move_chunks_of(kDims) && any % 16 == 0);
#pragma unroll
        for (int k = 0; k < kCopies; ++k) key_to_[k] = key_place(me, me.dim(k));
        value_to_ = place(me, me.dim(0));
        look_up(me, first);
    }

    // Starts copying the tile that begins at key `first` into a stage, with zeros past the end and past head_dim, and
    // looks up the pages of the next.
    LONGROPE_DEVICE void start(int first, int stage) {
        const Me me;
        const bool tail = S::kQuantised && first >= length_ / kKeyGroup * kKeyGroup;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const bool valid = first + me.row + i * kRowStep < length_;
            if (!tail)
                copy_row(me, S::stage(stage), i, row(key_, launch_.key, i), valid,
                         [&](int k, int half) { return half == 0 ? key_to_[k] : key_place(me, me.dim(k) + 8); });
            copy_row(me, S::values(stage), i, row(value_, launch_.value, i), valid,
                     [&](int k, int half) { return value_to(me, k) + 8 * half; });
        }
        if constexpr (S::kQuantised) {
            copy_value_scale(me, first, stage);
            if (tail)
                copy_tile<S::kThreads>(
                    typename S::KeyTile{S::stage(stage)}, length_ - first, static_cast<int>(p_.head_dim),
                    [&](int r) { return row_of<T>(p_.pages.key_tail, b_, head_, (first + r) % kKeyGroup); });
            else if (4 * thread_index() < kHeadDim)
                copy_channel_scales(stage);
        }
        look_up(me, first + S::kKeys);
    }

  private:
    static constexpr int kCopies = kChunks / kLine, kRows = S::kKeys / kRowStep;
    static_assert(kRowStep % 8 == 0 && kRows <= kLine,
                  "the swizzle of a thread's rows is one, and a row's scale has its thread");

    // The thread's part of a tile: chunks line, line + kLine and on of rows row, row + kRowStep and on. Made when it is
    // needed, as registers are few.
    struct Me {
        int row, line;

        LONGROPE_DEVICE Me() {
            const int thread = static_cast<int>(anew(thread_index()));
            row = thread / kLine;
            line = thread % kLine;
        }
        LONGROPE_DEVICE int dim(int k) const { return (line + kLine * k) * kDims; }
    };

    const DecodeLaunch& launch_;
    const AttentionParams& p_;
    uint32_t head_, b_;
    int length_;
    bool paged_, whole_;             // whole_: 16 bytes stay together
    const uint8_t *key_, *value_;    // of the head, from the thread's first chunk on
    SharedAddress key_to_[kCopies];  // places in a tile at 0, of the thread's first row
    SharedAddress value_to_;         // of the first copy; values stay in their columns
    PageWalk walk_;
    uint32_t outer_[kRows], token_[kRows];  // of the thread's rows of the next tile

    LONGROPE_DEVICE const uint8_t* bytes_of(const Operand& x, const ByteStrides& strides, int64_t key_start) const {
        const auto* data = static_cast<const std::conditional_t<S::kQuantised, uint8_t, T>*>(x.data);
        const int64_t from = (paged_ ? 0 : key_start * strides.token) + thread_index() % kLine * 16;
        // One address, not its terms, is kept in registers.
        return anew(reinterpret_cast<const uint8_t*>(data + head_ * x.head_stride) + from);
    }
    // The thread's row i of the tile that was looked up.
    LONGROPE_DEVICE const uint8_t* row(const uint8_t* base, const ByteStrides& strides, int i) const {
        return base + static_cast<int64_t>(outer_[i]) * strides.outer + static_cast<int64_t>(token_[i]) * strides.token;
    }

    static LONGROPE_DEVICE SharedAddress place(const Me& me, int column) {
        return typename S::StoredTile{0}.chunk(me.row, column / kDims) + column % kDims;  // a byte a dim, if any
    }
    LONGROPE_DEVICE SharedAddress key_place(const Me& me, int dim) const {
        const Columns<kHeadDim> columns(p_.rotation);
        return place(me, columns.move_chunks_of(8) ? columns.column(dim) : dim);
    }
    // A chunk further on lies in the same place of another slab, or is its neighbour's neighbour.
    LONGROPE_DEVICE SharedAddress value_to(const Me& me, int k) const {
        if constexpr (kLine % 4 == 0) return value_to_ + k * (kLine / 4) * S::kKeys * 64;
        return place(me, me.dim(k));
    }

    // Rows past the end: the first key's place, which nothing is read from.
    LONGROPE_DEVICE void look_up(const Me& me, int first) {
        const int32_t* table = p_.pages.block_table + anew(b_) * p_.pages.pages_per_sequence;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int index = first + me.row + i * kRowStep;
            const bool there = index < length_;
            if (paged_) {
                outer_[i] = static_cast<uint32_t>(load_global(table + (there ? walk_.page : 0)));
                token_[i] = there ? walk_.token : 0;
                walk_.step(launch_);
            } else {
                outer_[i] = b_;
                token_[i] = there ? index : 0;
            }
        }
    }

    LONGROPE_DEVICE Slot slot(uint32_t outer, uint32_t token) const {
        return {outer, token + (paged_ ? 0 : load_global(p_.key_start + b_))};
    }

    template <class PlaceOf>
    LONGROPE_DEVICE void copy_row(const Me& me, SharedAddress tile, int i, const uint8_t* from, bool valid,
                                  const PlaceOf& place_of) const {
        const int head_dim = static_cast<int>(p_.head_dim);
#pragma unroll
        for (int k = 0; k < kCopies; ++k) {
            const SharedAddress row = tile + i * kRowStep * 64;
            const uint8_t* chunk = from + 16 * kLine * k;
            if constexpr (S::kQuantised) {
                if (!whole_) {
                    copy_async<8>(row + place_of(k, 0), chunk, valid && me.dim(k) < head_dim);
                    copy_async<8>(row + place_of(k, 1), chunk + 8, valid && me.dim(k) + 8 < head_dim);
                    continue;
                }
            }
            copy_async<16>(row + place_of(k, 0), chunk, valid && me.dim(k) < head_dim);
        }
    }

    // Of a row, by one of the threads that copy it.
    LONGROPE_DEVICE void copy_value_scale(const Me& me, int first, int stage) const {
        if (me.line >= kRows) return;
        const int row = me.row + me.line * kRowStep;
        uint32_t outer = outer_[0], token = token_[0];
#pragma unroll
        for (int i = 1; i < kRows; ++i)
            if (me.line == i) {
                outer = outer_[i];
                token = token_[i];
            }
        copy_async<4>(S::value_scales(stage) + 4 * row, value_scale(p_, slot(outer, token), head_),
                      first + row < length_);
    }

    // Four channels a thread, in the columns of their keys. A tile lies in one group, and that in one page.
    LONGROPE_DEVICE void copy_channel_scales(int stage) const {
        const Columns<kHeadDim> columns(p_.rotation);
        const int dim = 4 * thread_index(), column = columns.move_chunks_of(8) ? columns.column(dim) : dim;
        copy_async<16>(S::channel_scales(stage) + 4 * column, key_scale(p_, slot(outer_[0], token_[0]), head_) + dim,
                       dim < p_.head_dim);
    }
};

}  // namespace longrope
