// Attention in which each query sees runs of keys, forward.
//
//     S_ij = scale q_i k_j, then softcap tanh(S_ij / softcap) where there is one, for the keys j that query i sees
//     lse_i = log sum_j exp(S_ij),  o_i = sum_j exp(S_ij - lse_i) v_j
//
// A query that sees nothing gets o = 0, lse = -inf. 4 D operations a pair that is seen; the scores exist for a block of
// queries and a block of keys at a time, O(T) memory in all.
//
// Queries in lanes. A block of up to kTileColumns queries is transposed once, keys and values are broadcast: S^T = K
// Q^T and O^T = V^T P^T are the same micro-kernel. Then keys need no transpose, only to lie together; maxima and sums
// over keys are vertical; and 8 rows of broadcasts divide the usual head sizes, so that none is padded.
//
// Online softmax. Keys come in blocks; m is the largest score so far, l and o are relative to it and rescaled when it
// grows (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867). Rescaling o costs one multiplication an
// element as the micro-kernel adds to it.
//
// Masks. Keys come in groups of kKeyGroup. Of each group only the vectors of lanes that see any of it are computed, and
// only where some lane does not see all of it are keys and lanes compared: packed causal documents lose 2 to 4 % to it.
// Several runs a query are taken one after the other.
//
// Memory moved. A task packs the keys and values that its part of a segment sees, kKeyPanel at a time, so that they
// stay in the L2 cache while each of its blocks of queries meets them: 2 kTileColumns operations for every float of
// them that comes from L2. What no query of the segment sees is packed as zeros (segments.h).
#include "cpu/product/tasks.h"
#include "cpu/span_attention/call.h"
#include "cpu/span_attention/decode.h"
#include "cpu/span_attention/logits.h"
#include "cpu/span_attention/pack.h"
#include "cpu/span_attention/plan.h"
#include "cpu/span_attention/prefetch.h"
#include "cpu/span_attention/scores.h"
#include "cpu/span_attention/short.h"
#include "cpu/span_attention/stretches.h"

namespace mmk::MMK_ISA {
namespace {

constexpr int64_t kKeyPanel = 2048;  // keys packed at once

// ---- what a block of queries keeps between blocks of keys

struct BlockState {
    uint32_t* queries;     // [units of D][kTileColumns]
    float* out;            // [Dv][kTileColumns], relative to exp2(highest)
    float *highest, *sum;  // [kTileColumns]

    static int64_t size(int64_t query_units, int64_t out_rows) { return (query_units + out_rows + 2) * kTileColumns; }
    BlockState(uint32_t* memory, int64_t query_units, int64_t out_rows)
        : queries(memory),
          out(reinterpret_cast<float*>(memory) + query_units * kTileColumns),
          highest(out + out_rows * kTileColumns),
          sum(highest + kTileColumns) {}

