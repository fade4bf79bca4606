// What both backward kernels of span attention need of all queries and of all keys, made before either begins.
//
//   RowTerms of a query: lse in units of log 2 and delta_i = dO_i . O_i - dlse_i, where dO_i . O_i is
//   sum_j P_ij (dO_i . v_j)
//   KeyBlock of kTableKeys keys: between which queries those lie that see any of them
//
// One launch does both: its first blocks make the terms, eight threads a query, its last ones the table, a warp an
// entry.
//
// Memory moved, in numbers: d_out, out and d_lse are read once, eight bytes a query are written; the table reads the
// spans' hulls once an entry, from the L2 cache. Nothing is computed twice, and nothing else limits it than memory.
#include "cuda/span_attention/device.h"

namespace mmk::cuda {
namespace {

constexpr int kThreads = 256, kLanes = 8, kRows = kThreads / kLanes, kEntries = kThreads / kWarp;

template <class T>
MMK_DEVICE float dot_of_eight(const T* left, const T* right, int count, bool aligned) {
    T a[8], b[8];
    float sum = 0;
    if (aligned) {
        const uint4 wide_a = *reinterpret_cast<const uint4*>(left), wide_b = *reinterpret_cast<const uint4*>(right);
        memcpy(a, &wide_a, sizeof a);
        memcpy(b, &wide_b, sizeof b);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += static_cast<float>(a[j]) * static_cast<float>(b[j]);
    } else {
        for (int j = 0; j < count; j++) sum += static_cast<float>(left[j]) * static_cast<float>(right[j]);
    }
    return sum;
}

// Of the query `line` of all heads of the batch.
template <class T>
MMK_DEVICE void make_terms(const SpanAttentionBackward& call, int64_t line, RowTerms* terms) {
    const SpanAttention& p = call.forward;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const bool inside = line < static_cast<int64_t>(p.batch) * p.heads * p.queries;
    float delta = 0;
    if (inside) {
        const int64_t row = line % p.queries, head = line / p.queries % p.heads, batch = line / p.queries / p.heads;
        const auto out = matrix<T>(p.out, p.value_size, batch, row, head);
        const auto d_out = matrix<T>(call.d_out, p.value_size, batch, row, head);
        for (int column = lane * 8; column < p.value_size; column += kLanes * 8) {
            delta += dot_of_eight(d_out.data + column, out.data + column, min(8, p.value_size - column),
                                  d_out.aligned && out.aligned);
        }
    }
#pragma unroll
    for (int other = 1; other < kLanes; other *= 2) delta += __shfl_xor_sync(kAllLanes, delta, other);
    if (!inside || lane != 0) return;
    if (call.d_lse != nullptr) delta -= call.d_lse[line];
    const float lse = p.lse[line];
    terms[line] = {lse == -INFINITY ? 0.0f : lse * kLog2E, delta};  // it sees nothing
}

// One entry of the table, by a warp.
MMK_DEVICE void find_queries(const SpanAttention& p, int64_t entry, KeyBlock* table) {
    const int blocks = (p.keys + kTableKeys - 1) / kTableKeys, count = (p.queries + kHullRows - 1) / kHullRows;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int key0 = static_cast<int>(entry % blocks) * kTableKeys;
    const int32_t* const hulls = p.hulls + entry / blocks * count * 4;
    int first = count, end = 0;
    for (int i = lane; i < count; i += kWarp) {
        const bool sees = hulls[i * int64_t{4}] < key0 + kTableKeys && hulls[i * int64_t{4} + 1] > key0;
        if (sees) {
            first = min(first, i);
            end = i + 1;
        }
    }
#pragma unroll
    for (int other = 1; other < kWarp; other *= 2) {
        first = min(first, __shfl_xor_sync(kAllLanes, first, other));
        end = max(end, __shfl_xor_sync(kAllLanes, end, other));
    }
    if (lane == 0) table[entry] = {first, end};
}

// Left to itself, ptxas would rather spill than hold fewer than six blocks.
template <class T>
__global__ __launch_bounds__(kThreads, 4) void span_attention_prepare_kernel(const SpanAttentionBackward call,
                                                                             int term_blocks, int64_t entries) {
    const auto [terms, table] = workspace_of(call);
    const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    if (block < term_blocks) {
        make_terms<T>(call, static_cast<int64_t>(block) * kRows + thread / kLanes, terms);
    } else {
        const int64_t entry = static_cast<int64_t>(block - term_blocks) * kEntries + thread / kWarp;
        if (entry < entries) find_queries(call.forward, entry, table);
    }
}

int64_t rows_of(const SpanAttention& p) { return int64_t{p.batch} * p.heads * p.queries; }

int64_t table_entries(const SpanAttention& p) {
    const int64_t blocks = (int64_t{p.keys} + kTableKeys - 1) / kTableKeys;
    return (p.spans_by_batch ? p.batch : 1) * int64_t{p.runs} * blocks;
}

}  // namespace

size_t span_attention_backward_bytes(const SpanAttention& forward) {
    return static_cast<size_t>(rows_of(forward)) * sizeof(RowTerms) +
           static_cast<size_t>(table_entries(forward)) * sizeof(KeyBlock);
}

Error span_attention_prepare(const SpanAttentionBackward& call, cudaStream_t stream) {
    const int64_t entries = table_entries(call.forward), term_blocks = (rows_of(call.forward) + kRows - 1) / kRows;
    const int64_t blocks = term_blocks + (entries + kEntries - 1) / kEntries;
    if (blocks > INT_MAX) return Error("span_attention_prepare: more queries than 32 bits number");
    if (blocks == 0) return {};
    const Launch at{"span_attention_prepare", static_cast<unsigned>(blocks), kThreads, 0, stream};
    const auto kernel =
        call.forward.bfloat16 ? span_attention_prepare_kernel<BFloat16> : span_attention_prepare_kernel<Float16>;
    return launch(at, kernel, call, static_cast<int>(term_blocks), entries);
}

}  // namespace mmk::cuda
