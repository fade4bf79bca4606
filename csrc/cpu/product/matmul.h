// Matrix products whose operands are gathered into 32-bit units (see gemm.h) block by block.
//
// C[m][n] = sum_k A(m, k) B(k, n). Rows of A are gathered into a block [rows][units] and broadcast; B lies packed in
// panels [units][width], whose lanes are its columns. A tile of kTileRows x width accumulators runs over all of k at
// once (up to kDepth): rereading a panel from the L2 cache costs less than reloading the accumulators would.
//
// Which thread computes an element changes nothing about its value: every element is one chain of multiply-adds in the
// order of k, and one addition a kDepth more.
#pragma once
#include <algorithm>

#include "cpu/product/gemm.h"
#include "cpu/product/tasks.h"
#include "cpu/run/scratch.h"

namespace mmk::MMK_ISA {

// 24 accumulators of 32 registers, 12 of 16; 8 where a product needs a register of its own (no fused multiply-add). Of
// a tile of columns whole tiles of rows are made, so vectors of four lanes take no more than four rows.
constexpr int kTileRows = kHasAmx ? kAmxRows : kRegisters == 32 && kLanes > 4 ? 8 : 4;
constexpr int kTileVectors = kHasFma ? 3 : 2;
constexpr int kTileColumns = kTileVectors * kLanes;
static_assert(kTileColumns % kTileRows == 0);

// A float32 chain of multiply-adds loses digits as it grows, so the accumulators are emptied after this many: sooner in
// a short product, where that costs little and libraries sum in several accumulators.
constexpr int64_t kChain = 256, kShortChain = 64;
// Units of k after which a tile makes way for the next one. AMX is faster than the L2 cache: so deep a part of a panel
// stays in L1 while all rows meet it.
constexpr int64_t kDepth = kHasAmx ? 128 : 1280;

static MMK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static MMK_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The element type that a unit of Operand holds one or two of.
template <class Operand>
using ElementOf = std::conditional_t<Operand::kPack == 1, float, BFloat16>;

// Units between rows of at least `units`, with room for a vector past the last: an odd number of cache lines, so that
// rows read together do not fall into the same set of the cache.
static MMK_INLINE int64_t row_units(int64_t units) { return (ceil_div(units + kLanes, 16) | 1) * 16; }

// ---- panels

// The units that so many elements along k take, their padding included.
template <class Operand>
static MMK_INLINE int64_t depth(int64_t elements) {
    return round_up(ceil_div(elements, Operand::kPack), kDepthStep);
}

// Columns cut into panels of at most kTileVectors vectors, as even as can be: a lone vector at the end would load more
// than it multiplies.
struct Panels {
    int64_t vectors, count;

    explicit Panels(int64_t columns) : vectors(ceil_div(columns, kLanes)), count(ceil_div(vectors, kTileVectors)) {}
    int64_t lanes() const { return vectors * kLanes; }
    int64_t first(int64_t panel) const { return vectors * panel / count * kLanes; }
    int64_t width(int64_t panel) const { return first(panel + 1) - first(panel); }
    int64_t offset(int64_t panel, int64_t units) const { return first(panel) * units; }  // in a packed matrix
};

// kLanes lanes of a panel of `width` from kLanes rows, whose units along k become the panel's.
static inline void pack_transposed(const uint32_t* rows, int64_t row_stride, int64_t units, int64_t width,
                                   uint32_t* panel) {
    for (int64_t u0 = 0; u0 < units; u0 += kLanes) {
        UVec block[kLanes];
        MMK_UNROLL for (int l = 0; l < kLanes; l++) block[l] = load_bits(rows + l * row_stride + u0);
        transpose(block);
        const int64_t count = std::min<int64_t>(kLanes, units - u0);
        for (int64_t u = 0; u < count; u++) store_bits(panel + (u0 + u) * width, block[u]);
    }
}

// Units [first, first + count) of every panel, from rows of elements that lie along the lanes: unit u is made of the
// kPack rows from kPack * (u - first) on.
template <class Operand>
static void pack_rows(const ElementOf<Operand>* rows, int64_t row_stride, int64_t first, int64_t count, Panels panels,
                      int64_t units, uint32_t* packed) {
    for (int64_t p = 0; p < panels.count; p++) {
        const int64_t width = panels.width(p);
        uint32_t* panel = packed + panels.offset(p, units) + first * width;
        const ElementOf<Operand>* from = rows + panels.first(p);
        for (int64_t u = 0; u < count; u++) {
            for (int64_t l = 0; l < width; l += kLanes) {
                if constexpr (Operand::kPack == 1) {
                    store_bits(panel + u * width + l, as_bits(load(from + u * row_stride + l)));
                } else {
                    HalfLanes low, high;
                    memcpy(&low, from + 2 * u * row_stride + l, sizeof low);
                    memcpy(&high, from + (2 * u + 1) * row_stride + l, sizeof high);
                    store_bits(panel + u * width + l,
                               __builtin_convertvector(low, UVec) | __builtin_convertvector(high, UVec) << 16);
                }
            }
        }
    }
}

// ---- tiles

// c[r][lane] = or += sum over units; c's rows are c_row apart.
template <class Operand, int kRows, int kVectors>
static void tile(Broadcast a, const uint32_t* b, int64_t units, float* c, int64_t c_row, bool add) {
    if (add) {  // on its way while the product runs
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kVectors; v++) __builtin_prefetch(c + r * c_row + v * kLanes, 1);
    }
    const int64_t chain = units < 2 * kChain ? kShortChain : kChain;
    const int64_t chains = Operand::kPack == 1 ? std::max<int64_t>(1, ceil_div(units, chain)) : 1;
    for (int64_t i = 0; i < chains; i++, add = true) {
        const int64_t first = units * i / chains, count = units * (i + 1) / chains - first;
        multiply_into<Operand, kRows, kVectors>({a.a + first * a.unit, a.row, a.unit}, b + first * kVectors * kLanes,
                                                kVectors * kLanes, count, c, c_row, add);
    }
}

