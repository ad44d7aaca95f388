// Gradients of attention at head_dim above 128, up to 256, for Ampere and newer; the same bits in every run.
//
// As attention_backward.cu: a block of 64 rows walks the keys for dq, one of 64 keys walks the rows for dk and dv,
// seven products in all. But 64 x 256 fp32 sums of dk and as many of dv are half of a multiprocessor's registers, and a
// thread that had both would have no other. So a team of two warps shares 16 rows (keys):
//
//     the scorer    S = q k^T    P = 2^(S - lse)    W = P scale     gives W        dv += P^T dO
//     the sloper    dP = dO v^T                                     takes W        dS = W (dP - delta)    dk += dS^T q
//
// A team has two products each, and what passes through shared memory are W (16 bytes a lane and 8 columns), and a
// barrier of 64 threads. For dq there is one set of sums, of which each warp has the half of the columns; dS then goes
// the other way as the operand that it is. A thread's registers hold 128 fp32 sums for dk and dv; for dq 64, and 64 of
// the queries or grad_out, which never change.
//
// Tiles arrive two deep: while one is worked on, the next is copied. Dk and dv need 64 KB of keys and values besides,
// so that tiles have 32 rows where a block may have 137 KB (sm_80, sm_90) and 16 where it may have 99 (sm_86, sm_89).
//
// Operations: 14 head_dim per visible score on the tensor cores. Bytes: each block reads its 64 rows or keys once and
// the other side from L2. 64 keys and 32 rows take the tensor cores of an A100 2,048 cycles for dk and dv and its
// shared memory 2,940 (16 rows at a time: 3,460), 1,536 and 1,980 for dq: bound by shared memory there, by the tensor
// cores on sm_86 and sm_89, which have half as many and the same shared memory.
#include "gradients.cuh"

namespace longrope {
namespace {

constexpr int kHeadDim = 256, kSteps = kHeadDim / 16;
constexpr int kRows = kBackwardRows, kKeys = kBackwardKeys;
constexpr int kTeams = 4, kThreads = 64 * kTeams;
static_assert(kRows == 16 * kTeams && kKeys == 16 * kTeams, "a team takes 16 rows or keys");

LONGROPE_DEVICE int team() {
    return warp_index() % kTeams;  // both warps of a team belong to one scheduler of a multiprocessor
}
LONGROPE_DEVICE bool scores_in_team() {
    return warp_index() < kTeams;
}
LONGROPE_DEVICE void team_sync() {
    named_sync(1 + team(), 64);
}

// Two tiles that are copied together, by what multiplies them: keys and values, or queries and grad_out.
template <int kTileRows>
struct Pair {
    using TileT = Tile<kTileRows, kHeadDim>;
    static constexpr int kBytes = 2 * TileT::kBytes;

    SharedAddress base;

    LONGROPE_DEVICE TileT first() const { return {base}; }
    LONGROPE_DEVICE TileT second() const { return {base + TileT::kBytes}; }
    LONGROPE_DEVICE TileT of(bool is_first) const { return is_first ? first() : second(); }
};

// What is known of rows: the keys that they see (none where there is no row), lse and delta.
template <int kCount>
struct KnownRows {
    static constexpr int kBytes = kCount * 16;

    SharedAddress base;

    LONGROPE_DEVICE SharedAddress seen(int r) const { return base + 8 * r; }
    LONGROPE_DEVICE SharedAddress lse(int r) const { return base + 8 * kCount + 4 * r; }
    LONGROPE_DEVICE SharedAddress delta(int r) const { return base + 12 * kCount + 4 * r; }

    LONGROPE_DEVICE void copy(const BackwardLaunch& launch, const Sequence& s, const RowMap& map, int64_t first,
                              int count) const {
        const AttentionParams& p = launch.params.forward;
        for (int r = thread_index(); r < kCount; r += kThreads) {
            const bool exists = r < count;
            const int64_t head = map.head(first + (exists ? r : 0)), i = map.token(first + (exists ? r : 0));
            const Interval keys = exists ? s.visible(p, i) : Interval{0, 0};
            store_shared(seen(r), Vec8{static_cast<uint32_t>(keys.low), static_cast<uint32_t>(keys.high)});
            const float* of_row = s.lse(p, head, i);
            copy_async<4>(lse(r), of_row, exists);
            copy_async<4>(delta(r), launch.scratch.delta + (of_row - p.lse), exists);
        }
    }
};

// 16-byte pieces that the lanes of a team hand each other, `kSlots` for each lane; a piece is for the same lane of the
// other warp.
template <int kSlots>
struct Exchange {
    static constexpr int kBytes = kSlots * kTeams * 32 * 16;

