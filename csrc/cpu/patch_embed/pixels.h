// Reading patches where they lie into rows of a product's units, and writing rows back.
//
// A product does not mind the order of its pixels as long as both sides keep it. So the order is the one in which the
// images hold them, and pixels that lie next to each other are moved as one run, by vectors: P at a time from a
// picture, C * P from a channels_last one, all of them from rows already cut. The other side of the product follows
// that order.
#pragma once
#include <algorithm>

#include "cpu/patch_embed/call.h"
#include "cpu/product/matmul.h"

namespace mmk::MMK_ISA {

static MMK_INLINE int64_t num_rows(const Patches& p) { return p.sizes[0] * p.sizes[1] * p.sizes[2] * p.sizes[3]; }
static MMK_INLINE int64_t num_pixels(const Patches& p) { return p.sizes[4] * p.sizes[5] * p.sizes[6] * p.sizes[7]; }

static inline int64_t row_offset(const Patches& p, int64_t row) {
    int64_t offset = 0;
    for (int i = 3; i >= 0; i--) {
        offset += row % p.sizes[i] * p.strides[i];
        row /= p.sizes[i];
    }
    return offset;
}

// ---- the order of the pixels

struct PixelOrder {
    int axis[4];  // of (c, t, y, x), outermost first
};

// By falling stride; an axis repeated by a stride of zero is outermost, where it breaks no run.
static inline PixelOrder memory_order(const Patches& p) {
    PixelOrder order{{0, 1, 2, 3}};
    const auto farther = [&](int a, int b) {
        const int64_t s = p.strides[4 + a], t = p.strides[4 + b];
        return t != 0 && (s == 0 || s > t);
    };
    for (int i = 1; i < 4; i++) {
        for (int j = i; j > 0 && farther(order.axis[j], order.axis[j - 1]); j--) {
            const int nearer = order.axis[j - 1];
            order.axis[j - 1] = order.axis[j];
            order.axis[j] = nearer;
        }
    }
    return order;
}

// The pixels of one patch in some order, as nested loops: neighbouring axes that one stride steps through are merged.
struct PixelLoops {
    int64_t size[4], stride[4];  // the last one is the run
};

static inline PixelLoops pixel_loops(const Patches& p, PixelOrder order) {
    PixelLoops loops{{1, 1, 1, 1}, {0, 0, 0, 1}};
    int outermost = 4;
    for (int i = 3; i >= 0; i--) {
        const int64_t size = p.sizes[4 + order.axis[i]], stride = p.strides[4 + order.axis[i]];
        if (size == 1) continue;
        if (outermost < 4 && stride == loops.size[outermost] * loops.stride[outermost]) {
            loops.size[outermost] *= size;
        } else {
            outermost--;
            loops.size[outermost] = size;
            loops.stride[outermost] = stride;
        }
    }
    return loops;
}

// ---- normalisation of bytes

// (x / 255 - mean) / std as x * scale + shift, in float32, as the pixels are read: what is rounded to the product's
// type is the normalised pixel, as if a float image had been written. (Folding the factors into the weight instead
// would round the weight twice and leave the sums to cancel.) scale and shift are kept in two floats each: one alone
// would shift every pixel of a channel by its rounding error, which sums over pixels and patches do not average out.
class Normalisation {
  public:
    struct Factors {
        float scale, shift, scale_rest, shift_rest;
    };

    Normalisation(const Patches& images, PixelOrder order, const float* mean, const float* std_dev)
        : pitch_(mean == nullptr ? 0 : num_pixels(images) + kLanes), factors_(4 * pitch_) {
        if (mean == nullptr) return;
        memset(factors_.get(), 0, 4 * pitch_ * sizeof(float));
        int64_t size[4], pixels = num_pixels(images), inside = pixels;  // inside: pixels inside one channel
        int channel_axis = 0;
        for (int i = 0; i < 4; i++) {
            size[i] = images.sizes[4 + order.axis[i]];
            if (order.axis[i] == 0) channel_axis = i;
        }
        for (int i = 0; i <= channel_axis; i++) inside /= size[i];
        for (int64_t k = 0; k < pixels; k++) {
            const int64_t channel = k / inside % images.sizes[4];
            const double scale = 1 / (255.0 * std_dev[channel]);
            const double shift = -static_cast<double>(mean[channel]) / std_dev[channel];
            float* at = factors_.get() + k;
            at[0] = static_cast<float>(scale);
            at[pitch_] = static_cast<float>(shift);
            at[2 * pitch_] = static_cast<float>(scale - at[0]);
            at[3 * pitch_] = static_cast<float>(shift - at[pitch_]);
        }
    }

