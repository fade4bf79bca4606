// The two GEMMs against products in float64, under each order of threads; the same to the bit under all of them.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "gemm.h"

using namespace mmk;
using namespace mmk::cuda;

static int failures = 0;

static void fail(const char* what, const Gemm& gemm, const char* why) {
    failures++;
    printf("FAILED %s (%d x %d x %d, bfloat16 %d, transpose_b %d): %s\n", what, gemm.m, gemm.n, gemm.k, gemm.bfloat16,
           gemm.transpose_b, why);
}

template <class T>
static std::vector<T> draw(size_t count) {
    std::vector<T> numbers(count);
    for (T& x : numbers) x = T(static_cast<float>(rand() % 2001 - 1000) / 1000);
    return numbers;
}

// Half a unit in the last place of float32 for each of the k additions, of terms of at most 1.
template <class T>
static bool is_right(const Gemm& gemm, const std::vector<float>& c) {
    const T *a = static_cast<const T*>(gemm.a), *b = static_cast<const T*>(gemm.b);
    for (int i = 0; i < gemm.m; i++) {
        for (int j = 0; j < gemm.n; j++) {
            double sum = 0, magnitude = 0;
            for (int k = 0; k < gemm.k; k++) {
                const float x = a[i * gemm.k + k], y = gemm.transpose_b ? b[j * gemm.k + k] : b[k * gemm.n + j];
                sum += double{x} * y;
                magnitude += std::abs(double{x} * y);
            }
            if (!(std::abs(c[i * gemm.n + j] - sum) <= gemm.k * 0x1p-24 * magnitude)) return false;
        }
    }
    return true;
}

template <class T, class Run>
static void check(const char* what, Gemm gemm, Run&& run) {
    const auto a = draw<T>(static_cast<size_t>(gemm.m) * gemm.k), b = draw<T>(static_cast<size_t>(gemm.n) * gemm.k);
    std::vector<float> first;
    for (const auto order : {emulator::Order::kLowestFirst, emulator::Order::kHighestFirst, emulator::Order::kRandom}) {
        emulator::options() = {order, static_cast<uint64_t>(rand())};
        std::vector<float> c(static_cast<size_t>(gemm.m) * gemm.n, NAN);
        gemm.a = a.data();
        gemm.b = b.data();
        gemm.c = c.data();
        emulator::watch(a.data(), a.size() * sizeof(T), true);
        emulator::watch(b.data(), b.size() * sizeof(T), true);
        emulator::watch(c.data(), c.size() * sizeof(float), false);
        try {
            if (const Error error = run(gemm)) fail(what, gemm, error.message().c_str());
        } catch (const emulator::Error& error) {
            fail(what, gemm, error.what());
        }
        emulator::forget_watched();
        if (first.empty()) {
            if (!is_right<T>(gemm, c)) fail(what, gemm, "is not the product");
            first = c;
        }
        if (c != first) fail(what, gemm, "depends on the order of threads");
    }
}

template <class T>
static void check_all(bool bfloat16, int m, int n, int k) {
    for (const bool transpose_b : {false, true}) {
        const Gemm gemm{nullptr, nullptr, nullptr, m, n, k, bfloat16, transpose_b};
        check<T>("gemm_sm80", gemm, [](const Gemm& call) { return gemm_sm80(call, nullptr); });
        for (const OperandA operand_a : {OperandA::kDescriptor, OperandA::kRegisters}) {
            check<T>("gemm_sm90", gemm, [&](const Gemm& call) { return gemm_sm90(call, operand_a, nullptr); });
        }
    }
}

int main(int, char** arguments) {
    srand(static_cast<unsigned>(atoi(arguments[1])));
    const int sizes[][3] = {{1, 8, 8}, {65, 72, 200}, {64, 64, 64}};
    for (const auto& size : sizes) {
        check_all<BFloat16>(true, size[0], size[1], size[2]);
        check_all<Float16>(false, size[0], size[1], size[2]);
    }
    emulator::counters() = {};
    const auto a = draw<BFloat16>(64 * 64), b = draw<BFloat16>(64 * 64);
    std::vector<float> c(64 * 64);
    if (gemm_sm80({a.data(), b.data(), c.data(), 64, 64, 64, true, true}, nullptr)) failures++;
    const auto& counters = emulator::counters();
    if (counters.blocks != 1 || counters.mma != 4 * 4 * 8 || counters.ldmatrix != 4 * 4 * 5 * 4) failures++;
    if (counters.bank_conflicts != 0) {
        printf("FAILED: %lu bank conflicts\n", static_cast<unsigned long>(counters.bank_conflicts));
        failures++;
    }
    if (failures == 0) printf("right\n");
    return failures != 0;
}
