// Which instruction set's kernels run on this machine.
#pragma once
#include <string>
#include <vector>

#include "cpu/run/tensor.h"

namespace mmk {

// X(enumerator, namespace, ...) for every level in this build, from the plainest to the richest; each is compiled from
// the same sources, in a namespace of its own. What each is compiled with stands in CMakeLists.txt.
#if defined(__x86_64__)
#define MMK_FOR_EACH_ISA(X, ...)             \
    X(kPortable, portable, __VA_ARGS__)      \
    X(kAvx2, avx2, __VA_ARGS__)              \
    X(kAvx512, avx512, __VA_ARGS__)          \
    X(kAvx512Bf16, avx512_bf16, __VA_ARGS__) \
    X(kAmx, amx, __VA_ARGS__)
#elif defined(__aarch64__)
#define MMK_FOR_EACH_ISA(X, ...)        \
    X(kPortable, portable, __VA_ARGS__) \
    X(kNeon, neon, __VA_ARGS__)         \
    X(kNeonBf16, neon_bf16, __VA_ARGS__)
#else
#define MMK_FOR_EACH_ISA(X, ...) X(kPortable, portable, __VA_ARGS__)
#endif

#define MMK_ENUMERATOR(enumerator, level, ...) enumerator,
enum class Isa { MMK_FOR_EACH_ISA(MMK_ENUMERATOR) };
#undef MMK_ENUMERATOR

const char* name(Isa isa);

// The levels this build holds, plainest first, and those of them that this processor runs.
const std::vector<Isa>& built_isas();
std::vector<Isa> usable_isas();

// The richest usable level, or the one MMKERNELS_CPU_ISA caps it to (read at every call, so that tests can run each).
// Throws std::invalid_argument naming the accepted values if the variable holds another.
Isa chosen_isa();

// The same for a call on tensors of this type: AMX multiplies bfloat16 alone, others are served by the level below.
Isa chosen_isa(DType dtype);

}  // namespace mmk