    SharedAddress base;

    LONGROPE_DEVICE SharedAddress slot(int i) const { return base + ((i * kTeams + team()) * 32 + lane_index()) * 16; }
};

struct QueryShape {
    static constexpr int kTileKeys = 32, kTiles = kTileKeys / 8;
    using Stage = Pair<kTileKeys>;
    // Two stages. Before them the block's queries and grad_out take their place, after them its sums.
    static constexpr int kExchange = 2 * Stage::kBytes, kKnown = kExchange + Exchange<kTiles>::kBytes;
    static constexpr int kSharedBytes = kKnown + KnownRows<kRows>::kBytes;
    static_assert(Pair<kRows>::kBytes <= kExchange && kRows * kHeadDim * 4 <= kExchange, "the stages are large enough");
    static_assert(kSharedBytes <= kSharedLimit, "the tiles do not fit sm_86");

    LONGROPE_DEVICE static Stage stage(int i) { return {static_cast<SharedAddress>(i * Stage::kBytes)}; }
};

template <int kRowsOfTile>
struct KeyShape {
    static constexpr int kTileRows = kRowsOfTile, kTiles = kTileRows / 8;
    using Block = Pair<kKeys>;
    using Stage = Pair<kTileRows>;
    // Weights of so many tiles of 8 rows are handed over at once: all, where there is room for them.
    static constexpr int kSlots = kTileRows == 16 ? 1 : kTiles;
    // Keys and values, two stages. Sums in fp32 take the place of the values and the stages.
    static constexpr int kStages = Block::kBytes, kExchange = kStages + 2 * Stage::kBytes;
    static constexpr int kKnown = kExchange + Exchange<kSlots>::kBytes;
    static constexpr SharedAddress kSums = Block::TileT::kBytes;
    static constexpr int kSharedBytes = kKnown + 2 * KnownRows<kTileRows>::kBytes;
    static_assert(kSums + kKeys * kHeadDim * 4 <= SharedAddress{kExchange}, "the sums do not fit");

