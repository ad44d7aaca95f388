// Tiles of rows in 16 bits that are copied one after another, for the loops of the forward and the backward kernels.
//
// A thread copies the same chunks of rows that are a fixed step apart, of every tile: its next row is an addition away,
// across the end of a tile too, and a 16-byte copy is one instruction. The steps are in bytes, as the host has them.
#pragma once

#include "../sequence.cuh"
#include "../tile.cuh"

namespace longrope {

// The part of a thread: chunks line, line + kLine and on of rows row, row + kStep and on.
template <class TileT, int kThreads>
struct CopyPart {
    static constexpr int kLine = TileT::kChunks % 8 == 0 ? 8 : 4;  // side by side, for as many threads
    static constexpr int kStep = kThreads / kLine, kRows = TileT::kRows / kStep, kCopies = TileT::kChunks / kLine;
    static_assert(TileT::kChunks % kLine == 0 && TileT::kRows % kStep == 0, "the threads divide the tile");

    int row, line;

    LONGROPE_DEVICE CopyPart() : row(thread_index() / kLine), line(thread_index() % kLine) {}

    // The thread's row i of a tile; zeros where it is not `valid`, and past head_dim.
    LONGROPE_DEVICE void copy_row(TileT tile, int i, const uint8_t* from, bool valid, int head_dim) const {
#pragma unroll
        for (int k = 0; k < kCopies; ++k)
            copy_async<16>(tile.chunk(row + i * kStep, line + k * kLine), from + 16 * kLine * k,
                           valid && (line + k * kLine) * kChunk < head_dim);
    }
};

// Keys or values of a sequence, from key `first` on.
template <class TileT, int kThreads>
class KeyCopies {
    using Part = CopyPart<TileT, kThreads>;

  public:
    // Bytes from a row that a thread copies to its next.
    static int64_t step_of(const Operand& x) { return 2 * Part::kStep * x.token_stride; }

    LONGROPE_DEVICE KeyCopies(const Operand& x, const Sequence& s, int64_t head, int first) {
        const Part me;
        next_ = reinterpret_cast<const uint8_t*>(row_of<uint16_t>(x, s.b, head, s.key_start + first + me.row)) +
                16 * me.line;
    }

    // Starts copying the next tile, of which `count` keys, or more, exist; zeros below.
    LONGROPE_DEVICE void start(TileT tile, int count, int head_dim, int64_t step) {
        const Part me;
#pragma unroll
        for (int i = 0; i < Part::kRows; ++i) {
            me.copy_row(tile, i, next_, me.row + i * Part::kStep < count, head_dim);
            next_ += step;
        }
    }

  private:
    const uint8_t* next_;  // the thread's first chunk of its next row
};

// A row as a token and one of the `group` heads that share a key head.
struct RowPlace {
    int token, head;

    LONGROPE_DEVICE RowPlace(const RowMap& map, int64_t row)
        : token(static_cast<int>(row / map.group)), head(static_cast<int>(row % map.group)) {}
};

// From a row to one that is `rows` further on: tokens and heads, or a token more and `group` heads less.
struct RowStep {
    int32_t tokens, heads, group;

    RowStep(int rows, int64_t heads_of_token)
        : tokens(static_cast<int32_t>(rows / heads_of_token)),
          heads(static_cast<int32_t>(rows % heads_of_token)),
          group(static_cast<int32_t>(heads_of_token)) {}

    // Whether the head passed the last.
    LONGROPE_DEVICE bool advance(int& head) const {
        head += heads;
        if (head < group) return false;
        head -= group;
        return true;
    }
    LONGROPE_DEVICE void advance(RowPlace& place) const { place.token += tokens + advance(place.head); }
};

// The rows of two operands like the query, from row `first` on.
template <class TileT, int kThreads>
class RowCopies {
    using Part = CopyPart<TileT, kThreads>;

  public:
    // Bytes from a row that a thread copies to its next, and besides where the head passes the last.
    struct Bytes {
        int64_t step, wrap;

        Bytes(const Operand& x, const RowStep& rows)
            : step(2 * (rows.tokens * x.token_stride + rows.heads * x.head_stride)),
              wrap(2 * (x.token_stride - rows.group * x.head_stride)) {}
    };
    struct Steps {
        RowStep rows;
        Bytes first, second;

        Steps(const Operand& x, const Operand& y, int64_t group)
            : rows(Part::kStep, group), first(x, rows), second(y, rows) {}
    };

    LONGROPE_DEVICE RowCopies(const Operand& x, const Operand& y, const Sequence& s, const RowMap& map, int64_t first) {
        const Part me;
        const RowPlace place(map, first + me.row);
        const auto at = [&](const Operand& of) {
            return reinterpret_cast<const uint8_t*>(
                       s.query_row<uint16_t>(of, map.first_head + place.head, place.token)) +
                   16 * me.line;
        };
        head_ = place.head;
        first_ = at(x);
        second_ = at(y);
    }

    // Starts copying the next `count` rows, zeros below.
    LONGROPE_DEVICE void start(TileT first, TileT second, int count, int head_dim, const Steps& steps) {
        const Part me;
#pragma unroll
        for (int i = 0; i < Part::kRows; ++i) {
            const bool valid = me.row + i * Part::kStep < count;
            me.copy_row(first, i, first_, valid, head_dim);
            me.copy_row(second, i, second_, valid, head_dim);
            const bool wraps = steps.rows.advance(head_);
            first_ += steps.first.step + (wraps ? steps.first.wrap : 0);
            second_ += steps.second.step + (wraps ? steps.second.wrap : 0);
        }
    }

  private:
    const uint8_t *first_, *second_;  // the thread's first chunk of its next row
    int head_;
};

}  // namespace longrope
