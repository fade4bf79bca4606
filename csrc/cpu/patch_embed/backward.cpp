// Patch embedding, backward. With G = dL/dY (M x E, M = B * N), X the patches (M x K) and W the weight (E x K):
//
//   dW[e, k] = sum_m G[m, e] X[m, k]        dbias[e] = sum_m G[m, e]        dX = G W, each pixel to its own place
//
// dX is the forward's kind of product, rows of G broadcast against panels of W, and each tile of the result is
// scattered into the images' gradient: a pixel belongs to one patch, so nothing is summed there.
//
// dW sums over M, which is long: chunks of kChunk patches are gathered (normalised again from bytes: cheaper than
// having kept them), packed with their index along the units, and added to dW in their order. So the working memory is
// a chunk and dW in float32, whatever M is; images and G are read once a product. The bias' gradient is summed on the
// way, in short float32 runs that are then added in double: one long float32 sum would lose digits that torch.sum
// keeps.
#include "cpu/patch_embed/call.h"
#include "cpu/patch_embed/pixels.h"

namespace mmk::MMK_ISA {

namespace {

constexpr int64_t kChunk = 512;          // patches summed in one accumulation
constexpr int64_t kResident = 96 << 10;  // units of x that stay in the L2 cache beside a panel of g: 384 KB
constexpr int64_t kGroup = 32;           // rows gathered, and summed for the bias, by one task

// Rows of a matrix, read in groups and packed along the units of panels; or, kColumns, each column of it as a row of
// units, which is the broadcast operand that AMX takes.
template <class Operand, bool kColumns = false>
class GroupPacker {
  public:
    using Element = ElementOf<Operand>;

    GroupPacker(const PatchReader& reader, int64_t columns, int threads)
        : reader_(reader),
          panels_(columns),
          row_(row_units(panels_.lanes()) * Operand::kPack),
          rows_(threads * kGroup * row_units(panels_.lanes())) {}

    Panels panels() const { return panels_; }

    // Rows [first + group, ...) of [first, last) go to units from group / kPack on; returns them as they were read.
    const Element* pack(int64_t first, int64_t last, int64_t group, int64_t units, int64_t worker,
                        uint32_t* packed) const {
        const int64_t count = std::min(kGroup, last - first - group);
        Element* rows = reinterpret_cast<Element*>(rows_.get() + worker * kGroup * row_units(panels_.lanes()));
        reader_.read(first + group, count, rows, row_);
        const int64_t whole = depth<Operand>(count) * Operand::kPack;
        for (int64_t r = count; r < whole; r++) memset(rows + r * row_, 0, panels_.lanes() * sizeof(Element));
        put(rows, group / Operand::kPack, whole / Operand::kPack, units, packed);
        return rows;
    }

    int64_t row() const { return row_; }

    // How the panels lie as the broadcast operand of a product.
    static int64_t size(Panels panels, int64_t units) { return panels.lanes() * (kColumns ? row_units(units) : units); }
    static Broadcast columns(const uint32_t* packed, Panels panels, int64_t p, int64_t column, int64_t units) {
        if constexpr (kColumns) {
            return {packed + (panels.first(p) + column) * row_units(units), row_units(units), 1};
        } else {
            return {packed + panels.offset(p, units) + column, 1, panels.width(p)};
        }
    }

  private:
    void put(const Element* rows, int64_t first, int64_t count, int64_t units, uint32_t* packed) const {
        if constexpr (kColumns) {
            pack_columns(rows, first, count, row_units(units), packed);
        } else {
            pack_rows<Operand>(rows, row_, first, count, panels_, units, packed);
        }
    }
    // Columns become rows of units, of which these are `count` from `first` on.
    void pack_columns(const Element* rows, int64_t first, int64_t count, int64_t to_row, uint32_t* packed) const {
        static_assert(kGroup <= Operand::kPack * kLanes || !kColumns);
        for (int64_t column = 0; column < panels_.lanes(); column += kLanes) {
            UVec block[kLanes] = {};
            for (int64_t u = 0; u < count; u++) {
                HalfLanes pair[2];
                for (int i = 0; i < 2; i++) memcpy(&pair[i], rows + (2 * u + i) * row_ + column, sizeof pair[i]);
                block[u] = __builtin_convertvector(pair[0], UVec) | __builtin_convertvector(pair[1], UVec) << 16;
            }
            transpose(block);
            for (int i = 0; i < kLanes; i++) {
                memcpy(packed + (column + i) * to_row + first, &block[i], count * sizeof *packed);
            }
        }
    }

