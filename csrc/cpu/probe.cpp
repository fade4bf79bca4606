#include "cpu/probe.h"

#include "cpu/product/gemm.h"

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

#if defined(__AMX_BF16__)
static double run_tiles(int64_t rounds) {
    const TileShapes shapes;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    for (int64_t i = 0; i < rounds; i++) {
        _tile_dpbf16ps(0, 3, 4);
        _tile_dpbf16ps(1, 3, 4);
        _tile_dpbf16ps(2, 3, 4);
    }
    return 3 * 2.0 * kAmxRows * kLanes * 2 * kAmxDepth * static_cast<double>(rounds);
}
#endif

// Runs the loop and returns how many floating-point operations that was.
double fma_flops(bool bfloat16, int64_t rounds) {
#if defined(__AMX_BF16__)
    if (bfloat16) return run_tiles(rounds);
#endif
    return bfloat16 ? run<BFloat16Operand>(rounds) : run<FloatOperand>(rounds);
}

}  // namespace mmk::MMK_ISA
