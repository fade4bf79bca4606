// What the tile kernels of the contrastive losses compute with, on every architecture.
#pragma once
#include "contrastive_tiles.h"
#include "ptx.h"

namespace mmk::cuda {

constexpr double kLog2E = 1.4426950408889634;

// What makes logits in units of log 2 of products. In float64, so that it is rounded once.
MMK_DEVICE float log2_scale(const Pairs& pairs) { return static_cast<float>(*pairs.scale * kLog2E); }

// a b, rounded whatever follows: fused with the subtraction of a maximum, it would not leave 0 where the maximum is.
MMK_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDACC__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// log(1 + x) on [0, 1], relative error 1.5e-7: x (1 + x q(x)), q minimax of degree 7.
MMK_DEVICE float log1p_unit(float x) {
    constexpr float kQ[] = {0.005364824552088976f, -0.03006579354405403f, 0.07920453697443008f, -0.13753803074359894f,
                            0.191536545753479f,    -0.24857163429260254f, 0.3332132399082184f,  -0.49999648332595825f};
    float q = kQ[0];
#pragma unroll
    for (int i = 1; i < 8; i++) q = q * x + kQ[i];
    return x + x * x * q;
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

// Maximum, and the sum of 2^(x - maximum), of some logits x in units of log 2. A NaN among them is in the sum.
struct Statistic {
    float maximum, sum;
};

// By one exponential: that of the higher one is 1.
MMK_DEVICE Statistic merged(const Statistic& a, const Statistic& b) {
    const float fade = exp2_approx(-fabsf(a.maximum - b.maximum));
    const bool a_higher = a.maximum >= b.maximum;
    return {fmaxf(a.maximum, b.maximum), (a_higher ? a.sum : b.sum) + (a_higher ? b.sum : a.sum) * fade};
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
