// The contrastive losses over all pairs of two sets of features, in passes that never hold the matrix of all logits.
// mmkernels/ops/contrastive/reference.py says what is right, passes.cu how it is computed.
//
// A call of a loss with gradients: clip_forward, then for each chunk of rows of S, from the first to the last,
// clip_gradient and two products by a library, of ds with the text and of ds transposed with the image's rows, which
// times scale / (count kGradientScale) are the chunk's rows of dI and its part of dT, count being what the loss is
// divided by. SigLIP needs no forward:
// siglip leaves the loss too.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/isa/error.h"

namespace mmk::cuda {

constexpr float kGradientScale = 32768.0f;  // ds is count dS, at most 1, times this: float16 would lose small ones

// (images or texts, width) numbers of 16 bits with a unit stride in the last dimension; the other in numbers. Rows that
// do not start at multiples of 16 bytes, or widths that are no multiple of 8, are slow.
struct Features {
    const void* data;
    int64_t stride;
};

// What equal ids say of an image and a text.
enum class Same { kNothing, kPositive, kIgnored };

// Which pairs belong together: image i in [first, last) and text i + offset, its own. Where equal ids say it
// (kPositive): those, own or not. Where these are to be ignored (kIgnored) the other pairs of equal ids count nowhere.
struct Pairs {
    Features image, text;
    const float *scale, *bias;  // each one number, on the device; CLIP is blind to a bias and reads none
    int images, texts, width;
    bool bfloat16;  // else float16
    int offset, first, last;
    Same same;
    const int32_t *image_ids, *text_ids;        // (images), (texts), none negative; null without
    const int32_t *image_counts, *text_counts;  // kPositive: of how many positives, elsewhere too; else null
};

// The statistics (3, images) or (3, texts) of rows or columns: the maximum of q, which is the products of features
// times the sign of the scale, and the sum of exponentials relative to it, both without the one positive and what is
// ignored; the sum of q over the positives, of rows without one anything. Several positives are in the first two, too:
// their shares are unequal.
struct ClipStatistics {
    Pairs pairs;
    float *rows, *columns;  // out; in, too, if `add`
    bool add;
    void* workspace;  // of clip_statistics_workspace() bytes or any less that it accepts; 16-byte aligned
    size_t workspace_bytes;
};
size_t clip_statistics_workspace(const Pairs& pairs);
Error clip_statistics(const ClipStatistics& call, cudaStream_t stream);  // sm_80 and later

// The loss, and weights (2, images) and (2, texts) in place of the first two statistics: the maximum m as it is, then
// w. 2^((q - m) |scale| / ln 2) w is the share of the loss times the probability of a pair that does not belong
// together. Where ids say what does, (4, images) and (4, texts), two more: v and t, with which a pair that belongs
// together has 2^(...) v - t.
struct ClipWeights {
    Pairs pairs;
    float label_smoothing;          // without what it takes off count dS of each pair alike, which the caller sees to
    float row_share, column_share;  // of the losses of images and of texts
    double count;                   // loss = (row_share sum of the images' + column_share sum of the texts') / count
    const double* shares;           // kPositive: these three on the device, which alone knows them; else null
    const double* products;         // two numbers on the device, the sums of the products of images, and of texts, that
                                    // have a positive, with all others; null without smoothing
    float *rows, *columns;          // in and out: statistics, weights
    float* own;   // out: count dS of the images' own pairs, 0 of those that have none; null with kPositive
    float* loss;  // out, one number
};
Error clip_weights(const ClipWeights& call, cudaStream_t stream);

// Rows [row0, row0 + row_count) of S. They end where own pairs do: where an image without one would meet a text at the
// offset, either all of these rows have one, or none has.
struct LogitRows {
    Pairs pairs;
    int row0, row_count;
    void* ds;           // out: (row_count, ds_stride), 16-byte aligned, the type of the features
    int64_t ds_stride;  // a multiple of 8, at least texts; columns from there up to the next multiple of 8 become zero
    double count;       // what the loss is divided by
    double* totals;     // in and out, except that a chunk with row0 == 0 does not read them; one for each mean
    float* means;       // out: totals / count: after the last chunk the results
    void* workspace;    // of gradient_workspace() bytes
    size_t workspace_bytes;
};
size_t gradient_workspace(int texts, int row_count);

struct ClipGradient {
    LogitRows to;                       // means: d scale
    const float *rows, *columns, *own;  // as clip_weights leaves them; own: null with kPositive
};
Error clip_gradient(const ClipGradient& call, cudaStream_t stream);

// means: loss, d scale, d bias. Without ds only the loss, and only the first of totals and means is touched.
Error siglip(const LogitRows& call, cudaStream_t stream);

// The same for Hopper alone (sm_90a), and only where TMA can read the features: their data and their strides are
// multiples of 16 bytes, and rows do not overlap.
bool contrastive_sm90_serves(const Pairs& pairs);
Error clip_statistics_sm90(const ClipStatistics& call, cudaStream_t stream);
Error clip_gradient_sm90(const ClipGradient& call, cudaStream_t stream);
Error siglip_sm90(const LogitRows& call, cudaStream_t stream);

}  // namespace mmk::cuda
