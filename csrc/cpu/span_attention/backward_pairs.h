// The backward of span attention for a few rows and keys, pair by pair: documents of a few tokens, of which a tile of
// rows and keys would be mostly padding, and which share no tile with a neighbour. The formulas are those of
// backward.cpp; both products of a pair are sums over the lanes, and its three gradients a multiple of a row each, 10 D
// operations in all. Nothing is packed and nothing rounded before the end.
#pragma once
#include "cpu/span_attention/backward_plan.h"
#include "cpu/span_attention/backward_rows.h"

namespace mmk::MMK_ISA::attention_backward {

template <class T>
float dot(const T* a, const T* b, int64_t count) {
    Vec total{};
    int64_t d = 0;
    for (; d + kLanes <= count; d += kLanes) total += load(a + d) * load(b + d);
    if (d < count) {
        const int left = static_cast<int>(count - d);
        total += load_first(a + d, left) * load_first(b + d, left);
    }
    return sum(total);
}

template <class T>
class FewPairs {
  public:
    static constexpr int64_t kMost = 8;  // rows, and keys

    FewPairs(const SpanAttentionBackward& call, Arena& memory)
        : call_(call),
          d_k_stride_(round_up(call.q.dim, kLanes)),
          d_v_stride_(round_up(call.v.dim, kLanes)),
          d_k_(memory.take(kMost * d_k_stride_)),
          d_v_(memory.take(kMost * d_v_stride_)) {}

    // Rows [first_row, last_row) of the plan and keys [first_key, last_key) of a key head, whose query heads are those
    // from `query_head` on.
    void run(const Plan& plan, int64_t batch, int64_t head, int64_t query_head, int64_t first_row, int64_t last_row,
             int64_t first_key, int64_t last_key) const {
        std::fill_n(d_k_, (last_key - first_key) * d_k_stride_, 0.0f);
        std::fill_n(d_v_, (last_key - first_key) * d_v_stride_, 0.0f);
        const HeadRows<const T> k(call_.k, batch, head), v(call_.v, batch, head);
        for (int64_t row = first_row; row < last_row; row++) {
            if (plan.rows[row].query < 0) continue;
            const int64_t own_head = query_head + plan.rows[row].head, query = plan.rows[row].query;
            const GradientRows<T> d_q(call_.d_q, batch, own_head);
            if (plan.sees_anything(row)) {
                add_row(plan, row, batch, own_head, query, k, v, first_key, last_key, d_q);
            } else {
                for (int64_t d = 0; d < call_.q.dim; d += kLanes) d_q.put(query, d, Vec{});
            }
        }
        const GradientRows<T> d_k(call_.d_k, batch, head), d_v(call_.d_v, batch, head);
        const Vec scale = splat(static_cast<float>(call_.scale));
        for (int64_t j = 0; j < last_key - first_key; j++) {
            for (int64_t d = 0; d < call_.q.dim; d += kLanes) {
                d_k.put(first_key + j, d, load(d_k_ + j * d_k_stride_ + d) * scale);
            }
            for (int64_t d = 0; d < call_.v.dim; d += kLanes) {
                d_v.put(first_key + j, d, load(d_v_ + j * d_v_stride_ + d));
            }
        }
    }

  private:
    static constexpr int64_t kRoom = kMost > kLanes ? kMost : kLanes;

    struct Pairs {  // of a row with each key
        alignas(64) float power[kRoom], p[kRoom], d_p[kRoom], slope[kRoom], d_score[kRoom];
        int64_t key[kMost], count = 0;
    };

    static MMK_INLINE Vec read(const T* row, int64_t d, int64_t dim) {
        return d + kLanes <= dim ? load(row + d) : load_first(row + d, static_cast<int>(dim - d));
    }

