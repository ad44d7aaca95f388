// The tiles of the split-key decode: what lies where in shared memory, and how keys and values get there.
//
// A thread copies the same chunks of rows that are a fixed step apart, of every tile. What does not change from tile to
// tile (its chunks' places, the strides) is computed once; a row costs a step through the pages and two products in 64
// bits, and a 16-byte copy one instruction. Pages are looked up a tile ahead. A tile of a quantised cache lies in one
// page: there a row is an addition from the one before. Scales come once, for all the keys of the run.
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
    // Keys are rotated in fp16, two at once: far finer than bf16, but not than fp16.
    static constexpr bool kPacked = kQuantised && !std::is_same_v<T, Half>;
    static constexpr int kKeys = kHeadDim <= 128 ? 64 : 32, kWarps = kKeys / 16, kThreads = 32 * kWarps;
    static constexpr int kSteps = kHeadDim / 16, kPairs = kHeadDim / 2;
    using QueryTile = Tile<kBlockRows, kHeadDim>;
    using KeyTile = Tile<kKeys, kHeadDim>;
    // Quantised rows, in chunks of 16 bytes.
    using ByteTile = Tile<kKeys, (kHeadDim / 2 + 31) / 32 * 32>;
    using StoredTile = std::conditional_t<kQuantised, ByteTile, KeyTile>;

    // Half the frequencies; the angles of distances from a middle, and of the middle. In fp32: 8 distances, and the
    // middle of each warp's 16 keys. Packed: half a tile of distances, and the tile's middle, in two places in turn.
    static constexpr int kHalfTurns = (kPacked ? 2 : 1) * QueryTile::kBytes, kDistances = kHalfTurns + kPairs * 8;
    static constexpr int kMiddles = kDistances + (kPacked ? kKeys / 2 * 4 : 8 * 8) * kPairs;
    static constexpr int kMiddleBytes = (kPacked ? 4 : 8) * kPairs;  // a warp's or a tile's
    // Scales of the run's values; what the warps know of them; of its channels, group by group, in the columns of their
    // keys, packed in fp16, with units of pairs and of rows.
    static constexpr int kGroups = kSplitKeys / kKeyGroup, kScaleBytes = kGroups * kHeadDim * 4;
    static constexpr int kValueScales = kMiddles + (kPacked ? 2 : kWarps) * kMiddleBytes;
    static constexpr int kFound = kValueScales + (kQuantised ? kSplitKeys * 4 : 0), kValueUnit = kFound + 16 * kWarps;
    static constexpr int kPackedScales = kFound + (kQuantised ? 16 * kWarps + 16 : 0);
    static constexpr int kPairUnits = kPackedScales + (kPacked ? kScaleBytes / 2 : kQuantised ? kScaleBytes : 0);
    static constexpr int kRowUnits = kPairUnits + (kPacked ? kPairs * 4 : 0);
    static constexpr int kStages = (kRowUnits + (kPacked ? kBlockRows * 4 : 0) + 127) / 128 * 128;
    // A stage: keys (quantised ones fill half of their place), values.
    static constexpr int kStageBytes = KeyTile::kBytes + StoredTile::kBytes;
    // Before packing, in the second stage: rotated queries in fp32, and the channels' scales.
    static constexpr int kRotated = kStages + kStageBytes;
    static constexpr int kChannelScales = kPacked ? kRotated + kBlockRows * kHeadDim * 4 : kPackedScales;
    static constexpr int kSharedBytes = kStages + 2 * kStageBytes;
    // The warps' sums, in the place of the stages: fp32 [warps][16][head_dim + 2].
    static constexpr int kSumStride = kHeadDim + 2;
    // Blocks on a multiprocessor of Hopper: what shared memory leaves room for, less where registers would not suffice.
    static constexpr int kResident = kHeadDim > 128 ? 2 : 3;
    static_assert(kResident * (kSharedBytes + 1024) <= 228 << 10, "the blocks do not fit a multiprocessor");
    static_assert(kWarps * kBlockRows * kSumStride * 4 <= kSharedBytes - kStages, "the sums do not fit the stages");
    static_assert(kSharedBytes <= kSharedLimit, "the tiles do not fit sm_86");
    static_assert(kSplitKeys % kKeys == 0 && kKeyGroup % kKeys == 0, "a tile lies in one run and one group");
    static_assert(kStageBytes % 128 == 0, "tiles begin at the first bank");
    static_assert(kBlockRows * kHeadDim * 4 + kScaleBytes <= kStageBytes, "what is packed does not fit a stage");

    // The tile's key in column i of half `half` of a warp's 16: as far from a middle in both halves.
    static LONGROPE_DEVICE int key(int half, int i) {
        const int first = kPacked ? kKeys / 2 : 16 * warp_index() + 8, distance = kPacked ? 8 * warp_index() + i : i;
        return half == 0 ? first - 1 - distance : first + distance;
    }
    // The one whose row a lane addresses for load_matrices of rows 0 to 7, then 8 to 15.
    static LONGROPE_DEVICE int key_row(int second) { return key(second, lane_index() % 8); }

    static LONGROPE_DEVICE SharedAddress stage(int i) { return kStages + i * kStageBytes; }
    static LONGROPE_DEVICE SharedAddress values(int i) { return stage(i) + KeyTile::kBytes; }
    static LONGROPE_DEVICE SharedAddress channel_scales(int key) {  // of the group of a key of the run
        return kChannelScales + key / kKeyGroup * kHeadDim * 4;
    }
    static LONGROPE_DEVICE SharedAddress value_scale(int key) { return kValueScales + 4 * key; }
    // What a warp has found: the least and the most of the values' scales; whether fp16 has the range of the scales of
    // keys, and of the rows.
    static LONGROPE_DEVICE SharedAddress found(int warp) { return kFound + 16 * warp; }
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
    uint32_t step_pages, step_tokens;  // from what a thread looks up to its next
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
    static constexpr bool kOfTile = S::kQuantised;  // what is looked up is the tile's first key, not each row
    static constexpr int kStep = kOfTile ? S::kKeys : kRowStep;

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
            const uint32_t size = static_cast<uint32_t>(p_.pages.page_tokens), index = first + (kOfTile ? 0 : me.row);
            walk_ = {index / size, index % size};
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
        if constexpr (S::kQuantised) {
            const bool tail = first >= length_ / kKeyGroup * kKeyGroup;
            if (!whole_ || tail || first + S::kKeys > length_)
                copy_pieces(me, first, stage, tail);
            else
                copy_whole(me, stage);
        } else {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const bool valid = first + me.row + i * kRowStep < length_;
                copy_row(me, S::stage(stage), i, row(key_, launch_.key, i), valid, [&](int k) { return key_to_[k]; });
                copy_row(me, S::values(stage), i, row(value_, launch_.value, i), valid,
                         [&](int k) { return value_to(me, k); });
            }
        }
        look_up(me, first + S::kKeys);
    }

    // Starts copying the scales of a quantised cache's run: of keys `begin` to `end`, which the block's rows see; zeros
    // for others, so that nothing depends on them.
    LONGROPE_DEVICE void start_scales(int run_begin, int begin, int end) const {
        const Sequence s(p_, b_);
        const Columns<kHeadDim> columns(p_.rotation);
        const bool chunks = columns.move_chunks_of(8);
        const int head_dim = static_cast<int>(p_.head_dim);
#pragma unroll 1
        for (int i = thread_index(); i < S::kGroups * kHeadDim / 4; i += S::kThreads) {
            const int group = i / (kHeadDim / 4), dim = i % (kHeadDim / 4) * 4, first = run_begin + group * kKeyGroup;
            const bool seen = first + kKeyGroup > begin && first < end;
            const bool valid = seen && first + kKeyGroup <= length_ && dim < head_dim;
            const float* scales = key_scale(p_, slot_of(p_, s, valid ? first : begin), head_);
            copy_async<16>(S::channel_scales(group * kKeyGroup) + 4 * (chunks ? columns.column(dim) : dim),
                           scales + (valid ? dim : 0), valid);
        }
#pragma unroll 1
        for (int i = thread_index(); i < kSplitKeys; i += S::kThreads) {
            const bool valid = run_begin + i >= begin && run_begin + i < end;
            copy_async<4>(S::value_scale(i), value_scale(p_, slot_of(p_, s, valid ? run_begin + i : begin), head_),
                          valid);
        }
    }

  private:
    static constexpr int kCopies = kChunks / kLine, kRows = S::kKeys / kRowStep;
    static_assert(kRowStep % 8 == 0, "the swizzle of a thread's rows is one");

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
    const uint8_t *key_, *value_;    // of the head, from the thread's first chunk, or row of a tile, on
    SharedAddress key_to_[kCopies];  // places in a tile at 0, of the thread's first row
    SharedAddress value_to_;         // of the first copy; values stay in their columns
    PageWalk walk_;
    static constexpr int kLookedUp = kOfTile ? 1 : kRows;
    uint32_t outer_[kLookedUp], token_[kLookedUp];  // of the next tile

    LONGROPE_DEVICE const uint8_t* bytes_of(const Operand& x, const ByteStrides& strides, int64_t key_start) const {
        const auto* data = static_cast<const std::conditional_t<S::kQuantised, uint8_t, T>*>(x.data);
        const int64_t row = (paged_ ? 0 : key_start) + (kOfTile ? thread_index() / kLine : 0);
        const int64_t from = row * strides.token + thread_index() % kLine * 16;
        // One address, not its terms, is kept in registers.
        return anew(reinterpret_cast<const uint8_t*>(data + head_ * x.head_stride) + from);
    }
    // The thread's row i of the tile that was looked up.
    LONGROPE_DEVICE const uint8_t* row(const uint8_t* base, const ByteStrides& strides, int i = 0) const {
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
        for (int i = 0; i < kLookedUp; ++i) {
            const int index = first + (kOfTile ? 0 : me.row + i * kRowStep);
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

    // A tile of which all is there, in 16 bytes at a time.
    LONGROPE_DEVICE void copy_whole(const Me& me, int stage) const {
        const uint8_t *key = row(key_, launch_.key), *value = row(value_, launch_.value);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            copy_row(me, S::stage(stage), i, key, true, [&](int k) { return key_to_[k]; });
            copy_row(me, S::values(stage), i, value, true, [&](int k) { return value_to(me, k); });
            key += kRowStep * launch_.key.token;
            value += kRowStep * launch_.value.token;
        }
    }

    // Any tile of a quantised cache, of its tail too.
    LONGROPE_DEVICE void copy_pieces(const Me& me, int first, int stage, bool tail) const {
        const int head_dim = static_cast<int>(p_.head_dim);
        const uint8_t *key = row(key_, launch_.key), *value = row(value_, launch_.value);
#pragma unroll 1
        for (int i = 0; i < kRows; ++i) {
            const bool valid = first + me.row + i * kRowStep < length_;
#pragma unroll
            for (int k = 0; k < kCopies; ++k)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int dim = me.dim(k) + 8 * half, from = 16 * kLine * k + 8 * half;
                    const bool there = valid && dim < head_dim;
                    const SharedAddress to = i * kRowStep * 64;
                    if (!tail)
                        copy_async<8>(S::stage(stage) + to + key_place(me, dim), there ? key + from : key_, there);
                    copy_async<8>(S::values(stage) + to + value_to(me, k) + 8 * half, there ? value + from : value_,
                                  there);
                }
            key += kRowStep * launch_.key.token;
            value += kRowStep * launch_.value.token;
        }
        if (tail)
            copy_tile<S::kThreads>(
                typename S::KeyTile{S::stage(stage)}, length_ - first, head_dim,
                [&](int r) { return row_of<T>(p_.pages.key_tail, b_, head_, (first + r) % kKeyGroup); },
                static_cast<int>(anew(thread_index())));
    }

    template <class PlaceOf>
    LONGROPE_DEVICE void copy_row(const Me& me, SharedAddress tile, int i, const uint8_t* from, bool valid,
                                  const PlaceOf& place_of) const {
        const int head_dim = static_cast<int>(p_.head_dim);
#pragma unroll
        for (int k = 0; k < kCopies; ++k)
            copy_async<16>(tile + i * kRowStep * 64 + place_of(k), from + 16 * kLine * k,
                           valid && me.dim(k) < head_dim);
    }
};

}  // namespace longrope
