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
#include "patch_embed.h"
#include "pixels.h"

namespace mmk::MMK_ISA {

namespace {

constexpr int64_t kChunk = 512;  // patches summed in one accumulation
constexpr int64_t kGroup = 32;   // rows gathered, and summed for the bias, by one task

// Rows of a matrix, read in groups and packed along the units of panels.
template <class Operand>
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
        const int64_t whole = round_up(count, Operand::kPack);
        for (int64_t r = count; r < whole; r++) memset(rows + r * row_, 0, panels_.lanes() * sizeof(Element));
        pack_rows<Operand>(rows, row_, group / Operand::kPack, whole / Operand::kPack, panels_, units, packed);
        return rows;
    }

    int64_t row() const { return row_; }

  private:
    const PatchReader& reader_;
    Panels panels_;
    int64_t row_;  // in elements
    Scratch<uint32_t> rows_;
};

typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));

// sums[e] of `count` rows of G.
template <class Element>
void sum_rows(const Element* rows, int64_t row, int64_t count, int64_t lanes, double* sums) {
    for (int64_t e = 0; e < lanes; e += kLanes) {
        Doubles sum{};
        for (int64_t r = 0; r < count; r++) sum += __builtin_convertvector(load(rows + r * row + e), Doubles);
        memcpy(sums + e, &sum, sizeof sum);
    }
}

template <class T>
void backward_weight(const PatchEmbedBackward& call) {
    using Operand = OperandOf<T>;
    const int64_t rows = num_rows(call.images), pixels = num_pixels(call.images), features = num_rows(call.weight);
    const int threads = useful_threads(2.0 * static_cast<double>(rows) * static_cast<double>(pixels * features));
    const PixelOrder order = memory_order(call.images);
    const Normalisation normalisation(call.images, order, call.mean, call.std_dev);
    const PatchReader images(call.images, order, &normalisation), grad(call.grad, memory_order(call.grad));
    const GroupPacker<Operand> x(images, pixels, threads), g(grad, features, threads);
    const Panels x_panels = x.panels(), g_panels = g.panels();

    const int64_t chunk = std::min(rows, kChunk), chunk_units = ceil_div(chunk, Operand::kPack);
    const int64_t d_row = row_units(x_panels.lanes()), lanes = g_panels.lanes();
    Scratch<uint32_t> x_packed(x_panels.lanes() * chunk_units), g_packed(lanes * chunk_units);
    Scratch<float> d(lanes * d_row);
    Scratch<double> partial(ceil_div(chunk, kGroup) * lanes), d_bias(lanes);
    for (int64_t e = 0; e < lanes; e++) d_bias.get()[e] = 0;
    if (rows == 0) memset(d.get(), 0, lanes * d_row * sizeof(float));

    for (int64_t first = 0; first < rows; first += chunk) {
        const int64_t last = std::min(rows, first + chunk), units = ceil_div(last - first, Operand::kPack);
        const int64_t groups = ceil_div(last - first, kGroup);
        for_each(groups, threads, [&](int64_t i, int64_t worker) {
            const int64_t count = std::min(kGroup, last - first - i * kGroup);
            const auto* read = g.pack(first, last, i * kGroup, units, worker, g_packed.get());
            if (call.need_bias) sum_rows(read, g.row(), count, lanes, partial.get() + i * lanes);
            if (call.need_weight) x.pack(first, last, i * kGroup, units, worker, x_packed.get());
        });
        for (int64_t i = 0; call.need_bias && i < groups; i++) {
            for (int64_t e = 0; e < lanes; e++) d_bias.get()[e] += partial.get()[i * lanes + e];
        }
        if (!call.need_weight) continue;
        for_each(x_panels.count * g_panels.count, threads, [&](int64_t i, int64_t) {
            const int64_t p = i / g_panels.count, q = i % g_panels.count;
            const int64_t width = g_panels.width(q), last_row = std::min(width, features - g_panels.first(q));
            for (int64_t r = 0; r < last_row; r += kTileRows) {
                const Broadcast a{g_packed.get() + g_panels.offset(q, units) + r, 1, width};
                multiply_tile<Operand>(a, std::min<int64_t>(kTileRows, last_row - r),
                                       x_packed.get() + x_panels.offset(p, units), x_panels.width(p), units,
                                       d.get() + (g_panels.first(q) + r) * d_row + x_panels.first(p), d_row, first > 0);
            }
        });
    }

    if (call.need_weight) {
        const PatchWriter writer(call.d_weight, order);
        for_each(ceil_div(features, kGroup), threads, [&](int64_t i, int64_t) {
            const int64_t e = i * kGroup;
            writer.write(e, std::min(kGroup, features - e), 0, pixels, d.get() + e * d_row, d_row);
        });
    }
    for (int64_t e = 0; call.need_bias && e < features; e++) {
        static_cast<T*>(call.d_bias)[e] = from_float<T>(static_cast<float>(d_bias.get()[e]));
    }
}

template <class T>
void backward_images(const PatchEmbedBackward& call) {
    using Operand = OperandOf<T>;
    const int64_t rows = num_rows(call.images), pixels = num_pixels(call.images), features = num_rows(call.weight);
    if (rows == 0) return;
    const int threads = useful_threads(2.0 * static_cast<double>(rows) * static_cast<double>(pixels * features));
    const PixelOrder order = memory_order(call.d_images);
    const PatchReader weight(call.weight, order), grad(call.grad, memory_order(call.grad));
    const PatchWriter writer(call.d_images, order);

    const GroupPacker<Operand> packer(weight, pixels, threads);
    const Panels panels = packer.panels();
    const int64_t units = ceil_div(features, Operand::kPack);
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
    if (call.need_weight || call.need_bias) backward_weight<T>(call);
    if (call.need_images) backward_images<T>(call);
}

}  // namespace

void patch_embed_backward(const PatchEmbedBackward& call) {
    switch (call.weight.dtype) {
        case DType::kFloat32:
            return run<float>(call);
        case DType::kBFloat16:
            return run<BFloat16>(call);
        case DType::kFloat16:
            return run<Float16>(call);
        case DType::kUInt8:
            return;  // refused by the caller
    }
}

}  // namespace mmk::MMK_ISA
