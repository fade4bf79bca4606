// P and dS of a row block of the backward of span attention, laid out for the products that take them.
#pragma once
#include "cpu/span_attention/backward_rows.h"

namespace mmk::MMK_ISA::attention_backward {

constexpr int kBlockRows = 96, kBlockKeys = 96;
static_assert(kBlockRows % kTileRows == 0 && kBlockKeys % kTileColumns == 0);

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
        if constexpr (kPairs) {
            store_bits(p_pairs_ + row / 2 * kTileColumns + lane, to_bfloat16_pairs(p[0], p[1]));
        } else {
            store(p_row(row) + lane, p[0]);
        }
    }
    MMK_INLINE void put_d_scores(int64_t row, [[maybe_unused]] int64_t lane, int64_t key,
                                 const Vec (&d)[Operand::kPack]) const {
#if MMK_HAS_BF16
        if constexpr (kPairs) {
            const UVec rows = to_bfloat16_rows(d[0], d[1]);
            store_bits(d_scores_pairs_ + row / 2 * kTileColumns + lane, pairs_of_rows(rows));
            uint32_t* by_key = d_scores_ + row * kScoreRow + key / 2;
            memcpy(by_key, &rows, sizeof rows / 2);
            memcpy(by_key + kScoreRow, reinterpret_cast<const char*>(&rows) + sizeof rows / 2, sizeof rows / 2);
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
