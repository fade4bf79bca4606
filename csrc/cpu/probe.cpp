#include "probe.h"

#include "gemm.h"

namespace mmk::MMK_ISA {

template <class Operand>
static double run(int64_t rounds) {
    // As many independent chains as the micro-kernels keep accumulators, so that latency is hidden as it is there.
    constexpr int kChains = kRegisters == 32 ? 24 : 12;
    Vec c[kChains];
    for (Vec& chain : c) chain = splat(1e-3f);
    UVec a = splat_bits(0x3f003f00u), b = splat_bits(0x3f003f00u);  // 0.5 as a float and as a bfloat16 pair
    asm volatile("" : "+x"(a), "+x"(b));                            // opaque, so that no product is folded
    for (int64_t i = 0; i < rounds; i++) {
        MMK_UNROLL for (int j = 0; j < kChains; j++) c[j] = Operand::multiply_add(c[j], a, b);
    }
    Vec total{};
    for (const Vec& chain : c) total += chain;
    volatile float sink = sum(total);
    (void)sink;
    return 2.0 * Operand::kPack * kLanes * kChains * static_cast<double>(rounds);
}

// Runs the loop and returns how many floating-point operations that was.
double fma_flops(bool bfloat16, int64_t rounds) {
    return bfloat16 ? run<BFloat16Operand>(rounds) : run<FloatOperand>(rounds);
}

}  // namespace mmk::MMK_ISA
