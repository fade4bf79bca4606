// The matrix-product micro-kernel, and packing for it.
//
// C[r][lanes] += sum_k A(r, k) * B(k)[lanes]: kRows x kVectors accumulators stay in registers over the whole k loop;
// each step loads kVectors vectors of B and broadcasts one unit of A a row. A unit is 32 bits in memory, either a float
// or a pair of bfloat16 that lie next to each other along k (one instruction multiplies and adds both), so one kernel
// and one packing serve both types: only `Operand` differs.
//
// A needs no packing where its units along k are 32 bits apart or any constant stride; B is packed in panels
// [k][kVectors * kLanes]. Where there is AMX, kAmxRows rows whose units lie side by side are multiplied in tiles
// (amx.h).
#pragma once
#include <algorithm>

#include "cpu/product/amx.h"
#include "cpu/run/tensor.h"
#include "cpu/simd.h"

namespace mmk::MMK_ISA {

// ---- operands

// multiply_add_lane: the same with the unit of a in one lane.
struct FloatOperand {
    static constexpr int kPack = 1;  // elements along k in one unit
    static MMK_INLINE Vec multiply_add(Vec c, UVec a, UVec b) { return as_float(a) * as_float(b) + c; }
#if defined(MMK_NEON)
    template <int kLane>
    static MMK_INLINE Vec multiply_add_lane(Vec c, UVec a, UVec b) {
        return (Vec)vfmaq_laneq_f32((float32x4_t)c, (float32x4_t)b, (float32x4_t)a, kLane);
    }
#endif
};

#if MMK_HAS_BF16
struct BFloat16Operand {
    static constexpr int kPack = 2;
    static MMK_INLINE Vec multiply_add(Vec c, UVec a, UVec b) { return add_products_of_pairs(c, a, b); }
#if defined(MMK_NEON)
    template <int kLane>
    static MMK_INLINE Vec multiply_add_lane(Vec c, UVec a, UVec b) {
        return (Vec)vbfdotq_laneq_f32((float32x4_t)c, (bfloat16x8_t)b, (bfloat16x8_t)a, kLane);
    }
#endif
};
#else
using BFloat16Operand = FloatOperand;  // without the instruction, bfloat16 is widened to float as it is packed
#endif

// What a product of tensors of element type T is computed in.
template <class T>
using OperandOf = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16Operand, FloatOperand>;

// Depths of products are whole multiples of this many units, the padding zero.
constexpr int kDepthStep = kHasAmx ? kAmxDepth : 1;

// body(T{}) for the element type of a call: of those that this level serves, which with AMX is bfloat16 alone.
template <class Body>
static auto with_element_type(DType dtype, Body&& body) {
    if constexpr (!kHasAmx) {
        if (dtype == DType::kFloat32) return body(float{});
        if (dtype == DType::kFloat16) return body(Float16{});
    }
    return body(BFloat16{});
}

static MMK_INLINE UVec load_bits(const uint32_t* p) {
    UVec v;
    memcpy(&v, p, sizeof v);
    return v;
}
static MMK_INLINE void store_bits(uint32_t* p, UVec v) { memcpy(p, &v, sizeof v); }

// The first n of 2 kLanes elements in pairs, the rest zero; 0 <= n < 2 kLanes.
static MMK_INLINE UVec load_first_pairs(const BFloat16* p, int n) {
#if defined(__AVX512F__)
    return (UVec)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
#else
    UVec pairs{};
    memcpy(&pairs, p, static_cast<size_t>(n) * sizeof *p);
    return pairs;
#endif
}

// ---- micro-kernel

struct Idle {
    MMK_INLINE void operator()() const {}
};

// beside() may do a little more every kBeside steps, such as a prefetch.
constexpr int kBeside = 4;

#if defined(MMK_NEON)
static MMK_INLINE UVec load_lanes(const uint32_t* p) {
    UVec lanes = load_bits(p);
    asm("" : "+w"(lanes));  // GCC 12 would load them one by one
    return lanes;
}
template <class Operand, int kLane, int kVectors>
static MMK_INLINE void add_lane(Vec (&c)[kVectors], UVec a, const uint32_t* b) {
    MMK_UNROLL for (int v = 0; v < kVectors; v++) {
        c[v] = Operand::template multiply_add_lane<kLane>(c[v], a, load_bits(b + v * kLanes));
    }
}

// A multiply-add takes its broadcast operand from a lane of four units that are loaded together, along a row or along
// a column of kLanes rows: spread over registers of their own, they would take the pipes that multiply, for a third
// more work. Passes a and b on by the steps it returns, whole multiples of kBeside.
template <class Operand, int kRows, int kVectors, class Beside>
static MMK_INLINE int64_t multiply_by_lanes(Vec (&c)[kRows][kVectors], const uint32_t*& a, int64_t a_row,
                                            int64_t a_unit, const uint32_t*& b, int64_t b_unit, int64_t units,
                                            Beside&& beside) {
    static_assert(kBeside == kLanes);
    int64_t k = 0;
    for (; a_unit == 1 && k + kBeside <= units; k += kBeside, a += kBeside, b += kBeside * b_unit) {
        beside();
        UVec rows[kRows];
        MMK_UNROLL for (int r = 0; r < kRows; r++) rows[r] = load_lanes(a + r * a_row);
        MMK_UNROLL for (int r = 0; r < kRows; r++) add_lane<Operand, 0>(c[r], rows[r], b);
        MMK_UNROLL for (int r = 0; r < kRows; r++) add_lane<Operand, 1>(c[r], rows[r], b + b_unit);
        MMK_UNROLL for (int r = 0; r < kRows; r++) add_lane<Operand, 2>(c[r], rows[r], b + 2 * b_unit);
        MMK_UNROLL for (int r = 0; r < kRows; r++) add_lane<Operand, 3>(c[r], rows[r], b + 3 * b_unit);
    }
    if constexpr (kRows == kLanes) {
        for (; a_row == 1 && k + kBeside <= units; k += kBeside) {
            beside();
            MMK_UNROLL for (int i = 0; i < kBeside; i++, a += a_unit, b += b_unit) {
                const UVec column = load_lanes(a);
                add_lane<Operand, 0>(c[0], column, b);
                add_lane<Operand, 1>(c[1], column, b);
                add_lane<Operand, 2>(c[2], column, b);
                add_lane<Operand, 3>(c[3], column, b);
            }
        }
    }
    return k;
}
#endif

// finish(row, vector, sum) takes an accumulator's last value.
template <class Operand, int kRows, int kVectors, class Finish, class Beside = Idle>
static MMK_INLINE void micro_kernel(const uint32_t* a, int64_t a_row, int64_t a_unit, const uint32_t* b, int64_t b_unit,
                                    int64_t units, Finish&& finish, Beside&& beside = {}) {
#if defined(__AMX_BF16__)
    if constexpr (kRows == kAmxRows) {
        alignas(64) float sums[kRows][kVectors * kLanes];
        multiply_in_tiles<kVectors>(a, a_row, a_unit, b, b_unit, units, sums[0], kVectors * kLanes, false, beside);
        for (int r0 = 0; r0 < kRows; r0 += 2) {  // by twos: two rows may make a row of pairs
            MMK_UNROLL for (int r = r0; r < r0 + 2; r++) {
                MMK_UNROLL for (int v = 0; v < kVectors; v++) finish(r, v, load(sums[r] + v * kLanes));
            }
        }
        return;
    }
#endif
    Vec c[kRows][kVectors] = {};
    const auto step = [&]() MMK_INLINE_LAMBDA {
        UVec lanes[kVectors];
        MMK_UNROLL for (int v = 0; v < kVectors; v++) lanes[v] = load_bits(b + v * kLanes);
        MMK_UNROLL for (int r = 0; r < kRows; r++) {
            const UVec unit = splat_bits(a[r * a_row]);
            MMK_UNROLL for (int v = 0; v < kVectors; v++) c[r][v] = Operand::multiply_add(c[r][v], unit, lanes[v]);
        }
        a += a_unit;
        b += b_unit;
    };
    int64_t k = 0;
#if defined(MMK_NEON)
    k = multiply_by_lanes<Operand>(c, a, a_row, a_unit, b, b_unit, units, beside);
#endif
    for (; k + kBeside <= units; k += kBeside) {
        beside();
        MMK_UNROLL for (int i = 0; i < kBeside; i++) step();
    }
    for (; k < units; k++) step();
    MMK_UNROLL for (int r = 0; r < kRows; r++) MMK_UNROLL for (int v = 0; v < kVectors; v++) finish(r, v, c[r][v]);
}

// How the broadcast operand lies: unit k of row r at a[r * row + k * unit]. One of row and unit is 1; with AMX it is
// unit, or the operand lies in whole tiles (amx.h).
struct Broadcast {
    const uint32_t* a;
    int64_t row, unit;
};

// c[r][lane] = or += sum over units, its rows c_row apart.
template <class Operand, int kRows, int kVectors, class Beside = Idle>
static MMK_INLINE void multiply_into(Broadcast a, const uint32_t* b, int64_t b_unit, int64_t units, float* c,
                                     int64_t c_row, bool add, Beside&& beside = {}) {
#if defined(__AMX_BF16__)
    if constexpr (kRows == kAmxRows) {
        return multiply_in_tiles<kVectors>(a.a, a.row, a.unit, b, b_unit, units, c, c_row, add, beside);
    }
#endif
    const auto finish = [&](int r, int v, Vec sum) MMK_INLINE_LAMBDA {
        float* at = c + r * c_row + v * kLanes;
        store(at, add ? load(at) + sum : sum);
    };
    if (a.unit == 1) {
        micro_kernel<Operand, kRows, kVectors>(a.a, a.row, 1, b, b_unit, units, finish, beside);
    } else {
        micro_kernel<Operand, kRows, kVectors>(a.a, 1, a.unit, b, b_unit, units, finish, beside);
    }
}

template <int kCount>
using Width = std::integral_constant<int, kCount>;

// body(Width<vectors>), for 1 to kMost: the micro-kernel's shape is fixed when it is compiled.
template <int kMost, class Body>
static MMK_INLINE void with_width(int64_t vectors, Body&& body) {
    if constexpr (kMost > 1) {
        if (vectors < kMost) return with_width<kMost - 1>(vectors, body);
    }
    body(Width<kMost>{});
}

// ---- packing

// The unit at column `column` of a row whose elements are `stride` apart; past `columns`, zero.
template <class Operand, class T>
static MMK_INLINE uint32_t load_unit(const T* row, int64_t stride, int64_t column, int64_t columns) {
    if constexpr (Operand::kPack == 1) {
        const float x = column < columns ? to_float(row[column * stride]) : 0.0f;
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        return bits;
    } else {
        BFloat16 pair[2] = {};
        for (int i = 0; i < 2 && column + i < columns; i++) {
            if constexpr (std::is_same_v<T, BFloat16>) {
                pair[i] = row[(column + i) * stride];
            } else {
                pair[i] = from_float<BFloat16>(to_float(row[(column + i) * stride]));
            }
        }
        return pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
    }
}

// kLanes units of a row from column `column` on.
template <class Operand, class T>
static MMK_INLINE UVec load_units(const T* row, int64_t stride, int64_t column, int64_t columns) {
    const int64_t left = columns - column;
    if constexpr (Operand::kPack == 1) {
        if (stride == 1 && left >= kLanes) return as_bits(load(row + column));
        if (stride == 1 && left > 0) return as_bits(load_first(row + column, static_cast<int>(left)));
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        if (stride == 1 && left >= 2 * kLanes) return load_bits(reinterpret_cast<const uint32_t*>(row + column));
        if (stride == 1 && left > 0) return load_first_pairs(row + column, static_cast<int>(left));
    }
    UVec units;
    for (int i = 0; i < kLanes; i++) {
        units[i] = load_unit<Operand>(row, stride, column + i * Operand::kPack, columns);
    }
    return units;
}

// block[i][j] <- block[j][i].
static MMK_INLINE void transpose(UVec (&block)[kLanes]) {
#if defined(__AVX512F__)
    __m512i t[16], r[16];
    memcpy(r, block, sizeof r);
    MMK_UNROLL for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    MMK_UNROLL for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    MMK_UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    MMK_UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
    memcpy(block, r, sizeof r);
#else
    for (int i = 0; i < kLanes; i++) {
        for (int j = 0; j < i; j++) {
            const uint32_t x = block[i][j];
            block[i][j] = block[j][i];
            block[j][i] = x;
        }
    }
#endif
}

// One panel of B, a row of a matrix a lane: panel[u * width + lane] = unit u of row_of(lane), for `lanes` lanes (a
// multiple of kLanes); lanes past the last row and columns past the last are zero, up to `units`.
template <class Operand, class RowOf>
static MMK_INLINE void pack_lanes_of(RowOf&& row_of, int64_t column_stride, int64_t rows, int64_t columns,
                                     int64_t units, int lanes, int64_t width, uint32_t* panel) {
    for (int l0 = 0; l0 < lanes; l0 += kLanes) {
        for (int64_t u0 = 0; u0 < units; u0 += kLanes) {
            UVec block[kLanes];
            const int64_t column = u0 * Operand::kPack, all = kLanes * Operand::kPack;
            if (l0 + kLanes <= rows && column + all <= columns && column_stride == 1) {  // no checks a row
                for (int l = 0; l < kLanes; l++) block[l] = load_units<Operand>(row_of(l0 + l) + column, 1, 0, all);
            } else {
                for (int l = 0; l < kLanes; l++) {
                    const bool present = l0 + l < rows;
                    block[l] = present ? load_units<Operand>(row_of(l0 + l), column_stride, column, columns) : UVec{};
                }
            }
            transpose(block);
            const int64_t count = std::min<int64_t>(kLanes, units - u0);
            for (int64_t u = 0; u < count; u++) store_bits(panel + (u0 + u) * width + l0, block[u]);
        }
    }
}

// The same for rows that are row_stride apart, into a panel of `lanes` lanes.
template <class Operand, class T>
static void pack_lanes(const T* data, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                       int64_t units, int lanes, uint32_t* panel) {
    const auto row_of = [=](int64_t row) { return data + row * row_stride; };
    pack_lanes_of<Operand>(row_of, column_stride, rows, columns, units, lanes, lanes, panel);
}

}  // namespace mmk::MMK_ISA
