// The swizzles of shared memory that TMA writes and wgmma reads.
#pragma once
#include <cstdint>

namespace mmk::emulator {

// bits = 0, 1, 2, 3 for none, 32, 64, 128 bytes: in rows of 16 << bits bytes, the number of the 16-byte chunk is XORed
// with address bits 7 and up. So it is addresses that are swizzled, and a tile lies on a repeat of the pattern.
constexpr uint32_t swizzled(uint32_t address, int bits) { return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4); }
constexpr uint32_t swizzle_repeat(int bits) { return 128u << bits; }

}  // namespace mmk::emulator
