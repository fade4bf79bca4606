#include "cpu/run/isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mmk {
namespace {

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

#if defined(__aarch64__)
bool has_neon_bfloat16() {
#if defined(__linux__)
    constexpr unsigned long kBFloat16 = 1ul << 14;  // HWCAP2_BF16
    return (getauxval(AT_HWCAP2) & kBFloat16) != 0;
#elif defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) == 0 && found != 0;
#else
    return false;
#endif
}
#endif

bool runs_here(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return true;
#if defined(__x86_64__)
        case Isa::kAvx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
        case Isa::kAvx512:
            return runs_here(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        case Isa::kAvx512Bf16:
            return runs_here(Isa::kAvx512) && has_avx512_bfloat16();
        case Isa::kAmx:
            return runs_here(Isa::kAvx512Bf16) && has_amx_bfloat16() && may_use_tiles();
#elif defined(__aarch64__)
        case Isa::kNeon:
            return true;
        case Isa::kNeonBf16:
            return has_neon_bfloat16();
#endif
    }
    return false;
}

std::string accepted() {
    std::string text;
    for (Isa isa : built_isas()) text += (text.empty() ? "" : ", ") + std::string(name(isa));
    return text;
}

}  // namespace

const char* name(Isa isa) {
#define MMK_NAME(enumerator, level, ...) #level,
    constexpr const char* kNames[] = {MMK_FOR_EACH_ISA(MMK_NAME)};
#undef MMK_NAME
    return kNames[static_cast<int>(isa)];
}

const std::vector<Isa>& built_isas() {
#define MMK_LEVEL(enumerator, level, ...) Isa::enumerator,
    static const std::vector<Isa> built{MMK_FOR_EACH_ISA(MMK_LEVEL)};
#undef MMK_LEVEL
    return built;
}

std::vector<Isa> usable_isas() {
    std::vector<Isa> usable;
    for (Isa isa : built_isas()) {
        if (runs_here(isa)) usable.push_back(isa);
    }
    return usable;
}

Isa chosen_isa() {
    static const std::vector<Isa> usable = usable_isas();
    const char* cap = std::getenv("MMKERNELS_CPU_ISA");
    if (cap == nullptr || *cap == '\0') return usable.back();
    for (Isa isa : built_isas()) {
        if (std::string(cap) == name(isa)) return std::min(isa, usable.back());
    }
    throw std::invalid_argument("MMKERNELS_CPU_ISA is '" + std::string(cap) + "'; accepted are " + accepted());
}

Isa chosen_isa([[maybe_unused]] DType dtype) {
    const Isa isa = chosen_isa();
#if defined(__x86_64__)
    if (dtype != DType::kBFloat16) return std::min(isa, Isa::kAvx512Bf16);
#endif
    return isa;
}

}  // namespace mmk
