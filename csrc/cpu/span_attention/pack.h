// Tokens of attention as operands of the micro-kernel (gemm.h): one head of one row of the batch, gathered into 32-bit
// units, widened to float where there is no instruction for the type.
//
//     lanes    [units of D][width]                        a row a lane: the vector operand
//     rows     [tokens][units of D]                       contiguous: the broadcast operand of products along D
//     panels   [D / kTileRows][units of tokens][kTileRows]  the broadcast operand of sums over tokens; units are
//                                                         tokens, or pairs of tokens for bfloat16
//              [D / 16][units of tokens / 16][16][16]     with AMX: whole tiles, a column of the tokens a row
//
// Tokens outside the spans that a caller names are zero, whatever lies there.
#pragma once
#include "cpu/product/matmul.h"
#include "cpu/span_attention/head_rows.h"
#include "cpu/span_attention/segments.h"

namespace mmk::MMK_ISA {

// Cuts tokens [first, last) into those inside the spans, which are ascending and apart, and those outside:
// inside(from, to) and outside(from, to), in the order of the tokens.
template <class Inside, class Outside>
static MMK_INLINE void split(int64_t first, int64_t last, const std::vector<Span>& spans, Inside&& inside,
                             Outside&& outside) {
    int64_t at = first;
    for (const Span span : spans) {
        const int64_t from = std::max<int64_t>(span.lo, first), to = std::min<int64_t>(span.hi, last);
        if (from >= to) continue;
        if (at < from) outside(at, from);
        inside(from, to);
        at = to;
    }
    if (at < last) outside(at, last);
}

// Rows are far apart in memory, where no hardware prefetcher follows: each asks for the one this many further on.
constexpr int64_t kRowsAhead = 12;

template <class T>
static MMK_INLINE void prefetch_row(const T* row, int64_t elements) {
    for (int64_t i = 0; i < elements; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i);
}

// `packed` has room for a vector more than the rows.
template <class Operand, class T>
static void pack_token_rows(const HeadRows<const T>& from, int64_t first, int64_t last, const std::vector<Span>& spans,
                            uint32_t* packed) {
    const int64_t units = depth<Operand>(from.dim);
    const auto copy = [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; token++) {
            prefetch_row(from.row(std::min(token + kRowsAhead, end - 1)), from.dim);
            // A last vector runs into the next row, which is written next.
            for (int64_t u = 0; u < units; u += kLanes) {
                store_bits(packed + (token - first) * units + u,
                           load_units<Operand>(from.row(token), 1, u * Operand::kPack, from.dim));
            }
        }
    };
    const auto clear = [&](int64_t begin, int64_t end) {
        std::fill_n(packed + (begin - first) * units, (end - begin) * units, 0u);
    };
    split(first, last, spans, copy, clear);
}

// How panels of `units` units of tokens lie. A cache line more, so that panels of a round number of units do not all
// fall into the same sets.
struct TokenPanels {
    explicit TokenPanels(int64_t units)
        : row(kHasAmx ? kAmxDepth : 1), unit(kTileRows), panel(round_up(units, kAmxDepth) * kTileRows + 16) {}

    // From unit u on, which with AMX begins a tile.
    Broadcast at(const uint32_t* packed, int64_t p, int64_t u) const {
        return {packed + p * panel + u * unit, row, unit};
    }

    // Where unit u of panel p has its first column; the others follow `row` units apart.
    uint32_t* start(uint32_t* packed, int64_t p, int64_t u) const {
        if constexpr (kHasAmx) return packed + p * panel + u / kAmxDepth * kAmxDepth * unit + u % kAmxDepth;
        return packed + p * panel + u * unit;
    }

    int64_t row, unit, panel;
};

// One head's tokens [first, last) as panels. first and last are multiples of kPack; spans are apart, so one alone has a
// share in a unit, and what is not its own there is zero.
template <class Operand, class T>
class PanelPacker {
    static constexpr int kPack = Operand::kPack;

