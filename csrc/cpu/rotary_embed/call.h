// Rotary position embedding of queries and keys.
#pragma once
#include <cstdint>

#include "cpu/run/isa.h"
#include "cpu/run/tensor.h"

namespace mmk {

struct RotaryEmbed {
    Heads x, out;            // of one dtype and shape, dim even; out contiguous
    const float *cos, *sin;  // (1 or x.batch, x.tokens, x.dim), contiguous
    int64_t table_stride;    // of the batch; 0: every row of it has the same
    bool interleaved;        // a pair is two neighbours, not one number of each half
    bool transposed;         // by the transpose of every rotation, as gradients are
};

#define MMK_DECLARE(level, isa, ...)            \
    namespace isa {                             \
    void rotary_embed(const RotaryEmbed& call); \
    }
MMK_FOR_EACH_ISA(MMK_DECLARE)
#undef MMK_DECLARE

}  // namespace mmk