    void clear(int64_t out_rows) const {
        std::fill_n(out, out_rows * kTileColumns, 0.0f);
        std::fill_n(highest, kTileColumns, -kInfinity);
        std::fill_n(sum, kTileColumns, 0.0f);
    }
};

// Keys and values of one head, packed; token numbers count from `first`.
struct KeyPanel {
    int64_t first, count;
    uint32_t *keys, *values;
    int64_t key_units, value_panels;
    TokenPanels values_lie;
};

// ---- a block of keys

// scores[key][lane] of one group, with AMX, whose sums go to memory; the highest of each lane is raised.
template <class Operand, int kVectors>
void score_group_in_tiles(const uint32_t* keys, int64_t units, const uint32_t* queries, float* scores, Vec* highest,
                          Prefetcher& prefetcher) {
    multiply_into<Operand, kTileRows, kVectors>({keys, units, 1}, queries, kTileColumns, units, scores, kTileColumns,
                                                false, [&]() MMK_INLINE_LAMBDA { prefetcher.step(); });
    for (int r = 0; r < kTileRows; r++) {
        for (int v = 0; v < kVectors; v++) {
            highest[v] = max(load(scores + r * kTileColumns + v * kLanes), highest[v]);
        }
    }
}

// The same at every level.
template <class Operand, int kVectors>
void score_group(const uint32_t* keys, int64_t units, int64_t longest, const uint32_t* queries, float* scores,
                 Vec* highest, Prefetcher& prefetcher) {
    if constexpr (kHasAmx) {
        if (chains_of<Operand>(units, longest) == 1) {
            return score_group_in_tiles<Operand, kVectors>(keys, units, queries, scores, highest, prefetcher);
        }
    }
    Vec top[kVectors];  // first of the first row: no register is held while the product runs
    const auto finish = [&](int r, int v, Vec sum) MMK_INLINE_LAMBDA {
        store(scores + r * kTileColumns + v * kLanes, sum);
        top[v] = max(sum, r == 0 ? highest[v] : top[v]);
    };
    multiply_in_chains<Operand, kTileRows, kVectors>(keys, units, queries, kTileColumns, units, longest, finish,
                                                     [&]() MMK_INLINE_LAMBDA { prefetcher.step(); });
    for (int v = 0; v < kVectors; v++) highest[v] = top[v];
}

// out[d][lane] = out * decay + sum over units of values[d] weights[lane], for one panel of kTileRows d.
template <class Operand, int kVectors>
void add_values(Broadcast values, const uint32_t* weights, int64_t units, const Vec* decay, float* out,
                Prefetcher& prefetcher) {
    const auto beside = [&]() MMK_INLINE_LAMBDA { prefetcher.step(); };
    if constexpr (kHasAmx) {  // tiles add to memory by themselves
        for (int v = 0; v < kVectors; v++) {
            if (all_ones(decay[v])) continue;
            for (int r = 0; r < kTileRows; r++) {
                float* at = out + r * kTileColumns + v * kLanes;
                store(at, load(at) * decay[v]);
            }
        }
        multiply_into<Operand, kTileRows, kVectors>(values, weights, kTileColumns, units, out, kTileColumns, true,
                                                    beside);
    } else {
        const auto finish = [&](int r, int v, Vec sum) MMK_INLINE_LAMBDA {
            float* at = out + r * kTileColumns + v * kLanes;
            store(at, load(at) * decay[v] + sum);
        };
        micro_kernel<Operand, kTileRows, kVectors>(values.a, 1, kTileRows, weights, kTileColumns, units, finish,
                                                   beside);
    }
}

template <class T>
class Forward {
    using Operand = OperandOf<T>;
    static constexpr int kPack = Operand::kPack;

  public:
    Forward(const SpanAttention& call, const std::vector<RowSegment>& segments, int64_t copies)
        : call_(call),
          logits_(call.scale, call.softcap),
          group_(call.q.heads / call.k.heads),
          query_units_(depth<Operand>(call.q.dim)),
          longest_chain_(call.q.tokens * group_ <= kFewRows ? kChainOfFewRows : longest_chain(query_units_)),
          value_panels_(ceil_div(call.v.dim, kTileRows)),
          plan_(group_, call.spans.runs, part_lanes()),
          copies_(copies) {
        for (const RowSegment& each : segments) {
            plan_.add(each.batch_row, SpanTable(call.spans, each.batch_row, call.k.tokens), each.segment);
        }
    }

    void run() const {
        const auto parts = static_cast<int64_t>(plan_.parts().size());
        const int64_t heads = call_.k.heads;
        const int threads = useful_threads(4.0 * call_.q.batch * call_.q.tokens * call_.q.heads * call_.q.dim * 64);
        const Sizes sizes = workspace();
        Scratch<uint32_t> memory(threads * sizes.total());
        const int64_t count = copies_ * parts * heads;
        const auto task = [&](int64_t i) {
            const Part& part = plan_.parts()[i / heads % parts];
            return Task{&part, part.batch_row + i / heads / parts, i % heads};
        };
        for_each(count, threads, [&](int64_t i, int64_t worker) {
            const Task next = task(std::min(i + 1, count - 1));  // most likely, too
            attend(task(i), next, Workspace(memory.get() + worker * sizes.total(), sizes));
        });
    }

  private:
    struct Sizes {  // of a worker's memory, in units
        int64_t keys, values, scores, states, blocks;
        int64_t total() const { return keys + values + scores + states; }
    };

