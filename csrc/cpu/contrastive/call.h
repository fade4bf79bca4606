// The contrastive losses of N pairs of features, with their gradients.
#pragma once
#include <cstdint>

#include "cpu/run/isa.h"
#include "cpu/run/tensor.h"

namespace mmk {

struct Contrastive {
    Matrix image, text;  // (N, D), one dtype, any strides
    double scale, bias;  // logits = scale * image text^T + bias; clip_loss is blind to the bias
    double label_smoothing;
    bool with_grads;
    Matrix d_image, d_text;  // float32 whatever the features are, columns 1 apart; read only if with_grads
};

struct ContrastiveResult {
    double loss;
    double d_scale, d_bias;  // 0 without with_grads
};

#define MMK_DECLARE(level, isa, ...)                        \
    namespace isa {                                         \
    ContrastiveResult clip_loss(const Contrastive& call);   \
    ContrastiveResult siglip_loss(const Contrastive& call); \
    }
MMK_FOR_EACH_ISA(MMK_DECLARE)
#undef MMK_DECLARE

}  // namespace mmk