    LONGROPE_DEVICE static Stage stage(int i) { return {static_cast<SharedAddress>(kStages + i * Stage::kBytes)}; }
    LONGROPE_DEVICE static KnownRows<kTileRows> known(int i) {
        return {static_cast<SharedAddress>(kKnown + i * KnownRows<kTileRows>::kBytes)};
    }
};
static_assert(KeyShape<16>::kSharedBytes <= kSharedLimit, "the tiles do not fit sm_86");

template <class T>
LONGROPE_KERNEL(kThreads)
wide_query_gradient_kernel(const BackwardLaunch launch) {
    using S = QueryShape;
    const AttentionParams& p = launch.params.forward;
    const int head_dim = static_cast<int>(p.head_dim);
    const int64_t row_block = launch.scratch.row_blocks - 1 - block_index() % launch.scratch.row_blocks;
    const int64_t key_head = block_index() / launch.scratch.row_blocks % p.key_heads;
    const Sequence s(p, block_index() / launch.scratch.row_blocks / p.key_heads);
    const RowMap map(p, key_head);
    const int64_t first_row = row_block * kRows, left = s.query_count * map.group - first_row;
    if (left <= 0) return;
    const int count = static_cast<int>(left < kRows ? left : kRows);
    const bool scorer = scores_in_team();
    const Pair<kRows> rows{0};
    const KnownRows<kRows> known{S::kKnown};
    const Exchange<S::kTiles> exchange{S::kExchange};

    copy_rows<T, kThreads>(launch.scratch.query, s, map, first_row, count, rows.first(), head_dim);
    copy_rows<T, kThreads>(launch.params.grad_out, s, map, first_row, count, rows.second(), head_dim);
    known.copy(launch, s, map, first_row, count);
    copy_async_commit();
    copy_async_wait<0>();
    block_sync();  // the rows are there for all
    uint32_t operand[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_left(operand[step], rows.of(scorer), 16 * team(), step);
    block_sync();  // the rows are in registers

    const auto fetch = [&](int first, int stage) {
        copy_keys<T, kThreads>(launch.scratch.key, s, key_head, first, S::stage(stage).first(), head_dim);
        copy_keys<T, kThreads>(p.value, s, key_head, first, S::stage(stage).second(), head_dim);
        copy_async_commit();
    };
    const Interval first_seen = s.visible(p, map.token(first_row));
    const Interval last_seen = s.visible(p, map.token(first_row + count - 1));
    const int begin = static_cast<int>(first_seen.low / S::kTileKeys * S::kTileKeys);
    const int end = static_cast<int>(last_seen.high < s.key_length ? last_seen.high : s.key_length);
    const ScoreScale scale(p.scale, p.softcap);
    float out[kSteps][4] = {};
    if (begin < end) fetch(begin, 0);
    for (int first = begin, stage = 0; first < end; first += S::kTileKeys, stage ^= 1) {
        copy_async_wait<0>();
        block_sync();  // the stage is there for all, and the other is done with
        if (first + S::kTileKeys < end) fetch(first + S::kTileKeys, stage ^ 1);
        float sums[S::kTiles][4] = {};
        multiply_rows<T, kSteps>(sums, S::stage(stage).of(scorer), [&](uint32_t (&a)[4], int step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = operand[step][i];
        });
        uint32_t slopes[S::kTiles / 2][4];
        if (scorer) {
#pragma unroll
            for (int j = 0; j < S::kTiles; ++j) {
                Float4 weights;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int row = 16 * team() + lane_index() / 4 + 8 * r;
                    const Vec8 seen = load_shared<Vec8>(known.seen(row));
                    const float lse = load_shared<float>(known.lse(row)) * kLog2E;
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int key = first + 8 * j + lane_index() % 4 * 2 + c;
                        float slope = p.scale;
                        const float weight = probability(sums[j][2 * r + c], lse, scale, slope) * slope;
                        const bool sees = key >= static_cast<int>(seen.word[0]) && key < static_cast<int>(seen.word[1]);
                        weights.at[2 * r + c] = sees ? weight : 0.0f;
                    }
                }
                store_shared(exchange.slot(j), weights);
            }
            team_sync();  // the weights are there
            team_sync();  // dS is there
#pragma unroll
            for (int j = 0; j < S::kTiles / 2; ++j) {
                const Vec16 taken = load_shared<Vec16>(exchange.slot(j));
#pragma unroll
                for (int i = 0; i < 4; ++i) slopes[j][i] = taken.word[i];
            }
        } else {
            team_sync();  // the weights are there
#pragma unroll
            for (int j = 0; j < S::kTiles; ++j) {
                const Float4 weights = load_shared<Float4>(exchange.slot(j));
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int row = 16 * team() + lane_index() / 4 + 8 * r;
                    const Vec8 seen = load_shared<Vec8>(known.seen(row));
                    const float delta = load_shared<float>(known.delta(row));
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int key = first + 8 * j + lane_index() % 4 * 2 + c;
                        const bool sees = key >= static_cast<int>(seen.word[0]) && key < static_cast<int>(seen.word[1]);
                        float& x = sums[j][2 * r + c];
                        x = sees ? weights.at[2 * r + c] * (x - delta) : 0.0f;
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < S::kTiles / 2; ++j) {
                probabilities_left<T>(slopes[j], sums[2 * j], sums[2 * j + 1]);
                // In the place of weights that this lane has taken.
                store_shared(exchange.slot(j), Vec16{{slopes[j][0], slopes[j][1], slopes[j][2], slopes[j][3]}});
            }
            team_sync();  // dS is there
        }
        multiply_weights<T>(out, S::stage(stage).first(), scorer ? 0 : kSteps / 2, [&](uint32_t (&a)[4], int j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = slopes[j][i];
        });
    }
    block_sync();  // the stages are done with
    const SharedAddress sums = 0;
    spread_sums(sums, out, 16 * team(), kHeadDim, scorer ? 0 : kHeadDim / 2);
    block_sync();
    const Regime regime = regime_of(p.rotation, s.b);
    const auto position_of = [&](int r) { return s.query_position(p, map.token(first_row + r)); };
    const auto row_at = [&](const Operand& x, int r) {
        return GlobalRow<T>{s.query_row<T>(x, map.head(first_row + r), map.token(first_row + r))};
    };
    rotate_rows<kThreads>(
        regime, head_dim, count, true, position_of, [&](int r) { return SharedFloatRow{sums + r * kHeadDim * 4}; },
        [&](int r) { return row_at(launch.params.grad_query, r); });
    if (launch.scratch.query_part != nullptr)
        store_frequency_part<kThreads>(
            regime, sums, kHeadDim, count,
            launch.scratch.query_part +
                ((s.b * p.key_heads + key_head) * launch.scratch.row_blocks + row_block) * regime.pairs,
            [&](int r) { return row_at(launch.scratch.query, r); }, position_of);
}

template <class T, int kTileRows>
LONGROPE_KERNEL(kThreads)
wide_key_gradient_kernel(const BackwardLaunch launch) {
    using S = KeyShape<kTileRows>;
    const AttentionParams& p = launch.params.forward;
    const int head_dim = static_cast<int>(p.head_dim);
    const int64_t key_block = block_index() % launch.scratch.key_blocks;
    const int64_t key_head = block_index() / launch.scratch.key_blocks % p.key_heads;
    const Sequence s(p, block_index() / launch.scratch.key_blocks / p.key_heads);
    const RowMap map(p, key_head);
    const int first_key = static_cast<int>(key_block * kKeys);
    const int left = static_cast<int>(s.key_length) - first_key, count = left < kKeys ? left : kKeys;
    if (count <= 0) return;
    const bool scorer = scores_in_team();
    const typename S::Block block{0};
    const Exchange<S::kSlots> exchange{S::kExchange};

    const int64_t rows = s.query_count * map.group;
    const auto fetch = [&](int64_t first, int stage) {
        const int row_count = static_cast<int>(rows - first < kTileRows ? rows - first : kTileRows);
        copy_rows<T, kThreads>(launch.scratch.query, s, map, first, row_count, S::stage(stage).first(), head_dim);
        copy_rows<T, kThreads>(launch.params.grad_out, s, map, first, row_count, S::stage(stage).second(), head_dim);
        S::known(stage).copy(launch, s, map, first, row_count);
        copy_async_commit();
    };
    // Tokens that see the first key, to those that see the last: intervals only move right.
    const int64_t begin = s.seeing(p, first_key).low * map.group / kTileRows * kTileRows;
    const int64_t end = s.seeing(p, first_key + count - 1).high * map.group;
    copy_keys<T, kThreads>(launch.scratch.key, s, key_head, first_key, block.first(), head_dim);
    copy_keys<T, kThreads>(p.value, s, key_head, first_key, block.second(), head_dim);
    copy_async_commit();
    if (begin < end) fetch(begin, 0);
    const ScoreScale scale(p.scale, p.softcap);
    float out[2 * kSteps][4] = {};  // of dv, the scorer's, or dk

    int stage = 0;
    for (int64_t first = begin; first < end; first += kTileRows, stage ^= 1) {
        copy_async_wait<0>();
        block_sync();  // the stage is there for all, and the other is done with
        if (first + kTileRows < end) fetch(first + kTileRows, stage ^ 1);
        float sums[S::kTiles][4] = {};
        multiply_rows<T, kSteps>(sums, S::stage(stage).of(scorer), [&](uint32_t (&a)[4], int step) {
            load_left(a, block.of(scorer), 16 * team(), step);
        });
        const KnownRows<kTileRows> known = S::known(stage);
#pragma unroll
        for (int from = 0; from < S::kTiles; from += S::kSlots) {
            if (from > 0) team_sync();  // the weights before have been taken
            if (!scorer) team_sync();   // the weights are there
#pragma unroll
            for (int j = from; j < from + S::kSlots; ++j) {
                const int row = 8 * j + lane_index() % 4 * 2;
                const Vec16 seen = load_shared<Vec16>(known.seen(row));
                const Float2 of_rows = load_shared<Float2>(scorer ? known.lse(row) : known.delta(row));
                Float4 weights;
                if (!scorer) weights = load_shared<Float4>(exchange.slot(j - from));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = first_key + 16 * team() + lane_index() / 4 + i / 2 * 8;
                    const bool sees = key >= static_cast<int>(seen.word[i % 2 * 2]) &&
                                      key < static_cast<int>(seen.word[i % 2 * 2 + 1]);
                    const float of_row = i % 2 == 0 ? of_rows.x : of_rows.y;
                    if (scorer) {
                        float slope = p.scale;
                        const float weight = probability(sums[j][i], of_row * kLog2E, scale, slope);
                        sums[j][i] = sees ? weight : 0.0f;
                        weights.at[i] = sees ? weight * slope : 0.0f;
                    } else {
                        sums[j][i] = sees ? weights.at[i] * (sums[j][i] - of_row) : 0.0f;
                    }
                }
                if (scorer) store_shared(exchange.slot(j - from), weights);
            }
            if (scorer) team_sync();  // the weights are there
        }
        multiply_weights<T>(out, S::stage(stage).of(!scorer), 0,
                            [&](uint32_t (&a)[4], int j) { probabilities_left<T>(a, sums[2 * j], sums[2 * j + 1]); });
    }
    copy_async_wait<0>();
    block_sync();  // the stages are done with; where no tile was visited, the keys are there

