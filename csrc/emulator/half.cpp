// Conversions of IEEE half precision in integer arithmetic: no instruction set and no compiler extension is assumed.
#include <cmath>

#include "emulator/cuda_types.h"

namespace mmk::emulator {

float float_of_half(uint16_t bits) {
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return float_of(sign | 0x7F800000 | mantissa << 13);
    if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // a subnormal number, or zero
    return sign != 0 ? -magnitude : magnitude;
}

uint16_t half_of_float(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);   // NaN
    if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // from 65520 on: infinity
    if (magnitude >= 0x38800000) {                                             // normal: from 2^-14 on
        const uint32_t rebased = magnitude - (112u << 23);
        return static_cast<uint16_t>(sign | (rebased + 0xFFF + (rebased >> 13 & 1)) >> 13);
    }
    const float units = std::nearbyint(float_of(magnitude) * 0x1p24f);  // exact product, then one rounding
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(units));
}

}  // namespace mmk::emulator
