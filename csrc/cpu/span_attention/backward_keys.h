// One key block of the backward of span attention: its packed operands, and the products over its tiles.
//
// A tile is kTileRows query rows x up to kTileVectors vectors of keys. KEYS ARE IN LANES, query rows are broadcast:
//
//     S = Q K^T -> P      dP = dO V^T -> dS      dV^T += dO^T P      dK^T += Q^T dS      (keys in lanes)
//     dQ += dS K                                                                        (head dimension in lanes)
//
// exp is the epilogue of S and dS that of dP, so neither has a pass of its own; lse and delta are broadcast scalars and
// a mask is two comparisons. dK^T and dV^T lie with their dimension along the rows, which wastes no lane whatever it
// is.
#pragma once
#include <numeric>

#include "cpu/span_attention/backward_plan.h"
#include "cpu/span_attention/backward_weights.h"
#include "cpu/span_attention/prefetch.h"
#include "cpu/span_attention/scores.h"

namespace mmk::MMK_ISA::attention_backward {

constexpr int kBlockPanels = kBlockKeys / kTileColumns;

// Scores become probabilities: exp2(score * scale - lse), with a cap exp2(tanh(score * scale) * cap - lse).
struct Softmax {
    TwoFloats scale;
    float cap;  // 0: none

    Softmax(double scale_, double softcap)
        : scale(softcap == 0 ? scale_ * kLog2e : scale_ / softcap), cap(static_cast<float>(softcap * kLog2e)) {}
};

struct VectorRange {  // of a panel
    int64_t first, last;
    int64_t count() const { return last - first; }
    bool operator==(const VectorRange& other) const { return first == other.first && last == other.last; }
};

static inline float bit_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

template <class Operand>
class KeyBlock {
  public:
    KeyBlock(int64_t dim, int64_t value_dim, Softmax softmax, Arena& memory)
        : dim_(dim),
          value_dim_(value_dim),
          softmax_(softmax),
          k_(kBlockKeys, dim, memory),
          v_(kBlockKeys, value_dim, memory),
          weights_(memory),
          k_lanes_(memory.take<uint32_t>(kBlockKeys * k_.units())),
          v_lanes_(memory.take<uint32_t>(kBlockKeys * v_.units())),
          d_k_(memory.take(kBlockPanels * panel_size(dim))),
          d_v_(memory.take(kBlockPanels * panel_size(value_dim))) {}

    // Keys [first, first + count) of a head, whose tokens are `stride` apart.
    template <class T>
    void pack(const Plan& plan, int64_t first, int64_t count, const T* k, int64_t k_stride, const T* v,
              int64_t v_stride) {
        first_ = first, count_ = count, panels_ = Panels(count);
        for (int64_t j = 0; j < panels_.lanes(); j++) {
            const bool seen = j < count && plan.seen(first + j);
            k_.put(j, seen ? k + (first + j) * k_stride : nullptr);
            v_.put(j, seen ? v + (first + j) * v_stride : nullptr);
        }
        k_.finish(0, panels_.lanes());
        for (int64_t p = 0; p < panels_.count; p++) {
            for (int64_t l = 0; l < panels_.width(p); l += kLanes) {
                const int64_t j = panels_.first(p) + l, width = panels_.width(p);
                pack_transposed(k_.along(j), k_.stride, k_.units(), width, k_lanes(p) + l);
                pack_transposed(v_.along(j), v_.stride, v_.units(), width, v_lanes(p) + l);
            }
        }
        std::fill_n(d_k_, panels_.count * panel_size(dim_), 0.0f);
        std::fill_n(d_v_, panels_.count * panel_size(value_dim_), 0.0f);
    }

    // Adds up P and dS of rows, in float32, which a softmax makes 1 and 0; arguments as those of `meet`.
    void add_up(const Plan& plan, int64_t plan_row, const QueryRows<Operand>& rows, int64_t row, int64_t count,
                double* p_totals, double* d_totals) {
        for (int64_t p = 0; p < panels_.count; p++) {
            for (int64_t r = 0; r < count; r++) {
                const Hull* hulls = plan.hulls(plan_row + r);
                const VectorRange range = visible(hulls, plan.runs, p);
                if (range.count() == 0) continue;
                if (r % kTileRows == 0) weigh_tile(plan, plan_row + r, hulls, rows, row + r, r, p, range);
                const int64_t lane = range.first * kLanes, lanes = range.count() * kLanes;
                const float* weights = weights_.p_row(r) + lane;
                const uint32_t* scores = weights_.d_scores_by_key(r, panels_.first(p) + lane).a;
                p_totals[r] = std::accumulate(weights, weights + lanes, p_totals[r]);
                const auto add = [](double sum, uint32_t bits) { return sum + bit_float(bits); };
                d_totals[r] = std::accumulate(scores, scores + lanes, d_totals[r], add);
            }
        }
    }

