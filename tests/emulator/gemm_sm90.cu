// c = a b by wgmma, from tiles that TMA brings in two stages; c leaves by TMA. A block makes 64 x 64 numbers of c: a
// warpgroup multiplies, one lane of a fifth warp copies.
#include "cuda/isa/tensor_map.h"
#include "cuda/isa/wgmma.h"
#include "gemm.h"

namespace mmk::cuda {
namespace {

constexpr int kTile = 64, kStages = 2, kThreads = kWarpgroup + kWarp;
constexpr int kTileBytes = kTile * kTile * 2;  // rows of 128 bytes, the width of the swizzle
constexpr size_t kSharedBytes = 2 * kStages * kTileBytes + 2 * kTileBytes + 2 * kStages * sizeof(uint64_t);

template <class T, bool kTransposeB, OperandA kOperandA>
__global__ __launch_bounds__(kThreads) void gemm_sm90_kernel(const __grid_constant__ CUtensorMap map_a,
                                                             const __grid_constant__ CUtensorMap map_b,
                                                             const __grid_constant__ CUtensorMap map_c,
                                                             const Gemm gemm) {
#if MMK_SM90A
    MMK_DYNAMIC_SHARED(tiles_a);
    constexpr bool kFromRegisters = kOperandA == OperandA::kRegisters;
    unsigned char *tiles_b = tiles_a + kStages * kTileBytes, *tile_c = tiles_b + kStages * kTileBytes;
    uint64_t *full = reinterpret_cast<uint64_t*>(tile_c + 2 * kTileBytes), *empty = full + kStages;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
    const int warp = __shfl_sync(kAllLanes, thread / kWarp, 0);
    const int row0 = static_cast<int>(blockIdx.x) * kTile, column0 = static_cast<int>(blockIdx.y) * kTile;
    const int steps = (gemm.k + kTile - 1) / kTile;

    if (thread == 0) {
        for (int stage = 0; stage < kStages; stage++) {
            mbarrier_init(full + stage, 1);
            mbarrier_init(empty + stage, kWarpgroup / kWarp);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warp == kWarpgroup / kWarp) {
        if (!elect_one()) return;
        for (int step = 0; step < steps; step++) {
            const int stage = step % kStages, parity = step / kStages % 2;
            mbarrier_wait(empty + stage, parity ^ 1);
            mbarrier_arrive_expect(full + stage, kFromRegisters ? kTileBytes : 2 * kTileBytes);
            if constexpr (!kFromRegisters) {
                tensor_load(tiles_a + stage * kTileBytes, &map_a, {step * kTile, row0}, full + stage);
            }
            const int x = kTransposeB ? step * kTile : column0, y = kTransposeB ? column0 : step * kTile;
            tensor_load(tiles_b + stage * kTileBytes, &map_b, {x, y}, full + stage);
        }
        return;
    }

    float d[kTile / 2];
    for (int step = 0; step < steps; step++) {
        const int stage = step % kStages, parity = step / kStages % 2;
        uint32_t a[kTile / 16][4];
        if constexpr (kFromRegisters) {
            for (int i = 0; i < kTile / 4; i++) {
                const int row = row0 + warp * 16 + lane / 4 + i % 2 * 8;
                const int k = step * kTile + i / 4 * 16 + lane % 4 * 2 + i / 2 % 2 * 8;
                const T* const from = static_cast<const T*>(gemm.a) + static_cast<int64_t>(row) * gemm.k + k;
                a[i / 4][i % 4] = row < gemm.m && k < gemm.k ? *reinterpret_cast<const uint32_t*>(from) : 0;
            }
        }
        mbarrier_wait(full + stage, parity);
        const uint32_t address_a = shared_address(tiles_a + stage * kTileBytes);
        const uint32_t address_b = shared_address(tiles_b + stage * kTileBytes);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kTile / 16; k++) {  // 16 values of k: 32 bytes of a row, or two patterns of eight rows
            const uint64_t b = kTransposeB ? matrix_descriptor(address_b + k * 32, 16, 1024, Swizzle::k128)
                                           : matrix_descriptor(address_b + k * 2048, kTileBytes, 1024, Swizzle::k128);
            constexpr Major kMajorB = kTransposeB ? Major::kK : Major::kOther;
            const bool accumulate = step > 0 || k > 0;
            if constexpr (kFromRegisters) {
                wgmma<T, kMajorB>(d, a[k], b, accumulate);
            } else {
                const uint64_t descriptor_a = matrix_descriptor(address_a + k * 32, 16, 1024, Swizzle::k128);
                wgmma<T, Major::kK, kMajorB>(d, descriptor_a, b, accumulate);
            }
        }
        wgmma_commit();
        wgmma_wait<0>(d);
        if (lane == 0) mbarrier_arrive(empty + stage);  // each warp: it has waited for its own reads only
    }

    // c as float32: two boxes of 32 columns, since TMA swizzles nothing wider than 128 bytes; here without a swizzle.
    float* const c = reinterpret_cast<float*>(tile_c);
    for (int i = 0; i < kTile / 2; i++) {
        const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        c[column / 32 * kTile * 32 + row * 32 + column % 32] = d[i];
    }
    async_proxy_fence();
    named_barrier_sync(1, kWarpgroup);
    if (warp == 0 && elect_one()) {
        tensor_store(&map_c, {column0, row0}, c);
        tensor_store(&map_c, {column0 + 32, row0}, c + kTile * 32);
        bulk_store_commit();
        bulk_store_wait_read<0>();
    }
#endif
}

template <class T, bool kTransposeB, OperandA kOperandA>
Error run(const Gemm& gemm, cudaStream_t stream) {
    const char* const name = "gemm_sm90";
    const auto matrix = [](const void* base, int rows, int columns) {
        return TensorLayout<2>{base,
                               {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)},
                               {static_cast<uint64_t>(columns) * sizeof(T)},
                               {kTile, kTile},
                               RowSwizzle::k128};
    };
    CUtensorMap map_a, map_b, map_c;
    if (Error error = encode<T>(map_a, name, matrix(gemm.a, gemm.m, gemm.k))) return error;
    const int rows_b = kTransposeB ? gemm.n : gemm.k, columns_b = kTransposeB ? gemm.k : gemm.n;
    if (Error error = encode<T>(map_b, name, matrix(gemm.b, rows_b, columns_b))) return error;
    TensorLayout<2> c = matrix(gemm.c, gemm.m, gemm.n);
    c.stride[0] = static_cast<uint64_t>(gemm.n) * sizeof(float);
    c.box[0] = 32;
    c.swizzle = RowSwizzle::kNone;
    if (Error error = encode<float>(map_c, name, c)) return error;
    const dim3 grid((gemm.m + kTile - 1) / kTile, (gemm.n + kTile - 1) / kTile);
    const Launch at{name, grid, kThreads, kSharedBytes, stream};
    return launch(at, gemm_sm90_kernel<T, kTransposeB, kOperandA>, map_a, map_b, map_c, gemm);
}

template <class T>
Error run(const Gemm& gemm, OperandA operand_a, cudaStream_t stream) {
    if (operand_a == OperandA::kDescriptor) {
        if (gemm.transpose_b) return run<T, true, OperandA::kDescriptor>(gemm, stream);
        return run<T, false, OperandA::kDescriptor>(gemm, stream);
    }
    if (gemm.transpose_b) return run<T, true, OperandA::kRegisters>(gemm, stream);
    return run<T, false, OperandA::kRegisters>(gemm, stream);
}

}  // namespace

Error gemm_sm90(const Gemm& gemm, OperandA operand_a, cudaStream_t stream) {
    return gemm.bfloat16 ? run<BFloat16>(gemm, operand_a, stream) : run<Float16>(gemm, operand_a, stream);
}

}  // namespace mmk::cuda
