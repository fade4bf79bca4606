// What span attention's kernels for Hopper have in common, forward and backward: who works in a block, tiles of heads
// in shared memory, products of them, and the maps by which TMA fills them.
#pragma once
#include "cuda/isa/tensor_map.h"
#include "cuda/isa/wgmma.h"
#include "cuda/span_attention/device.h"

namespace mmk::cuda::sm90 {

constexpr int kGroups = 2;  // warpgroups that compute
constexpr int kGroupRows = 64, kBlockRows = kGroups * kGroupRows;
constexpr int kThreads = (1 + kGroups) * kWarpgroup;
constexpr int kHelperWarps = 3;

// ---- tiles

// Where rows lie in a tensor, from the first on.
struct Place {
    int row, head, batch;
};

// kRows rows of kWidth numbers in shared memory: slabs as wide as a swizzle, one after the other.
template <int kWidth, int kRows>
struct alignas(1024) Tile {
    static constexpr int kColumns = kWidth % 64 == 0 ? 64 : kWidth % 32 == 0 ? 32 : 16;  // of a slab
    static constexpr int kPitch = 2 * kColumns, kSlab = kRows * kPitch;
    static constexpr Swizzle kSwizzle = kPitch == 128 ? Swizzle::k128 : kPitch == 64 ? Swizzle::k64 : Swizzle::k32;
    static constexpr int kBytes = 2 * kWidth * kRows;

    unsigned char bytes[kBytes];

    // By boxes of `box` rows, as the map has them.
    MMK_DEVICE void load(const CUtensorMap& map, const Place& from, uint64_t* barrier, int box = kRows) {
#pragma unroll
        for (int column = 0; column < kWidth; column += kColumns) {
#pragma unroll
            for (int i = 0; i < kRows; i += box) {
                tensor_load(bytes + column / kColumns * kSlab + i * kPitch, &map,
                            {column, from.head, from.row + i, from.batch}, barrier);
            }
        }
    }

    // Operand of a product over columns, of which these are 16 k and up: rows from `row` on.
    MMK_DEVICE uint64_t over_columns(int row, int k) const {
        const uint64_t first = matrix_descriptor(shared_address(bytes) + row * kPitch, 16, 8 * kPitch, kSwizzle);
        return advanced(first, k * 16 / kColumns * kSlab + k * 16 % kColumns * 2);
    }
    // Right operand of a product over rows, of which these are 16 k and up: all columns.
    MMK_DEVICE uint64_t over_rows(int k) const {
        return advanced(matrix_descriptor(shared_address(bytes), kSlab, 8 * kPitch, kSwizzle), k * 16 * kPitch);
    }

    // Where two numbers lie: `column` is even.
    MMK_DEVICE uint32_t* at(int row, int column) {
        const int flat = row * kPitch + column % kColumns * 2;
        const int offset = flat ^ (flat >> 7 & (kPitch / 16 - 1)) << 4;
        return reinterpret_cast<uint32_t*>(bytes + column / kColumns * kSlab + offset);
    }
};

// d = rows of left, from `row` on, times the rows of right transposed.
template <class T, int kWidth, int kLeft, int kRight>
MMK_DEVICE void multiply(float (&d)[kRight / 2], const Tile<kWidth, kLeft>& left, int row,
                         const Tile<kWidth, kRight>& right) {
#pragma unroll
    for (int k = 0; k < kWidth / 16; k++) {
        wgmma<T, Major::kK, Major::kK>(d, left.over_columns(row, k), right.over_columns(0, k), k > 0);
    }
    wgmma_commit();
}

// What a thread holds of 64 rows of a tile, `row` being its first, as the left operand of products over columns.
template <int kWidth, int kRows>
MMK_DEVICE void hold(uint32_t (&left)[kWidth / 16][4], Tile<kWidth, kRows>& tile, int row, int lane) {
#pragma unroll
    for (int k = 0; k < kWidth / 16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) left[k][i] = *tile.at(row + i % 2 * 8, k * 16 + i / 2 * 8 + lane % 4 * 2);
    }
}

