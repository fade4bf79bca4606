// A product of two tiles in shared memory that 256 threads add to 128 x 128 sums in their registers, and the pipeline
// that brings the tiles there.
//
//   c_ij += sum_k a_ik b_kj                    kDepth numbers of k a step, 64 bytes of a row
//
// A tile lies deep, 128 rows along i or j of kDepth numbers each, or wide, kDepth rows of 128 numbers: whichever way
// its source is dense in memory. Rows are padded so that neither ldmatrix nor plain loads meet bank conflicts.
//
// 16-bit numbers and tf32: mma, eight warps of 64 x 32 sums each. For two deep tiles of 16 bits a warp loads 6 KiB of
// fragments for 32 mma a step; what limits it is the tensor cores as long as two blocks share a multiprocessor.
// Exact float32: FFMA, 8 x 8 sums a thread, 16 loads of 16 bytes for 256 FFMA.
#pragma once
#include "cuda/isa/ptx.h"

namespace mmk::cuda::tiles {

constexpr int kTile = 128, kThreads = 256, kStages = 4;
template <class T>
constexpr int kDepth = 64 / static_cast<int>(sizeof(T));

enum class Layout { kDeep, kWide };

template <class T, Layout kLayout>
struct TileOf {
    static constexpr bool kDeep = kLayout == Layout::kDeep;
    static constexpr int kRows = kDeep ? kTile : kDepth<T>, kColumns = kDeep ? kDepth<T> : kTile;
    static constexpr int kPitch = kColumns + (kDeep ? 16 / static_cast<int>(sizeof(T)) : 8);
    static constexpr int kNumbers = kRows * kPitch;
};

// Once all products are done, the sums go through shared memory too, so that rows of them are stored.
constexpr int kSumsPitch = kTile + 8;
constexpr size_t kSumsBytes = sizeof(float) * kTile * kSumsPitch;

template <class T, Layout kLeft, Layout kRight>
struct Shared {
    static constexpr int kLeftNumbers = TileOf<T, kLeft>::kNumbers;
    static constexpr int kStage = kLeftNumbers + TileOf<T, kRight>::kNumbers;
    static constexpr size_t kStageBytes = sizeof(T) * kStages * kStage;
    static constexpr size_t kBytes = kStageBytes > kSumsBytes ? kStageBytes : kSumsBytes;
    T* const stages;

    MMK_DEVICE explicit Shared(unsigned char* memory) : stages(reinterpret_cast<T*>(memory)) {}
    MMK_DEVICE T* left(int step) const { return stages + step % kStages * kStage; }
    MMK_DEVICE T* right(int step) const { return left(step) + kLeftNumbers; }
    MMK_DEVICE float* sums() const { return reinterpret_cast<float*>(stages); }
};

// Runs the steps with kStages - 1 of them under way. fetch(step) begins to bring in the tiles of a step, in order; what
// it left in registers put(step) stores, after the product that hides the wait for it.
template <class Fetch, class Put, class Multiply>
MMK_DEVICE void run_pipeline(int steps, const Fetch& fetch, const Put& put, const Multiply& multiply) {
    for (int step = 0; step < kStages - 1; step++) {
        if (step < steps) {
            fetch(step);
            put(step);
        }
        cp_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the tiles of this step are here, and nobody needs those of the last
        const int ahead = step + kStages - 1;
        if (ahead < steps) fetch(ahead);
        cp_async_commit();
        multiply(step);
        if (ahead < steps) put(ahead);
    }
    cp_async_wait<0>();
    __syncthreads();
}

// ---- by tensor cores. The block's warps are 2 x 4; lane = 4 g + t as in ptx.h.

template <class T, Layout kLeft, Layout kRight>
class MmaProduct {
    static constexpr bool kTf32 = sizeof(T) == 4;
    static constexpr int kStep = 32 / static_cast<int>(sizeof(T)), kHalf = kStep / 2;  // of k, in one mma
    static constexpr int kLeftPitch = TileOf<T, kLeft>::kPitch, kRightPitch = TileOf<T, kRight>::kPitch;

