// How many cycles a product of wgmma takes on this GPU, alone: a line of JSON for each shape, with what is expected
// beside it.
//
//   nvcc -std=c++17 -O3 -I<repository>/csrc -gencode=arch=compute_90a,code=sm_90a wgmma_rates.cu -o wgmma_rates
//
// One or two warpgroups of a block multiply matrices of 64 x 16 and 16 x N over and over, on every multiprocessor; a's
// matrix comes from shared memory or from registers. The tensor cores of a multiprocessor multiply and add 1024 times a
// cycle, which is N / 2 cycles for a product, and shared memory is said to give 128 bytes a cycle: (64 + N) / 4 cycles
// with a in it, N / 4 without. Products of few columns show whether that is so. Operands are random numbers, since a
// GPU that multiplies zeros draws less power and keeps a higher clock.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/isa/launch.h"
#include "cuda/isa/wgmma.h"

namespace mmk::cuda {
namespace {

constexpr int kRows = 64, kDepth = 64, kSlices = kDepth / 16;  // of a, and its matrices of 64 x 16
constexpr int kMatrixBytes = kRows * kDepth * 2;               // rows of 128 bytes, the width of the swizzle
constexpr int kProducts = 16;                                  // between two commits
constexpr int kMostGroups = 2;

struct Times {
    long long begin, end;
};

// A number between 0.5 and 1 of either sign, twice.
MMK_DEVICE uint32_t random_pair(uint32_t x) {
    x = (x ^ x >> 16) * 0x7FEB352D;
    x = (x ^ x >> 15) * 0x846CA68B;
    return ((x ^ x >> 16) & 0x807F807F) | 0x3F003F00;
}

MMK_DEVICE long long now() {
#ifdef __CUDACC__
    return clock64();
#else
    return 0;
#endif
}

// times: of each warpgroup of each block. sums: keeps the products from being left out.
template <int kColumns, bool kFromRegisters>
__global__ __launch_bounds__(kMostGroups* kWarpgroup, 1) void wgmma_rates_kernel(int rounds, Times* times,
                                                                                 float* sums) {
#if MMK_SM90A
    MMK_DYNAMIC_SHARED(shared);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int group = __shfl_sync(kAllLanes, thread / kWarpgroup, 0), groups = threads / kWarpgroup;
    uint32_t* const numbers = reinterpret_cast<uint32_t*>(shared);
    for (int i = thread; i < (groups * kRows + kColumns) * kDepth / 2; i += threads) {
        numbers[i] = random_pair(static_cast<uint32_t>(i));
    }
    uint32_t registers[kSlices][4];
#pragma unroll
    for (int i = 0; i < kSlices * 4; i++) registers[i / 4][i % 4] = random_pair(static_cast<uint32_t>(thread + i));
    async_proxy_fence();
    __syncthreads();

    const uint32_t address_a = shared_address(shared + group * kMatrixBytes);
    const uint32_t address_b = shared_address(shared + groups * kMatrixBytes);
    float d[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; i++) d[i] = 0;
    const long long begin = now();
    for (int round = 0; round < rounds; round++) {
        wgmma_fence();
#pragma unroll
        for (int product = 0; product < kProducts; product++) {
            const int k = product % kSlices;
            const uint64_t b = matrix_descriptor(address_b + k * 32, 16, 1024, Swizzle::k128);
            if constexpr (kFromRegisters) {
                wgmma<BFloat16, Major::kK>(d, registers[k], b, true);
            } else {
                const uint64_t a = matrix_descriptor(address_a + k * 32, 16, 1024, Swizzle::k128);
                wgmma<BFloat16, Major::kK, Major::kK>(d, a, b, true);
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>(d);
    const long long end = now();

    float sum = 0;
#pragma unroll
    for (int i = 0; i < kColumns / 2; i++) sum += d[i];
    const int block = static_cast<int>(blockIdx.x);
    sums[block * threads + thread] = sum;
    if (thread % kWarpgroup == 0) times[block * groups + group] = {begin, end};
#endif
}

}  // namespace

template <int kColumns, bool kFromRegisters>
Error multiply(int blocks, int groups, int rounds, Times* times, float* sums) {
    const size_t shared_bytes = groups * kMatrixBytes + kColumns * kDepth * 2;
    const Launch at{"wgmma_rates", dim3(blocks), dim3(groups * kWarpgroup), shared_bytes, nullptr};
    return launch(at, wgmma_rates_kernel<kColumns, kFromRegisters>, rounds, times, sums);
}

}  // namespace mmk::cuda

#ifdef __CUDACC__
using namespace mmk::cuda;

static void ask(cudaError_t status) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "wgmma_rates: %s (%s)\n", cudaGetErrorName(status), cudaGetErrorString(status));
    std::exit(1);
}

static void ask(const Error& error) {
    if (!error) return;
    std::fprintf(stderr, "%s\n", error.message().c_str());
    std::exit(1);
}

template <int kColumns, bool kFromRegisters>
static void measure(int blocks, Times* times, float* sums) {
    for (int groups = 1; groups <= kMostGroups; groups++) {
        const double shared = (kFromRegisters ? kColumns : kRows + kColumns) / 4.0;
        const double expected = std::max(kColumns / 2.0, shared);
        const int rounds = static_cast<int>(1e8 / (expected * kProducts * groups));  // a twentieth of a second or so
        cudaEvent_t begin, end;
        ask(cudaEventCreate(&begin));
        ask(cudaEventCreate(&end));
        ask(multiply<kColumns, kFromRegisters>(blocks, groups, rounds, times, sums));  // the clock settles
        ask(cudaEventRecord(begin));
        ask(multiply<kColumns, kFromRegisters>(blocks, groups, rounds, times, sums));
        ask(cudaEventRecord(end));
        ask(cudaEventSynchronize(end));
        float ms;
        ask(cudaEventElapsedTime(&ms, begin, end));
        std::vector<Times> found(blocks * groups);
        ask(cudaMemcpy(found.data(), times, found.size() * sizeof(Times), cudaMemcpyDeviceToHost));
        std::vector<long long> taken;
        for (int block = 0; block < blocks; block++) {
            Times whole = found[block * groups];
            for (int group = 1; group < groups; group++) {
                whole.begin = std::min(whole.begin, found[block * groups + group].begin);
                whole.end = std::max(whole.end, found[block * groups + group].end);
            }
            taken.push_back(whole.end - whole.begin);
        }
        std::sort(taken.begin(), taken.end());
        const double products = static_cast<double>(rounds) * kProducts * groups;
        const double flops = products * blocks * 2 * kRows * kColumns * 16;
        std::printf(
            "{\"columns\": %d, \"a_from\": \"%s\", \"warpgroups\": %d, \"cycles\": %.2f, \"cycles_most\": %.2f, "
            "\"expected\": %.0f, \"clock_mhz\": %.0f, \"tflops\": %.0f}\n",
            kColumns, kFromRegisters ? "registers" : "shared", groups, taken[blocks / 2] / products,
            taken.back() / products, expected, taken.back() / (ms * 1e3), flops / (ms * 1e9));
        std::fflush(stdout);
    }
}

int main() {
    int blocks = 0;
    ask(count_multiprocessors(blocks));
    Times* times;
    float* sums;
    ask(cudaMalloc(&times, blocks * kMostGroups * sizeof(Times)));
    ask(cudaMalloc(&sums, blocks * kMostGroups * kWarpgroup * sizeof(float)));
    measure<64, false>(blocks, times, sums);
    measure<64, true>(blocks, times, sums);
    measure<128, false>(blocks, times, sums);
    measure<128, true>(blocks, times, sums);
    measure<256, false>(blocks, times, sums);
    measure<16, false>(blocks, times, sums);
    measure<32, false>(blocks, times, sums);
}
#endif
