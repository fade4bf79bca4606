// One vector interface, compiled once per instruction set (MMK_ISA names it and is the namespace, so that the linker
// never merges two levels' templates). Vectors of kLanes floats are GCC vector extensions, which reach the intrinsics'
// speed at every level; intrinsics stand only where the extensions have no word for it.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(MMK_NEON)
#include <arm_neon.h>
#endif

// An instruction that multiplies pairs of bfloat16 and adds both products to a float.
#if defined(__AVX512BF16__) || (defined(MMK_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#define MMK_HAS_BF16 1
#else
#define MMK_HAS_BF16 0
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
#elif defined(MMK_NEON)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif
#if defined(__AVX2__) || defined(MMK_NEON)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;  // or nothing says so: a product may be rounded before it is added
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
static MMK_INLINE Vec swap_neighbours(Vec v) {  // lanes 1 0 3 2 5 4 ...
#if defined(__AVX512F__)
    return _mm512_permute_ps(v, 0xb1);
#elif defined(__AVX2__)
    return _mm256_permute_ps(v, 0xb1);
#else
    return Vec{v[1], v[0], v[3], v[2]};
#endif
}
static MMK_INLINE Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }

static MMK_INLINE bool all_ones(Vec v) {
#if defined(__AVX512F__)
    return _mm512_cmpneq_ps_mask(v, splat(1.0f)) == 0;
#else
    const IVec other = v != 1.0f;
    for (int i = 0; i < kLanes; i++) {
        if (other[i]) return false;
    }
    return true;
#endif
}

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

template <int kCount>
static MMK_INLINE Vec polynomial(Vec x, const float (&coefficients)[kCount]) {  // the highest power first
    Vec p = splat(coefficients[0]);
    MMK_UNROLL for (int i = 1; i < kCount; i++) p = p * x + splat(coefficients[i]);
    return p;
}

// 2^x, where the polynomial gives 2^f for f in [0, 1): 0 below the subnormals, inf above, NaN stays NaN.
template <int kCount>
static MMK_INLINE Vec exp2_by(Vec x, const float (&coefficients)[kCount]) {
#if defined(__AVX512F__)
    const Vec f = _mm512_reduce_ps(x, 9);  // x - floor(x); scalef then applies floor(x), with gradual underflow
    return _mm512_scalef_ps(polynomial(f, coefficients), x);
#else
    // Clamped to where the exponent arithmetic below holds; NaN fails both comparisons and passes through.
    const Vec high = splat(129.0f), low = splat(-150.0f);
    const Vec y = x > high ? high : x < low ? low : x;
    const IVec whole = __builtin_convertvector(y == y ? y : Vec{}, IVec);  // towards zero
    const Vec truncated = __builtin_convertvector(whole, Vec);
    const IVec floor = truncated > y ? whole - 1 : whole;
    const Vec p = polynomial(y - __builtin_convertvector(floor, Vec), coefficients);
    // Two factors, since 2^floor alone leaves the range of a float at both ends.
    const IVec half = floor >> 1;
    const IVec a = (half + 127) << 23, b = (floor - half + 127) << 23;
    Vec scale_a, scale_b;
    memcpy(&scale_a, &a, sizeof a);
    memcpy(&scale_b, &b, sizeof b);
    return p * scale_a * scale_b;
#endif
}

// A number as a float and what that leaves of it.
struct TwoFloats {
    explicit TwoFloats(double x) : first(static_cast<float>(x)), rest(static_cast<float>(x - first)) {}
    float first, rest;
};

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.69314718055994531;

// The polynomials are those through 2^0 = 1 that are minimax in the relative error, so whole x give exact results.

// 2^x to 1e-7 of the value (polynomial: 2e-9).
static MMK_INLINE Vec exp2(Vec x) {
    constexpr float kCoefficients[] = {0.000216129159441f,
                                       0.00124678461739f,
                                       0.00967545159359f,
                                       0.0554852806079f,
                                       0.240229305554f,
                                       0.693147044443f,
                                       1.0f};
    return exp2_by(x, kCoefficients);
}