    struct Task {
        const Part* part;
        int64_t batch_row, head;  // of the keys
    };

    struct Workspace {
        uint32_t *keys, *values;
        float* scores;
        uint32_t* states;
        mutable Prefetcher prefetcher;

        Workspace(uint32_t* memory, const Sizes& sizes)
            : keys(memory),
              values(keys + sizes.keys),
              scores(reinterpret_cast<float*>(values + sizes.values)),
              states(values + sizes.values + sizes.scores) {}
    };

    // Parts small enough that there are many, and large enough that packing keys and values for each costs little.
    int64_t part_lanes() const {
        constexpr int64_t kTasks = 32;
        const int64_t lanes = call_.q.batch * call_.q.tokens * call_.q.heads;
        return std::clamp<int64_t>(lanes / kTasks, 16 * kTileColumns, 32 * kTileColumns);
    }

    Sizes workspace() const {
        Sizes sizes{};
        int64_t keys = 0;
        for (const Part& part : plan_.parts()) {
            const int64_t seen = part.hull.hi - part.hull.lo;
            keys = std::max(keys, std::min(round_up(seen, kKeyGroup), kKeyPanel));
            // Only where keys come in several panels must the blocks wait for the next one.
            sizes.blocks = std::max(sizes.blocks, seen > kKeyPanel ? part.last_block - part.first_block : 1);
        }
        sizes.keys = round_up(keys * query_units_ + kLanes, 16);
        sizes.values = value_panels_ * TokenPanels(keys / kPack).panel;
        sizes.scores = kKeyBlock * kTileColumns;
        sizes.states = sizes.blocks * BlockState::size(query_units_, value_panels_ * kTileRows);
        return sizes;
    }

    // ---- a part of a segment, one key head

    void attend(const Task& task, const Task& next, const Workspace& work) const {
        const Part& part = *task.part;
        const int64_t out_rows = value_panels_ * kTileRows;
        const int64_t panels = std::max<int64_t>(1, ceil_div(part.hull.hi - part.hull.lo, kKeyPanel));
        for (int64_t p = 0; p < panels; p++) {
            const KeyPanel panel = pack(task, part.hull.lo + p * kKeyPanel, work);
            for (int64_t i = part.first_block; i < part.last_block; i++) {
                const int64_t slot = panels == 1 ? 0 : i - part.first_block;
                const BlockState state(work.states + slot * BlockState::size(query_units_, out_rows), query_units_,
                                       out_rows);
                if (p == 0) begin(task, i, state);
                if (p == 0) ask_for_block(task, next, i, work.prefetcher);
                if (p == panels - 1 && i == part.first_block) ask_for_keys(next, work.prefetcher);
                for (int64_t run = 0; run < plan_.runs(); run++) {
                    meet(plan_.block(i).vectors(), plan_.spans(i, run), panel, state, work);
                }
                if (p == panels - 1) finish(task, i, state);
            }
        }
    }

    KeyPanel pack(const Task& task, int64_t first, const Workspace& work) const {
        const Part& part = *task.part;
        const int64_t count = round_up(std::min<int64_t>(part.hull.hi - first, kKeyPanel), kKeyGroup);
        const KeyPanel panel{
            first, count, work.keys, work.values, query_units_, value_panels_, TokenPanels(count / kPack)};
        pack_token_rows<Operand>(HeadRows<const T>(call_.k, task.batch_row, task.head), first, first + count,
                                 plan_.covered_by(part), work.keys);
        const HeadRows<const T> values(call_.v, task.batch_row, task.head);
        PanelPacker<Operand, T>(values, first, panel.values_lie, work.values)
            .pack(first + count, plan_.covered_by(part));
        return panel;
    }

    // ---- what will be wanted from memory soon

    void ask_for_keys(const Task& next, Prefetcher& prefetcher) const {
        const Span hull = next.part->hull;
        for (const Heads* x : {&call_.k, &call_.v}) {
            const HeadRows<const T> rows(*x, next.batch_row, next.head);
            prefetcher.add(rows.row(hull.lo), rows.stride, hull.hi - hull.lo, rows.dim);
        }
    }

