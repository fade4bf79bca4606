// All pairs of two sets of features, tile by tile: products of their rows, and sums of rows weighted by a tile.
//
//     products   p_ij = sum_d image_id text_jd                       (rows x columns of one tile)
//     gradients  dI_id += sum_j g_ij text_jd,  dT_jd += sum_i g_ij image_id     (g one tile of weights)
//
// Each set of rows, N of them, is packed twice. `lanes`: panels of kPanel rows, [N / kPanel][D units][kPanel], a row a
// lane, which serve the products both as the broadcast and as the vector operand; with AMX the broadcast operand is
// rows, [N][D units]. `columns`: panels of kPanel columns,
// [D / kPanel][N units][kPanel], a column a lane, the vector operand of the gradients. The gradients are summed in the
// panels' own layout, [tile][D / kPanel][rows of a tile][kPanel], whole lines one after the other in large pages:
// summed in the caller's tensors, rows far apart would miss the address translation's cache at every step (5 % slower).
// Padding is zero. Packing moves O(N D) bytes once, against O(N^2 D) operations.
//
// A tile is kTile x kTile, or smaller for few rows so that there is work for several threads. 144 is a multiple of
// every shape of the micro-kernel; a tile of float32 (81 KB) and the panels it meets share the L2 cache, while its
// depth of 144 keeps the accumulators busy long enough to hide the loads and stores of the gradients' rows. With AMX
// the pairs along a side have to fill its tiles: multiples of 96.
#pragma once
#include "cpu/product/matmul.h"

namespace mmk::MMK_ISA {

constexpr int kPanel = kTileColumns;
constexpr int kTile = kHasAmx ? 192 : 144;
constexpr int kSmallTile = kHasAmx ? kTile / 2 : kTile / 3;
static_assert(kPanel % kTileRows == 0 && kSmallTile % kPanel == 0);

// ---- c = or += a b, with a memory that is far away

// Memory that the next product will read, asked for a line at a time while this one runs.
struct RowPrefetcher {
    const uint32_t *next, *end;
    MMK_INLINE void fetch() {
        if (next < end) __builtin_prefetch(next, 0, 2);
        next += 16;
    }
};

// Rows of c are asked for one by one while the product runs. All at once they would occupy the L1 cache's miss buffers,
// and the operands would wait for them: 10 % slower in float32, 20 % in bfloat16. AMX loads c first: there they are
// those of the next tile.
template <class Operand, int kVectors>
static void far_tile(Broadcast a, const uint32_t* b, int64_t units, float* c, int64_t c_row, bool add,
                     RowPrefetcher& prefetcher) {
    int row = 0;
    const auto beside = [&] {
        prefetcher.fetch();
        if (row < kTileRows) {
            const float* at = c + (kHasAmx ? kTileRows + row : row) * c_row;
            MMK_UNROLL for (int v = 0; v < kVectors; v++) __builtin_prefetch(at + v * kLanes, 1);
            row++;
        }
    };
    multiply_into<Operand, kTileRows, kVectors>(a, b, kPanel, units, c, c_row, add, beside);
}

// One panel: the first `vectors` vectors of its lanes. Rows of a come in groups of kPanel, a_group units apart, and are
// rounded up to kTileRows, as those of c: they must be there. One of a.row and a.unit is 1.
template <class Operand>
static void multiply(Broadcast a, int64_t a_group, int64_t rows, const uint32_t* b, int64_t vectors, int64_t units,
                     float* c, int64_t c_row, bool add, RowPrefetcher prefetcher) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
        const Broadcast from{a.a + r / kPanel * a_group + r % kPanel * a.row, a.row, a.unit};
        static_assert(kTileVectors <= 3);
        if (vectors == 1) {
            far_tile<Operand, 1>(from, b, units, c + r * c_row, c_row, add, prefetcher);
        } else if (vectors == 2) {
            far_tile<Operand, 2>(from, b, units, c + r * c_row, c_row, add, prefetcher);
        } else {
            far_tile<Operand, kTileVectors>(from, b, units, c + r * c_row, c_row, add, prefetcher);
        }
    }
}

// ---- packing

template <class T>
struct Rows {  // a Matrix whose element type is known
    const T* data;
    int64_t rows, columns, row_stride, column_stride;

    explicit Rows(const Matrix& m)
        : data(static_cast<const T*>(m.data)),
          rows(m.rows),
          columns(m.columns),
          row_stride(m.row_stride),
          column_stride(m.column_stride) {}
    const T* row(int64_t i) const { return data + i * row_stride; }
    // kLanes elements of row i from column d on, zero past the last
    Vec floats(int64_t i, int64_t d) const {
        return as_float(load_units<FloatOperand>(row(i), column_stride, d, columns));
    }
};