    // All products with `count` rows, whole tiles: `row` counts in the task, `plan_row` in the plan.
    void meet(const Plan& plan, int64_t plan_row, const QueryRows<Operand>& rows, int64_t row, int64_t count) {
        for (int64_t p = 0; p < panels_.count; p++) {
            VectorRange same{0, 0};  // that the tiles from `since` on see
            int64_t since = 0;
            for (int64_t r = 0; r < count; r += kTileRows) {
                const Hull* hulls = plan.hulls(plan_row + r);
                const VectorRange range = visible(hulls, plan.runs, p);
                if (range.count() > 0) weigh_tile(plan, plan_row + r, hulls, rows, row + r, r, p, range);
                if (range == same) continue;
                accumulate(rows, row, since, r, p, same);
                same = range, since = r;
            }
            accumulate(rows, row, since, count, p, same);
        }
        for (int64_t r = 0; r < count; r += kTileRows) add_to_queries(plan, plan_row + r, rows, row + r, r);
    }

    template <class T>
    void store_gradients(const Plan& plan, float scale, const GradientRows<T>& d_k, const GradientRows<T>& d_v) const {
        for (int64_t p = 0; p < panels_.count; p++) {
            store_panel(plan, p, d_k_ + p * panel_size(dim_), scale, d_k);
            store_panel(plan, p, d_v_ + p * panel_size(value_dim_), 1.0f, d_v);
        }
    }

    Prefetcher prefetcher;  // what memory is asked for while the products run

  private:
    static int64_t panel_size(int64_t dim) { return round_up(dim, kLanes) * kTileColumns; }
    uint32_t* k_lanes(int64_t p) const { return k_lanes_ + panels_.offset(p, k_.units()); }
    uint32_t* v_lanes(int64_t p) const { return v_lanes_ + panels_.offset(p, v_.units()); }

    // The vectors of panel p that the rows of a tile see.
    VectorRange visible(const Hull* hulls, int64_t runs, int64_t p) const {
        const int64_t key = first_ + panels_.first(p), width = panels_.width(p);
        VectorRange range{width / kLanes, 0};
        for (int64_t run = 0; run < runs; run++) {
            if (!hulls[run].meets(key, key + width)) continue;
            range.first = std::min(range.first, std::max<int64_t>(hulls[run].lo - key, 0) / kLanes);
            range.last = std::max(range.last, ceil_div(std::min(hulls[run].hi - key, width), kLanes));
        }
        return range.count() > 0 ? range : VectorRange{0, 0};
    }

    // P and dS of a tile: rows from `row` of the task, `r` of the row block.
    void weigh_tile(const Plan& plan, int64_t plan_row, const Hull* hulls, const QueryRows<Operand>& rows, int64_t row,
                    int64_t r, int64_t p, VectorRange range) {
        const int64_t key = first_ + panels_.first(p);
        bool plain = false;
        for (int64_t run = 0; run < plan.runs; run++) {
            plain |= hulls[run].everyone_sees(key + range.first * kLanes, key + range.last * kLanes);
        }
        const Span* spans = plain && softmax_.cap == 0 ? nullptr : plan.spans(plan_row);
        switch (range.count()) {
            case 1:
                return weigh<1>(spans, plan.runs, rows, row, r, p, range.first * kLanes);
            case 2:
                return weigh<2>(spans, plan.runs, rows, row, r, p, range.first * kLanes);
            default:
                return weigh<kTileVectors>(spans, plan.runs, rows, row, r, p, range.first * kLanes);
        }
    }
    template <int kVectors>
    void weigh(const Span* spans, int64_t runs, const QueryRows<Operand>& rows, int64_t row, int64_t r, int64_t p,
               int64_t lane) {
        if (spans == nullptr) {
            weigh<kVectors, true>(spans, runs, rows, row, r, p, lane);
        } else {
            weigh<kVectors, false>(spans, runs, rows, row, r, p, lane);
        }
    }

