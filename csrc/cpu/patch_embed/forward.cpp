// Patch embedding, forward:
//
//   Y[b, p, e] = round(sum_k X[b, p, k] W[e, k] + bias[e] + position[p, e]),    prefix tokens before the patches
//
// A convolution whose stride is its kernel shares no pixel between outputs: it is the product of the patches X (M x K,
// M = B * N) with the weight. Moved: the images once, the weight once (packed, once a call: it may change silently
// between calls), the result once. X is never written: a block of patches is gathered, converted (and, from bytes,
// normalised) into the L2 cache, multiplied with every feature, and each tile of the result is written as soon as it is
// there. 2 M K E operations against M (K + E) + K E elements make the product bound by arithmetic alone.
//
// Patches are broadcast and features lie in the lanes, so that a patch needs no transposition and its bfloat16 pixels
// are the pairs that the product takes; only the weight is transposed, which is M / kLanes times less work than
// multiplying it.
#include "cpu/patch_embed/call.h"
#include "cpu/patch_embed/pixels.h"

namespace mmk::MMK_ISA {

namespace {

constexpr int64_t kLine = 64;                // bytes of a cache line
constexpr int64_t kStreamedBytes = 8 << 20;  // a result this large is not written through the caches

template <class T>
void widen(const T* from, int64_t count, float* to, int64_t padded) {
    for (int64_t i = 0; i < padded; i += kLanes) {
        const int64_t left = std::max<int64_t>(0, count - i);
        store(to + i,
              from == nullptr ? Vec{} : load_first(from + i, static_cast<int>(std::min<int64_t>(kLanes, left))));
    }
}

// The tokens of a call: where they go and what is added to them.
template <class T>
class Tokens {
  public:
    explicit Tokens(const PatchEmbed& call)
        : call_(call),
          patches_(call.images.sizes[1] * call.images.sizes[2] * call.images.sizes[3]),
          features_(num_rows(call.weight)),
          streams_(num_rows(call.images) * features_ * int64_t{sizeof(T)} >= kStreamedBytes &&
                   features_ * sizeof(T) % kLine == 0 && reinterpret_cast<uintptr_t>(call.tokens) % kLine == 0),
          bias_(round_up(features_, kLanes)) {
        widen(static_cast<const T*>(call.bias), features_, bias_.get(), round_up(features_, kLanes));
    }

    // A tile of the product, its rows c_row apart, rounded once after all additions.
    void write(int64_t row, int64_t count, int64_t column, int64_t width, const float* c, int64_t c_row) const {
        int64_t batch = row / patches_, patch = row % patches_;
        for (int64_t r = 0; r < count; r++, patch++) {
            if (patch == patches_) batch++, patch = 0;
            write_token(batch, call_.prefix_rows + patch, column, width, c + r * c_row, bias_.get() + column);
        }
    }

    void write_prefixes() const {
        const int64_t padded = round_up(features_, kLanes);
        Scratch<float> token(padded), zero(padded);
        widen<T>(nullptr, features_, zero.get(), padded);
        for (int64_t i = 0; i < call_.prefix_rows; i++) {
            widen(static_cast<const T*>(call_.prefix) + i * features_, features_, token.get(), padded);
            for (int64_t b = 0; b < call_.images.sizes[0]; b++) {
                write_token(b, i, 0, features_, token.get(), zero.get());
            }
        }
    }

  private:
    // Features [first, first + width) of a token, or up to the last; values and bias are those from `first` on.
    MMK_INLINE void write_token(int64_t batch, int64_t token, int64_t first, int64_t width, const float* values,
                                const float* bias) const {
        const int64_t tokens = call_.prefix_rows + patches_, count = std::min(width, features_ - first);
        T* out = static_cast<T*>(call_.tokens) + (batch * tokens + token) * features_ + first;
        // Positions may be of the patches only: they are then those of the last rows.
        const int64_t position = token - (tokens - call_.position_rows);
        const bool placed = call_.positions != nullptr && position >= 0;
        const T* added = placed ? static_cast<const T*>(call_.positions) + position * features_ + first : nullptr;
        int64_t e = 0;
        for (; e + kLanes <= count; e += kLanes) {
            Vec sum = load(values + e) + load(bias + e);
            if (placed) sum += load(added + e);
            streams_ ? stream(out + e, sum) : store(out + e, sum);
        }
        if (e == count) return;
        const int left = static_cast<int>(count - e);
        Vec sum = load(values + e) + load(bias + e);
        if (placed) sum += load_first(added + e, left);
        store_first(out + e, sum, left);
    }