// The tile that `rows` (at most kTileRows) and `width` ask for. Rows are rounded up to half a tile, with AMX to a whole
// one: a and c must be there.
template <class Operand>
static MMK_INLINE void multiply_tile(Broadcast a, int64_t rows, const uint32_t* b, int64_t width, int64_t units,
                                     float* c, int64_t c_row, bool add) {
    static_assert(kTileVectors <= 3);
    constexpr int kFewRows = kHasAmx ? kTileRows : kTileRows / 2;
    const bool few = rows <= kFewRows;
    switch (width / kLanes) {
        case 1:
            return (few ? tile<Operand, kFewRows, 1> : tile<Operand, kTileRows, 1>)(a, b, units, c, c_row, add);
        case 2:
            return (few ? tile<Operand, kFewRows, 2> : tile<Operand, kTileRows, 2>)(a, b, units, c, c_row, add);
        default:
            return (few ? tile<Operand, kFewRows, kTileVectors>
                        : tile<Operand, kTileRows, kTileVectors>)(a, b, units, c, c_row, add);
    }
}

// ---- whole products of gathered rows and packed panels

// The blocks of k are as even as can be; c holds the tiles between them.
template <class Operand, class Finish>
static void multiply_panel(const uint32_t* a, int64_t a_row, int64_t first_row, int64_t rows, Panels panels, int64_t p,
                           const uint32_t* b, int64_t units, float* c, Finish&& finish) {
    const int64_t blocks = std::max<int64_t>(1, ceil_div(units, kDepth)), width = panels.width(p);
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t steps = units / kDepthStep, first = steps * i / blocks * kDepthStep;
        const int64_t count = steps * (i + 1) / blocks * kDepthStep - first;
        for (int64_t r = 0; r < rows; r += kTileRows) {
            const int64_t tile_rows = std::min<int64_t>(kTileRows, rows - r);
            float* at = blocks == 1 ? c : c + r * kTileColumns;
            multiply_tile<Operand>({a + r * a_row + first, a_row, 1}, tile_rows, b + first * width, width, count, at,
                                   kTileColumns, i > 0);
            if (i == blocks - 1) finish(first_row + r, tile_rows, panels.first(p), width, at);
        }
    }
}

// gather(first, count, block, row_units): rows [first, first + count) as units, the row's padding zeroed to `units`.
// panel(p, worker): panel p, packed by now. finish(row, count, column, width, tile): takes a tile of the result, whose
// rows are kTileColumns apart; columns past the last are there too.

// Few rows: all of them gathered at once, then a panel a task, so that a panel packed by its task is still in the cache
// when it is used.
template <class Operand, class Gather, class Panel, class Finish>
static void multiply_few(int64_t rows, Panels panels, int64_t units, int threads, Gather&& gather, Panel&& panel,
                         Finish&& finish) {
    const int64_t a_row = row_units(units), c_size = round_up(rows, kTileRows) * kTileColumns;
    Scratch<uint32_t> a(round_up(rows, kTileRows) * a_row);
    Scratch<float> c(threads * c_size);
    const int64_t group = 2 * kTileRows;
    for_each(ceil_div(rows, group), threads, [&](int64_t i, int64_t) {
        gather(i * group, std::min(group, rows - i * group), a.get() + i * group * a_row, a_row);
    });
    for_each(panels.count, threads, [&](int64_t p, int64_t worker) {
        multiply_panel<Operand>(a.get(), a_row, 0, rows, panels, p, panel(p, worker), units, c.get() + worker * c_size,
                                finish);
    });
}

// Many rows: a block of rows a task, gathered, multiplied with every panel and finished by one thread.
template <class Operand, class Gather, class Panel, class Finish>
static void multiply_many(int64_t rows, Panels panels, int64_t units, int threads, Gather&& gather, Panel&& panel,
                          Finish&& finish) {
    const int64_t a_row = row_units(units);
    // 192 KB: beside a panel in the L2 cache. With AMX 640 KB of 2 MB, for the panels come from beyond it once a block.
    constexpr int64_t kBlockUnits = (kHasAmx ? 160 : 48) << 10;
    const int64_t block = std::clamp<int64_t>(kBlockUnits / a_row / kTileRows, 2, kHasAmx ? 16 : 12) * kTileRows;
    const int64_t a_size = block * a_row, c_size = block * kTileColumns;
    Scratch<uint32_t> a(threads * a_size);
    Scratch<float> c(threads * c_size);
    for_each(ceil_div(rows, block), threads, [&](int64_t i, int64_t worker) {
        const int64_t first = i * block, count = std::min(block, rows - first);
        uint32_t* a_block = a.get() + worker * a_size;
        gather(first, count, a_block, a_row);
        for (int64_t p = 0; p < panels.count; p++) {
            multiply_panel<Operand>(a_block, a_row, first, count, panels, p, panel(p, worker), units,
                                    c.get() + worker * c_size, finish);
        }
    });
}

// Up to this many rows are few: all of them together stay in the caches.
constexpr int64_t kFewGathered = 1024;

template <class Operand, class Gather, class Panel, class Finish>
static void multiply_rows(int64_t rows, Panels panels, int64_t units, int threads, Gather&& gather, Panel&& panel,
                          Finish&& finish) {
    if (rows <= kFewGathered) {
        multiply_few<Operand>(rows, panels, units, threads, gather, panel, finish);
    } else {
        multiply_many<Operand>(rows, panels, units, threads, gather, panel, finish);
    }
}

}  // namespace mmk::MMK_ISA