// 2^x to 2e-7 of the value (polynomial: 8e-8), for results that are rounded to a half type.
static MMK_INLINE Vec exp2_coarse(Vec x) {
    constexpr float kCoefficients[] = {0.00186713147793f, 0.0090170246603f, 0.0557999204246f,
                                       0.240164446553f,   0.693151312365f,  1.0f};
    return exp2_by(x, kCoefficients);
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

// log2(x) as a whole number and a fraction below 0.6, for x = 0 and normal x > 0; inf and NaN give NaN. With x = 2^e m,
// m in [0.75, 1.5), it is e + t L(t^2) for t = (m - 1) / (m + 1), L minimax in the relative error, 2e-9.
struct Log2 {
    Vec whole, fraction;
};

static MMK_INLINE Log2 log2_parts(Vec x) {
    constexpr float kCoefficients[] = {0.439083155624f, 0.576395234724f, 0.961802200895f, 2.88539007486f};
    const UVec bits = as_bits(x);
    IVec e;
    memcpy(&e, &bits, sizeof e);
    e = (e - 0x3f400000) >> 23;  // 0x3f400000: 0.75
    const Vec m = as_float(bits - ((UVec)e << 23)), t = (m - 1.0f) / (m + 1.0f);
    const Vec whole = select(x == Vec{}, splat(-__builtin_inff()), __builtin_convertvector(e, Vec));
    return {whole, t * polynomial(t * t, kCoefficients) + (x - x)};
}

// To 2e-7 of the value.
static MMK_INLINE Vec log2(Vec x) {
    const Log2 log = log2_parts(x);
    return log.whole + log.fraction;
}

// The logarithm of 2^power x, rounded once: the powers of a softmax's sum make most of it.
static MMK_INLINE Vec log_of_scaled(Vec power, Vec x) {
    typedef double Doubles __attribute__((vector_size(kLanes * 8)));
    const Log2 log = log2_parts(x);
    const Doubles sum = __builtin_convertvector(power, Doubles) + __builtin_convertvector(log.whole, Doubles) +
                        __builtin_convertvector(log.fraction, Doubles);
    return __builtin_convertvector(sum * kLn2, Vec);
}

// tanh(x) to 2e-7 of the value; NaN stays NaN. Near zero, where 1 - exp(-2x) would cancel, x + x^3 R(x^2) with R
// minimax in the relative error of tanh, 1e-9.
static MMK_INLINE Vec tanh(Vec x) {
    constexpr float kCoefficients[] = {-0.00627423855725f, 0.0210716781526f, -0.053852309615f, 0.133325861346f,
                                       -0.333333175595f};
    const UVec sign = as_bits(x) & 0x80000000u;
    const Vec size = as_float(as_bits(x) ^ sign), square = x * x;
    const Vec e = exp2(size * splat(-2 * 1.44269504f)), far = (1.0f - e) / (1.0f + e);
    return select(size < splat(0.55f), x + x * square * polynomial(square, kCoefficients),
                  as_float(as_bits(far) | sign));
}

typedef uint16_t HalfLanes __attribute__((vector_size(kLanes * 2)));
typedef uint8_t ByteLanes __attribute__((vector_size(kLanes)));

#if !defined(__AVX2__) && !defined(MMK_NEON)
// float16 where no instruction converts it and the compiler may have no type for it. Exponents are 112 apart.
static MMK_INLINE Vec from_float16(HalfLanes h) {
    const UVec bits = __builtin_convertvector(h, UVec), sign = (bits & 0x8000u) << 16, size = bits & 0x7fffu;
    const UVec top = size >= 0x7c00u ? splat_bits(112u << 23) : UVec{};  // inf and NaN keep the highest exponent
    const Vec normal = as_float((size << 13) + (112u << 23) + top);
    const Vec subnormal = __builtin_convertvector((IVec)size, Vec) * splat(0x1p-24f);
    return as_float(as_bits(select((IVec)(size < 0x400u), subnormal, normal)) | sign);
}
// Rounded to nearest even, past the largest to infinity; NaN becomes a quiet NaN of the same sign.
static MMK_INLINE HalfLanes to_float16(Vec v) {
    const UVec sign = as_bits(v) & 0x80000000u, size = as_bits(v) ^ sign, shifted = size - (112u << 23);
    const UVec normal = (shifted + 0xfffu + ((shifted >> 13) & 1u)) >> 13;
    const UVec subnormal = as_bits(as_float(size) + splat(0.5f)) - as_bits(splat(0.5f));  // 0.5 has an ulp of 2^-24
    const UVec infinite = size > 0x7f800000u ? splat_bits(0x7e00u) : splat_bits(0x7c00u);
    const UVec finite = size < 0x38800000u ? subnormal : normal;
    return __builtin_convertvector((size < 0x477ff000u ? finite : infinite) | sign >> 16, HalfLanes);
}
#endif

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
#elif defined(MMK_NEON)
    return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
    HalfLanes h;
    memcpy(&h, p, sizeof h);
    return from_float16(h);
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
#elif MMK_HAS_BF16
    return (HalfLanes)vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)v));