    void add_row(const Plan& plan, int64_t row, int64_t batch, int64_t head, int64_t query, const HeadRows<const T>& k,
                 const HeadRows<const T>& v, int64_t first_key, int64_t last_key, const GradientRows<T>& d_q) const {
        const T* q = HeadRows<const T>(call_.q, batch, head).row(query);
        const T* d_out = HeadRows<const T>(call_.d_out, batch, head).row(query);
        const T* out = HeadRows<const T>(call_.out, batch, head).row(query);
        const int64_t at = (batch * call_.q.heads + head) * call_.q.tokens + query;
        Pairs pairs;
        for (int64_t run = 0; run < plan.runs; run++) {
            const Span span = plan.spans(row)[run];
            for (int64_t j = std::max<int64_t>(span.lo, first_key); j < std::min<int64_t>(span.hi, last_key); j++) {
                meet(q, d_out, k.row(j), v.row(j), call_.lse[at], pairs);
                pairs.key[pairs.count++] = j - first_key;
            }
        }
        weigh(pairs, dot(d_out, out, call_.v.dim), call_.d_lse == nullptr ? 0.0f : call_.d_lse[at]);
        for (int64_t d = 0; d < call_.q.dim; d += kLanes) {
            const Vec own = read(q, d, call_.q.dim);
            Vec total{};
            for (int64_t i = 0; i < pairs.count; i++) {
                const Vec d_score = splat(pairs.d_score[i]);
                float* sum = d_k_ + pairs.key[i] * d_k_stride_ + d;
                total += d_score * read(k.row(first_key + pairs.key[i]), d, call_.q.dim);
                store(sum, load(sum) + d_score * own);
            }
            d_q.put(query, d, total * splat(static_cast<float>(call_.scale)));
        }
        for (int64_t d = 0; d < call_.v.dim; d += kLanes) {
            const Vec own = read(d_out, d, call_.v.dim);
            for (int64_t i = 0; i < pairs.count; i++) {
                float* sum = d_v_ + pairs.key[i] * d_v_stride_ + d;
                store(sum, load(sum) + splat(pairs.p[i]) * own);
            }
        }
    }

    // The pair of a row and a key.
    void meet(const T* q, const T* d_out, const T* k, const T* v, float lse, Pairs& pairs) const {
        double logit = static_cast<double>(dot(q, k, call_.q.dim)) * call_.scale;
        float slope = 1;
        if (call_.softcap > 0) {
            const float t = tanh(splat(static_cast<float>(logit / call_.softcap)))[0];
            logit = static_cast<double>(t) * call_.softcap, slope = 1 - t * t;
        }
        pairs.power[pairs.count] = static_cast<float>((logit - static_cast<double>(lse)) * kLog2e);
        pairs.d_p[pairs.count] = dot(d_out, v, call_.v.dim);
        pairs.slope[pairs.count] = slope;
    }

    // P and dS. In float32 P is made to add up to 1, and without a cap dS to add up to d_lse, as where rows are tiles.
    void weigh(Pairs& pairs, float delta, float d_lse) const {
        for (int64_t i = pairs.count; i < kRoom; i++) pairs.power[i] = -__builtin_inff();
        for (int64_t i = 0; i < kRoom; i += kLanes) store(pairs.p + i, exp2(load(pairs.power + i)));
        if constexpr (std::is_same_v<T, float>) {
            double total = 0, fed = 0;
            for (int64_t i = 0; i < pairs.count; i++) total += static_cast<double>(pairs.p[i]);
            if (total > 0.5 && total < 2) {  // else a row of NaN
                for (int64_t i = 0; i < pairs.count; i++) {
                    pairs.p[i] = static_cast<float>(static_cast<double>(pairs.p[i]) / total);
                    fed += static_cast<double>(pairs.p[i]) * static_cast<double>(pairs.d_p[i]);
                }
                if (call_.softcap == 0) delta = static_cast<float>(fed);
            }
        }
        for (int64_t i = 0; i < pairs.count; i++) {
            pairs.d_score[i] = pairs.p[i] * (pairs.d_p[i] - (delta - d_lse)) * pairs.slope[i];
        }
    }

    const SpanAttentionBackward& call_;
    int64_t d_k_stride_, d_v_stride_;
    float *d_k_, *d_v_;
};

}  // namespace mmk::MMK_ISA::attention_backward
