// wgmma (sm_90a): products of a warpgroup, asynchronous, with operands in shared memory.
//
//   wgmma_fence();                          registers written since the last product are seen by the next one
//   wgmma<BFloat16, ...>(d, a, b, true);    any number of products
//   wgmma_commit();
//   wgmma_wait<0>(d);                       names every accumulator that is read, or written, from here on
//
// To the compiler an accumulator is ready as soon as a product is issued; only being named by the wait keeps its uses
// behind it. The emulator therefore gives an accumulator back at a wait that names it, and at no other.
#pragma once
#include "cuda/isa/tma.h"

namespace mmk::cuda {

// ---- operands in shared memory

enum class Swizzle : uint64_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// The matrix descriptor of 16-bit numbers in rows of the swizzle's width w (in bytes; 16 without a swizzle), eight rows
// being one pattern of 8 w bytes. For element (i, k) of an operand, i its row (a) or column (b):
//   k is the dense dimension:  pattern i / 8 lies `stride` bytes after the one before it; `leading` matters only
//   without a
//                              swizzle, from 8 values of k to the next
//   i is the dense dimension:  8 values of k are one pattern, the next 8 lie `stride` bytes on; w / 2 values of i fill
//   its
//                              rows, the next ones lie `leading` bytes on. Without a swizzle, the other way round.
MMK_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle) {
    return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 |
           static_cast<uint64_t>(swizzle) << 62;
}
// The same operand `bytes` further on, a multiple of 16 that the compiler knows. Only the low word changes, so that one
// addition is all that stands between two products.
MMK_DEVICE uint64_t advanced(uint64_t descriptor, int bytes) {
    constexpr uint64_t kHigh = ~uint64_t{0xFFFFFFFF};
    return (descriptor & kHigh) | (static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes >> 4));
}

// ---- ordering

MMK_DEVICE void wgmma_fence() {
#ifdef __CUDACC__
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    emulator::wgmma_fence();
#endif
}
MMK_DEVICE void wgmma_commit() {
#ifdef __CUDACC__
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    emulator::wgmma_commit();
#endif
}

#ifdef __CUDACC__
template <int kPending>
MMK_DEVICE void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// An index loop: a range-for would send the whole array to local memory.
template <int kCount>
MMK_DEVICE void pin(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(d[i])::"memory");
}
#endif

// Until at most kPending groups are under way; names the accumulators that are complete then.
template <int kPending>
MMK_DEVICE void wgmma_wait(MMK_ONLY_SITE) {
#ifdef __CUDACC__
    wgmma_wait_group<kPending>();
#else
    emulator::wgmma_wait(kPending, {}, site);
#endif
}
template <int kPending, int kCount>
MMK_DEVICE void wgmma_wait(float (&d)[kCount] MMK_SITE) {
#ifdef __CUDACC__
    wgmma_wait_group<kPending>();
    pin(d);
#else
    emulator::wgmma_wait(kPending, {d}, site);
#endif
}
template <int kPending, int kCount, int kOther>
MMK_DEVICE void wgmma_wait(float (&d)[kCount], float (&e)[kOther] MMK_SITE) {
#ifdef __CUDACC__
    wgmma_wait_group<kPending>();
    pin(d);
    pin(e);
#else
    emulator::wgmma_wait(kPending, {d, e}, site);
#endif
}

// ---- products

// Is the dense dimension of an operand in shared memory k, or the other one?
enum class Major { kK, kOther };

#ifdef __CUDACC__
#include "cuda/isa/wgmma_shapes.h"
#endif

// d (64, N) = a (64, 16) b (16, N), plus d if `accumulate`; N = 2 kCount. T = BFloat16 or Float16. Thread 32 w + 4 g +
// t of the warpgroup holds in d[i] row 16 w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2 t + i % 2.
template <class T, Major kA, Major kB, int kCount>
MMK_DEVICE void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate MMK_SITE) {
    constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
#ifdef __CUDACC__
    wgmma_issue<kBFloat16, static_cast<int>(kA), static_cast<int>(kB)>(d, a, b, accumulate);
#else
    const auto type = kBFloat16 ? emulator::Number::kBFloat16 : emulator::Number::kFloat16;
    emulator::wgmma({2 * kCount, type, d, accumulate, nullptr, a, b, kA != Major::kK, kB != Major::kK}, site);
#endif
}
// a from registers: warp w holds its rows 16 w to 16 w + 15, laid out as for mma(). Not to be written before the wait.
template <class T, Major kB, int kCount>
MMK_DEVICE void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate MMK_SITE) {
    constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
#ifdef __CUDACC__
    wgmma_issue<kBFloat16, static_cast<int>(kB)>(d, a, b, accumulate);
#else
    const auto type = kBFloat16 ? emulator::Number::kBFloat16 : emulator::Number::kFloat16;
    emulator::wgmma({2 * kCount, type, d, accumulate, a, 0, b, false, kB != Major::kK}, site);
#endif
}

}  // namespace mmk::cuda