#else
    const UVec bits = as_bits(v);
    const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const UVec quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector(v == v ? rounded : quiet, HalfLanes);
#endif
}
#if MMK_HAS_BF16
// In each lane c + a0 b0 + a1 b1, of pairs of bfloat16.
static MMK_INLINE Vec add_products_of_pairs(Vec c, UVec a, UVec b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
    return (Vec)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b);
#endif
}
// Both rounded to bfloat16, one after the other.
static MMK_INLINE UVec to_bfloat16_rows(Vec first, Vec second) {
#if defined(__AVX512BF16__)
    return (UVec)_mm512_cvtne2ps_pbh(second, first);
#else
    return (UVec)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)first), (float32x4_t)second);
#endif
}
// The halves of two rows as pairs, the first row's in the lower half of a lane.
static MMK_INLINE UVec pairs_of_rows(UVec rows) {
#if defined(__AVX512BF16__)
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (UVec)_mm512_permutexvar_epi16(interleave, (__m512i)rows);
#else
    const uint16x8_t first = vreinterpretq_u16_u32((uint32x4_t)rows);
    return (UVec)vzip1q_u16(first, vextq_u16(first, first, kLanes));
#endif
}
// Pairs of the halves of a and b: of each 128 bits of these the lower four, or the upper four.
static MMK_INLINE UVec zip_low(UVec a, UVec b) {
#if defined(__AVX512BF16__)
    return (UVec)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
#else
    return (UVec)vzip1q_u16(vreinterpretq_u16_u32((uint32x4_t)a), vreinterpretq_u16_u32((uint32x4_t)b));
#endif
}
static MMK_INLINE UVec zip_high(UVec a, UVec b) {
#if defined(__AVX512BF16__)
    return (UVec)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#else
    return (UVec)vzip2q_u16(vreinterpretq_u16_u32((uint32x4_t)a), vreinterpretq_u16_u32((uint32x4_t)b));
#endif
}
// Lanes that zip_low and zip_high dealt out four by four, in the order they had.
static MMK_INLINE void undo_zip([[maybe_unused]] Vec& low, [[maybe_unused]] Vec& high) {
#if defined(__AVX512BF16__)
    const __m512i lower = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i upper = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    const Vec first = _mm512_permutex2var_ps(low, lower, high);
    high = _mm512_permutex2var_ps(low, upper, high);
    low = first;
#endif
}
#endif
// Pairs of bfloat16 in 32 bits a lane, `low` in the lower half.
static MMK_INLINE UVec to_bfloat16_pairs(Vec low, Vec high) {
#if MMK_HAS_BF16
    return pairs_of_rows(to_bfloat16_rows(low, high));
#else
    return __builtin_convertvector(to_bfloat16(low), UVec) | __builtin_convertvector(to_bfloat16(high), UVec) << 16;
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
#elif defined(MMK_NEON)
    vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
    const HalfLanes h = to_float16(v);
    memcpy(p, &h, sizeof h);
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
static MMK_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
static MMK_INLINE Vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
static MMK_INLINE Vec load_first(const BFloat16* p, int n) {
    return as_float(__builtin_convertvector((HalfLanes)_mm256_maskz_loadu_epi16(first_lanes(n), p), UVec) << 16);
}
static MMK_INLINE Vec load_first(const Float16* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
static MMK_INLINE void store_first(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
static MMK_INLINE void store_first(BFloat16* p, Vec v, int n) {
    _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)to_bfloat16(v));
}
static MMK_INLINE void store_first(Float16* p, Vec v, int n) {
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
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
