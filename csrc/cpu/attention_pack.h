// Tokens of attention as operands of the micro-kernel (gemm.h): one head of one row of the batch, gathered into 32-bit
// units, widened to float where there is no instruction for the type.
//
//     lanes    [units of D][width]                        a row a lane: the vector operand
//     rows     [tokens][units of D]                       contiguous: the broadcast operand of products along D
//     panels   [D / kTileRows][units of tokens][kTileRows]  the broadcast operand of sums over tokens; units are
//                                                         tokens, or pairs of tokens for bfloat16
//
// Tokens outside the spans that a caller names are zero, whatever lies there.
#pragma once
#include "matmul.h"
#include "segments.h"

namespace mmk::MMK_ISA {

template <class T>
struct TokenRows {  // one head of one row of the batch
    const T* data;
    int64_t stride, dim;

    TokenRows(const Heads& x, int64_t batch_row, int64_t head)
        : data(static_cast<const T*>(x.data) + batch_row * x.batch_stride + head * x.head_stride),
          stride(x.token_stride),
          dim(x.dim) {}
    const T* row(int64_t token) const { return data + token * stride; }
};

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
static void pack_token_rows(const TokenRows<T>& from, int64_t first, int64_t last, const std::vector<Span>& spans,
                            uint32_t* packed) {
    const int64_t units = ceil_div(from.dim, Operand::kPack);
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

// Unit `unit` of every panel, from kLanes columns on: `lanes` goes to as many panels as it fills.
static MMK_INLINE void store_panels(uint32_t* packed, int64_t panel_stride, int64_t panels, int64_t column,
                                    int64_t unit, UVec lanes) {
    uint32_t pieces[kLanes];
    memcpy(pieces, &lanes, sizeof pieces);
    MMK_UNROLL for (int i = 0; i < kLanes / kTileRows; i++) {
        const int64_t panel = column / kTileRows + i;
        if (panel < panels)
            memcpy(packed + panel * panel_stride + unit * kTileRows, pieces + i * kTileRows, 4 * kTileRows);
    }
}

// Panels lie panel_stride units apart. first and last are multiples of kPack.
template <class Operand, class T>
static void pack_token_panels(const TokenRows<T>& from, int64_t first, int64_t last, const std::vector<Span>& spans,
                              uint32_t* packed, int64_t panel_stride) {
    constexpr int kPack = Operand::kPack;
    const int64_t panels = ceil_div(from.dim, kTileRows);
    // Spans are apart, so one alone has a share in a unit; what is not its own there is zero.
    const auto copy = [&](int64_t begin, int64_t end) {
        for (int64_t unit = (begin - first) / kPack; unit < ceil_div(end - first, kPack); unit++) {
            const auto bits = [&](int64_t token, int64_t column) MMK_INLINE_LAMBDA {
                const bool present = begin <= token && token < end;
                return present ? load_units<FloatOperand>(from.row(token), 1, column, from.dim) : UVec{};
            };
            const int64_t token = first + unit * kPack;
            for (int i = 0; i < kPack; i++) prefetch_row(from.row(std::min(token + i + kRowsAhead, end - 1)), from.dim);
            int64_t column = 0;
            if (begin <= token && token + kPack <= end) {  // no checks a vector
                const T* row = from.row(token);
                uint32_t* to = packed + unit * kTileRows;
                for (; column + kLanes <= from.dim; column += kLanes, to += kLanes / kTileRows * panel_stride) {
                    UVec lanes = load_units<FloatOperand>(row + column, 1, 0, kLanes);
                    if constexpr (kPack == 2) {
                        lanes = lanes >> 16 | load_units<FloatOperand>(row + from.stride + column, 1, 0, kLanes);
                    }
                    store_panels(to, panel_stride, kLanes / kTileRows, 0, 0, lanes);
                }
            }
            for (; column < from.dim; column += kLanes) {
                UVec lanes = bits(token, column);
                if constexpr (kPack == 2) lanes = lanes >> 16 | bits(token + 1, column);  // of a widened bfloat16
                store_panels(packed, panel_stride, panels, column, unit, lanes);
            }
        }
    };
    const auto clear = [&](int64_t begin, int64_t end) {
        const int64_t unit = ceil_div(begin - first, kPack), count = (end - first) / kPack - unit;
        for (int64_t panel = 0; panel < panels && count > 0; panel++) {
            std::fill_n(packed + panel * panel_stride + unit * kTileRows, count * kTileRows, 0u);
        }
    };
    split(first, last, spans, copy, clear);
}

}  // namespace mmk::MMK_ISA
