// The contrastive losses over all pairs of N images and M texts, and their gradients; whole, or in the steps between
// which processes that share the texts exchange what they found.
#pragma once
#include <cstdint>

#include "cpu/run/isa.h"
#include "cpu/run/tensor.h"

namespace mmk {

// What equal ids say of an image and a text.
enum class Same : int { kNothing, kPositive, kIgnored };

// Which pairs belong together. Without ids, or where those of equal ids are to be ignored: each image i in
// [first, last) and text i + offset, its own. Where equal ids say it: those, own or not.
struct Pairing {
    int64_t offset, first, last;
    Same same;
    const int32_t *image_ids, *text_ids;        // (N), (M), none negative; null without
    const int32_t *image_counts, *text_counts;  // kPositive: of how many positives, elsewhere too; else null
};

struct Rectangle {
    Matrix image, text;  // (N, D), (M, D), one dtype, any strides
    double scale;        // logits = scale * image text^T, plus SigLIP's bias
    Pairing pairing;
};

// Both of them, or none. Columns are 1 apart, numbers float32 whatever the features are.
struct Gradients {
    bool wanted;
    Matrix d_image, d_text;
};

// Of each image or text, with q the products of features times the sign of the scale: the maximum of q, the sum of
// exp(S - its logit), both over those pairs that do not belong together, and the sum of q over those that do. A row of
// several positives has these in its maximum and sum, too. See statistics.h.
struct Statistics {
    float *max, *sum, *positive;
};

// What the statistics make of each image or text in dS: see weights.h.
struct Weights {
    const float *max, *weight, *positive_weight, *target;
};

struct ClipLoss {
    Rectangle rectangle;
    double count;                    // the loss is a sum divided by this
    double row_share, column_share;  // of the losses of images and of texts in that sum
    double label_smoothing;  // without what it takes off each pair alike, see mmkernels/ops/contrastive/smoothing.py
    Gradients gradients;
};

struct SigLipLoss {
    Rectangle rectangle;
    double bias, count;
    Gradients gradients;
};

struct ContrastiveResult {
    double loss;
    double d_scale, d_bias;  // 0 unless gradients are wanted
};

#define MMK_DECLARE(level, isa, ...)                                                                        \
    namespace isa {                                                                                         \
    ContrastiveResult clip_loss(const ClipLoss& call);                                                      \
    ContrastiveResult siglip_loss(const SigLipLoss& call);                                                  \
    void clip_statistics(const Rectangle& call, const Statistics& rows, const Statistics& columns);         \
    double clip_gradients(const Rectangle& call, const Weights& rows, const Weights& columns, double count, \
                          const Gradients& gradients);                                                      \
    }
MMK_FOR_EACH_ISA(MMK_DECLARE)
#undef MMK_DECLARE

}  // namespace mmk