    // The queries of the block after this one, and where its result goes.
    void ask_for_block(const Task& task, const Task& next, int64_t block, Prefetcher& prefetcher) const {
        const bool last = block + 1 == task.part->last_block;
        ask_for_lanes(call_.q, last ? next : task, plan_.block(last ? next.part->first_block : block + 1), prefetcher);
        ask_for_lanes(call_.out, task, plan_.block(block), prefetcher);
    }

    void ask_for_lanes(const Heads& x, const Task& task, const QueryBlock& block, Prefetcher& prefetcher) const {
        const int64_t first = block.first_lane / group_, last = ceil_div(block.first_lane + block.lanes, group_);
        const int64_t together = x.head_stride == x.dim ? group_ : 1;  // heads of the group that lie together
        const HeadRows<const T> rows(x, task.batch_row, task.head * group_);
        prefetcher.add(rows.row(first), rows.stride, last - first, together * rows.dim);
    }

    // ---- a block of queries

    // The rows of x that belong to the lanes of a block.
    struct LaneRows {
        const T* row[kTileColumns];
    };
    LaneRows lane_rows(const Heads& x, const Task& task, const QueryBlock& block) const {
        LaneRows rows;
        const auto* first =
            static_cast<const T*>(x.data) + task.batch_row * x.batch_stride + task.head * group_ * x.head_stride;
        int64_t token = block.first_lane / group_, of_group = block.first_lane % group_;
        for (int64_t lane = 0; lane < block.lanes; lane++) {
            rows.row[lane] = first + token * x.token_stride + of_group * x.head_stride;
            if (++of_group == group_) of_group = 0, token++;
        }
        return rows;
    }

    void begin(const Task& task, int64_t i, const BlockState& state) const {
        const QueryBlock& block = plan_.block(i);
        const LaneRows rows = lane_rows(call_.q, task, block);
        pack_lanes_of<Operand>([&](int64_t lane) { return rows.row[lane]; }, 1, block.lanes, call_.q.dim, query_units_,
                               block.vectors() * kLanes, kTileColumns, state.queries);
        state.clear(value_panels_ * kTileRows);
    }

    // The keys of a panel that lanes of the block see, in blocks as even as can be.
    void meet(int vectors, const LaneSpans& spans, const KeyPanel& panel, const BlockState& state,
              const Workspace& work) const {
        int64_t lo = panel.count, hi = 0;
        for (int v = 0; v < vectors; v++) {
            if (spans.outer[v].empty()) continue;
            lo = std::min(lo, std::max<int64_t>(spans.outer[v].lo - panel.first, 0));
            hi = std::max(hi, std::min<int64_t>(spans.outer[v].hi - panel.first, panel.count));
        }
        if (lo >= hi) return;
        lo = lo / kKeyGroup * kKeyGroup, hi = round_up(hi, kKeyGroup);
        const int64_t size = round_up(ceil_div(hi - lo, ceil_div(hi - lo, kKeyBlock)), kKeyGroup);
        for (int64_t at = lo; at < hi; at += size) {
            meet_block(vectors, spans, panel, at, static_cast<int>(std::min(size, hi - at)), state, work);
        }
    }

    void meet_block(int vectors, const LaneSpans& spans, const KeyPanel& panel, int64_t at, int count,
                    const BlockState& state, const Workspace& work) const {
        Vec highest[kTileVectors];
        std::fill_n(highest, kTileVectors, splat(-kInfinity));
        const Stretches stretches(spans, vectors, panel.first + at, count);
        for (const Stretch& stretch : stretches) score(stretch, spans, panel, at, state, work, highest);

        Vec decay[kTileVectors], reference[kTileVectors];
        const Vec base = splat(logits_.base().first);
        for (int v = 0; v < vectors; v++) {
            const Vec before = load(state.highest + v * kLanes), now = max(highest[v] * base, before);
            // Lanes that saw nothing yet: any finite reference gives them weights of 0.
            reference[v] = select(now == splat(-kInfinity), Vec{}, now);
            decay[v] = exp2(before - reference[v]);
            store(state.highest + v * kLanes, now);
            store(state.sum + v * kLanes, load(state.sum + v * kLanes) * decay[v]);
        }
        for (const Stretch& stretch : stretches) {
            with_width<kTileVectors>(stretch.vectors, [&](auto width) {
                add_stretch<decltype(width)::value>(stretch, panel, at, reference + stretch.vector,
                                                    decay + stretch.vector, state, work);
            });
        }
    }

