// Products of queries with keys, or of gradients with values, in float32: sums along a head's dimension.
//
// A chain of float32 additions loses digits as it grows: where the product is large, so is every partial sum, and each
// is rounded. So a long sum is cut into chains, which are added one after the other. An error here is one of the
// logit, and moves its weight by as large a part. Pairs of bfloat16, whose weights keep three digits, need less care:
// what is exact to float32 there is the log-sum-exp alone.
#pragma once
#include "cpu/product/matmul.h"

namespace mmk::MMK_ISA {

// The longest chain in a sum of so many units; shorter where a product is rounded before it is added. A second chain at
// D = 80 cost windows of 64 tokens 8 %, and nothing needed it.
static MMK_INLINE int64_t longest_chain(int64_t units) { return !kHasFma ? 16 : units <= 96 ? 96 : 64; }

// The same for pairs: two chains in the widest heads that are served, of 576. More would be one chain again with AMX,
// whose tiles go on adding where sum_chains adds.
constexpr int64_t kChainOfPairs = 144;

template <class Operand>
static MMK_INLINE int64_t chains_of(int64_t units, int64_t longest) {
    return ceil_div(units, Operand::kPack == 1 ? longest : kChainOfPairs);
}

// The errors of so few rows do not average out: the value of a decoded token has those of one row. Time goes into
// packing keys there, and plain PyTorch takes such products in shorter chains, too.
constexpr int64_t kFewRows = 32, kChainOfFewRows = 16;

// All but the last of the chains that the units are cut into, added up. A function of its own: inlined beside the last
// one, it would take that one's registers (a fifth of the time at D = 128).
template <class Operand, int kRows, int kVectors>
[[gnu::noinline]] static void sum_chains(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_unit,
                                         int64_t units, int64_t chains, float* sums) {
    const int64_t steps = units / kDepthStep;
    for (int64_t i = 0; i + 1 < chains; i++) {
        const int64_t first = steps * i / chains * kDepthStep, last = steps * (i + 1) / chains * kDepthStep;
        multiply_into<Operand, kRows, kVectors>({a + first, a_row, 1}, b + first * b_unit, b_unit, last - first, sums,
                                                kVectors * kLanes, i > 0);
    }
}

// finish(row, vector, sum over the units of a row of a and the lanes of b); beside() does a little more meanwhile.
template <class Operand, int kRows, int kVectors, class Finish, class Beside>
static MMK_INLINE void multiply_in_chains(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_unit,
                                          int64_t units, int64_t longest, Finish&& finish, Beside&& beside) {
    const int64_t chains = chains_of<Operand>(units, longest);
    if (chains == 1) return micro_kernel<Operand, kRows, kVectors>(a, a_row, 1, b, b_unit, units, finish, beside);
    float before[kRows][kVectors * kLanes];
    sum_chains<Operand, kRows, kVectors>(a, a_row, b, b_unit, units, chains, before[0]);
    const int64_t first = units / kDepthStep * (chains - 1) / chains * kDepthStep;
    const auto total = [&](int r, int v, Vec sum)
                           MMK_INLINE_LAMBDA { finish(r, v, load(before[r] + v * kLanes) + sum); };
    micro_kernel<Operand, kRows, kVectors>(a + first, a_row, 1, b + first * b_unit, b_unit, units - first, total,
                                           beside);
}

}  // namespace mmk::MMK_ISA
