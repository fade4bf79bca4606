// Tensor maps: what TMA has to know of a tensor. Made on the host, passed to the kernel as a
// `const __grid_constant__ CUtensorMap`, and handed to tensor_load() by address.
#pragma once
#include "cuda/isa/launch.h"
#include "cuda/isa/tma.h"

#ifdef __CUDACC__
#include <cudaTypedefs.h>
#endif

namespace mmk::cuda {

enum class RowSwizzle { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };  // bytes, which the row of a box then has

template <int kRank>
struct TensorLayout {
    const void* base;
    uint64_t size[kRank];        // elements; dimension 0 is dense
    uint64_t stride[kRank - 1];  // bytes, of dimensions 1 and up; multiples of 16
    uint32_t box[kRank];         // elements copied at a time, at most 256 each
    RowSwizzle swizzle;
};

// `kernel`: for the error, which a base or a stride that is no multiple of 16 bytes gives.
template <class T, int kRank>  // T: BFloat16, Float16 or float
Error encode(CUtensorMap& map, const char* kernel, const TensorLayout<kRank>& layout) {
#ifdef __CUDACC__
    void* entry = nullptr;  // the driver's, found at run time: the module loads where there is no driver
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (status != cudaSuccess || entry == nullptr) {
        return Error(std::string(kernel) + ": the driver has no cuTensorMapEncodeTiled: " + cudaGetErrorString(status));
    }
    uint32_t steps[kRank];
    for (uint32_t& step : steps) step = 1;
    const CUtensorMapSwizzle swizzle = layout.swizzle == RowSwizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                       : layout.swizzle == RowSwizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                       : layout.swizzle == RowSwizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                           : CU_TENSOR_MAP_SWIZZLE_NONE;
    const CUtensorMapDataType type = std::is_same_v<T, float>      ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                     : std::is_same_v<T, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUresult result = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry)(
        &map, type, kRank, const_cast<void*>(layout.base), layout.size, layout.stride, layout.box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    const bool encoded = result == CUDA_SUCCESS;
#else
    const bool encoded = emulator::encode_tensor_map(map, sizeof(T), kRank, const_cast<void*>(layout.base), layout.size,
                                                     layout.stride, layout.box, static_cast<int>(layout.swizzle));
#endif
    if (encoded) return {};
    return Error(std::string(kernel) +
                 ": a tensor cannot be read by TMA; its base and strides must be multiples of 16 bytes");
}

}  // namespace mmk::cuda
