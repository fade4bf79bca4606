// Attention in which each query sees runs of keys, forward and backward.
#pragma once
#include <cstdint>

#include "cpu/run/isa.h"
#include "cpu/run/tensor.h"

namespace mmk {

// Query i of row b sees key j if lo[b * batch_stride + r * queries + i] <= j < hi[...] for one of the runs r, which are
// disjoint and ascending. Values may be anything: they count as clamped to the keys there are.
struct Spans {
    const int32_t *lo, *hi;
    int64_t runs, queries;
    int64_t batch_stride;  // 0: every row of the batch has the same
};

struct SpanAttention {
    Heads q, k, v, out;  // one dtype; q.heads a multiple of k.heads; out contiguous, of v's dim
    float* lse;          // (batch, q.heads, q.tokens)
    Spans spans;
    double scale, softcap;  // softcap 0: none
};

struct SpanAttentionBackward {
    Heads d_out, q, k, v, out;
    const float* lse;
    const float* d_lse;  // as lse, or null; not read of queries that see nothing
    Spans spans;
    double scale, softcap;
    Heads d_q, d_k, d_v;  // contiguous
};

#define MMK_DECLARE(level, isa, ...)                                 \
    namespace isa {                                                  \
    void span_attention(const SpanAttention& call);                  \
    void span_attention_backward(const SpanAttentionBackward& call); \
    }
MMK_FOR_EACH_ISA(MMK_DECLARE)
#undef MMK_DECLARE

}  // namespace mmk
