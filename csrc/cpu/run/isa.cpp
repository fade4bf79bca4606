#include "cpu/run/isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mmk {
namespace {

constexpr Isa kLevels[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

#if defined(__x86_64__)
// Those whose names older compilers do not know.
bool has_f16c() {
    constexpr unsigned kF16c = 1u << 29;
    unsigned a, b, features, d;
    return __get_cpuid(1, &a, &b, &features, &d) != 0 && (features & kF16c);
}
bool has_avx512_bfloat16() {
    constexpr unsigned kBFloat16 = 1u << 5;
    unsigned features, b, c, d;
    return __get_cpuid_count(7, 1, &features, &b, &c, &d) != 0 && (features & kBFloat16);
}
bool has_amx_bfloat16() {
    constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
    unsigned a, b, c, features;
    return __get_cpuid_count(7, 0, &a, &b, &c, &features) != 0 && (features & kBFloat16) && (features & kTiles);
}

// The system keeps the 8 KB of tiles for a process that asks for them, and for its threads.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

bool runs_here([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::kPortable:
            return true;
        case Isa::kAvx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
        case Isa::kAvx512:
            return runs_here(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        case Isa::kAvx512Bf16:
            return runs_here(Isa::kAvx512) && has_avx512_bfloat16();
        case Isa::kAmx:
            return runs_here(Isa::kAvx512Bf16) && has_amx_bfloat16() && may_use_tiles();
    }
#endif
    return isa == Isa::kPortable;
}

}  // namespace

const char* name(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return "portable";
        case Isa::kAvx2:
            return "avx2";
        case Isa::kAvx512:
            return "avx512";
        case Isa::kAvx512Bf16:
            return "avx512_bf16";
        case Isa::kAmx:
            return "amx";
    }
    return "";
}

std::vector<Isa> usable_isas() {
    std::vector<Isa> usable;
    for (Isa isa : kLevels) {
        if (runs_here(isa)) usable.push_back(isa);
    }
    return usable;
}

Isa chosen_isa() {
    static const std::vector<Isa> usable = usable_isas();
    const char* cap = std::getenv("MMKERNELS_CPU_ISA");
    if (cap == nullptr || *cap == '\0') return usable.back();
    for (Isa isa : kLevels) {
        if (std::string(cap) == name(isa)) return std::min(isa, usable.back());
    }
    throw std::invalid_argument("MMKERNELS_CPU_ISA is '" + std::string(cap) +
                                "'; accepted are portable, avx2, avx512, avx512_bf16 and amx");
}

Isa chosen_isa(DType dtype) {
    const Isa isa = chosen_isa();
    return dtype == DType::kBFloat16 ? isa : std::min(isa, Isa::kAvx512Bf16);
}

}  // namespace mmk
