// wgmma: products of a warpgroup whose operands lie in shared memory, done when the warpgroup waits for them.
//
// An accumulator lives here from the first product until a wait that names it: its registers hold NaN, since on the
// device the compiler may move what uses them above a wait that does not name them.
#include <deque>
#include <map>

#include "emulator/shadow.h"
#include "emulator/swizzle.h"

namespace mmk::emulator {
namespace {

constexpr int kRows = 64, kDepth = 16, kMaxColumns = 256;
constexpr uint32_t kPoison = 0xFFFFFFFF;

// ---- operands in shared memory: the canonical layouts of the matrix descriptor, for numbers of 16 bits

class Operand {
  public:
    Operand(uint64_t descriptor, bool k_major, Site site)
        : start_(field(descriptor, 0)),
          leading_(field(descriptor, 16)),
          stride_(field(descriptor, 32)),
          swizzle_bits_(kSwizzleBits[descriptor >> 62]),
          k_major_(k_major) {
        // On the device a tile off the pattern needs the descriptor's base offset, which our kernels leave at 0.
        if (swizzle_bits_ != 0 && (start_ >> 7 & ((1u << swizzle_bits_) - 1)) != 0) {
            fail(site, "wgmma descriptor: the tile does not lie on a repeat of its swizzle");
        }
    }

    // Element k of row (of a) or column (of b) i.
    const void* at(uint32_t i, uint32_t k) const {
        const uint32_t pitch = 16u << swizzle_bits_,
                       wide = pitch / 2;  // bytes, and elements, of one row of the pattern
        uint32_t offset;
        if (k_major_ && swizzle_bits_ != 0) {
            offset = i % 8 * pitch + i / 8 * stride_ + k * 2;
        } else if (k_major_) {
            offset = i % 8 * 16 + i / 8 * stride_ + k / 8 * leading_ + k % 8 * 2;
        } else if (swizzle_bits_ != 0) {
            offset = i % wide * 2 + i / wide * leading_ + k % 8 * pitch + k / 8 * stride_;
        } else {
            offset = i % 8 * 2 + i / 8 * stride_ + k % 8 * 16 + k / 8 * leading_;
        }
        return shared_pointer(swizzled(start_ + offset, swizzle_bits_));
    }
    uint16_t bits(uint32_t i, uint32_t k) const {
        uint16_t value;
        memcpy(&value, at(i, k), sizeof value);
        return value;
    }
    // The current thread reads rows or columns [begin, end), 16 bytes at a time.
    void check(uint32_t begin, uint32_t end, Site site) const {
        for (uint32_t i = begin; i < end; i += k_major_ ? 1 : 8) {
            for (uint32_t k = 0; k < kDepth; k += k_major_ ? 8 : 1) {
                check_shared(at(i, k), 16, "wgmma", site);
                check_read(at(i, k), 16, site, By::kAsyncProxy);
            }
        }
    }