// Units [first, first + count) of every panel of `columns` (see above): unit u is made of rows kPack * u onwards.
template <class Operand, class T>
static void pack_columns(const Rows<T>& rows, int64_t first, int64_t count, int64_t units, uint32_t* packed) {
    const auto bits = [&](int64_t i, int64_t d) { return i < rows.rows ? as_bits(rows.floats(i, d)) : UVec{}; };
    for (int64_t u = first; u < first + count; u++) {
        for (int64_t d = 0; d < round_up(rows.columns, kPanel); d += kLanes) {
            uint32_t* to = packed + (d / kPanel * units + u) * kPanel + d % kPanel;
            if constexpr (Operand::kPack == 1) {
                store_bits(to, bits(u, d));
            } else {  // the upper half of a float is the bfloat16 it was widened from
                static_assert(std::is_same_v<T, BFloat16>);
                store_bits(to, bits(2 * u, d) >> 16 | bits(2 * u + 1, d));
            }
        }
    }
}

// How the rows of a set are cut into tiles. Nothing here knows the number of threads, so no result can depend on it.
struct Tiling {
    int64_t rows, side, tiles;  // `side` rows a tile, of which there are `tiles`

    explicit Tiling(int64_t n)
        : rows(n),
          side(n <= 4 * kSmallTile   ? kSmallTile
               : n <= 8 * kSmallTile ? 2 * kSmallTile
                                     : kTile),
          tiles(ceil_div(n, side)) {}
    int64_t first(int64_t tile) const { return tile * side; }
    int64_t count(int64_t tile) const { return std::min(side, rows - tile * side); }
    int64_t padded() const { return tiles * side; }
};

// Tiles that lie next to each other, the rows or columns of one task. At most 64 of them: that bounds the memory of
// what is kept a band, and the threads that find work.
struct Bands {
    int64_t tiles, size, count;

    Bands(const Tiling& tiling, int64_t least)
        : tiles(tiling.tiles), size(std::max(least, ceil_div(tiles, 64))), count(ceil_div(tiles, size)) {}
    int64_t first(int64_t band) const { return band * size; }
    int64_t last(int64_t band) const { return std::min(tiles, (band + 1) * size); }
};

template <class T>
class Pairs {
  public:
    using Operand = OperandOf<T>;

    Pairs(const Matrix& image, const Matrix& text, bool with_grads, int threads)
        : image(image),
          text(text),
          rows(image.rows),
          columns(text.rows),
          panels(ceil_div(image.columns, kPanel)),
          depth_(depth<Operand>(image.columns)),
          image_units_(rows.padded() / Operand::kPack),
          text_units_(columns.padded() / Operand::kPack),
          image_rows_lie_(kHasAmx ? Lie{row_units(depth_), 1} : Lie{1, kPanel}),
          image_rows_(rows.padded() * (kHasAmx ? image_rows_lie_.row : depth_)),
          text_lanes_(columns.padded() * depth_),
          image_columns_(with_grads ? image_units_ * panels * kPanel : 0),
          text_columns_(with_grads ? text_units_ * panels * kPanel : 0) {
        for_each(rows.tiles + columns.tiles, threads, [&](int64_t i, int64_t) {
            if (i < rows.tiles) {
                kHasAmx ? copy_rows(i) : pack_lanes_of_tile(this->image, rows, i, image_rows_.get());
                if (with_grads) pack_columns_of_tile(this->image, rows, i, image_units_, image_columns_.get());
            } else {
                const int64_t tile = i - rows.tiles;
                pack_lanes_of_tile(this->text, columns, tile, text_lanes_.get());
                if (with_grads) pack_columns_of_tile(this->text, columns, tile, text_units_, text_columns_.get());
            }
        });
    }

