// The product that attention is made of, in registers, and the layouts it wants its operands in. Internal linkage
// throughout, as in vec.h.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "memory.h"
#include "vec.h"

namespace longrope {
namespace {

constexpr int kPanelKeys = kTileVectors * kLanes;

// Products in fp32: one step of a product is one element.
struct Fp32Math {
    using Element = float;
    static constexpr int kStep = 1;  // elements in a step
    static vf multiply_add(vf sum, Element a, vf b) { return splat(a) * b + sum; }
    static vf load_operand(const Element* p) { return load<vf>(p); }
    using Vector = vf;
};

#if defined(__AVX512BF16__)
// Products of bf16 pairs with fp32 sums: one step is two neighbouring elements, held as one 32-bit word.
struct Bf16Math {
    using Element = uint32_t;
    static constexpr int kStep = 2;
    using Vector = __m512bh;
    static vf multiply_add(vf sum, Element a, Vector b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), b);
    }
    static Vector load_operand(const Element* p) { return (__m512bh)_mm512_loadu_si512(p); }
};
#endif

// Not inlined: inside its caller GCC 12 spills accumulators, and the whole kernel loses a third of its speed
// (measured). sums[r][n] = sum over steps of a[r][step] * panel[step][n], with `scales` plus scales[r] * sums[r][n]:
// added at the end, because one chain of fp32 additions over all keys of a long sequence loses more (1.6 times at
// 2,500). `a_row` and `a_step` are elements between the rows and between the steps of a.
template <class Math, int N>
__attribute__((noinline)) void tile(const typename Math::Element* a, int64_t a_row, int64_t a_step,
                                    const typename Math::Element* panel, int steps, float* sums, int64_t sums_stride,
                                    const float* scales) {
    vf acc[kTileRows][N];
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[r][n] = splat(0.0f);
    for (int step = 0; step < steps; ++step, a += a_step) {
        typename Math::Vector b[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) b[n] = Math::load_operand(panel + (int64_t{step} * N + n) * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
            const typename Math::Element x = a[r * a_row];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[r][n] = Math::multiply_add(acc[r][n], x, b[n]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            float* to = sums + r * sums_stride + n * kLanes;
            store(to, scales ? load<vf>(to) * scales[r] + acc[r][n] : acc[r][n]);
        }
}

template <class Math>
void tile_of(int vectors, const typename Math::Element* a, int64_t a_row, int64_t a_step,
             const typename Math::Element* panel, int steps, float* sums, int64_t sums_stride, const float* scales) {
    static_assert(kTileVectors <= 4, "add a case");
    switch (vectors) {
        case 1:
            return tile<Math, 1>(a, a_row, a_step, panel, steps, sums, sums_stride, scales);
        case 2:
            return tile<Math, 2>(a, a_row, a_step, panel, steps, sums, sums_stride, scales);
#if defined(__AVX512F__)
        case 3:
            return tile<Math, 3>(a, a_row, a_step, panel, steps, sums, sums_stride, scales);
        default:
            return tile<Math, 4>(a, a_row, a_step, panel, steps, sums, sums_stride, scales);
#endif
    }
}

// How head_dim columns of the values split into panels of at most kTileVectors vectors, as evenly as possible.
struct ValuePanels {
    int vectors, panels;

    explicit ValuePanels(int64_t head_dim)
        : vectors(static_cast<int>((head_dim + kLanes - 1) / kLanes)),
          panels((vectors + kTileVectors - 1) / kTileVectors) {}
    int first(int panel) const { return static_cast<int>(int64_t{vectors} * panel / panels); }
    int width(int panel) const { return first(panel + 1) - first(panel); }
    int columns() const { return vectors * kLanes; }
};

// Packed keys of a block: panels of kPanelKeys keys, [steps][kPanelKeys] each. Values: panels of columns,
// [steps][columns].
template <class T, class Math, int Keys>
struct Packed {
    using Element = typename Math::Element;
    int64_t key_steps, value_steps, key_elements, value_elements;
    ValuePanels panels;

    explicit Packed(int64_t head_dim)
        : key_steps((head_dim + Math::kStep - 1) / Math::kStep),
          value_steps(Keys / Math::kStep),
          key_elements(key_steps * Keys),
          value_elements(0),
          panels(head_dim) {
        value_elements = value_steps * panels.columns();
    }
    int64_t block_elements() const { return key_elements + value_elements; }

    static Element join(const T* row, int64_t index, int64_t size) {
        if constexpr (Math::kStep == 1) {
            return widen(row[index]);
        } else {
            const uint32_t low = row[2 * index].bits;
            const uint32_t high = 2 * index + 1 < size ? row[2 * index + 1].bits : 0;
            return low | high << 16;
        }
    }

    // kLanes steps of a row from `row` on.
    static auto lanes_of(const T* row) {
        if constexpr (Math::kStep == 1) {
            return widen_lanes(row);
        } else {
            return load<vi>(row);
        }
    }

    // rows: Keys rotated keys of head_dim elements each, contiguous.
    void pack_keys(const T* rows, int64_t head_dim, Element* to) const {
        const int64_t whole = head_dim / (Math::kStep * kLanes) * kLanes;  // steps that fill vectors
        for (int first = 0; first < Keys; first += kPanelKeys, to += kPanelKeys * key_steps)
            for (int k = 0; k < kPanelKeys; k += kLanes) {
                const T* from = rows + (first + k) * head_dim;
                for (int64_t step = 0; step < whole; step += kLanes) {
                    decltype(lanes_of(from)) block[kLanes];
#pragma GCC unroll 16
                    for (int i = 0; i < kLanes; ++i) block[i] = lanes_of(from + i * head_dim + step * Math::kStep);
                    transpose(block);
#pragma GCC unroll 16
                    for (int i = 0; i < kLanes; ++i) store(to + (step + i) * kPanelKeys + k, block[i]);
                }
                for (int64_t step = whole; step < key_steps; ++step)
                    for (int i = 0; i < kLanes; ++i)
                        to[step * kPanelKeys + k + i] = join(from + i * head_dim, step, head_dim);
            }
    }

    // `count` values at `rows`, `stride` elements apart; the rest of the block is zero.
    void pack_values(const T* rows, int64_t stride, int count, int64_t head_dim, Element* to) const {
        for (int panel = 0; panel < panels.panels; ++panel) {
            const int64_t first = int64_t{panels.first(panel)} * kLanes;
            const int64_t width = int64_t{panels.width(panel)} * kLanes;
            const int64_t used = std::min(width, head_dim - first);
            for (int64_t step = 0; step < value_steps; ++step, to += width) {
                const T* low = rows + Math::kStep * step * stride + first;
                const int present = static_cast<int>(std::min<int64_t>(Math::kStep, count - Math::kStep * step));
                if (present <= 0) {
                    std::memset(to, 0, sizeof(Element) * width);
                    continue;
                }
                if constexpr (Math::kStep == 1) {
                    for (int64_t c = 0; c < used; ++c) to[c] = widen(low[c]);
                } else {
                    const T* high = low + stride;
                    if (present == 2)
                        for (int64_t c = 0; c < used; ++c)
                            to[c] = low[c].bits | static_cast<uint32_t>(high[c].bits) << 16;
                    else
                        for (int64_t c = 0; c < used; ++c) to[c] = low[c].bits;
                }
                for (int64_t c = used; c < width; ++c) to[c] = 0;
            }
        }
    }
};

struct AlignedDelete {
    void operator()(void* p) const { std::free(p); }
};

template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;

// From 2 MiB on in huge pages, where the system has them: fewer faults, and lines that share no sets of the L2 cache as
// long as they fit it.
template <class T>
Buffer<T> allocate(int64_t count) {
    constexpr size_t kHuge = size_t{1} << 21;
    const size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T);
    const size_t unit = bytes >= kHuge ? kHuge : 64;
    const size_t rounded = (bytes + unit - 1) / unit * unit;
    void* p = std::aligned_alloc(unit, rounded);
    if (p == nullptr) throw std::bad_alloc();
    if (unit == kHuge) advise_huge_pages(p, static_cast<int64_t>(rounded));
    return Buffer<T>(static_cast<T*>(p));
}

// Buffers one after another in one allocation: `lay_out(pieces)` takes them, first to learn how much they need. With
// sanitizers no two of them touch.
class Pieces {
  public:
    template <class T>
    void take(T** piece, int64_t count) {
        *piece = memory_ ? reinterpret_cast<T*>(memory_.get() + used_) : nullptr;
        const int64_t end = used_ + count * static_cast<int64_t>(sizeof(T));
        used_ = (end + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
        used_ += 64;
        if (memory_) __asan_poison_memory_region(memory_.get() + end, static_cast<size_t>(used_ - end));
#endif
    }

    template <class LayOut>
    void allocate_for(const LayOut& lay_out) {
        lay_out(*this);
        memory_ = allocate<char>(used_);
        used_ = 0;
        lay_out(*this);
    }

  private:
    Buffer<char> memory_;
    int64_t used_ = 0;
};

}  // namespace
}  // namespace longrope
