// Attention of each query over the keys of its spans; mmkernels/ops/span_attention/reference.py says what is right.
#pragma once
#include <cstdint>

#include "launch.h"

namespace mmk::cuda {

constexpr int kLargestHead = 256;
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

}  // namespace mmk::cuda
