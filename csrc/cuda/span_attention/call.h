// Attention of each query over the keys of its spans; mmkernels/ops/span_attention/reference.py says what is right.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/isa/error.h"

namespace mmk::cuda {

constexpr int kLargestHead = 576;
constexpr int kHullRows = 32;  // HULL_ROWS of mmkernels/spans.py

// A (batch, T, heads, width) tensor of 16-bit numbers, unit stride in its last dimension; strides in elements.
struct Heads {
    void* data;
    int64_t batch, row, head;
};

struct SpanAttention {
    Heads q, k, v, out;
    const int32_t *lo, *hi;  // (batch or 1, runs, queries), contiguous
    const int32_t* hulls;    // (batch or 1, runs, queries / kHullRows up, 4), contiguous: RowSpans.hulls()
    float* lse;              // (batch, heads, queries), contiguous
    int batch, queries, keys, heads, key_heads, head_size, value_size, runs;
    bool spans_by_batch;   // else every row of the batch has the same
    bool bfloat16;         // else float16
    float scale, softcap;  // softcap 0: none
};

// out and lse from the rest; sm_80 and later. Sizes may be zero.
Error span_attention_forward(const SpanAttention& call, cudaStream_t stream);

// The same for Hopper alone (sm_90a), for heads of up to 256 numbers, and only where q, k and v can be copied by TMA:
// their data and those of their strides that matter lie at multiples of 16 bytes.
bool span_attention_forward_sm90_serves(const SpanAttention& call);
Error span_attention_forward_sm90(const SpanAttention& call, cudaStream_t stream);

// The gradients of a call whose forward has run: of `forward` everything is read, out and lse too.
struct SpanAttentionBackward {
    SpanAttention forward;
    Heads d_out, d_q, d_k, d_v;
    const float* d_lse;  // as lse, or null; that of queries that see nothing reaches no gradient
    void* workspace;     // span_attention_backward_bytes(forward) of them, aligned to 16
};

// What the backward's workspace holds, in this order; both kernels of it, that of sm_80 and that of Hopper, use it so.
//   RowTerms  (batch, heads, queries)
//   KeyBlock  (batch or 1, runs, keys / kTableKeys up)
constexpr int kTableKeys = 64;
struct alignas(8) RowTerms {
    float lse;    // in units of log 2; 0 for a query that sees nothing
    float delta;  // sum of d_out * out, less d_lse
};
struct KeyBlock {
    int32_t first, end;  // queries / kHullRows, outside which none sees any of the block's keys
};
size_t span_attention_backward_bytes(const SpanAttention& forward);

// d_q, d_k and d_v from the rest; sm_80 and later. Sizes may be zero.
Error span_attention_backward(const SpanAttentionBackward& call, cudaStream_t stream);

// The same for Hopper alone (sm_90a), for heads of up to 128 numbers, where TMA can read and write every tensor: their
// data and those of their strides that matter lie at multiples of 16 bytes, and no size is zero.
bool span_attention_backward_sm90_serves(const SpanAttentionBackward& call);
Error span_attention_backward_sm90(const SpanAttentionBackward& call, cudaStream_t stream);

// Fills the workspace, the first step of every backward. call.forward's sizes have to be right.
Error span_attention_prepare(const SpanAttentionBackward& call, cudaStream_t stream);

}  // namespace mmk::cuda