  private:
    static constexpr int kSwizzleBits[4] = {0, 3, 2, 1};  // the descriptor's layout types: none, 128, 64, 32 bytes
    static uint32_t field(uint64_t descriptor, int shift) {
        return static_cast<uint32_t>(descriptor >> shift & 0x3FFF) << 4;
    }
    uint32_t start_, leading_, stride_;
    int swizzle_bits_;
    bool k_major_;
};

// ---- what each thread has in flight

struct Issued {
    Wgmma product;
    uint32_t a[4];
    Site site;
};
struct State {
    std::vector<Issued> open;
    std::deque<std::vector<Issued>> groups;
    std::map<const float*, std::vector<float>> accumulators;
    bool fenced = false;
};
std::vector<State> of_thread;

bool in_flight(const State& state, const float* accumulator) {
    const auto uses = [&](const std::vector<Issued>& group) {
        for (const Issued& issued : group) {
            if (issued.product.d == accumulator) return true;
        }
        return false;
    };
    for (const auto& group : state.groups) {
        if (uses(group)) return true;
    }
    return uses(state.open);
}

// Takes the accumulator out of the registers, unless it is out already.
void take(State& state, float* d, size_t count, Site site) {
    const auto found = state.accumulators.find(d);
    if (found != state.accumulators.end()) {
        bool poisoned = true;
        for (size_t i = 0; i < count; i++) poisoned = poisoned && bits_of(d[i]) == kPoison;
        if (poisoned) return;
        if (in_flight(state, d)) fail(site, "wgmma: its accumulator was written while a product into it is in flight");
    }
    state.accumulators[d].assign(d, d + count);
    for (size_t i = 0; i < count; i++) d[i] = float_of(kPoison);
}

// ---- doing the products of a warpgroup

float number(Number type, uint32_t bits) {
    const auto low = static_cast<uint16_t>(bits);
    return type == Number::kBFloat16 ? float_of_bfloat16(low) : float_of_half(low);
}

// Register i of a thread holds row row_of(thread, i) and column column_of(thread, i) of d.
int row_of(int thread, int i) { return thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8; }
int column_of(int thread, int i) { return thread % 4 * 2 + i % 2 + i / 4 * 8; }

bool agree(const Issued& x, const Issued& y) {
    const Wgmma &a = x.product, &b = y.product;
    return x.site.line == y.site.line && a.n == b.n && a.accumulate == b.accumulate &&
           a.descriptor_a == b.descriptor_a && a.descriptor_b == b.descriptor_b;
}

// In the name of every warp: warp w reads its 16 rows of a and all of b.
void check_operands(int first, const Issued& issued, const Operand& a, const Operand& b) {
    Thread* const self = current;
    for (uint32_t warp = 0; warp < 4; warp++) {
        current = &threads[first + static_cast<int>(warp) * kWarp];
        if (issued.product.a == nullptr) a.check(warp * 16, warp * 16 + 16, issued.site);
        b.check(0, static_cast<uint32_t>(issued.product.n), issued.site);
    }
    current = self;
}

void execute(int first, size_t index) {  // product `index` of the oldest group of the threads from `first` on
    const auto issued_by = [&](int thread) -> const Issued& { return of_thread[first + thread].groups.front()[index]; };
    const Issued& leader = issued_by(0);
    const Wgmma& product = leader.product;
    for (int thread = 1; thread < kWarpgroup; thread++) {
        if (!agree(leader, issued_by(thread))) fail(leader.site, "wgmma: threads of the warpgroup disagree about it");
    }
    const Operand operand_a(product.a == nullptr ? product.descriptor_a : 0, !product.m_major_a, leader.site);
    const Operand operand_b(product.descriptor_b, !product.n_major_b, leader.site);
    check_operands(first, leader, operand_a, operand_b);

    static float a[kRows][kDepth], b[kDepth][kMaxColumns], d[kRows][kMaxColumns];
    const auto columns = static_cast<uint32_t>(product.n);
    for (uint32_t k = 0; k < kDepth; k++) {
        for (uint32_t i = 0; product.a == nullptr && i < kRows; i++)
            a[i][k] = number(product.type, operand_a.bits(i, k));
        for (uint32_t j = 0; j < columns; j++) b[k][j] = number(product.type, operand_b.bits(j, k));
    }
    const auto accumulator = [&](int thread) {
        return of_thread[first + thread].accumulators[issued_by(thread).product.d].data();
    };
    for (int thread = 0; thread < kWarpgroup; thread++) {
        for (int i = 0; product.a != nullptr && i < 8; i++) {  // a's fragment is laid out as 16 columns of d are
            const uint32_t bits = issued_by(thread).a[i / 2] >> i % 2 * 16;
            a[row_of(thread, i)][column_of(thread, i)] = number(product.type, bits);
        }
        const float* const from = accumulator(thread);
        for (int i = 0; i < product.n / 2; i++) {
            d[row_of(thread, i)][column_of(thread, i)] = product.accumulate ? from[i] : 0;
        }
    }
    for (int i = 0; i < kRows; i++) {
        for (int k = 0; k < kDepth; k++) {
            for (int j = 0; j < product.n; j++) d[i][j] += a[i][k] * b[k][j];
        }
    }
    for (int thread = 0; thread < kWarpgroup; thread++) {
        float* const to = accumulator(thread);
        for (int i = 0; i < product.n / 2; i++) to[i] = d[row_of(thread, i)][column_of(thread, i)];
    }
    counters().mma++;
}

// The last thread of the warpgroup to wait does what must be complete.
void execute_groups(int first, int pending, Site site) {
    State& leader = of_thread[first];
    for (int thread = 1; thread < kWarpgroup; thread++) {
        if (of_thread[first + thread].groups.size() != leader.groups.size()) {
            fail(site, "wgmma: threads of the warpgroup disagree about its groups");
        }
    }
    while (static_cast<int>(leader.groups.size()) > pending) {
        for (size_t i = 0; i < leader.groups.front().size(); i++) execute(first, i);
        for (int thread = 0; thread < kWarpgroup; thread++) of_thread[first + thread].groups.pop_front();
    }
    for (int warp = 0; warp < kWarpgroup / kWarp; warp++) sync_clocks(first / kWarp + warp, ~0u);
}

std::vector<int> waiting;  // threads of each warpgroup

}  // namespace

void begin_wgmma(size_t count) {
    of_thread.assign(count, {});
    waiting.assign(count / kWarpgroup + 1, 0);
}

void end_wgmma(const Thread& thread) {
    const State& state = of_thread[thread.id];
    if (!state.open.empty()) fail(state.open[0].site, "thread ends with a wgmma that was never committed");
    for (const auto& group : state.groups) {
        if (!group.empty()) fail(group[0].site, "thread ends with a wgmma in flight");
    }
}

void wgmma(const Wgmma& product, Site site) {
    State& state = of_thread[current->id];
    if (product.n % 8 != 0 || product.n < 8 || product.n > kMaxColumns) fail(site, "wgmma of %d columns", product.n);
    if (!state.fenced) fail(site, "wgmma: no wgmma.fence since the thread began, or since its last wait");
    take(state, product.d, static_cast<size_t>(product.n) / 2, site);
    Issued issued{product, {}, site};
    if (product.a != nullptr) memcpy(issued.a, product.a, sizeof issued.a);
    state.open.push_back(issued);
}

void wgmma_fence() { of_thread[current->id].fenced = true; }

void wgmma_commit() {
    State& state = of_thread[current->id];
    if (current->id % kWarpgroup == 0) counters().wgmma_commits.push_back(current->id / kWarpgroup);
    state.groups.push_back(std::move(state.open));
    state.open.clear();
}

void wgmma_wait(int pending, std::initializer_list<const float*> accumulators, Site site) {
    State& state = of_thread[current->id];
    const int group = current->id / kWarpgroup;
    state.fenced = false;
    if (static_cast<size_t>(group + 1) * kWarpgroup <= threads.size() &&
        ++waiting[static_cast<size_t>(group)] == kWarpgroup) {
        waiting[static_cast<size_t>(group)] = 0;
        execute_groups(group * kWarpgroup, pending, site);
    }
    meet_warpgroup(site);
    for (const float* const named : accumulators) {
        if (in_flight(state, named)) fail(site, "wgmma wait: names an accumulator that a product is still adding to");
        const auto found = state.accumulators.find(named);
        if (found == state.accumulators.end()) continue;  // nothing was issued, as in a loop of no steps
        memcpy(const_cast<float*>(named), found->second.data(), found->second.size() * sizeof(float));
        state.accumulators.erase(found);
    }
}

void set_max_registers(int count, Site site) {
    if (count % 8 != 0 || count < 24 || count > 256) {
        fail(site, "setmaxnreg: %d is not a multiple of 8 from 24 to 256", count);
    }
    meet_warpgroup(site);
}

}  // namespace mmk::emulator
