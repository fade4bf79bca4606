// Span attention, backward, on Hopper (sm_90a); backward_sm80.cu has the mathematics in full.
//
//   p_ij = exp(s_ij - lse_i);  ds_ij = p_ij (d_out_i v_j - delta_i), times 1 - tanh^2 of the score if there is a cap
//   d_q_i = scale sum_j ds_ij k_j;  d_k_j = scale sum_i ds_ij q_i;  d_v_j = sum_i p_ij d_out_i
//
// Two kernels, without atomics: each number of a gradient has one owner, who adds in one order. A block of three
// warpgroups owns 128 rows, and two warpgroups compute, 64 rows each:
//   query_grad  owns 128 queries of a head and walks the keys they see, 128 at a time
//   key_grads   owns 128 keys and walks the queries that see them, 64 at a time, of every head of the group
// Both make the scores in the shape (own rows, rows of the step), so that the result of a product, rounded, is in
// registers what the next product wants on its left: neither p nor ds goes through shared memory. The right operand of
// the second products is the tile of the first ones, read across its rows.
//
// Of the third warpgroup, one lane walks, says what is masked for whom, and copies (TMA); three warps bring what is
// known of each query, and see to it that no NaN leaves its row (Isolation). Steps and tiles go round in a ring of
// barriers.
//
// What limits it: the tensor cores. A step of query_grad on heads of 128 is 1536 of their cycles a warpgroup, of
// key_grads 1024; the exponentials of either (512 and 256) and the rest of a warpgroup's arithmetic run under its own
// second product and under the products of the other warpgroup. A product from shared memory reads it for 48 of 64
// cycles with 128 columns, and for all of 32 with 64, which is why query_grad takes 128 keys; key_grads cannot, its two
// sums and its scores fill the registers. Memory: k and v again for every 128 queries that see them, q and d_out for
// every 128 keys.
//
// Isolation. A product multiplies masked numbers by zero, which does not stop a NaN in the rows of the step. Where
// not everyone sees everything the helpers look: a row that is not finite becomes zero where it is summed over, and all
// who see it get NaN: through v for a key, through lse for a query.
#include "cuda/span_attention/backward_sm90.h"

namespace mmk::cuda {
namespace {

constexpr const char* kName = "span_attention_backward_sm90";
constexpr int kLargestWidth = 128;  // of heads: the sums of wider ones do not fit the registers

}  // namespace

bool span_attention_backward_sm90_serves(const SpanAttentionBackward& call) {
    const SpanAttention& p = call.forward;
    if (p.batch < 1 || p.queries < 1 || p.keys < 1 || p.heads < 1) return false;  // maps are of something
    if (std::max(p.head_size, p.value_size) > kLargestWidth) return false;
    for (const Heads* x : {&p.q, &call.d_out, &call.d_q}) {
        if (!sm90::readable(*x, p.batch, p.queries, p.heads)) return false;
    }
    for (const Heads* x : {&p.k, &p.v, &call.d_k, &call.d_v}) {
        if (!sm90::readable(*x, p.batch, p.keys, p.key_heads)) return false;
    }
    return true;
}

Error span_attention_backward_sm90(const SpanAttentionBackward& call, cudaStream_t stream) {
    const SpanAttention& p = call.forward;
    if (Error error = without_sm90a(kName)) return error;
    if (Error error = wrong_sizes(kName, p)) return error;
    if (!span_attention_backward_sm90_serves(call)) {
        return Error(std::string(kName) + ": it serves heads of up to " + std::to_string(kLargestWidth) +
                     " numbers, of tensors that have some and begin, as their rows do, at multiples of 16 bytes");
    }
    const auto too_many = [&](int64_t rows, int64_t heads) {
        return rows > INT_MAX - sm90::kBlockRows ||
               (rows + sm90::kBlockRows - 1) / sm90::kBlockRows * heads * p.batch > INT_MAX;
    };
    if (too_many(p.queries, p.heads) || too_many(p.keys, p.key_heads)) {
        return Error(std::string(kName) + ": more queries or keys than 32 bits number");
    }
    if (Error error = span_attention_prepare(call, stream)) return error;
    if (Error error = sm90::launch_query_grad(sm90::Call(call), stream)) return error;
    return sm90::launch_key_grads(sm90::Call(call), stream);
}

}  // namespace mmk::cuda