// d = left times the rows of right transposed.
template <class T, int kWidth, int kRight>
MMK_DEVICE void multiply(float (&d)[kRight / 2], const uint32_t (&left)[kWidth / 16][4],
                         const Tile<kWidth, kRight>& right) {
#pragma unroll
    for (int k = 0; k < kWidth / 16; k++) wgmma<T, Major::kK>(d, left[k], right.over_columns(0, k), k > 0);
    wgmma_commit();
}

// d += left times the rows of right.
template <class T, int kWidth, int kRows>
MMK_DEVICE void add_product(float (&d)[kWidth / 2], const uint32_t (&left)[kRows / 16][4],
                            const Tile<kWidth, kRows>& right) {
#pragma unroll
    for (int k = 0; k < kRows / 16; k++) wgmma<T, Major::kOther>(d, left[k], right.over_rows(k), true);
    wgmma_commit();
}

// One chunk of a tile, made finite; was it not?
template <class T>
MMK_DEVICE bool make_finite(unsigned char* at) {
    constexpr uint32_t kExponents = std::is_same_v<T, BFloat16> ? 0x7F807F80 : 0x7C007C00;
    constexpr uint32_t kOne = std::is_same_v<T, BFloat16> ? 0x00800080 : 0x04000400, kCarries = 0x80008000;
    const uint4 was = *reinterpret_cast<const uint4*>(at);
    const auto carries = [](uint32_t both) { return (both & kExponents) + kOne; };  // where an exponent is all ones
    if (((carries(was.x) | carries(was.y) | carries(was.z) | carries(was.w)) & kCarries) == 0) return false;
    *reinterpret_cast<uint4*>(at) = {finite<T>(was.x), finite<T>(was.y), finite<T>(was.z), finite<T>(was.w)};
    return true;
}

// Where in a ring of stages, and the parity of its barriers' phase.
template <int kStages>
struct Turn {
    int stage = 0, parity = 0;

    MMK_DEVICE Turn after() const { return stage + 1 < kStages ? Turn{stage + 1, parity} : Turn{0, parity ^ 1}; }
    MMK_DEVICE Turn before() const { return stage > 0 ? Turn{stage - 1, parity} : Turn{kStages - 1, parity ^ 1}; }
    MMK_DEVICE void advance() { *this = after(); }
};

// ---- maps

constexpr int64_t kLargestStride = int64_t{1} << 39;  // in elements: a map holds 40 bits of bytes

// By TMA, and written. A dimension of one element is never stepped along.
inline bool readable(const Heads& x, int batch, int tokens, int heads) {
    const auto steps = [](int size, int64_t stride) {
        return size <= 1 || (stride % 8 == 0 && stride > 0 && stride < kLargestStride);
    };
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && steps(batch, x.batch) && steps(tokens, x.row) &&
           steps(heads, x.head);
}

// Of `rows` tokens, of which `box` at a time come into a tile of kWidth columns.
template <class T, int kWidth>
Error encode_heads(CUtensorMap& map, const char* kernel, const Heads& x, int batch, int rows, int heads, int width,
                   int box) {
    constexpr int kColumns = Tile<kWidth, kGroupRows>::kColumns;
    const auto count = [](int size) { return static_cast<uint64_t>(size); };
    const auto stride = [](int64_t elements, int size) {  // of a dimension of size 1 it may be anything
        return size <= 1 ? uint64_t{16} : static_cast<uint64_t>(elements) * sizeof(T);
    };
    return encode<T>(map, kernel,
                     TensorLayout<4>{x.data,
                                     {count(width), count(heads), count(rows), count(batch)},
                                     {stride(x.head, heads), stride(x.row, rows), stride(x.batch, batch)},
                                     {kColumns, 1, static_cast<uint32_t>(box), 1},
                                     static_cast<RowSwizzle>(2 * kColumns)});
}

}  // namespace mmk::cuda::sm90
