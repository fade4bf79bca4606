// c = a b by mma, from tiles that cp.async brings in two stages. A block of four warps makes 64 x 64 numbers of c; a
// warp 16 rows of them.
#include "cuda/isa/ptx.h"
#include "gemm.h"

namespace mmk::cuda {
namespace {

constexpr int kTile = 64, kDepth = 32, kThreads = 128;
constexpr int kPitchA = kDepth + 8;  // eight rows of ldmatrix fall into different banks
template <bool kTransposeB>
constexpr int kPitchB = (kTransposeB ? kDepth : kTile) + 8;
template <bool kTransposeB>
constexpr int kStage = kTile * kPitchA + (kTransposeB ? kTile : kDepth) * kPitchB<kTransposeB>;
template <bool kTransposeB>
constexpr size_t kSharedBytes = 2 * kStage<kTransposeB> * 2;

// A tile of kRows rows of kColumns numbers from (row, column) of a matrix; zeros outside.
template <int kRows, int kColumns, int kPitch, class T>
MMK_DEVICE void load_tile(T* to, const void* matrix, int row, int column, int rows, int columns) {
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns / 8; i += kThreads) {
        const int r = i / (kColumns / 8), c = i % (kColumns / 8) * 8;
        const bool inside = row + r < rows && column + c < columns;
        const int64_t offset = inside ? static_cast<int64_t>(row + r) * columns + column + c : 0;
        cp_async<16>(to + r * kPitch + c, static_cast<const T*>(matrix) + offset, inside);
    }
}

template <class T, bool kTransposeB>
__global__ __launch_bounds__(kThreads) void gemm_sm80_kernel(const Gemm gemm) {
    MMK_DYNAMIC_SHARED(shared);
    constexpr int kB = kPitchB<kTransposeB>;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int row0 = static_cast<int>(blockIdx.x) * kTile, column0 = static_cast<int>(blockIdx.y) * kTile;
    const int steps = (gemm.k + kDepth - 1) / kDepth;

    const auto stage = [&](int step) { return reinterpret_cast<T*>(shared) + step % 2 * kStage<kTransposeB>; };
    const auto load = [&](int step) {
        T *a = stage(step), *b = a + kTile * kPitchA;
        load_tile<kTile, kDepth, kPitchA>(a, gemm.a, row0, step * kDepth, gemm.m, gemm.k);
        if constexpr (kTransposeB) load_tile<kTile, kDepth, kB>(b, gemm.b, column0, step * kDepth, gemm.n, gemm.k);
        if constexpr (!kTransposeB) load_tile<kDepth, kTile, kB>(b, gemm.b, step * kDepth, column0, gemm.k, gemm.n);
    };

    float d[kTile / 8][4] = {};
    load(0);
    cp_async_commit();
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) load(step + 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();  // the tiles of this step are here, from every thread
        const T *a = stage(step), *b = a + kTile * kPitchA;
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
            uint32_t fragment_a[4], fragment_b[4];
            ldmatrix_x4(fragment_a, a + (warp * 16 + lane % 16) * kPitchA + k + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < kTile; n += 16) {
                if constexpr (kTransposeB) {
                    ldmatrix_x4(fragment_b, b + (n + lane / 16 * 8 + lane % 8) * kB + k + lane / 8 % 2 * 8);
                } else {
                    ldmatrix_x4_trans(fragment_b, b + (k + lane % 16) * kB + n + lane / 16 * 8);
                }
                mma<T>(d[n / 8], fragment_a, fragment_b);
                mma<T>(d[n / 8 + 1], fragment_a, fragment_b + 2);
            }
        }
        __syncthreads();  // before the next step's copies overwrite this stage
    }
    cp_async_wait<0>();

    for (int n = 0; n < kTile / 8; n++) {
        for (int i = 0; i < 4; i++) {
            const int row = row0 + warp * 16 + lane / 4 + i / 2 * 8, column = column0 + n * 8 + lane % 4 * 2 + i % 2;
            if (row < gemm.m && column < gemm.n) gemm.c[static_cast<int64_t>(row) * gemm.n + column] = d[n][i];
        }
    }
}

template <class T, bool kTransposeB>
Error run(const Gemm& gemm, cudaStream_t stream) {
    const dim3 grid((gemm.m + kTile - 1) / kTile, (gemm.n + kTile - 1) / kTile);
    const Launch at{"gemm_sm80", grid, kThreads, kSharedBytes<kTransposeB>, stream};
    return launch(at, gemm_sm80_kernel<T, kTransposeB>, gemm);
}

}  // namespace

Error gemm_sm80(const Gemm& gemm, cudaStream_t stream) {
    if (gemm.bfloat16) return gemm.transpose_b ? run<BFloat16, true>(gemm, stream) : run<BFloat16, false>(gemm, stream);
    return gemm.transpose_b ? run<Float16, true>(gemm, stream) : run<Float16, false>(gemm, stream);
}

}  // namespace mmk::cuda