    void score(const Stretch& stretch, const LaneSpans& spans, const KeyPanel& panel, int64_t at,
               const BlockState& state, const Workspace& work, Vec* highest) const {
        Span inner{0, INT32_MAX};
        for (int v = stretch.vector; v < stretch.vector + stretch.vectors; v++) {
            inner = {std::max(inner.lo, spans.inner[v].lo), std::min(inner.hi, spans.inner[v].hi)};
        }
        const uint32_t* queries = state.queries + stretch.vector * kLanes;
        with_width<kTileVectors>(stretch.vectors, [&](auto width) {
            constexpr int kVectors = decltype(width)::value;
            for (int i = stretch.first; i < stretch.first + stretch.count; i += kTileRows) {
                const auto key = static_cast<int32_t>(panel.first + at + i);
                const bool plain = logits_.deferred && inner.lo <= key && key + kTileRows <= inner.hi;
                const uint32_t* keys = panel.keys + (at + i) * panel.key_units;
                float* to = work.scores + i * kTileColumns + stretch.vector * kLanes;
                Vec unused[kVectors] = {};
                Vec* top = plain ? highest + stretch.vector : unused;
                score_group<Operand, kVectors>(keys, panel.key_units, longest_chain_, queries, to, top,
                                               work.prefetcher);
                for (int v = 0; v < kVectors && !plain; v++) {
                    const int lane = (stretch.vector + v) * kLanes;
                    const Vec seen =
                        logits_.refine<kTileColumns>(to + v * kLanes, kTileRows, key, spans.lo + lane, spans.hi + lane);
                    highest[stretch.vector + v] = max(seen, highest[stretch.vector + v]);
                }
            }
        });
    }

    // Scores become weights in their place, two keys to a unit for bfloat16, and the values weighted by them are added.
    template <int kVectors>
    void add_stretch(const Stretch& stretch, const KeyPanel& panel, int64_t at, const Vec* reference, Vec* decay,
                     const BlockState& state, const Workspace& work) const {
        float* from = work.scores + stretch.vector * kLanes;
        auto* weights = reinterpret_cast<uint32_t*>(from) + stretch.first / kPack * kTileColumns;
        weigh<kVectors>(from + stretch.first * kTileColumns, stretch.count, reference,
                        state.sum + stretch.vector * kLanes, weights);
        for (int64_t p = 0; p < panel.value_panels; p++) {
            add_values<Operand, kVectors>(
                panel.values_lie.at(panel.values, p, (at + stretch.first) / kPack), weights, stretch.count / kPack,
                decay, state.out + p * kTileRows * kTileColumns + stretch.vector * kLanes, work.prefetcher);
        }
        std::fill_n(decay, kVectors, splat(1.0f));  // once
    }

    template <int kVectors>
    void weigh(const float* scores, int count, const Vec* reference, float* sum_at, uint32_t* weights) const {
        const TwoFloats base = logits_.base();
        Vec sum[kVectors];
        std::fill_n(sum, kVectors, Vec{});
        const int group = std::is_same_v<T, float> ? kSumGroup : count;
        for (int first = 0; first < count; first += group) {
            Vec part[kVectors];
            std::fill_n(part, kVectors, Vec{});
            for (int i = first; i < std::min(first + group, count); i += kPack) {
                MMK_UNROLL for (int v = 0; v < kVectors; v++) {
                    Vec of_keys[kPack];
                    MMK_UNROLL for (int j = 0; j < kPack; j++) {
                        const Vec logit = load(scores + (i + j) * kTileColumns + v * kLanes);
                        of_keys[j] = weight<T>(logit, base, reference[v]);
                        part[v] += of_keys[j];
                    }
                    uint32_t* to = weights + i / kPack * kTileColumns + v * kLanes;
                    if constexpr (kPack == 1) {
                        store_bits(to, as_bits(of_keys[0]));
                    } else {
                        store_bits(to, to_bfloat16_pairs(of_keys[0], of_keys[1]));
                    }
                }
            }
            for (int v = 0; v < kVectors; v++) sum[v] += part[v];
        }
        for (int v = 0; v < kVectors; v++) store(sum_at + v * kLanes, load(sum_at + v * kLanes) + sum[v]);
    }

