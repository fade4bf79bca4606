// Sums over the lanes of kLanes vectors at once: a tree of shuffles instead of a store and a loop for each.
#pragma once
#include "cpu/simd.h"

namespace mmk::MMK_ISA {

// Of every four lanes the first two from a, the others from b: the even ones, or the odd ones.
static MMK_INLINE Vec evens(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_shuffle_ps(a, b, 0x88);
#elif defined(__AVX2__)
    return _mm256_shuffle_ps(a, b, 0x88);
#else
    return Vec{a[0], a[2], b[0], b[2]};
#endif
}
static MMK_INLINE Vec odds(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_shuffle_ps(a, b, 0xdd);
#elif defined(__AVX2__)
    return _mm256_shuffle_ps(a, b, 0xdd);
#else
    return Vec{a[1], a[3], b[1], b[3]};
#endif
}

// The sum of the neighbouring quarters of a, then that of b: halves the number of quarters.
static MMK_INLINE Vec add_quarters(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
#elif defined(__AVX2__)
    return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
#else
    return a + b;  // never called: one quarter is all there is
#endif
}

// Lane i: the sum over the lanes of v[i].
static MMK_INLINE Vec lane_sums(const Vec (&v)[kLanes]) {
    Vec part[kLanes];
    MMK_UNROLL for (int i = 0; i < kLanes / 2; i++) {
        part[i] = evens(v[2 * i], v[2 * i + 1]) + odds(v[2 * i], v[2 * i + 1]);
    }
    MMK_UNROLL for (int i = 0; i < kLanes / 4; i++) {
        part[i] = evens(part[2 * i], part[2 * i + 1]) + odds(part[2 * i], part[2 * i + 1]);
    }
    MMK_UNROLL for (int count = kLanes / 4; count > 1; count /= 2) {
        MMK_UNROLL for (int i = 0; i < count / 2; i++) part[i] = add_quarters(part[2 * i], part[2 * i + 1]);
    }
    return part[0];
}

}  // namespace mmk::MMK_ISA
