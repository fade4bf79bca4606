// From a product of a query and a key to its weight, in the forward of span attention.
#pragma once
#include "cpu/simd.h"

namespace mmk::MMK_ISA {

constexpr float kInfinity = __builtin_inff();

// Scores become logits: scaled and capped here, unless scaling is left to the exponential.
struct Logits {
    double exact_scale;
    float scale, softcap;
    bool deferred;  // the scale is positive and there is no cap: the order of the scores is that of the logits

    Logits(double scale, double softcap)
        : exact_scale(scale),
          scale(static_cast<float>(scale)),
          softcap(static_cast<float>(softcap)),
          deferred(scale > 0 && softcap == 0) {}
    // Factor that makes powers of two of them.
    TwoFloats base() const { return TwoFloats(deferred ? exact_scale * kLog2e : kLog2e); }
    MMK_INLINE Vec operator()(Vec score) const {
        if (deferred) return score;
        const Vec logit = score * splat(scale);
        return softcap == 0 ? logit : tanh(logit * splat(1 / softcap)) * splat(softcap);
    }

    // The scores of a vector of lanes and `count` keys from `key` on, kStride apart, become logits, -inf where a lane
    // does not see a key. The highest of each lane.
    template <int kStride>
    MMK_INLINE Vec refine(float* scores, int64_t count, int32_t key, const int32_t* lo, const int32_t* hi) const {
        IVec first, last;
        memcpy(&first, lo, sizeof first);
        memcpy(&last, hi, sizeof last);
        Vec highest = splat(-kInfinity);
        for (int64_t r = 0; r < count; r++) {
            const IVec number = IVec{} + (key + static_cast<int32_t>(r));
            const Vec logit =
                select((number >= first) & (number < last), (*this)(load(scores + r * kStride)), splat(-kInfinity));
            store(scores + r * kStride, logit);
            highest = max(logit, highest);
        }
        return highest;
    }
};

// The float32 weights of so many keys are added up by themselves: one by one, small ones would be rounded away beside
// that of a key to which the query clings.
constexpr int kSumGroup = 8;

// 2^(base logit - reference). The reference is a rounded product and the one here is not: all weights of a row are too
// large or too small by one factor, and so is their sum. Large weights have large logits and a power near zero: what a
// float leaves of the base counts, but for weights that are rounded to half a float's digits. Where nothing is seen the
// logit is -inf, and its product with the rest would be anything.
template <class T>
static MMK_INLINE Vec weight(Vec logit, const TwoFloats& base, Vec reference) {
    const Vec power = logit * splat(base.first) - reference;
    if constexpr (!std::is_same_v<T, float>) return exp2_coarse(power);
    return exp2(power + max(logit, splat(-1e30f)) * splat(base.rest));
}

}  // namespace mmk::MMK_ISA
