// The contrastive losses over all pairs of two sets of features, in passes that never hold the matrix of all logits.
// mmkernels/ops/contrastive/reference.py says what is right, passes.cu how it is computed.
//
// A call of a loss with gradients: clip_forward, then for each chunk of rows of S, from the first to the last,
// clip_gradient and two products by a library, of ds with the text and of ds transposed with the image's rows, which
// times scale / (count kGradientScale) are the chunk's rows of dI and its part of dT. SigLIP needs no forward:
// siglip leaves the loss too.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/isa/error.h"

namespace mmk::cuda {

constexpr float kGradientScale = 32768.0f;  // ds is count dS, at most 1, times this: float16 would lose small ones

// (count, width) numbers of 16 bits with a unit stride in the last dimension; the other in numbers. Rows that do not
// start at multiples of 16 bytes, or widths that are no multiple of 8, are slow.
struct Features {
    const void* data;
    int64_t stride;
};

struct Pairs {
    Features image, text;
    const float *scale, *bias;  // each one number, on the device; CLIP is blind to a bias and reads none
    int count, width;           // of both features
    bool bfloat16;              // else float16
};

// Softmax weights (2, count) of rows or columns: the maximum m off the diagonal of q, which is the products of features
// times the sign of the scale, then w. 2^((q - m) |scale| / ln 2) w is half the probability of a pair off the diagonal.
struct ClipForward {
    Pairs pairs;
    float label_smoothing;
    const double* products;            // one number on the device, the sum of all products; null without smoothing
    float *rows, *columns, *diagonal;  // out: softmax weights, twice, and the diagonal (count) of count dS
    float* loss;                       // out, one number
    void* workspace;                   // of clip_forward_workspace() bytes or any less that it accepts; 16-byte aligned
    size_t workspace_bytes;
};
size_t clip_forward_workspace(int count);
Error clip_forward(const ClipForward& call, cudaStream_t stream);  // sm_80 and later

// Rows [row0, row0 + row_count) of S.
struct LogitRows {
    Pairs pairs;
    int row0, row_count;
    void* ds;           // out: (row_count, ds_stride), 16-byte aligned, the type of the features
    int64_t ds_stride;  // a multiple of 8, at least count; columns from count up to the next multiple of 8 become zero
    double* totals;     // in and out, except that a chunk with row0 == 0 does not read them; one for each mean
    float* means;       // out: totals / count: after the last chunk the results
    void* workspace;    // of gradient_workspace() bytes
    size_t workspace_bytes;
};
size_t gradient_workspace(int count, int row_count);

struct ClipGradient {
    LogitRows to;  // means: d scale
    float label_smoothing;
    const float *rows, *columns, *diagonal;  // as clip_forward leaves them
};
Error clip_gradient(const ClipGradient& call, cudaStream_t stream);

// means: loss, d scale, d bias. Without ds only the loss, and only the first of totals and means is touched.
Error siglip(const LogitRows& call, cudaStream_t stream);

// The same for Hopper alone (sm_90a), and only where TMA can read the features: their data and their strides are
// multiples of 16 bytes, and rows do not overlap.
bool contrastive_sm90_serves(const Pairs& pairs);
Error clip_forward_sm90(const ClipForward& call, cudaStream_t stream);
Error clip_gradient_sm90(const ClipGradient& call, cudaStream_t stream);
Error siglip_sm90(const LogitRows& call, cudaStream_t stream);

}  // namespace mmk::cuda
