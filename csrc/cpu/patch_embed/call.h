// Patch embedding, forward and backward: what a call hands to the kernels.
#pragma once
#include <cstdint>

#include "cpu/run/isa.h"
#include "cpu/run/tensor.h"

namespace mmk {

// A matrix that lies in a strided tensor: its row index is (b, gt, gy, gx) and its column index (c, t, y, x), the first
// of each outermost. Images are patches with their pixels; a weight is (1, 1, 1, E) rows of the same pixels; the
// gradient of the result is (B, 1, 1, N) rows of (1, 1, 1, E) columns.
struct Patches {
    void* data;
    DType dtype;
    int64_t sizes[8];
    int64_t strides[8];  // in elements, none negative
};

struct PatchEmbed {
    Patches images, weight;       // the same four column sizes
    const float *mean, *std_dev;  // one a channel for uint8 images, else null
    const void* bias;             // (E) or null; this and what follows contiguous and of the weight's dtype
    const void* positions;        // (position_rows, E) or null, N or prefix_rows + N rows
    const void* prefix;           // (prefix_rows, E)
    void* tokens;                 // the result, (B, prefix_rows + N, E)
    int64_t position_rows, prefix_rows;
};

struct PatchEmbedBackward {
    Patches grad, images, weight;
    const float *mean, *std_dev;
    bool need_images, need_weight, need_bias;
    Patches d_images, d_weight;  // if needed: data of any floating dtype, sizes as images and weight, own strides
    void* d_bias;                // (E), contiguous, of the weight's dtype
};

#define MMK_DECLARE(level, isa, ...)                           \
    namespace isa {                                            \
    void patch_embed(const PatchEmbed& call);                  \
    void patch_embed_backward(const PatchEmbedBackward& call); \
    }
MMK_FOR_EACH_ISA(MMK_DECLARE)
#undef MMK_DECLARE

}  // namespace mmk
