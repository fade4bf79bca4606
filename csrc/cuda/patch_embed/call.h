// Patch embedding: a matrix product whose left rows are patches, read where they lie in the images.
// mmkernels/ops/patch_embed/reference.py says what is right, forward.cu and backward.cu how it is
// computed. All for sm_80 and later; sizes may be zero.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/isa/error.h"

namespace mmk::cuda {

enum class PixelType { kFloat32, kBFloat16, kFloat16, kUint8 };

// Patch (b, t, y, x) of the grid begins at the sum of its indices times their strides. Its pixels are counted in the
// order of memory: pixel k, of the digits (d0, d1, d2, d3) in the mixed base `sizes`, lies at the sum of d_i strides[i]
// after that. Strides in elements, any; the fastest with runs of pixels (a last stride of 1) that are aligned to 16
// bytes, or at least to 4.
struct Patches {
    void* data;
    PixelType type;
    int batch, grid[3];  // their product is below 2^31
    int64_t batch_stride, grid_strides[3];
    int sizes[4];
    int64_t strides[4];
};

// uint8 pixels x become (x / 255 - mean) / std, pixel k with those of channel k / pixels_inside % channels. Else
// unused.
struct Normalisation {
    const float *mean, *std_dev;  // (channels)
    int channels, pixels_inside;
};

// Rows of the type of the weight, 16-byte aligned, a multiple of 8 wide: zeros fill them up.
struct Rows {
    const void* data;
    int64_t stride;
};

// tokens (batch, prefix_rows + N, features): the prefix, then the N patches of an image; positions added to the last
// position_rows of them. Rows are dense.
struct PatchEmbed {
    Patches images;
    Normalisation normalisation;
    Rows weight;            // (features, pixels), in the order of the images' pixels
    PixelType type;         // of the weight and of what follows; not kUint8
    bool tf32;              // for kFloat32: products of 11 bits on tensor cores; else exact
    const void* bias;       // (features) or null
    const void* positions;  // (position_rows, features) or null; N or prefix_rows + N rows
    const void* prefix;     // (prefix_rows, features)
    void* tokens;
    int features, prefix_rows, position_rows;
};
Error patch_embed(const PatchEmbed& call, cudaStream_t stream);

// The gradient of the N patches' tokens, (batch, N, features).
struct TokenGrad {
    const void* data;
    int64_t batch, row;  // strides of rows as Rows has them
};

// d_weight = grad^T patches. Sums in float32 over runs of patches that depend on the sizes alone, then over the runs.
struct PatchWeightGrad {
    TokenGrad grad;
    Patches images;
    Normalisation normalisation;
    PixelType type;  // of grad and d_weight
    bool tf32;
    int features;
    void* d_weight;           // feature e begins at e d_weight_stride, its pixels lie as those of the images do
    int64_t d_weight_stride;  // but by their own sizes and strides, of the same product
    int d_weight_sizes[4];
    int64_t d_weight_strides[4];
    void* workspace;  // of patch_weight_grad_workspace bytes, 16-byte aligned
};
size_t patch_weight_grad_workspace(const PatchWeightGrad& call);
Error patch_weight_grad(const PatchWeightGrad& call, cudaStream_t stream);

// Every pixel of every patch of d_images, of one of the three floating types: grad weight.
struct PatchImagesGrad {
    TokenGrad grad;
    Rows weight;  // (features, pixels), in the order of the pixels of d_images
    PixelType type;
    bool tf32;
    int features;
    Patches d_images;
};
Error patch_images_grad(const PatchImagesGrad& call, cudaStream_t stream);

}  // namespace mmk::cuda
