// P and dS of a row block of the backward of span attention, laid out for the products that take them.
#pragma once
#include "cpu/span_attention/backward_rows.h"

namespace mmk::MMK_ISA::attention_backward {

constexpr int kBlockRows = 96, kBlockKeys = 96;
static_assert(kBlockRows % kTileRows == 0 && kBlockKeys % kTileColumns == 0);

#if defined(__AVX512BF16__)
// Two rows rounded to bfloat16, one after the other, and their pairs.
struct Narrowed {
    explicit Narrowed(Vec first, Vec second) : rows((__m512i)_mm512_cvtne2ps_pbh(second, first)) {}
    UVec pairs() const {
        typedef uint16_t Halves __attribute__((vector_size(64)));
        const Halves zip = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return (UVec)_mm512_permutexvar_epi16((__m512i)zip, rows);
    }
    __m512i rows;
};
#endif

struct Lanes {  // a vector operand: unit u at at + u * stride
    const uint32_t* at;
    int64_t stride;
};

// P of one panel of keys, and dS of the whole key block, each the vector operand of a product that sums over query
// rows; dS is the broadcast operand of dQ besides, which sums over keys. In float32 one memory serves everything; pairs
// lie along the rows in the first place, along the keys in the second.
template <class Operand>
class Weights {
  public:
    explicit Weights(Arena& memory)
        : p_(memory.take((kPairs ? kTileRows : kBlockRows) * kTileColumns)),
          d_scores_(memory.take<uint32_t>(kBlockRows * kScoreRow)),
          p_pairs_(memory.take<uint32_t>(kPairs ? kBlockRows / 2 * kTileColumns : 0)),
          d_scores_pairs_(memory.take<uint32_t>(kPairs ? kBlockRows / 2 * kTileColumns : 0)) {}

    // P as floats, of the tile at work.
    float* p_row(int64_t row) const { return p_ + (kPairs ? row % kTileRows : row) * kTileColumns; }

    // kPack rows from `row` on; `lane` counts in the panel, `key` in the block.
    MMK_INLINE void put_p(int64_t row, int64_t lane, const Vec (&p)[Operand::kPack]) const {
#if defined(__AVX512BF16__)
        if constexpr (kPairs) store_bits(p_pairs_ + row / 2 * kTileColumns + lane, Narrowed(p[0], p[1]).pairs());
#endif
        if constexpr (!kPairs) store(p_row(row) + lane, p[0]);
    }
    MMK_INLINE void put_d_scores(int64_t row, [[maybe_unused]] int64_t lane, int64_t key,
                                 const Vec (&d)[Operand::kPack]) const {
#if defined(__AVX512BF16__)
        if constexpr (kPairs) {
            const Narrowed two(d[0], d[1]);
            store_bits(d_scores_pairs_ + row / 2 * kTileColumns + lane, two.pairs());
            uint32_t* by_key = d_scores_ + row * kScoreRow + key / 2;
            memcpy(by_key, &two.rows, 32);
            memcpy(by_key + kScoreRow, reinterpret_cast<const char*>(&two.rows) + 32, 32);
        }
#endif
        if constexpr (!kPairs) store_bits(d_scores_ + row * kScoreRow + key, as_bits(d[0]));
    }

    Lanes p(int64_t row, int64_t lane) const {
        if constexpr (kPairs) return {p_pairs_ + row / 2 * kTileColumns + lane, kTileColumns};
        return {reinterpret_cast<const uint32_t*>(p_row(row) + lane), kTileColumns};
    }
    Lanes d_scores(int64_t row, int64_t lane, int64_t key) const {
        if constexpr (kPairs) return {d_scores_pairs_ + row / 2 * kTileColumns + lane, kTileColumns};
        return {d_scores_ + row * kScoreRow + key, kScoreRow};
    }
    Broadcast d_scores_by_key(int64_t row, int64_t unit) const {
        return {d_scores_ + row * kScoreRow + unit, kScoreRow, 1};
    }

  private:
    static constexpr bool kPairs = Operand::kPack == 2;
    static constexpr int64_t kScoreRow = kPairs ? kBlockKeys / 2 : kBlockKeys + 16;  // an odd number of cache lines

    float* p_;
    uint32_t *d_scores_, *p_pairs_, *d_scores_pairs_;
};

}  // namespace mmk::MMK_ISA::attention_backward