    template <int kVectors, bool kPlain>
    void weigh(const Span* spans, int64_t runs, const QueryRows<Operand>& rows, int64_t row, int64_t r, int64_t p,
               int64_t lane) {
        constexpr int kPack = Operand::kPack;
        const int64_t width = panels_.width(p), key = panels_.first(p) + lane;
        float d_cap[kTileRows][kTileColumns];  // derivative of the cap
        Vec last[kVectors][kPack];
        const auto to_p = [&](int i, int v, Vec score) MMK_INLINE_LAMBDA {
            const TwoFloats lse = rows.lse[row + i];
            Vec x;
            if constexpr (kPlain) {
                x = exponential(score, softmax_.scale, lse);
            } else {
                Vec logit = score;
                TwoFloats scale = softmax_.scale;
                if (softmax_.cap != 0) {
                    logit = tanh(score * splat(scale.first));
                    store(d_cap[i] + v * kLanes, splat(1.0f) - logit * logit);
                    scale = TwoFloats(softmax_.cap);
                }
                const IVec keys = lane_index() + static_cast<int32_t>(first_ + key + v * kLanes);
                x = select(sees(spans + i * runs, runs, keys), exponential(logit, scale, lse), Vec{});
            }
            store(weights_.p_row(r + i) + lane + v * kLanes, x);
            last[v][i % kPack] = x;
            if (i % kPack == kPack - 1) weights_.put_p(r + i - kPack + 1, lane + v * kLanes, last[v]);
        };
        multiply_rows<kVectors>(rows.q, row, {k_lanes(p) + lane, width}, rows.few, to_p);
        const auto to_d_scores = [&](int i, int v, Vec d_p) MMK_INLINE_LAMBDA {
            const Vec weight = load(weights_.p_row(r + i) + lane + v * kLanes);
            Vec x = weight * (d_p - splat(rows.delta[row + i]));
            if constexpr (!kPlain) {
                if (softmax_.cap != 0) x *= load(d_cap[i] + v * kLanes);
                x = select(weight == Vec{}, Vec{}, x);  // whatever d_p is where nothing is seen
            }
            last[v][i % kPack] = x;
            if (i % kPack == kPack - 1) {
                weights_.put_d_scores(r + i - kPack + 1, lane + v * kLanes, key + v * kLanes, last[v]);
            }
        };
        multiply_rows<kVectors>(rows.d_out, row, {v_lanes(p) + lane, width}, rows.few, to_d_scores);
    }

    // finish(row, vector, product of a row of the tile with the lanes of keys).
    template <int kVectors, class Finish>
    MMK_INLINE void multiply_rows(const PackedRows<Operand, kHasAmx>& rows, int64_t row, Lanes keys, bool few,
                                  Finish&& finish) {
        const int64_t longest = few ? kChainOfFewRows : longest_chain(rows.units());
        multiply_in_chains<Operand, kTileRows, kVectors>(rows.along(row), rows.stride, keys.at, keys.stride,
                                                         rows.units(), longest, finish,
                                                         [&]() MMK_INLINE_LAMBDA { prefetcher.step(); });
    }

    // 2^(logit * scale - lse). The largest weights of a row have large logits and a power near zero: what a float
    // leaves of scale and lse counts there. Not for weights that are rounded to bfloat16.
    static MMK_INLINE Vec exponential(Vec logit, TwoFloats scale, TwoFloats lse) {
        const Vec power = logit * splat(scale.first) - splat(lse.first);
        if constexpr (Operand::kPack == 2) return exp2_coarse(power);
        return exp2(power + (logit * splat(scale.rest) - splat(lse.rest)));
    }

    static MMK_INLINE IVec sees(const Span* spans, int64_t runs, IVec keys) {
        IVec seen{};
        for (int64_t run = 0; run < runs; run++) seen |= (keys >= spans[run].lo) & (keys < spans[run].hi);
        return seen;
    }

    // dV and dK of the vectors that rows [first, last) of the row block see; the block begins at `row` of the task.
    void accumulate(const QueryRows<Operand>& rows, int64_t row, int64_t first, int64_t last, int64_t p,
                    VectorRange range) {
        const int64_t lane = range.first * kLanes, units = (last - first) / Operand::kPack;
        if (range.count() == 0 || units == 0) return;
        const Lanes weights = weights_.p(first, lane), scores = weights_.d_scores(first, lane, panels_.first(p) + lane);
        add_columns(rows.d_out, row + first, value_dim_, weights, range.count(), units,
                    d_v_ + p * panel_size(value_dim_) + lane);
        add_columns(rows.q, row + first, dim_, scores, range.count(), units, d_k_ + p * panel_size(dim_) + lane);
    }
    void add_columns(const PackedRows<Operand, kHasAmx>& rows, int64_t row, int64_t dim, Lanes lanes, int64_t vectors,
                     int64_t units, float* sums) {
        switch (vectors) {
            case 1:
                return add_columns<1>(rows, row, dim, lanes, units, sums);
            case 2:
                return add_columns<2>(rows, row, dim, lanes, units, sums);
            default:
                return add_columns<kTileVectors>(rows, row, dim, lanes, units, sums);
        }
    }
    template <int kVectors>
    void add_columns(const PackedRows<Operand, kHasAmx>& rows, int64_t row, int64_t dim, Lanes lanes, int64_t units,
                     float* sums) {
        constexpr int kFew = kHasAmx ? kTileRows : kTileRows / 2;
        int64_t d = 0;
        for (; d + kFew < dim; d += kTileRows) {
            add_product<kTileRows, kVectors>(rows.broadcast(row, d), lanes, units, sums + d * kTileColumns,
                                             kTileColumns);
        }
        if (d < dim) {
            add_product<kFew, kVectors>(rows.broadcast(row, d), lanes, units, sums + d * kTileColumns, kTileColumns);
        }
    }

