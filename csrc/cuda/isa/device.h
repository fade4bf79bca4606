// What every kernel file includes first: the CUDA language, from nvcc or from the emulator, and the words in which a
// kernel is written once for both.
//
//   MMK_DEVICE              a device function, always inlined
//   MMK_DYNAMIC_SHARED(p);  unsigned char* p: the launch's shared memory, aligned to 1024 bytes
//   MMK_SHARED(T, x, n);    T x[n] in shared memory
//   MMK_SITE                ends the parameters of a primitive (MMK_ONLY_SITE is all of them): where in the kernel it
//                           stands, for the emulator's reports
//
// A primitive (ptx.h, tma.h, wgmma.h) is written twice, as inline PTX and as a call of the emulator:
//   #ifdef __CUDACC__ ... #else ... #endif
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MMK_DEVICE __device__ __forceinline__
#define MMK_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define MMK_SHARED(type, name, count) __shared__ type name[count]
#define MMK_SITE
#define MMK_ONLY_SITE

namespace mmk::cuda {
using BFloat16 = __nv_bfloat16;
using Float16 = __half;
}  // namespace mmk::cuda
#else
#include "emulator/cuda_language.h"

#define MMK_DEVICE inline
#define MMK_DYNAMIC_SHARED(name) \
    unsigned char* const name = static_cast<unsigned char*>(::mmk::emulator::dynamic_shared())
#define MMK_SHARED(type, name, count)      \
    static const char name##_variable = 0; \
    auto& name = *static_cast<type(*)[count]>(::mmk::emulator::static_shared(&name##_variable, sizeof(type[count])))

namespace mmk::cuda {
using BFloat16 = emulator::BFloat16;
using Float16 = emulator::Float16;
}  // namespace mmk::cuda
#endif

namespace mmk::cuda {

constexpr int kWarp = 32, kWarpgroup = 128;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;

// Two numbers in one register, `low` in the low half, rounded to nearest.
template <class T>
MMK_DEVICE uint32_t pack2(float low, float high) {
    uint32_t bits;
#ifdef __CUDACC__
    if constexpr (std::is_same_v<T, BFloat16>) {
        const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
        memcpy(&bits, &both, sizeof bits);
    } else {
        const __half2 both = __floats2half2_rn(low, high);
        memcpy(&bits, &both, sizeof bits);
    }
#else
    const T both[2] = {T(low), T(high)};
    memcpy(&bits, both, sizeof bits);
#endif
    return bits;
}

}  // namespace mmk::cuda
