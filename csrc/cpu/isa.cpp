#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace mmk {
namespace {

bool runs_here([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::kPortable:
            return true;
        case Isa::kAvx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        case Isa::kAvx512:
            return runs_here(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        case Isa::kAvx512Bf16:
            return runs_here(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
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
    }
    return "";
}

std::vector<Isa> usable_isas() {
    std::vector<Isa> usable;
    for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
        if (runs_here(isa)) usable.push_back(isa);
    }
    return usable;
}

Isa chosen_isa() {
    static const std::vector<Isa> usable = usable_isas();
    const char* cap = std::getenv("MMKERNELS_CPU_ISA");
    if (cap == nullptr || *cap == '\0') return usable.back();
    for (Isa isa : {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kPortable}) {
        if (std::string(cap) == name(isa)) return std::min(isa, usable.back());
    }
    throw std::invalid_argument("MMKERNELS_CPU_ISA is '" + std::string(cap) +
                                "'; accepted are portable, avx2, avx512 and avx512_bf16");
}

}  // namespace mmk
