// The machine's own peak rate of fused multiply-adds, against which benchmarks quote a kernel's.
#pragma once
#include <cstdint>

#include "cpu/run/isa.h"

namespace mmk {

#define MMK_DECLARE(level, isa, ...)                 \
    namespace isa {                                  \
    double fma_flops(bool bfloat16, int64_t rounds); \
    }
MMK_FOR_EACH_ISA(MMK_DECLARE)
#undef MMK_DECLARE

}  // namespace mmk