  public:
    PanelPacker(const HeadRows<const T>& from, int64_t first, TokenPanels to, uint32_t* packed)
        : from_(from), first_(first), panels_(ceil_div(from.dim, kTileRows)), to_(to), packed_(packed) {}

    void pack(int64_t last, const std::vector<Span>& spans) const {
        split(
            first_, last, spans, [&](int64_t begin, int64_t end) { copy(begin, end); },
            [&](int64_t begin, int64_t end) { clear(begin, end); });
    }

  private:
    void copy(int64_t begin, int64_t end) const {
        const int64_t last = ceil_div(end - first_, kPack);
        for (int64_t unit = (begin - first_) / kPack; unit < last;) {
            if constexpr (kHasAmx) {
                const int64_t count = std::min(kAmxDepth - unit % kAmxDepth, last - unit);
                copy_block(unit, count, begin, end);
                unit += count;
            } else {
                copy_unit(unit++, begin, end);
            }
        }
    }

    // kLanes columns of a unit, of the tokens among [begin, end).
    MMK_INLINE UVec lanes(int64_t unit, int64_t column, int64_t begin, int64_t end) const {
        const int64_t token = first_ + unit * kPack;
        const bool inside = begin <= token && token + kPack <= end && column + kLanes <= from_.dim;
        const auto bits = [&](int64_t i) MMK_INLINE_LAMBDA {
            if (inside) return load_units<FloatOperand>(from_.row(i) + column, 1, 0, kLanes);  // no checks a vector
            const bool present = begin <= i && i < end;
            return present ? load_units<FloatOperand>(from_.row(i), 1, column, from_.dim) : UVec{};
        };
        if constexpr (kPack == 1) return bits(token);
        return bits(token) >> 16 | bits(token + 1);  // of widened bfloat16
    }
    MMK_INLINE void prefetch(int64_t unit, int64_t end) const {
        for (int i = 0; i < kPack; i++) {
            prefetch_row(from_.row(std::min(first_ + unit * kPack + i + kRowsAhead, end - 1)), from_.dim);
        }
    }

    // To as many panels as a vector fills.
    MMK_INLINE void copy_unit(int64_t unit, int64_t begin, int64_t end) const {
        prefetch(unit, end);
        for (int64_t column = 0; column < from_.dim; column += kLanes) {
            const UVec unit_lanes = lanes(unit, column, begin, end);
            uint32_t pieces[kLanes];
            memcpy(pieces, &unit_lanes, sizeof pieces);
            MMK_UNROLL for (int i = 0; i < kLanes / kTileRows; i++) {
                const int64_t p = column / kTileRows + i;
                if (p < panels_) memcpy(to_.start(packed_, p, unit), pieces + i * kTileRows, 4 * kTileRows);
            }
        }
    }

    // `count` units of every column, all in one tile.
    MMK_INLINE void copy_block(int64_t unit, int64_t count, int64_t begin, int64_t end) const {
        for (int64_t column = 0; column < from_.dim; column += kLanes) {
            UVec block[kLanes];
            for (int i = 0; i < kLanes; i++) {
                if (column == 0 && i < count) prefetch(unit + i, end);
                block[i] = i < count ? lanes(unit + i, column, begin, end) : UVec{};
            }
            transpose(block);
            float* to = reinterpret_cast<float*>(to_.start(packed_, column / kLanes, unit));
            for (int i = 0; i < kLanes; i++, to += to_.row)
                store_first(to, as_float(block[i]), static_cast<int>(count));
        }
    }

    void clear(int64_t begin, int64_t end) const {
        for (int64_t unit = ceil_div(begin - first_, kPack); unit < (end - first_) / kPack; unit++) {
            for (int64_t p = 0; p < panels_; p++) {
                for (int64_t r = 0; r < kTileRows; r++) to_.start(packed_, p, unit)[r * to_.row] = 0;
            }
        }
    }

    const HeadRows<const T> from_;
    const int64_t first_, panels_;
    const TokenPanels to_;
    uint32_t* const packed_;
};

}  // namespace mmk::MMK_ISA
