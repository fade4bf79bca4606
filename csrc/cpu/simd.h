// One vector interface, compiled once per instruction set (MMK_ISA names it and is the namespace, so that the linker
// never merges two levels' templates). Vectors of kLanes floats are GCC vector extensions, which reach the intrinsics'
// speed at every level; intrinsics stand only where the extensions have no word for it.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MMK_INLINE inline __attribute__((always_inline))
#define MMK_INLINE_LAMBDA __attribute__((always_inline))
#define MMK_UNROLL _Pragma("GCC unroll 32")

namespace mmk::MMK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));

// Element types as they lie in memory. BFloat16 and Float16 are bits only; arithmetic is on float.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

static MMK_INLINE Vec splat(float x) { return x - Vec{}; }
static MMK_INLINE UVec splat_bits(uint32_t x) { return x - UVec{}; }
static MMK_INLINE Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
static MMK_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
static MMK_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN
static MMK_INLINE IVec lane_index() {
    IVec i;
    MMK_UNROLL for (int l = 0; l < kLanes; l++) i[l] = l;
    return i;
}
static MMK_INLINE Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }

// Over the lanes, by halves.
static MMK_INLINE float sum(Vec v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}
static MMK_INLINE float max(Vec v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

// 2^x to 1e-7 of the value for every finite x, and exactly where x is whole: 0 below the subnormals, inf above, NaN
// stays NaN. 2^f on [0, 1) is the polynomial of degree 6 through 2^0 = 1 that is minimax in the relative error, 2e-9.
static MMK_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
    const Vec f = _mm512_reduce_ps(x, 9);  // x - floor(x); scalef then applies floor(x), with gradual underflow
#else
    // Clamped to where the exponent arithmetic below holds; NaN fails both comparisons and passes through.
    const Vec high = splat(129.0f), low = splat(-150.0f);
    const Vec y = x > high ? high : x < low ? low : x;
    const IVec whole = __builtin_convertvector(y == y ? y : Vec{}, IVec);  // towards zero
    const Vec truncated = __builtin_convertvector(whole, Vec);
    const IVec floor = truncated > y ? whole - 1 : whole;
    const Vec f = y - __builtin_convertvector(floor, Vec);
#endif
    Vec p = splat(0.000216129159441f);
    p = p * f + splat(0.00124678461739f);
    p = p * f + splat(0.00967545159359f);
    p = p * f + splat(0.0554852806079f);
    p = p * f + splat(0.240229305554f);
    p = p * f + splat(0.693147044443f);
    p = p * f + splat(1.0f);
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, x);
#else
    // Two factors, since 2^floor alone leaves the range of a float at both ends.
    const IVec half = floor >> 1;
    const IVec a = (half + 127) << 23, b = (floor - half + 127) << 23;
    Vec scale_a, scale_b;
    memcpy(&scale_a, &a, sizeof a);
    memcpy(&scale_b, &b, sizeof b);
    return p * scale_a * scale_b;
#endif
}

// ---- conversions between memory types and float lanes

static MMK_INLINE Vec as_float(UVec bits) {
    Vec v;
    memcpy(&v, &bits, sizeof v);
    return v;
}
static MMK_INLINE UVec as_bits(Vec v) {
    UVec bits;
    memcpy(&bits, &v, sizeof v);
    return bits;
}

typedef uint16_t HalfLanes __attribute__((vector_size(kLanes * 2)));
typedef uint8_t ByteLanes __attribute__((vector_size(kLanes)));

static MMK_INLINE Vec load(const BFloat16* p) {
    HalfLanes h;
    memcpy(&h, p, sizeof h);
    return as_float(__builtin_convertvector(h, UVec) << 16);
}
static MMK_INLINE Vec load(const Float16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    _Float16 h[kLanes];
    memcpy(h, p, sizeof h);
    Vec v;
    for (int i = 0; i < kLanes; i++) v[i] = static_cast<float>(h[i]);
    return v;
#endif
}
static MMK_INLINE Vec load(const uint8_t* p) {
    ByteLanes b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, IVec), Vec);
}

// Rounded to nearest even; NaN becomes a quiet NaN of the same sign.
static MMK_INLINE HalfLanes to_bfloat16(Vec v) {
#if defined(__AVX512BF16__)
    return (HalfLanes)_mm512_cvtneps_pbh(v);
#else
    const UVec bits = as_bits(v);
    const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const UVec quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector(v == v ? rounded : quiet, HalfLanes);
#endif
}
static MMK_INLINE void store(BFloat16* p, Vec v) {
    const HalfLanes h = to_bfloat16(v);
    memcpy(p, &h, sizeof h);
}
static MMK_INLINE void store(Float16* p, Vec v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    _Float16 h[kLanes];
    for (int i = 0; i < kLanes; i++) h[i] = static_cast<_Float16>(v[i]);
    memcpy(p, h, sizeof h);
#endif
}

// The first n lanes only (0 <= n <= kLanes); nothing past them is touched, and the rest loads as zero.
template <class T>
static MMK_INLINE Vec load_first(const T* p, int n) {
    if (n < 0 || n > kLanes) __builtin_unreachable();
    T lanes[kLanes] = {};
    memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}
template <class T>
static MMK_INLINE void store_first(T* p, Vec v, int n) {
    if (n < 0 || n > kLanes) __builtin_unreachable();
    T lanes[kLanes];
    store(lanes, v);
    memcpy(p, lanes, n * sizeof(T));
}
#if defined(__AVX512F__)
static MMK_INLINE Vec load_first(const float* p, int n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
static MMK_INLINE void store_first(float* p, Vec v, int n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
}
#endif

template <class T>
static MMK_INLINE float to_float(T x) {
    return load_first(&x, 1)[0];
}
template <class T>
static MMK_INLINE T from_float(float x) {
    T out;
    store_first(&out, splat(x), 1);
    return out;
}

// ---- stores past the caches

// Whole lines written without reading them first, for results too large to be found in a cache later. Other threads see
// them after end_streams. `p` is on a boundary of the vector's size; other levels store as usual.
static MMK_INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, v);
#else
    store(p, v);
#endif
}
static MMK_INLINE void stream(BFloat16* p, Vec v) {
#if defined(__AVX512F__)
    const HalfLanes h = to_bfloat16(v);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)h);
#else
    store(p, v);
#endif
}
static MMK_INLINE void stream(Float16* p, Vec v) { store(p, v); }
static MMK_INLINE void end_streams() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

}  // namespace mmk::MMK_ISA
