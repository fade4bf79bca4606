// What the tile kernels of the contrastive losses compute with, on every architecture.
#pragma once
#include "cuda/contrastive/passes.h"
#include "cuda/isa/ptx.h"

namespace mmk::cuda {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// How products p become exponentials: q = sign p, and e to the power of a difference of logits is 2 to that of q times
// the factor. The difference comes first: that of products that are close is exact, and nothing is left to be fused in
// one pass and not in another.
struct Logits {
    float sign, factor;  // never 0, which would make kLowest a logit like others; NaN of NaN

    MMK_DEVICE explicit Logits(float scale)
        : sign(scale < 0.0f ? -1.0f : 1.0f), factor(static_cast<float>(fabs(scale * kLog2E))) {
        if (factor < 0x1p-100f) factor = 0x1p-100f;
    }
    MMK_DEVICE float exp(float q, float maximum) const { return exp2_approx((q - maximum) * factor); }
    // Of a positive: one that lies above the maximum is the only one of its row, and of no weight.
    MMK_DEVICE float exp_up_to_1(float q, float maximum) const {
        return exp2_approx(fminf((q - maximum) * factor, 0.0f));
    }
    // exp(-|a - b|)
    MMK_DEVICE float fade(float a, float b) const { return exp2_approx(-fabsf(a - b) * factor); }
};

// log(1 + x) on [0, 1], relative error 1.5e-7: x (1 + x q(x)), q minimax of degree 7.
MMK_DEVICE float log1p_unit(float x) {
    constexpr float kQ[] = {0.005364824552088976f, -0.03006579354405403f, 0.07920453697443008f, -0.13753803074359894f,
                            0.191536545753479f,    -0.24857163429260254f, 0.3332132399082184f,  -0.49999648332595825f};
    float q = kQ[0];
#pragma unroll
    for (int i = 1; i < 8; i++) q = q * x + kQ[i];
    return x + x * x * q;
}

// log(1 + x) of 0 <= x < 2^64, relative error 1.4e-7: 1 + x = 2^k (1 + m), m from -1/4 to 1/2, and log(1 + m) =
// m (1 + m q(m)), q minimax of degree 7. A small x is m itself, and loses nothing.
MMK_DEVICE float log1p_approx(float x) {
    constexpr float kQ[] = {0.0592360645532608f, -0.1241033524274826f,  0.14918099343776703f, -0.16757598519325256f,
                            0.1997883915901184f, -0.24997051060199738f, 0.33333534002304077f, -0.5000001192092896f};
    constexpr int kBits = 23;  // of a mantissa
    const float sum = 1.0f + x;
    int bits;
    memcpy(&bits, &sum, sizeof bits);
    const int exponent = (bits - 0x3F400000) & ~((1 << kBits) - 1), of_unit = 0x3F800000 - exponent;  // 3/4, and 1
    float unit;                                                                                       // 2^-k
    memcpy(&unit, &of_unit, sizeof unit);
    const float m = fmaf(x, unit, unit - 1.0f);
    float q = kQ[0];
#pragma unroll
    for (int i = 1; i < 8; i++) q = q * m + kQ[i];
    return fmaf(m * m, q, m) + static_cast<float>(exponent) * static_cast<float>(kLn2 / (1 << kBits));
}

// (1 + x_1) ... (1 + x_n) - 1 of x_i >= 0: positive terms alone are added up, and small x lose nothing to a 1.
template <int kCount>
MMK_DEVICE float product_beyond_1(const float (&x)[kCount]) {
    if constexpr (kCount == 1) {
        return x[0];
    } else {
        float halves[kCount / 2];
#pragma unroll
        for (int i = 0; i < kCount / 2; i++) halves[i] = fmaf(x[2 * i], x[2 * i + 1], x[2 * i] + x[2 * i + 1]);
        return product_beyond_1(halves);
    }
}

// A pair of SigLIP. y is its logit, negative where the pair belongs together: loss = log(1 + exp y).
struct Sigmoid {
    float loss, slope;  // slope: d loss / dy

    MMK_DEVICE explicit Sigmoid(float y) {
        const float e = exp2_approx(fabsf(y) * -static_cast<float>(kLog2E));
        loss = fmaxf(y, 0.0f) + log1p_unit(e);
        slope = (y >= 0.0f ? 1.0f : e) * reciprocal_approx(1.0f + e);
    }
};

// Maximum of some q, and the sum of their exponentials relative to it. A NaN among them is in the sum.
struct Statistic {
    float maximum, sum;
};

// By one exponential: that of the higher one is 1.
MMK_DEVICE Statistic merged(const Statistic& a, const Statistic& b, const Logits& logits) {
    const float fade = logits.fade(a.maximum, b.maximum);
    const bool a_higher = a.maximum >= b.maximum;
    return {fmaxf(a.maximum, b.maximum), (a_higher ? a.sum : b.sum) + (a_higher ? b.sum : a.sum) * fade};
}

// What stands for the id of an image, and of a text, that is not there: neither's, nor that of the other.
constexpr int kNoImage = -1, kNoText = -2;

// The id of one of the first `end`. kAlone: only if it has one positive, which stays out of its sum.
template <bool kAlone>
MMK_DEVICE int image_id(const Pairs& pairs, int i, int end) {
    return i < end && (!kAlone || pairs.image_counts[i] == 1) ? pairs.image_ids[i] : kNoImage;
}
template <bool kAlone>
MMK_DEVICE int text_id(const Pairs& pairs, int j, int end) {
    return j < end && (!kAlone || pairs.text_counts[j] == 1) ? pairs.text_ids[j] : kNoText;
}

// What a row or a column makes of its positives in count dS, its others being weight exp(S - maximum):
// weight exp(S - maximum) - target, both of these of their own.
struct PositiveWeight {
    float weight, target;

    // Of the weights (4, count) of all.
    static MMK_DEVICE PositiveWeight at(const float* weights, int i, int count) {
        if (i >= count) return {0.0f, 0.0f};
        return {weights[int64_t{2} * count + i], weights[int64_t{3} * count + i]};
    }
};

// Whether own pairs may lie among the `rows` from i on and the `columns` from j on.
MMK_DEVICE bool crosses_own_pairs(const Pairs& pairs, int i, int rows, int j, int columns) {
    return i + pairs.offset < j + columns && j < i + pairs.offset + rows;
}

// The tile of this block: kGroup rows of tiles go column by column, so that what runs at a time reads few rows of
// either matrix and finds them in the L2 cache.
struct TileAt {
    int row, column;
};

template <int kGroup>
MMK_DEVICE TileAt grouped_tile(int index, int rows, int columns) {
    const int first = index / (kGroup * columns) * kGroup, within = index - first * columns;
    const int count = min(rows - first, kGroup);
    return {first + within % count, within / count};
}

}  // namespace mmk::cuda