  public:
    MMK_DEVICE void add(const T* left, const T* right) {
#pragma unroll
        for (int k = 0; k < kDepth<T>; k += kStep) {
            uint32_t a[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) load_left(a[i], left, row0_ + 16 * i, k);
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                uint32_t b[4];
                load_right(b, right, column0_ + 8 * j, k);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    multiply(c_[i][j], a[i], b);
                    multiply(c_[i][j + 1], a[i], b + 2);
                }
            }
        }
    }

    MMK_DEVICE void store(float* sums) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float* const to = sums + (row0_ + 16 * i + lane_ / 4) * kSumsPitch + column0_ + 8 * j + lane_ % 4 * 2;
                *reinterpret_cast<float2*>(to) = {c_[i][j][0], c_[i][j][1]};
                *reinterpret_cast<float2*>(to + 8 * kSumsPitch) = {c_[i][j][2], c_[i][j][3]};
            }
        }
    }

  private:
    MMK_DEVICE static void multiply(float* c, const uint32_t* a, const uint32_t* b) {
        if constexpr (kTf32) {
            mma_tf32(c, a, b);
        } else {
            mma<T>(c, a, b);
        }
    }

    // 16 rows, kStep of k. ldmatrix moves words: to it, rows of float32 are rows of twice as many 16-bit numbers.
    MMK_DEVICE void load_left(uint32_t (&a)[4], const T* tile, int row, int k) const {
        if constexpr (kLeft == Layout::kDeep) {
            ldmatrix_x4(a, tile + (row + lane_ % 16) * kLeftPitch + k + lane_ / 16 * kHalf);
        } else if constexpr (!kTf32) {
            ldmatrix_x4_trans(a, tile + (k + lane_ / 16 * 8 + lane_ % 8) * kLeftPitch + row + lane_ / 8 % 2 * 8);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                memcpy(&a[i], tile + (k + lane_ % 4 + i / 2 * 4) * kLeftPitch + row + lane_ / 4 + i % 2 * 8, 4);
            }
        }
        round(a);
    }

    // Two times 8 columns, kStep of k.
    MMK_DEVICE void load_right(uint32_t (&b)[4], const T* tile, int column, int k) const {
        if constexpr (kRight == Layout::kDeep) {
            ldmatrix_x4(b, tile + (column + lane_ / 16 * 8 + lane_ % 8) * kRightPitch + k + lane_ / 8 % 2 * kHalf);
        } else if constexpr (!kTf32) {
            ldmatrix_x4_trans(b, tile + (k + lane_ % 16) * kRightPitch + column + lane_ / 16 * 8);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                memcpy(&b[i], tile + (k + lane_ % 4 + i % 2 * 4) * kRightPitch + column + lane_ / 4 + i / 2 * 8, 4);
            }
        }
        round(b);
    }

    MMK_DEVICE static void round(uint32_t (&x)[4]) {
        if constexpr (kTf32) {
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = round_to_tf32(x[i]);
        }
    }

    const int lane_ = static_cast<int>(threadIdx.x) % kWarp, warp_ = static_cast<int>(threadIdx.x) / kWarp;
    const int row0_ = warp_ / 4 * 64, column0_ = warp_ % 4 * 32;
    float c_[4][4][4] = {};
};

// ---- exactly. Threads are 16 x 16, those of a warp 4 x 8, and each has 8 x 8 sums. Long sums are sums of short ones,
// whose errors stay small.

template <Layout kLeft, Layout kRight>
class FmaProduct {
  public:
    MMK_DEVICE void add(const float* left, const float* right) {
        if (++steps_ % kSteps == 0) {
#pragma unroll
            for (int i = 0; i < 64; i++) sums_[i] += c_[i / 8][i % 8], c_[i / 8][i % 8] = 0;
        }
#pragma unroll
        for (int k = 0; k < kDepth<float>; k += 4) {
            float a[4][8], b[4][8];
            load<kLeft>(a, left, thread_row_, k);
            load<kRight>(b, right, thread_column_, k);
#pragma unroll
            for (int n = 0; n < 4; n++) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
#pragma unroll
                    for (int j = 0; j < 8; j++) c_[i][j] = fmaf(a[n][i], b[n][j], c_[i][j]);
                }
            }
        }
    }

    MMK_DEVICE void store(float* sums) const {
#pragma unroll
        for (int i = 0; i < 8; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                sums[place<kLeft>(thread_row_, i) * kSumsPitch + place<kRight>(thread_column_, j)] =
                    sums_[8 * i + j] + c_[i][j];
            }
        }
    }

  private:
    // Which row or column a thread's i-th is: such that four numbers of k, or four neighbours, are one load.
    template <Layout kLayout>
    MMK_DEVICE static int place(int thread, int i) {
        return kLayout == Layout::kDeep ? thread + 16 * i : 4 * thread + i / 4 * 64 + i % 4;
    }

    // x[n][i]: number k + n of row i
    template <Layout kLayout>
    MMK_DEVICE static void load(float (&x)[4][8], const float* tile, int thread, int k) {
        constexpr int kPitch = TileOf<float, kLayout>::kPitch;
        if constexpr (kLayout == Layout::kDeep) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float4 four = *reinterpret_cast<const float4*>(tile + place<kLayout>(thread, i) * kPitch + k);
                x[0][i] = four.x, x[1][i] = four.y, x[2][i] = four.z, x[3][i] = four.w;
            }
        } else {
#pragma unroll
            for (int n = 0; n < 4; n++) {
#pragma unroll
                for (int i = 0; i < 8; i += 4) {
                    const float* const from = tile + (k + n) * kPitch + place<kLayout>(thread, i);
                    const float4 four = *reinterpret_cast<const float4*>(from);
                    x[n][i] = four.x, x[n][i + 1] = four.y, x[n][i + 2] = four.z, x[n][i + 3] = four.w;
                }
            }
        }
    }

    const int lane_ = static_cast<int>(threadIdx.x) % kWarp, warp_ = static_cast<int>(threadIdx.x) / kWarp;
    const int thread_row_ = warp_ / 2 * 4 + lane_ / 8, thread_column_ = warp_ % 2 * 8 + lane_ % 8;
    static constexpr int kSteps = 8;  // of a short sum
    float c_[8][8] = {}, sums_[64] = {};
    int steps_ = 0;
};

// kExact: no tensor cores; float32 only.
template <class T, bool kExact, Layout kLeft, Layout kRight>
using Product = std::conditional_t<kExact, FmaProduct<kLeft, kRight>, MmaProduct<T, kLeft, kRight>>;

}  // namespace mmk::cuda::tiles
