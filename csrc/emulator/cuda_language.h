// The names of the CUDA language, for g++: what a kernel says without including anything. Static shared memory goes by
// MMK_SHARED (csrc/cuda/device.h); plain __shared__ is left undefined, since g++ could not watch it.
#pragma once
#include <cmath>

#include "emulator/emulator.h"

#define threadIdx (::mmk::emulator::thread_index())
#define blockIdx (::mmk::emulator::block_index())
#define blockDim (::mmk::emulator::block_size())
#define gridDim (::mmk::emulator::grid_size())
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define MMK_ONLY_SITE ::mmk::emulator::Site site = ::mmk::emulator::Site::here()
#define MMK_SITE , MMK_ONLY_SITE

template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}

inline void __syncthreads(MMK_ONLY_SITE) { mmk::emulator::sync_threads(site); }
inline void __syncwarp(uint32_t mask = ~0u MMK_SITE) { mmk::emulator::sync_warp(mask, site); }
inline uint32_t __ballot_sync(uint32_t mask, bool vote MMK_SITE) { return mmk::emulator::ballot(mask, vote, site); }
inline bool __any_sync(uint32_t mask, bool vote MMK_SITE) { return mmk::emulator::ballot(mask, vote, site) != 0; }
inline bool __all_sync(uint32_t mask, bool vote MMK_SITE) { return mmk::emulator::ballot(mask, vote, site) == mask; }

namespace mmk::emulator {

template <class T>
T shuffle_from(uint32_t mask, T value, int source_lane, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = shuffle(mask, bits, source_lane, site);
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The first and the last lane of the calling lane's part of the warp, `width` lanes wide.
inline int first_lane(int width) { return lane() & ~(width - 1); }
inline int last_lane(int width) { return lane() | (width - 1); }

}  // namespace mmk::emulator

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32 MMK_SITE) {
    using namespace mmk::emulator;
    return shuffle_from(mask, value, first_lane(width) | (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32 MMK_SITE) {
    using namespace mmk::emulator;
    const int source = lane() ^ bits;
    return shuffle_from(mask, value, source > last_lane(width) ? lane() : source, site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned distance, int width = 32 MMK_SITE) {
    using namespace mmk::emulator;
    const int source = lane() - static_cast<int>(distance);
    return shuffle_from(mask, value, source < first_lane(width) ? lane() : source, site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned distance, int width = 32 MMK_SITE) {
    using namespace mmk::emulator;
    const int source = lane() + static_cast<int>(distance);
    return shuffle_from(mask, value, source > last_lane(width) ? lane() : source, site);
}

// Integers only: a sum of floats in the order of arrival would not be the same twice.
template <class T>
__attribute__((no_sanitize("thread"))) T atomicAdd(T* p, T value MMK_SITE) {
    static_assert(std::is_integral_v<T>, "atomics on floats are not deterministic");
    mmk::emulator::atomic_access(p, sizeof value, site);
    const T old = *p;
    *p = old + value;
    return old;
}