    // Of the pixels from k on, by lanes.
    MMK_INLINE Vec apply(Vec x, int64_t k) const {
        const float* at = factors_.get() + k;
        return (x * load(at) + load(at + pitch_)) + (x * load(at + 2 * pitch_) + load(at + 3 * pitch_));
    }

  private:
    int64_t pitch_;
    Scratch<float> factors_;
};

// ---- reading

// Rows of a matrix in the pixels' order, as elements of a product's type.
class PatchReader {
  public:
    PatchReader(const Patches& patches, PixelOrder order, const Normalisation* normalisation = nullptr)
        : patches_(patches), loops_(pixel_loops(patches, order)), normalisation_(normalisation), elements_(1) {
        for (int i = 0; i < 8; i++) elements_ += (patches.sizes[i] - 1) * patches.strides[i];
    }

    // Rows [first, first + count), to_row elements apart. Up to kLanes elements behind a row's last are overwritten.
    template <class To>
    void read(int64_t first, int64_t count, To* to, int64_t to_row) const {
        switch (patches_.dtype) {
            case DType::kFloat32:
                return read_as<To, float>(first, count, to, to_row);
            case DType::kBFloat16:
                return read_as<To, BFloat16>(first, count, to, to_row);
            case DType::kFloat16:
                return read_as<To, Float16>(first, count, to, to_row);
            case DType::kUInt8:
                return read_as<To, uint8_t>(first, count, to, to_row);
        }
    }

    // The same as units of a product: a row filled with zero up to its depth, and the rows behind the last up to a
    // whole tile.
    template <class Operand>
    void read_units(int64_t first, int64_t count, uint32_t* to, int64_t to_row) const {
        using Element = ElementOf<Operand>;
        read(first, count, reinterpret_cast<Element*>(to), to_row * Operand::kPack);
        const int64_t pixels = num_pixels(patches_), units = depth<Operand>(pixels);
        const int64_t padding = units * Operand::kPack - pixels;
        for (int64_t r = 0; r < count && padding > 0; r++) {
            memset(reinterpret_cast<Element*>(to + r * to_row) + pixels, 0, padding * sizeof(Element));
        }
        for (int64_t r = count; r < round_up(count, kTileRows); r++) memset(to + r * to_row, 0, units * sizeof *to);
    }

    // Row `first` where the rows can be taken as units of Operand as they lie, whole vectors of them; else null.
    template <class Operand>
    const uint32_t* units_in_place(int64_t first) const {
        const DType dtype = Operand::kPack == 1 ? DType::kFloat32 : DType::kBFloat16;
        const int64_t pixels = num_pixels(patches_);
        const bool in_place = patches_.dtype == dtype && loops_.size[3] == pixels && loops_.stride[3] == 1 &&
                              pixels % (kLanes * Operand::kPack) == 0 && patches_.strides[3] % Operand::kPack == 0;
        if (!in_place) return nullptr;
        return reinterpret_cast<const uint32_t*>(static_cast<const ElementOf<Operand>*>(patches_.data) +
                                                 row_offset(patches_, first));
    }

  private:
    // Patches next to each other are read together, a run of each in turn: their pixels then stream through whole rows
    // of the picture.
    template <class To, class From>
    void read_as(int64_t first, int64_t count, To* to, int64_t to_row) const {
        const From* data = static_cast<const From*>(patches_.data);
        const int64_t *size = loops_.size, *stride = loops_.stride;
        while (count > 0) {
            const int64_t neighbours = std::min(count, patches_.sizes[3] - first % patches_.sizes[3]);
            const int64_t start = row_offset(patches_, first);
            int64_t k = 0;
            for (int64_t i = 0; i < size[0]; i++) {
                for (int64_t j = 0; j < size[1]; j++) {
                    for (int64_t l = 0; l < size[2]; l++, k += size[3]) {
                        const int64_t run = start + i * stride[0] + j * stride[1] + l * stride[2];
                        read_runs(data + run, elements_ - run, neighbours, k, to, to_row);
                    }
                }
            }
            first += neighbours, count -= neighbours, to += neighbours * to_row;
        }
    }

