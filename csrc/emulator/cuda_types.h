// CUDA's own types, as far as our kernels use them, for a machine that has no CUDA headers.
#pragma once
#include <cstdint>
#include <cstring>

struct dim3 {
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    unsigned x, y, z;
};
struct uint3 {
    unsigned x, y, z;
};

// Vectors are as aligned as CUDA's: the address sanitizer's companion then reports a vector load that a GPU would trap.
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

using cudaStream_t = struct CUstream_st*;

struct alignas(64) CUtensorMap {
    uint64_t opaque[16];
};

namespace mmk::emulator {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

float float_of_half(uint16_t bits);
uint16_t half_of_float(float x);  // rounds to nearest, ties to even

inline float float_of_bfloat16(uint16_t bits) { return float_of(uint32_t{bits} << 16); }
inline uint16_t bfloat16_of_float(float x) {  // rounds to nearest, ties to even
    const uint32_t bits = bits_of(x);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

struct BFloat16 {
    BFloat16() = default;
    BFloat16(float x) : bits(bfloat16_of_float(x)) {}
    operator float() const { return float_of_bfloat16(bits); }
    uint16_t bits;
};

struct Float16 {
    Float16() = default;
    Float16(float x) : bits(half_of_float(x)) {}
    operator float() const { return float_of_half(bits); }
    uint16_t bits;
};

}  // namespace mmk::emulator