    const PatchEmbed& call_;
    int64_t patches_, features_;
    bool streams_;
    Scratch<float> bias_;
};

// The weight as panels of features.
template <class Operand>
class PackedWeight {
  public:
    PackedWeight(const Patches& weight, PixelOrder order, Panels panels, int threads)
        : reader_(weight, order),
          panels_(panels),
          features_(num_rows(weight)),
          units_(depth<Operand>(num_pixels(weight))),
          row_stride_(weight.strides[3] / Operand::kPack),
          rows_stride_(row_units(units_)),
          rows_(threads * kLanes * rows_stride_) {}

    int64_t units() const { return units_; }

    void pack(int64_t p, int64_t worker, uint32_t* panel) const {
        uint32_t* rows = rows_.get() + worker * kLanes * rows_stride_;
        const int64_t first = panels_.first(p), width = panels_.width(p);
        for (int64_t l = 0; l < width; l += kLanes) {
            const int64_t count = std::min<int64_t>(kLanes, features_ - first - l);
            const uint32_t* in_place = reader_.template units_in_place<Operand>(first + l);
            if (in_place != nullptr && count == kLanes) {
                pack_transposed(in_place, row_stride_, units_, width, panel + l);
                continue;
            }
            reader_.template read_units<Operand>(first + l, count, rows, rows_stride_);
            for (int64_t r = count; r < kLanes; r++) memset(rows + r * rows_stride_, 0, units_ * sizeof *rows);
            pack_transposed(rows, rows_stride_, units_, width, panel + l);
        }
    }

  private:
    PatchReader reader_;
    Panels panels_;
    int64_t features_, units_, row_stride_, rows_stride_;
    Scratch<uint32_t> rows_;
};

template <class T>
void run(const PatchEmbed& call) {
    using Operand = OperandOf<T>;
    const int64_t rows = num_rows(call.images), pixels = num_pixels(call.images), features = num_rows(call.weight);
    const Tokens<T> tokens(call);
    tokens.write_prefixes();
    if (rows == 0 || features == 0) return;

    const PixelOrder order = memory_order(call.images);
    const Normalisation normalisation(call.images, order, call.mean, call.std_dev);
    const PatchReader images(call.images, order, &normalisation);
    const auto gather = [&](int64_t first, int64_t count, uint32_t* block, int64_t row) {
        images.read_units<Operand>(first, count, block, row);
    };
    const auto finish = [&](int64_t row, int64_t count, int64_t column, int64_t width, const float* tile) {
        tokens.write(row, count, column, width, tile, kTileColumns);
    };

    const int threads = useful_threads(2.0 * static_cast<double>(rows) * static_cast<double>(pixels * features));
    const Panels panels(features);
    const PackedWeight<Operand> weight(call.weight, order, panels, threads);
    const int64_t units = weight.units();
    if (rows <= kFewGathered) {
        const int64_t size = kTileVectors * kLanes * units;
        Scratch<uint32_t> panel(threads * size);
        const auto packed = [&](int64_t p, int64_t worker) {
            uint32_t* mine = panel.get() + worker * size;
            weight.pack(p, worker, mine);
            return mine;
        };
        multiply_few<Operand>(rows, panels, units, threads, gather, packed, finish);
    } else {
        Scratch<uint32_t> packed(panels.lanes() * units);
        const auto at = [&](int64_t p, int64_t) { return packed.get() + panels.offset(p, units); };
        for_each(panels.count, threads, [&](int64_t p, int64_t worker) { weight.pack(p, worker, at(p, worker)); });
        multiply_many<Operand>(rows, panels, units, threads, gather, at, finish);
    }
}

}  // namespace

void patch_embed(const PatchEmbed& call) {
    with_element_type(call.weight.dtype, [&](auto type) { run<decltype(type)>(call); });
}

}  // namespace mmk::MMK_ISA