    const PatchReader& reader_;
    Panels panels_;
    int64_t row_;  // in elements
    Scratch<uint32_t> rows_;
};

// sums[e] of `count` rows of G.
template <class Element>
void sum_rows(const Element* rows, int64_t row, int64_t count, int64_t lanes, double* sums) {
    constexpr int kHalf = kLanes / 2;  // as many doubles as a register holds
    typedef float Floats __attribute__((vector_size(kHalf * sizeof(float))));
    typedef double Doubles __attribute__((vector_size(kHalf * sizeof(double))));
    for (int64_t e = 0; e < lanes; e += kLanes) {
        Doubles sum[2] = {};
        for (int64_t r = 0; r < count; r++) {
            const Vec values = load(rows + r * row + e);
            Floats halves[2];
            memcpy(halves, &values, sizeof values);
            MMK_UNROLL for (int i = 0; i < 2; i++) sum[i] += __builtin_convertvector(halves[i], Doubles);
        }
        memcpy(sums + e, sum, sizeof sum);
    }
}

// A chunk of patches and of their upstream gradients, packed along the units.
struct Chunk {
    int64_t first, last, units;
    uint32_t *x, *g;
};

template <class T>
class WeightGradient {
  public:
    using Operand = OperandOf<T>;
    using Gradients = GroupPacker<Operand, kHasAmx>;

    WeightGradient(const PatchEmbedBackward& call, int threads)
        : call_(call),
          rows_(num_rows(call.images)),
          features_(num_rows(call.weight)),
          threads_(threads),
          order_(memory_order(call.images)),
          normalisation_(call.images, order_, call.mean, call.std_dev),
          images_(call.images, order_, &normalisation_),
          grad_(call.grad, memory_order(call.grad)),
          x_(images_, num_pixels(call.images), threads),
          g_(grad_, features_, threads),
          lanes_(g_.panels().lanes()),
          d_row_(row_units(x_.panels().lanes())),
          chunk_units_(depth<Operand>(std::min(rows_, kChunk))),
          chunk_size_(chunk_units_ * x_.panels().lanes() + Gradients::size(g_.panels(), chunk_units_)),
          group_(std::max<int64_t>(1, kResident / std::max<int64_t>(1, chunk_units_ * kTileColumns))),
          packed_((rows_ > kChunk ? 2 : 1) * chunk_size_),
          d_(call.need_weight ? (rows_ > kChunk ? lanes_ : threads * kTileRows) * d_row_ : 0),
          writer_(call.d_weight, order_),
          partial_(kChunk / kGroup * lanes_),
          d_bias_(lanes_) {}

    // While one chunk is multiplied, the next is packed: by then it is there, and threads meet once a chunk.
    void run() {
        memset(d_bias_.get(), 0, lanes_ * sizeof(double));
        const bool one = rows_ <= kChunk;
        const int64_t chunks = std::max<int64_t>(1, ceil_div(rows_, kChunk));
        const int64_t parts = one ? kTileColumns / kTileRows : ceil_div(x_.panels().count, group_);
        const int64_t products = call_.need_weight ? g_.panels().count * parts : 0;
        for (int64_t i = 0; i <= chunks; i++) {
            const Chunk next = chunk(i), now = chunk(i - 1);
            const int64_t groups = ceil_div(next.last - next.first, kGroup);
            const Shares to_pack(groups, threads_), to_multiply(i > 0 ? products : 0, threads_);
            on_threads(threads_, [&](int64_t worker) {
                to_pack.take(worker, [&](int64_t group) { pack(next, group, worker); });
                to_multiply.take(worker, [&](int64_t task) { one ? finish(now, task, worker) : multiply(now, task); });
            });
            for (int64_t j = 0; call_.need_bias && j < groups; j++) {
                for (int64_t e = 0; e < lanes_; e++) d_bias_.get()[e] += partial_.get()[j * lanes_ + e];
            }
        }
        if (call_.need_bias) write_bias();
        if (call_.need_weight && !one) write_weight();
    }

  private:
    Chunk chunk(int64_t i) const {
        const int64_t first = std::min(i * kChunk, rows_), last = std::min(first + kChunk, rows_);
        uint32_t* x = packed_.get() + (rows_ > kChunk ? i & 1 : 0) * chunk_size_;
        return {first, last, depth<Operand>(last - first), x, x + chunk_units_ * x_.panels().lanes()};
    }

    void pack(const Chunk& c, int64_t group, int64_t worker) const {
        const int64_t count = std::min(kGroup, c.last - c.first - group * kGroup);
        const auto* read = g_.pack(c.first, c.last, group * kGroup, c.units, worker, c.g);
        if (call_.need_bias) sum_rows(read, g_.row(), count, lanes_, partial_.get() + group * lanes_);
        if (call_.need_weight) x_.pack(c.first, c.last, group * kGroup, c.units, worker, c.x);
    }