    // dQ of a tile, over the keys of the block that it sees: those of visible vectors, where dS is.
    void add_to_queries(const Plan& plan, int64_t plan_row, const QueryRows<Operand>& rows, int64_t row, int64_t r) {
        const Hull* hulls = plan.hulls(plan_row);
        Span hull{INT_MAX, 0};
        for (int64_t run = 0; run < plan.runs; run++) {
            hull = {std::min(hull.lo, hulls[run].lo), std::max(hull.hi, hulls[run].hi)};
        }
        int64_t first = 0, last = 0;  // keys of vectors that lie next to each other
        for (int64_t p = 0; p < panels_.count; p++) {
            const VectorRange range = visible(hulls, plan.runs, p);
            if (range.count() == 0) continue;
            // AMX takes whole vectors; what their keys outside the hull have is zero.
            const int64_t lo = kHasAmx ? 0 : hull.lo - first_, hi = kHasAmx ? panels_.lanes() : hull.hi - first_;
            const int64_t begin = std::max(panels_.first(p) + range.first * kLanes, lo);
            if (begin > last) {
                add_to_queries(first, last, rows, row, r);
                first = begin;
            }
            last = std::min({panels_.first(p) + range.last * kLanes, hi, kHasAmx ? panels_.lanes() : count_});
        }
        add_to_queries(first, last, rows, row, r);
    }
    void add_to_queries(int64_t first, int64_t last, const QueryRows<Operand>& rows, int64_t row, int64_t r) {
        const int64_t unit = first / Operand::kPack, units = ceil_div(last, Operand::kPack) - unit;
        const Panels panels(first < last ? dim_ : 0);
        for (int64_t p = 0; p < panels.count; p++) {
            const Lanes keys{k_.across(unit * Operand::kPack, panels.first(p)), k_.across_stride};
            add_rows(weights_.d_scores_by_key(r, unit), keys, panels.width(p) / kLanes, units,
                     rows.d_q + row * rows.d_q_stride + panels.first(p), rows.d_q_stride);
        }
    }
    void add_rows(Broadcast weights, Lanes keys, int64_t vectors, int64_t units, float* sums, int64_t stride) {
        switch (vectors) {
            case 1:
                return add_product<kTileRows, 1>(weights, keys, units, sums, stride);
            case 2:
                return add_product<kTileRows, 2>(weights, keys, units, sums, stride);
            default:
                return add_product<kTileRows, kTileVectors>(weights, keys, units, sums, stride);
        }
    }

    template <int kRows, int kVectors>
    MMK_INLINE void add_product(Broadcast a, Lanes b, int64_t units, float* sums, int64_t stride) {
        const auto beside = [&]() MMK_INLINE_LAMBDA { prefetcher.step(); };
        multiply_into<Operand, kRows, kVectors>(a, b.at, b.stride, units, sums, stride, true, beside);
    }

    // sums: [dim][kTileColumns] of panel p, to its keys' rows of a gradient.
    template <class T>
    void store_panel(const Plan& plan, int64_t p, const float* sums, float scale, const GradientRows<T>& to) const {
        for (int64_t l = 0; l < panels_.width(p); l += kLanes) {
            const int64_t first = panels_.first(p) + l, count = std::min<int64_t>(kLanes, count_ - first);
            for (int64_t d = 0; d < to.dim; d += kLanes) {
                UVec block[kLanes];
                MMK_UNROLL for (int i = 0; i < kLanes; i++) {
                    block[i] = as_bits(load(sums + (d + i) * kTileColumns + l) * splat(scale));
                }
                transpose(block);
                for (int64_t j = 0; j < count; j++) {
                    const Vec x = plan.seen(first_ + first + j) ? as_float(block[j]) : Vec{};
                    to.put(first_ + first + j, d, x);
                }
            }
        }
    }

    int64_t dim_, value_dim_;
    Softmax softmax_;
    PackedRows<Operand> k_, v_;
    Weights<Operand> weights_;
    uint32_t *k_lanes_, *v_lanes_;  // panels: a key a lane
    float *d_k_, *d_v_;             // panels [dim][kTileColumns]
    int64_t first_ = 0, count_ = 0;
    Panels panels_{0};
};

}  // namespace mmk::MMK_ISA::attention_backward