    // The run whose first pixel is the k-th, of each of the neighbours. By whole vectors where the tensor has them:
    // what they hold past the run is overwritten by the next one.
    template <class To, class From>
    MMK_INLINE void read_runs(const From* from, int64_t elements, int64_t neighbours, int64_t k, To* to,
                              int64_t to_row) const {
        const int64_t count = loops_.size[3], stride = loops_.stride[3], next = patches_.strides[3];
        const int64_t vectors = ceil_div(count, kLanes);
        int64_t n = 0;
        if (stride == 1) {
            const int64_t reach = elements - vectors * kLanes;  // the farthest start from which all vectors are there
            if (reach >= (neighbours - 1) * next) {
                for (; n < neighbours; n++) {
                    for (int64_t i = 0; i < vectors; i++) {
                        read_lanes(from + n * next + i * kLanes, k + i * kLanes, to + n * to_row + k + i * kLanes);
                    }
                }
            }
        }
        for (; n < neighbours; n++) {
            for (int64_t i = 0; i < count; i++) {
                read_one(from + n * next + i * stride, k + i, to + n * to_row + k + i);
            }
        }
    }

    template <class To, class From>
    MMK_INLINE void read_lanes(const From* from, int64_t k, To* to) const {
        if constexpr (std::is_same_v<From, uint8_t>) {
            store(to, normalisation_->apply(load(from), k));
        } else if constexpr (std::is_same_v<To, From>) {
            memcpy(to, from, kLanes * sizeof(To));
        } else {
            store(to, load(from));
        }
    }

    template <class To, class From>
    MMK_INLINE void read_one(const From* from, int64_t k, To* to) const {
        if constexpr (std::is_same_v<From, uint8_t>) {
            store_first(to, normalisation_->apply(load_first(from, 1), k), 1);
        } else if constexpr (std::is_same_v<To, From>) {
            memcpy(to, from, sizeof(To));
        } else {
            store_first(to, load_first(from, 1), 1);
        }
    }

    Patches patches_;
    PixelLoops loops_;
    const Normalisation* normalisation_;
    int64_t elements_;  // of memory from the first to the last that the patches hold
};

// ---- writing

// Rows of a float matrix in the pixels' order into patches; nothing else of the tensor is touched.
class PatchWriter {
  public:
    PatchWriter(const Patches& patches, PixelOrder order) : patches_(patches), loops_(pixel_loops(patches, order)) {}

    // Pixels [column, column + width), or up to the last, of rows [row, row + count), which lie from_row apart.
    void write(int64_t row, int64_t count, int64_t column, int64_t width, const float* from, int64_t from_row) const {
        switch (patches_.dtype) {
            case DType::kFloat32:
                return write_as<float>(row, count, column, width, from, from_row);
            case DType::kBFloat16:
                return write_as<BFloat16>(row, count, column, width, from, from_row);
            case DType::kFloat16:
                return write_as<Float16>(row, count, column, width, from, from_row);
            case DType::kUInt8:
                return;  // has no gradient
        }
    }

  private:
    template <class To>
    void write_as(int64_t row, int64_t count, int64_t column, int64_t width, const float* from,
                  int64_t from_row) const {
        const int64_t *size = loops_.size, *stride = loops_.stride;
        const int64_t last = std::min(column + width, num_pixels(patches_));
        while (count > 0) {
            const int64_t neighbours = std::min(count, patches_.sizes[3] - row % patches_.sizes[3]);
            To* patch = static_cast<To*>(patches_.data) + row_offset(patches_, row);
            for (int64_t k = column; k < last;) {
                const int64_t inside = k % size[3], run = k / size[3], length = std::min(size[3] - inside, last - k);
                To* to = patch + run / size[2] / size[1] * stride[0] + run / size[2] % size[1] * stride[1] +
                         run % size[2] * stride[2] + inside * stride[3];
                for (int64_t n = 0; n < neighbours; n++) {
                    write_run(from + n * from_row + k - column, length, to + n * patches_.strides[3]);
                }
                k += length;
            }
            row += neighbours, count -= neighbours, from += neighbours * from_row;
        }
    }

    template <class To>
    MMK_INLINE void write_run(const float* from, int64_t count, To* to) const {
        const int64_t stride = loops_.stride[3];
        int64_t i = 0;
        if (stride == 1) {
            for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
            if (i < count)
                store_first(to + i, load_first(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
            return;
        }
        for (; i < count; i++) store_first(to + i * stride, splat(from[i]), 1);
    }

    Patches patches_;
    PixelLoops loops_;
};

}  // namespace mmk::MMK_ISA
