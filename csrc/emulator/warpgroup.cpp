#include "warpgroup.h"

#include <algorithm>
#include <cstring>

#include "bulk.h"
#include "convert.h"
#include "machine.h"

namespace longrope::emulator {
namespace {

constexpr uint32_t kInFlight = 0x7fdead00u;  // a NaN

struct Fields {
    uint32_t start, leading, stride;  // bytes
    Swizzle swizzle;
};

Fields fields(MatrixDescriptor d) {
    const auto bytes = [&](int bit) { return static_cast<uint32_t>(d >> bit & 0x3fff) << 4; };
    return {bytes(0), bytes(16), bytes(32), static_cast<Swizzle>(d >> 62)};
}

void restore(Accumulator& accumulator) {
    const int of_lane = accumulator.columns / 2;
    for (int l = 0; l < kLanes; ++l)
        std::memcpy(accumulator.d[l], &accumulator.value[static_cast<size_t>(l) * of_lane], of_lane * sizeof(float));
}

}  // namespace

// In units of 16-byte chunks the manual's layouts are, for a row of W bytes: along k, 8 rows W bytes apart make an atom
// and atoms follow at the stride; transposed, 8 k W bytes apart make an atom, atoms follow along k at the stride and
// along the rows at the leading offset. Without swizzle W is one chunk, and the other direction goes by the other
// offset.
uint32_t SharedMatrix::chunk(int row, int k) const {
    const Fields f = fields(descriptor);
    const uint32_t bytes = swizzle_bytes(f.swizzle), across = bytes / 2;
    const bool plain = f.swizzle == Swizzle::kNone;
    const uint32_t r = row, c = k;
    uint32_t offset;
    if (!transposed)
        offset = r % 8 * bytes + r / 8 * f.stride + (plain ? c / 8 * f.leading : c * 2);
    else
        offset = r % across * 2 + c % 8 * bytes + r / across * (plain ? f.stride : f.leading) +
                 c / 8 * (plain ? f.leading : f.stride);
    return swizzled(f.start + offset, f.swizzle);
}

void SharedMatrix::check(Site site) const {
    const Fields f = fields(descriptor);
    if (descriptor >> 49 & 7) throw Error(site.text() + ": a descriptor with a base offset, which is not emulated");
    const uint32_t bytes = swizzle_bytes(f.swizzle);
    if (f.swizzle != Swizzle::kNone && f.start % (8 * bytes) >= bytes)
        throw Error(site.text() + ": a descriptor starts at shared address " + std::to_string(f.start) +
                    ", inside a pattern of the swizzle");
}

void Machine::issue_product(const LaneProduct& mine, GroupProduct& product, Site site) {
    LaneProduct slot = mine;
    collective("wgmma", product.columns, ~0u, true, slot, site, [&](LaneProduct** lanes) {
        const int warp = current_ / kLanes;
        WarpProducts& queue = products_[warp];
        const bool in_registers = lanes[0]->a != nullptr;
        if (!in_registers) product.left.check(site);
        product.right.check(site);

        std::vector<Issue>& issues = issues_[warp / kGroupWarps];
        const Issue issue{site, product.left.descriptor, product.right.descriptor};
        if (queue.issued == issues.size()) issues.push_back(issue);
        const Issue& first = issues[queue.issued++];
        if (!(first.site == site) || first.left != issue.left || first.right != issue.right)
            throw Error(site.text() + ": warp " + std::to_string(warp) +
                        " issues another wgmma than its warpgroup, at " + first.site.text());

        for (int l = 0; l < kLanes; ++l) {
            product.lanes[l] = *lanes[l];
            if (in_registers) std::memcpy(product.a[l], lanes[l]->a, sizeof product.a[l]);
        }
        auto found = std::find_if(queue.accumulators.begin(), queue.accumulators.end(),
                                  [&](const Accumulator& x) { return x.d[0] == lanes[0]->d; });
        if (!queue.fenced && (found == queue.accumulators.end() || in_registers))
            throw Error(site.text() + ": wgmma without a fence after its registers could be written");
        if (found == queue.accumulators.end()) {
            queue.accumulators.push_back({{}, product.columns, 0, {}});
            found = queue.accumulators.end() - 1;
            for (int l = 0; l < kLanes; ++l) {
                found->d[l] = lanes[l]->d;
                found->value.insert(found->value.end(), lanes[l]->d, lanes[l]->d + product.columns / 2);
                for (int i = 0; i < product.columns / 2; ++i) std::memcpy(lanes[l]->d + i, &kInFlight, 4);
            }
        }
        if (found->columns != product.columns)
            throw Error(site.text() + ": an accumulator in flight is used with another shape");
        ++found->products;

        const Accessor by = accessor(current_, site);
        const auto begin = [&](int, int, uint32_t address) { shared.begin_read(by, address, 16, era); };
        if (!in_registers) product.left.each_chunk(begin);
        product.right.each_chunk(begin);
        queue.groups.back().push_back(product);
        counters.products += product.columns / 8;
    });
}

void Machine::finish_product(int warp, const GroupProduct& product) {
    WarpProducts& queue = products_[warp];
    float left[kGroupRows][kDepth], right[kDepth][256];
    const auto read = [&](const SharedMatrix& matrix, const auto& put) {
        matrix.each_chunk([&](int row, int k, uint32_t address) {
            uint16_t element[8];
            std::memcpy(element, shared.end_read(warp, address, 16, era), 16);
            for (int i = 0; i < 8; ++i)
                put(matrix.transposed ? row + i : row, matrix.transposed ? k : k + i, product.widen(element[i]));
        });
    };
    const int first_row = warp % kGroupWarps * 16;
    if (product.lanes[0].a == nullptr) {
        read(product.left, [&](int row, int k, float x) { left[row][k] = x; });
    } else {
        for (int l = 0; l < kLanes; ++l) {
            if (std::memcmp(product.a[l], product.lanes[l].a, sizeof product.a[l]) != 0)
                throw Error(product.site.text() + ": registers of A were written while the wgmma was in flight");
            for (int i = 0; i < 4; ++i)
                for (int e = 0; e < 2; ++e)
                    left[first_row + l / 4 + 8 * (i % 2)][2 * (l % 4) + e + 8 * (i / 2)] =
                        product.widen(static_cast<uint16_t>(product.a[l][i] >> 16 * e));
        }
    }
    read(product.right, [&](int n, int k, float x) { right[k][n] = x; });

    Accumulator& accumulator = *std::find_if(queue.accumulators.begin(), queue.accumulators.end(),
                                             [&](const Accumulator& x) { return x.d[0] == product.lanes[0].d; });
    // d[4 j + c] of a lane: row lane / 4 + 8 (c / 2), column 8 j + 2 (lane % 4) + c % 2.
    const int columns = product.columns;
    for (int row = 0; row < 16; ++row) {
        float sum[256];
        const auto at = [&](int column) -> float& {
            const int lane = row % 8 * 4 + column % 8 / 2;
            return accumulator
                .value[static_cast<size_t>(lane) * (columns / 2) + column / 8 * 4 + row / 8 * 2 + column % 2];
        };
        for (int n = 0; n < columns; ++n) sum[n] = product.accumulate ? at(n) : 0.0f;
        for (int k = 0; k < kDepth; ++k)
            for (int n = 0; n < columns; ++n) sum[n] += left[first_row + row][k] * right[k][n];
        for (int n = 0; n < columns; ++n) at(n) = sum[n];
    }
    if (--accumulator.products != 0) return;
    for (int l = 0; l < kLanes; ++l)
        for (int i = 0; i < columns / 2; ++i)
            if (bits_of(accumulator.d[l][i]) != kInFlight)
                throw Error(product.site.text() + ": an accumulator was written while the wgmma was in flight");
    restore(accumulator);
    queue.accumulators.erase(queue.accumulators.begin() + (&accumulator - queue.accumulators.data()));
}

void Machine::group_fence(Site site) {
    int unused = 0;
    collective("wgmma.fence", 0, ~0u, true, unused, site, [&](int**) { products_[current_ / kLanes].fenced = true; });
}

void Machine::group_commit(Site site) {
    int unused = 0;
    collective("wgmma.commit_group", 0, ~0u, true, unused, site,
               [&](int**) { products_[current_ / kLanes].groups.emplace_back(); });
}

// All but the `pending` youngest committed groups are done.
void Machine::group_wait(int pending, Site site) {
    int unused = 0;
    collective("wgmma.wait_group", pending, ~0u, true, unused, site, [&](int**) {
        const int warp = current_ / kLanes;
        auto& groups = products_[warp].groups;
        while (static_cast<int>(groups.size()) - 1 > pending) {
            for (const GroupProduct& product : groups.front()) finish_product(warp, product);
            groups.erase(groups.begin());
        }
        products_[warp].fenced = false;
    });
}

void Machine::check_landed(const float* d, int count, Site site) const {
    for (const Accumulator& x : products_[current_ / kLanes].accumulators)
        if (x.d[current_ % kLanes] >= d && x.d[current_ % kLanes] < d + count)
            throw Error(site.text() + ": an accumulator is expected that the wait leaves in flight");
}

// Registers that the threads of a warp have.
void Machine::set_registers(int count, bool grow, Site site) {
    int unused = 0;
    const int group = current_ / kLanes / kGroupWarps;
    if (count % 8 != 0 || count < 24 || count > 256)
        throw Error(site.text() + ": " + std::to_string(count) + " registers, expected a multiple of 8 from 24 to 256");
    collective("setmaxnreg", count, ~0u, true, unused, site, [&](int**) {
        int& mine = registers_[current_ / kLanes];
        if (grow ? count < mine : count > mine)
            throw Error(site.text() + ": warpgroup " + std::to_string(group) + " has " + std::to_string(mine) +
                        " registers a thread, which " + (grow ? "growing" : "shrinking") + " to " +
                        std::to_string(count) + " is not");
        mine = count;
    });
}

// Growing waits for others to give registers back: for ever, where all together ask for more than there are.
void Machine::check_registers() const {
    int total = 0;
    for (int count : registers_) total += count * kLanes;
    if (total > kRegisters)
        throw Error("warpgroups hold " + std::to_string(total) + " registers in the end, a multiprocessor has " +
                    std::to_string(kRegisters));
}

}  // namespace longrope::emulator