    // One of several chunks: a panel of features times a group of panels of pixels, added to what the chunks before it
    // came to. The group stays in the L2 cache from task to task.
    void multiply(const Chunk& c, int64_t task) const {
        const int64_t first = task / g_.panels().count * group_, q = task % g_.panels().count;
        for (int64_t p = first; p < std::min(first + group_, x_.panels().count); p++) {
            for (int64_t r = 0; r < rows_of(q); r += kTileRows) {
                multiply_one(c, p, q, r, d_.get() + (g_.panels().first(q) + r) * d_row_, c.first > 0);
            }
        }
    }

    // The only chunk: the rows of dW that a tile of features is, complete, and written as they lie in memory.
    void finish(const Chunk& c, int64_t task, int64_t worker) const {
        constexpr int64_t kParts = kTileColumns / kTileRows;
        const int64_t q = task / kParts, r = task % kParts * kTileRows;
        if (r >= rows_of(q)) return;
        float* rows = d_.get() + worker * kTileRows * d_row_;
        for (int64_t p = 0; p < x_.panels().count; p++) multiply_one(c, p, q, r, rows, false);
        writer_.write(g_.panels().first(q) + r, std::min<int64_t>(kTileRows, rows_of(q) - r), 0,
                      num_pixels(call_.weight), rows, d_row_);
    }

    int64_t rows_of(int64_t q) const { return std::min(g_.panels().width(q), features_ - g_.panels().first(q)); }

    void multiply_one(const Chunk& c, int64_t p, int64_t q, int64_t r, float* rows, bool add) const {
        const Panels x = x_.panels(), g = g_.panels();
        multiply_tile<Operand>(Gradients::columns(c.g, g, q, r, c.units), std::min<int64_t>(kTileRows, rows_of(q) - r),
                               c.x + x.offset(p, c.units), x.width(p), c.units, rows + x.first(p), d_row_, add);
    }

    void write_bias() const {
        for (int64_t e = 0; e < features_; e++) {
            static_cast<T*>(call_.d_bias)[e] = from_float<T>(static_cast<float>(d_bias_.get()[e]));
        }
    }

    void write_weight() const {
        for_each(ceil_div(features_, kGroup), threads_, [&](int64_t i, int64_t) {
            const int64_t e = i * kGroup;
            writer_.write(e, std::min(kGroup, features_ - e), 0, num_pixels(call_.weight), d_.get() + e * d_row_,
                          d_row_);
        });
    }

    const PatchEmbedBackward& call_;
    int64_t rows_, features_;
    int threads_;
    PixelOrder order_;
    Normalisation normalisation_;
    PatchReader images_, grad_;
    GroupPacker<Operand> x_;
    Gradients g_;
    int64_t lanes_, d_row_, chunk_units_, chunk_size_, group_;
    Scratch<uint32_t> packed_;
    Scratch<float> d_;
    PatchWriter writer_;
    Scratch<double> partial_, d_bias_;
};

template <class T>
void backward_images(const PatchEmbedBackward& call, int threads) {
    using Operand = OperandOf<T>;
    const int64_t rows = num_rows(call.images), pixels = num_pixels(call.images), features = num_rows(call.weight);
    if (rows == 0) return;
    const PixelOrder order = memory_order(call.d_images);
    const PatchReader weight(call.weight, order), grad(call.grad, memory_order(call.grad));
    const PatchWriter writer(call.d_images, order);

    const GroupPacker<Operand> packer(weight, pixels, threads);
    const Panels panels = packer.panels();
    const int64_t units = depth<Operand>(features);
    Scratch<uint32_t> packed(panels.lanes() * units);
    for_each(ceil_div(features, kGroup), threads,
             [&](int64_t i, int64_t worker) { packer.pack(0, features, i * kGroup, units, worker, packed.get()); });

    const auto gather = [&](int64_t first, int64_t count, uint32_t* block, int64_t row) {
        grad.read_units<Operand>(first, count, block, row);
    };
    const auto panel = [&](int64_t p, int64_t) { return packed.get() + panels.offset(p, units); };
    const auto finish = [&](int64_t row, int64_t count, int64_t column, int64_t width, const float* tile) {
        writer.write(row, count, column, width, tile, kTileColumns);
    };
    multiply_rows<Operand>(rows, panels, units, threads, gather, panel, finish);
}

template <class T>
void run(const PatchEmbedBackward& call) {
    const double columns = static_cast<double>(num_pixels(call.images)) * static_cast<double>(num_rows(call.weight));
    const int threads = useful_threads(2.0 * static_cast<double>(num_rows(call.images)) * columns);
    if (call.need_weight || call.need_bias) WeightGradient<T>(call, threads).run();
    if (call.need_images) backward_images<T>(call, threads);
}

}  // namespace

void patch_embed_backward(const PatchEmbedBackward& call) {
    with_element_type(call.weight.dtype, [&](auto type) { run<decltype(type)>(call); });
}

}  // namespace mmk::MMK_ISA