    const Regime regime = regime_of(p.rotation, s.b);
    const auto row_at = [&](const Operand& x, int r) {
        return GlobalRow<T>{row_of<T>(x, s.b, key_head, s.key_start + first_key + r)};
    };
    const auto position_of = [&](int r) { return s.key_position(p, first_key + r); };
    const auto sums_at = [&](int r) { return SharedFloatRow{S::kSums + r * kHeadDim * 4}; };
    if (scorer) spread_sums(S::kSums, out, 16 * team(), kHeadDim);
    block_sync();  // dv is there
    for (int i = thread_index(); i < count * (head_dim / kChunk); i += kThreads) {
        const int r = i / (head_dim / kChunk), c = i % (head_dim / kChunk);
        row_at(launch.params.grad_value, r).store8(c, sums_at(r).load8(c));
    }
    block_sync();  // dv has left
    if (!scorer) spread_sums(S::kSums, out, 16 * team(), kHeadDim);
    block_sync();  // dk is there
    rotate_rows<kThreads>(regime, head_dim, count, true, position_of, sums_at,
                          [&](int r) { return row_at(launch.params.grad_key, r); });
    if (launch.scratch.key_part != nullptr)
        store_frequency_part<kThreads>(
            regime, S::kSums, kHeadDim, count,
            launch.scratch.key_part +
                ((s.b * p.key_heads + key_head) * launch.scratch.key_blocks + key_block) * regime.pairs,
            [&](int r) { return SharedRow<T, typename S::Block::TileT>{block.first(), r}; }, position_of);
}

template <class T>
void run(const BackwardLaunch& arguments, Stream stream) {
    const int64_t heads = arguments.params.forward.batch * arguments.params.forward.key_heads;
    const int64_t key_blocks = arguments.scratch.key_blocks * heads;
    launch(wide_query_gradient_kernel<T>, arguments.scratch.row_blocks * heads, kThreads, QueryShape::kSharedBytes,
           arguments, stream);
    if (blocks_that_fit(multiprocessor_shared(), KeyShape<32>::kSharedBytes) > 0)
        launch(wide_key_gradient_kernel<T, 32>, key_blocks, kThreads, KeyShape<32>::kSharedBytes, arguments, stream);
    else
        launch(wide_key_gradient_kernel<T, 16>, key_blocks, kThreads, KeyShape<16>::kSharedBytes, arguments, stream);
}

}  // namespace

void attention_backward_wide_sm80(const BackwardLaunch& launch, Stream stream) {
    if (launch.params.forward.dtype == Dtype::kFloat16) return run<Half>(launch, stream);
    run<BFloat16Bits>(launch, stream);
}

}  // namespace longrope
