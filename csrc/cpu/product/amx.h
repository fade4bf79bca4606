// Products of bfloat16 in AMX tiles: a processor's eight registers of 16 rows x 64 bytes, of which one instruction
// multiplies two and adds to a third, 8192 multiply-adds in 16 cycles.
//
//     c[16][kVectors * 16] (+)= sum_u a[r][u] b[u][lane]
//
// in the layout of the micro-kernel (gemm.h): a's units along k are rows of a tile, b's panel rows are the pairs that a
// tile wants, so nothing is packed anew. Three tiles of sums, one of a and two of b, which take turns. Depths are
// padded to whole tiles; the padding has to be zero on both sides, as NaN times zero is NaN. A sum over rows, or
// keys, that others lie behind may end in half a tile, of kHalfDepth units, which has tiles of its own shape: too few
// to take turns, so that its loads wait for its products (a fifth of the time at D = 80, where no depth was padded).
#pragma once
#include "cpu/simd.h"

namespace mmk::MMK_ISA {

#if defined(__AMX_BF16__)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif
constexpr int kAmxRows = 16, kAmxDepth = 16, kHalfDepth = 8;

// While it lives, its thread's tiles have the shapes that the products want. What comes after starts anew, as libraries
// do that use tiles themselves.
class TileShapes {
  public:
#if defined(__AMX_BF16__)
    TileShapes() {
        struct alignas(64) {
            uint8_t palette = 1, reserved[15] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 4 * kHalfDepth, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, kHalfDepth};
        } shapes;
        asm volatile("" ::"r"(&shapes) : "memory");  // GCC's intrinsic says that it reads no more than 8 bytes
        _tile_loadconfig(&shapes);
    }
    ~TileShapes() { _tile_release(); }
#else
    TileShapes() {}  // not trivial, so that an object is no unused variable
#endif
    TileShapes(const TileShapes&) = delete;
    TileShapes& operator=(const TileShapes&) = delete;
};

#if defined(__AMX_BF16__)
// Rows of a, b and c are a_row, b_row and c_row units apart, and the tile of a from unit u on begins at a + u * a_unit:
// with 1 its rows are a matrix', with kAmxRows (and a_row kAmxDepth) each tile is a KB of its own. beside() may do a
// little more; it is called as often for so many multiply-adds as the micro-kernel calls it.
template <int kVectors, class Beside>
static MMK_INLINE void multiply_in_tiles(const uint32_t* a, int64_t a_row, int64_t a_unit, const uint32_t* b,
                                         int64_t b_row, int64_t units, float* c, int64_t c_row, bool add,
                                         Beside&& beside) {
    static_assert(kVectors <= 3);
    const auto meanwhile = [&]() MMK_INLINE_LAMBDA { beside(), beside(); };
    // The instructions name tiles by constants: 0 to 2 are sums, 3 is of a, 4 and 5 are of b; 6 and 7 half as deep. To
    // the compiler they are assembly that reads no memory.
    asm volatile("" ::: "memory");
    const auto a_bytes = static_cast<size_t>(4 * a_row), b_bytes = static_cast<size_t>(4 * b_row),
               c_bytes = static_cast<size_t>(4 * c_row);
    if (add) {
        _tile_loadd(0, c, c_bytes);
        if (kVectors > 1) _tile_loadd(1, c + 16, c_bytes);
        if (kVectors > 2) _tile_loadd(2, c + 32, c_bytes);
    } else {
        _tile_zero(0);
        if (kVectors > 1) _tile_zero(1);
        if (kVectors > 2) _tile_zero(2);
    }
    int64_t u = 0;
    for (; u + kAmxDepth <= units; u += kAmxDepth, b += kAmxDepth * b_row) {
        meanwhile();
        _tile_loadd(3, a + u * a_unit, a_bytes);
        _tile_loadd(4, b, b_bytes);
        meanwhile();
        if (kVectors > 1) _tile_loadd(5, b + 16, b_bytes);
        _tile_dpbf16ps(0, 3, 4);
        meanwhile();
        if (kVectors > 2) _tile_loadd(4, b + 32, b_bytes);
        if (kVectors > 1) _tile_dpbf16ps(1, 3, 5);
        meanwhile();
        if (kVectors > 2) _tile_dpbf16ps(2, 3, 4);
    }
    if (u < units) {
        _tile_loadd(6, a + u * a_unit, a_bytes);
        _tile_loadd(7, b, b_bytes);
        _tile_dpbf16ps(0, 6, 7);
        if (kVectors > 1) {
            _tile_loadd(7, b + 16, b_bytes);
            _tile_dpbf16ps(1, 6, 7);
        }
        if (kVectors > 2) {
            _tile_loadd(7, b + 32, b_bytes);
            _tile_dpbf16ps(2, 6, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    if (kVectors > 1) _tile_stored(1, c + 16, c_bytes);
    if (kVectors > 2) _tile_stored(2, c + 32, c_bytes);
    asm volatile("" ::: "memory");
}
#endif

}  // namespace mmk::MMK_ISA
