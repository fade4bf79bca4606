// Launching a kernel: <<<>>> under nvcc, the emulator under g++. Nothing is synchronised, nothing allocated.
#pragma once
#include <cstddef>
#include <string>
#include <type_traits>

#include "cuda/isa/device.h"
#include "cuda/isa/error.h"

namespace mmk::cuda {

struct Launch {
    const char* kernel;  // the name that errors give it
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
    unsigned cluster = 1;  // neighbouring blocks along x that are a cluster
};

#ifdef __CUDACC__
inline std::string describe(const Launch& at) {
    const auto sizes = [](const dim3& d) {
        return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
    };
    return std::string(at.kernel) + ": launch of " + sizes(at.grid) + " blocks of " + sizes(at.block) +
           " threads with " + std::to_string(at.shared_bytes) + " bytes of dynamic shared memory";
}

inline Error error_of(cudaError_t status, const Launch& at) {
    if (status == cudaSuccess) return {};
    return Error(describe(at) + " failed: " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ")");
}
#endif

// The arguments are converted to the kernel's parameters before anything is launched.
template <class... Parameters>
Error launch(const Launch& at, void (*kernel)(Parameters...), const std::common_type_t<Parameters>&... arguments) {
#ifdef __CUDACC__
    constexpr size_t kWithoutAsking = 48 << 10;  // more shared memory has to be asked for
    if (at.shared_bytes > kWithoutAsking) {
        const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                        static_cast<int>(at.shared_bytes));
        if (Error error = error_of(status, at)) return error;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = at.grid;
    config.blockDim = at.block;
    config.dynamicSmemBytes = at.shared_bytes;
    config.stream = at.stream;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {at.cluster, 1, 1};
    if (at.cluster > 1) {
        config.attrs = &cluster;
        config.numAttrs = 1;
    }
    return error_of(cudaLaunchKernelEx(&config, kernel, arguments...), at);
#else
    emulator::launch(kernel, {at.grid, at.block, at.shared_bytes, at.cluster}, arguments...);
    return {};
#endif
}

// What a launcher of *_sm90.cu, `name`, asks first. Without 90a among the architectures of a build the bodies of those
// kernels are left out, and to launch them would do nothing, without an error. CMakeLists.txt says which build it is.
inline Error without_sm90a(const char* name) {
#if defined(__CUDACC__) && !defined(MMK_BUILT_FOR_SM90A)
    return Error(std::string(name) +
                 ": this build holds no code for sm_90a, without which the kernel does nothing; mend: "
                 "MMKERNELS_CUDA_ARCHS=\"80;90a\" pip install --force-reinstall --no-deps mmkernels");
#else
    static_cast<void>(name);
    return {};
#endif
}

// Blocks of a persistent kernel that keeps a multiprocessor to itself: one on each.
inline Error count_multiprocessors(int& count) {
#ifdef __CUDACC__
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return Error(std::string("no number of multiprocessors: ") + cudaGetErrorString(status));
#else
    count = 2;  // few, so that blocks of small cases have several tiles too
#endif
    return {};
}

}  // namespace mmk::cuda