    // ---- the result

    void finish(const Task& task, int64_t i, const BlockState& state) const {
        const QueryBlock& block = plan_.block(i);
        const LaneRows out = lane_rows(call_.out, task, block);
        const int64_t dim = call_.v.dim, out_rows = value_panels_ * kTileRows;
        for (int v = 0; v < block.vectors(); v++) {
            const Vec sum = load(state.sum + v * kLanes);
            const Vec factor = select(sum == Vec{}, Vec{}, 1.0f / sum);  // 0: the lane saw nothing
            const int count = static_cast<int>(std::min<int64_t>(kLanes, block.lanes - v * kLanes));
            store_lse(task, block.first_lane + v * kLanes, count, log_of_scaled(load(state.highest + v * kLanes), sum));
            for (int64_t d = 0; d < dim; d += kLanes) {
                UVec rows[kLanes];
                for (int i = 0; i < kLanes; i++) {
                    const bool present = d + i < out_rows;
                    rows[i] =
                        present ? as_bits(load(state.out + (d + i) * kTileColumns + v * kLanes) * factor) : UVec{};
                }
                transpose(rows);
                store_columns(out.row + v * kLanes, count, d, dim - d, rows);
            }
        }
    }

    void store_lse(const Task& task, int64_t first_lane, int count, Vec lse) const {
        float* row = call_.lse + (task.batch_row * call_.q.heads + task.head * group_) * call_.q.tokens;
        if (group_ == 1) return store_first(row + first_lane, lse, count);
        float lanes[kLanes];
        store(lanes, lse);
        int64_t token = first_lane / group_, of_group = first_lane % group_;
        for (int i = 0; i < count; i++) {
            row[of_group * call_.q.tokens + token] = lanes[i];
            if (++of_group == group_) of_group = 0, token++;
        }
    }

    static void store_columns(const T* const* rows, int count, int64_t first, int64_t left, const UVec* lanes) {
        if (left >= kLanes) {
            for (int i = 0; i < count; i++) store(const_cast<T*>(rows[i]) + first, as_float(lanes[i]));
        } else {
            for (int i = 0; i < count; i++) {
                store_first(const_cast<T*>(rows[i]) + first, as_float(lanes[i]), static_cast<int>(left));
            }
        }
    }

    const SpanAttention& call_;
    const Logits logits_;
    const int64_t group_, query_units_, longest_chain_, value_panels_;
    Plan plan_;
    int64_t copies_;  // rows of the batch that share a plan
};

}  // namespace

void span_attention(const SpanAttention& call) {
    if (call.q.batch == 0 || call.q.tokens == 0) return;
    // Rows of the batch that share their spans share one plan on the general path.
    const int64_t plans = call.spans.batch_stride == 0 ? 1 : call.q.batch, copies = call.q.batch / plans;
    std::vector<RowSegment> to_decode, to_short, general;
    for (int64_t b = 0; b < plans; b++) {
        for (const Segment& segment : segments(SpanTable(call.spans, b, call.k.tokens))) {
            const bool one_block = is_short(call, segment);
            if (!one_block && !decodes(call, segment)) {
                general.push_back({b, segment});
                continue;
            }
            for (int64_t copy = 0; copy < copies; copy++)
                (one_block ? to_short : to_decode).push_back({b + copy, segment});
        }
    }
    if (!to_decode.empty()) span_decode(call, to_decode);
    if (!to_short.empty()) span_short(call, to_short);
    if (general.empty()) return;
    with_element_type(call.q.dtype, [&](auto type) { Forward<decltype(type)>(call, general, copies).run(); });
}

}  // namespace mmk::MMK_ISA
