// What each call reads and writes, for the emulator's race detector: the one thing that a launcher does not say.
// Tensors from outside have bounds here, as the address sanitizer gives them to the memory that the tests allocate.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/contrastive/call.h"
#include "cuda/patch_embed/call.h"
#include "cuda/span_attention/call.h"
#include "emulator/emulator.h"

namespace mmk::cuda {

class Touched {
  public:
    template <class T>
    void reads(const T* data, int64_t count) {
        add(data, count * static_cast<int64_t>(sizeof(T)), true);
    }
    template <class T>
    void writes(const T* data, int64_t count) {
        add(data, count * static_cast<int64_t>(sizeof(T)), false);
    }

    // Tensors that lie among one another, such as slices of a fused projection, are watched as one.
    void watch() {
        std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
        for (size_t i = 0; i < ranges_.size();) {
            Range whole = ranges_[i++];
            for (; i < ranges_.size() && ranges_[i].begin < whole.end; i++) {
                whole.end = std::max(whole.end, ranges_[i].end);
                whole.initialised |= ranges_[i].initialised;
            }
            emulator::watch(whole.begin, static_cast<size_t>(whole.end - whole.begin), whole.initialised);
        }
    }

  private:
    struct Range {
        const char *begin, *end;
        bool initialised;
    };
    void add(const void* data, int64_t bytes, bool initialised) {
        const char* const begin = static_cast<const char*>(data);
        if (bytes > 0) ranges_.push_back({begin, begin + bytes, initialised});
    }
    std::vector<Range> ranges_;
};

// ---- span_attention

// From the first to the last number of 16 bits; 0 of an empty tensor.
inline int64_t extent(const Heads& x, int64_t batch, int64_t rows, int64_t heads, int64_t width) {
    if (batch == 0 || rows == 0 || heads == 0) return 0;
    return (batch - 1) * x.batch + (rows - 1) * x.row + (heads - 1) * x.head + width;
}

inline const uint16_t* numbers(const Heads& x) { return static_cast<const uint16_t*>(x.data); }

inline int64_t slices(const SpanAttention& call) { return int64_t{call.spans_by_batch ? call.batch : 1} * call.runs; }

inline void read_inputs(Touched& found, const SpanAttention& call) {
    found.reads(numbers(call.q), extent(call.q, call.batch, call.queries, call.heads, call.head_size));
    found.reads(numbers(call.k), extent(call.k, call.batch, call.keys, call.key_heads, call.head_size));
    found.reads(numbers(call.v), extent(call.v, call.batch, call.keys, call.key_heads, call.value_size));
    found.reads(call.lo, slices(call) * call.queries);
    found.reads(call.hi, slices(call) * call.queries);
    found.reads(call.hulls, slices(call) * ((call.queries + kHullRows - 1) / kHullRows) * 4);
}

inline Touched touched(const SpanAttention& call) {
    Touched found;
    read_inputs(found, call);
    found.writes(numbers(call.out), extent(call.out, call.batch, call.queries, call.heads, call.value_size));
    found.writes(call.lse, int64_t{call.batch} * call.heads * call.queries);
    return found;
}

inline Touched touched(const SpanAttentionBackward& call) {
    const SpanAttention& f = call.forward;
    Touched found;
    read_inputs(found, f);
    found.reads(numbers(f.out), extent(f.out, f.batch, f.queries, f.heads, f.value_size));
    found.reads(f.lse, int64_t{f.batch} * f.heads * f.queries);
    found.reads(numbers(call.d_out), extent(call.d_out, f.batch, f.queries, f.heads, f.value_size));
    if (call.d_lse != nullptr) found.reads(call.d_lse, int64_t{f.batch} * f.heads * f.queries);
    found.writes(numbers(call.d_q), extent(call.d_q, f.batch, f.queries, f.heads, f.head_size));
    found.writes(numbers(call.d_k), extent(call.d_k, f.batch, f.keys, f.key_heads, f.head_size));
    found.writes(numbers(call.d_v), extent(call.d_v, f.batch, f.keys, f.key_heads, f.value_size));
    found.writes(static_cast<const char*>(call.workspace), static_cast<int64_t>(span_attention_backward_bytes(f)));
    return found;
}

// ---- contrastive losses

inline void read_counts(Touched& found, const Pairs& pairs) {
    if (pairs.image_counts != nullptr) found.reads(pairs.image_counts, pairs.images);
    if (pairs.text_counts != nullptr) found.reads(pairs.text_counts, pairs.texts);
}

// Planes of the weights of images and of texts.
inline int64_t weights_of(const Pairs& pairs) { return pairs.same == Same::kPositive ? 4 : 2; }

inline Touched touched(const Pairs& pairs) {
    Touched found;
    const auto reads = [&](const Features& x, int64_t count) {
        found.reads(static_cast<const uint16_t*>(x.data), count == 0 ? 0 : (count - 1) * x.stride + pairs.width);
    };
    reads(pairs.image, pairs.images);
    reads(pairs.text, pairs.texts);
    found.reads(pairs.scale, 1);
    if (pairs.bias != nullptr) found.reads(pairs.bias, 1);
    read_counts(found, pairs);
    if (pairs.image_ids != nullptr) found.reads(pairs.image_ids, pairs.images);
    if (pairs.text_ids != nullptr) found.reads(pairs.text_ids, pairs.texts);
    return found;
}

inline Touched touched(const ClipStatistics& call) {
    Touched found = touched(call.pairs);
    for (const auto& [statistics, count] :
         {std::pair(call.rows, call.pairs.images), {call.columns, call.pairs.texts}}) {
        if (call.add) found.reads(statistics, int64_t{3} * count);
        found.writes(statistics, int64_t{3} * count);
    }
    found.writes(static_cast<const char*>(call.workspace), static_cast<int64_t>(call.workspace_bytes));
    return found;
}

inline Touched touched(const ClipWeights& call) {
    Touched found;
    found.reads(call.pairs.scale, 1);
    read_counts(found, call.pairs);
    for (const auto& [statistics, count] :
         {std::pair(call.rows, int64_t{call.pairs.images}), {call.columns, int64_t{call.pairs.texts}}}) {
        found.reads(statistics, 3 * count);
        if (call.pairs.same == Same::kPositive) found.writes(statistics + 3 * count, count);
    }
    if (call.shares != nullptr) found.reads(call.shares, 3);
    if (call.products != nullptr) found.reads(call.products, 2);
    if (call.own != nullptr) found.writes(call.own, call.pairs.images);
    found.writes(call.loss, 1);
    return found;
}

inline Touched touched(const LogitRows& call, int sums) {
    Touched found = touched(call.pairs);
    if (call.ds != nullptr) found.writes(static_cast<const uint16_t*>(call.ds), call.row_count * call.ds_stride);
    if (call.row0 == 0) {
        found.writes(call.totals, sums);
    } else {
        found.reads(call.totals, sums);
    }
    found.writes(call.means, sums);
    found.writes(static_cast<const char*>(call.workspace), static_cast<int64_t>(call.workspace_bytes));
    return found;
}

inline Touched touched(const ClipGradient& call) {
    Touched found = touched(call.to, 1);
    found.reads(call.rows, weights_of(call.to.pairs) * call.to.pairs.images);
    found.reads(call.columns, weights_of(call.to.pairs) * call.to.pairs.texts);
    if (call.own != nullptr) found.reads(call.own, call.to.pairs.images);
    return found;
}

inline Touched touched(const LogitRows& siglip) { return touched(siglip, siglip.ds == nullptr ? 1 : 3); }

// ---- patch_embed

inline int64_t size_of_pixel(PixelType type) {
    return type == PixelType::kFloat32 ? 4 : type == PixelType::kUint8 ? 1 : 2;
}

// Bytes from the first pixel to the last.
inline int64_t extent(const Patches& x) {
    int64_t last = (x.batch - 1) * x.batch_stride, count = x.batch;
    for (int i = 0; i < 3; i++) last += (x.grid[i] - 1) * x.grid_strides[i], count *= x.grid[i];
    for (int i = 0; i < 4; i++) last += (x.sizes[i] - 1) * x.strides[i], count *= x.sizes[i];
    return count == 0 ? 0 : (last + 1) * size_of_pixel(x.type);
}

inline int64_t pixels_of(const Patches& x) { return int64_t{x.sizes[0]} * x.sizes[1] * x.sizes[2] * x.sizes[3]; }
inline int64_t patches_of(const Patches& x) { return int64_t{x.grid[0]} * x.grid[1] * x.grid[2]; }
inline int64_t filled(int64_t width) { return (width + 7) / 8 * 8; }
inline const char* bytes_at(const void* data) { return static_cast<const char*>(data); }

inline void reads_weight(Touched& found, const Rows& weight, int64_t features, int64_t pixels, PixelType type) {
    if (features > 0) {
        found.reads(bytes_at(weight.data), ((features - 1) * weight.stride + filled(pixels)) * size_of_pixel(type));
    }
}

inline void reads_grad(Touched& found, const TokenGrad& grad, const Patches& images, int features, PixelType type) {
    if (int64_t{images.batch} * patches_of(images) == 0) return;
    const int64_t last = (images.batch - 1) * grad.batch + (patches_of(images) - 1) * grad.row;
    found.reads(bytes_at(grad.data), (last + filled(features)) * size_of_pixel(type));
}

inline void reads_pixels(Touched& found, const Patches& images, const Normalisation& normalisation) {
    found.reads(bytes_at(images.data), extent(images));
    if (images.type == PixelType::kUint8) {
        found.reads(normalisation.mean, normalisation.channels);
        found.reads(normalisation.std_dev, normalisation.channels);
    }
}

inline Touched touched(const PatchEmbed& call) {
    const int64_t row = call.features * size_of_pixel(call.type);
    Touched found;
    reads_pixels(found, call.images, call.normalisation);
    reads_weight(found, call.weight, call.features, pixels_of(call.images), call.type);
    if (call.bias != nullptr) found.reads(bytes_at(call.bias), row);
    if (call.positions != nullptr) found.reads(bytes_at(call.positions), call.position_rows * row);
    found.reads(bytes_at(call.prefix), call.prefix_rows * row);
    found.writes(bytes_at(call.tokens), call.images.batch * (call.prefix_rows + patches_of(call.images)) * row);
    return found;
}

inline Touched touched(const PatchWeightGrad& call) {
    int64_t last = (call.features - 1) * call.d_weight_stride;
    for (int i = 0; i < 4; i++) last += (call.d_weight_sizes[i] - 1) * call.d_weight_strides[i];
    Touched found;
    reads_pixels(found, call.images, call.normalisation);
    reads_grad(found, call.grad, call.images, call.features, call.type);
    if (call.features * pixels_of(call.images) != 0) {
        found.writes(bytes_at(call.d_weight), (last + 1) * size_of_pixel(call.type));
    }
    found.writes(bytes_at(call.workspace), static_cast<int64_t>(patch_weight_grad_workspace(call)));
    return found;
}

inline Touched touched(const PatchImagesGrad& call) {
    Touched found;
    reads_weight(found, call.weight, call.features, pixels_of(call.d_images), call.type);
    reads_grad(found, call.grad, call.d_images, call.features, call.type);
    found.writes(bytes_at(call.d_images.data), extent(call.d_images));
    return found;
}

}  // namespace mmk::cuda