    // p[r * kTile + c] = <image row r, text row c> of tiles a and b; rows up to a whole kTileRows and columns up to a
    // whole vector are written, those of the padding being 0. Features are summed in blocks: a panel's block stays in
    // the caches, and the sum of the blocks' sums rounds less than one long chain of additions.
    void products(int64_t a, int64_t b, float* p) const {
        constexpr int64_t kBlock = kHasAmx ? 128 : 256;
        const int64_t blocks = ceil_div(depth_, kBlock);
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t steps = depth_ / kDepthStep, u = steps * i / blocks * kDepthStep;
            const int64_t units = steps * (i + 1) / blocks * kDepthStep - u;
            const Broadcast of = image_rows(rows.first(a), u);
            for (int64_t c = 0; c < columns.count(b); c += kPanel) {
                const uint32_t* lanes = text_lanes_.get() + (columns.first(b) + c) * depth_ + u * kPanel;
                const uint32_t* next = lanes + (c + kPanel < columns.side ? depth_ * kPanel : 0);
                multiply<Operand>(of, kHasAmx ? kPanel * of.row : depth_ * kPanel, rows.count(a), lanes,
                                  vectors(columns.count(b) - c), units, p + c, kTile, i > 0,
                                  {next, next + units * kPanel});
            }
        }
    }

    // Panel `d` of dI's rows of tile a (+)= g text. g: unit k of row r at r * kTile / kPack + k.
    void add_to_image(int64_t a, int64_t b, const uint32_t* g, int64_t d, float* d_image, bool add) const {
        gradient({g, kTile / Operand::kPack, 1}, {columns, b, text_columns_.get(), text_units_}, rows, a, d, d_image,
                 add);
    }
    // Panel `d` of dT's rows of tile b (+)= g^T image. g: unit k of column c at k * kTile + c, with AMX as above.
    void add_to_text(int64_t a, int64_t b, const uint32_t* g, int64_t d, float* d_text, bool add) const {
        gradient(kHasAmx ? Broadcast{g, kTile / Operand::kPack, 1} : Broadcast{g, 1, kTile},
                 {rows, a, image_columns_.get(), image_units_}, columns, b, d, d_text, add);
    }
    // kLanes numbers of row i of a gradient, from column d on, a multiple of kLanes.
    Vec gradient_at(const Tiling& tiling, const float* gradient, int64_t i, int64_t d) const {
        const int64_t tile = i / tiling.side, row = i % tiling.side;
        return load(gradient + ((tile * panels + d / kPanel) * tiling.side + row) * kPanel + d % kPanel);
    }

    const Rows<T> image, text;
    const Tiling rows, columns;  // of p: the images and the texts
    const int64_t panels;        // of D

  private:
    static int64_t vectors(int64_t columns) { return std::min<int64_t>(ceil_div(columns, kLanes), kTileVectors); }

    struct TileOfColumns {  // `units` along all rows of the set
        const Tiling& tiling;
        int64_t tile;
        const uint32_t* packed;
        int64_t units;
    };
    void gradient(Broadcast g, const TileOfColumns& of, const Tiling& into, int64_t to, int64_t d, float* sum,
                  bool add) const {
        const int64_t units = depth<Operand>(of.tiling.count(of.tile));
        const uint32_t* panel = of.packed + (d * of.units + of.tiling.first(of.tile) / Operand::kPack) * kPanel;
        const uint32_t* next = panel + (d + 1 < panels ? of.units * kPanel : 0);
        multiply<Operand>(g, kPanel * g.row, into.count(to), panel, vectors(image.columns - d * kPanel), units,
                          sum + (to * panels + d) * into.side * kPanel, kPanel, add, {next, next + units * kPanel});
    }

    void pack_lanes_of_tile(const Rows<T>& of, const Tiling& tiling, int64_t tile, uint32_t* lanes) const {
        const int64_t first = tiling.first(tile);
        for (int64_t i = first; i < first + tiling.side; i += kPanel) {
            pack_lanes<Operand>(of.row(i), of.row_stride, of.column_stride, of.rows - i, of.columns, depth_, kPanel,
                                lanes + i * depth_);
        }
    }
    void copy_rows(int64_t tile) const {
        for (int64_t i = rows.first(tile); i < rows.first(tile) + rows.side; i++) {
            uint32_t* to = image_rows_.get() + i * image_rows_lie_.row;
            for (int64_t u = 0; u < depth_; u += kLanes) {  // there is room for a vector more
                const bool present = i < image.rows;
                store_bits(to + u, present ? load_units<Operand>(image.row(i), image.column_stride, u * Operand::kPack,
                                                                 image.columns)
                                           : UVec{});
            }
        }
    }
    void pack_columns_of_tile(const Rows<T>& of, const Tiling& tiling, int64_t tile, int64_t units,
                              uint32_t* packed) const {
        pack_columns<Operand>(of, tiling.first(tile) / Operand::kPack, tiling.side / Operand::kPack, units, packed);
    }

    struct Lie {
        int64_t row, unit;
    };
    // From row `first`, which a panel begins with, and unit u on.
    Broadcast image_rows(int64_t first, int64_t u) const {
        const int64_t at = kHasAmx ? first * image_rows_lie_.row + u : first * depth_ + u * kPanel;
        return {image_rows_.get() + at, image_rows_lie_.row, image_rows_lie_.unit};
    }

    int64_t depth_;                     // units along D
    int64_t image_units_, text_units_;  // units along the rows of each set
    Lie image_rows_lie_;
    Scratch<uint32_t> image_rows_, text_lanes_, image_columns_, text_columns_;
};

}  // namespace mmk::MMK_ISA
