// Attention within short segments, forward: all keys of a segment are one block.
//
//     S = K Q^T,  P_ji = exp(scale S_ji - max_j scale S_ji),  O = (P^T V) / sum_j P_ji,  for each segment and key head
//
// The general forward (forward.cpp) takes blocks of keys one after the other, and pays for it in the least
// block, too: an output that is rescaled, kept transposed and transposed again in the end. Here the softmax is known
// before the first value is met. So
//
//     S^T[key][lane]   queries in lanes, as there: the softmax is vertical
//     O[query][d]      d in lanes, the weights are broadcast: rows of the output leave the registers once, as they lie
//
// Memory moved: every tensor once, 4 D operations a pair that the segment could have, for 2 D numbers a token: short
// segments are as fast as memory is, if it is asked early. Rows of one head lie a whole token apart, where no hardware
// prefetcher follows, so a task asks for the rows of the next one a few lines at a time (prefetch.h); heads of a
// segment come one after the other and share the lines and pages that they touch.
//
// Of a segment's keys, queries that stand side by side meet those from the first to the last that one of them sees:
// causal text of 128 tokens costs little more than half of what it would without a mask. Pairs in between that do not
// see each other are computed and masked.
#include "cpu/span_attention/short.h"

#include "cpu/product/tasks.h"
#include "cpu/span_attention/logits.h"
#include "cpu/span_attention/pack.h"
#include "cpu/span_attention/prefetch.h"
#include "cpu/span_attention/scores.h"

namespace mmk::MMK_ISA {
namespace {

// A block of queries: several panels of vectors, for which the values are loaded once.
constexpr int kBlockVectors = 4, kBlockLanes = kBlockVectors * kLanes;

// Rows of the output are cut into at most this many vectors, of which so many rows fit the registers.
constexpr int kOutVectors = kRegisters == 32 && !kHasAmx ? 5 : kTileVectors;
constexpr int out_rows(int vectors) { return vectors > 3 ? 4 : kTileRows; }

// [0, vectors) in pieces of at most kMost, as even as can be: body(Width<count>, first).
template <int kMost, class Body>
MMK_INLINE void in_pieces(int64_t vectors, Body&& body) {
    const int64_t pieces = ceil_div(vectors, kMost);
    for (int64_t i = 0; i < pieces; i++) {
        const int64_t first = vectors * i / pieces;
        with_width<kMost>(vectors * (i + 1) / pieces - first, [&](auto width) { body(width, first); });
    }
}

template <class T>
class Short {
    using Operand = OperandOf<T>;
    static constexpr int kPack = Operand::kPack, kKeyStep = kPack * kDepthStep;  // keys of a product's least depth

  public:
    Short(const SpanAttention& call, const std::vector<RowSegment>& segments)
        : call_(call),
          logits_(call.scale, call.softcap),
          group_(call.q.heads / call.k.heads),
          units_(depth<Operand>(call.q.dim)),
          out_vectors_(ceil_div(call.v.dim, kLanes)) {
        for (const RowSegment& each : segments) {
            add(each.batch_row, SpanTable(call.spans, each.batch_row, call.k.tokens), each.segment);
        }
    }

    void run() const {
        const int64_t heads = call_.k.heads, count = static_cast<int64_t>(pieces_.size()) * heads;
        const int threads = useful_threads(4.0 * pairs_ * call_.q.heads * call_.q.dim);
        const Sizes sizes = workspace();
        Scratch<uint32_t> memory(threads * sizes.total());
        const auto task = [&](int64_t i) { return Task{&pieces_[i / heads], i % heads}; };
        for_each(count, threads, [&](int64_t i, int64_t worker) {
            const Workspace work(memory.get() + worker * sizes.total(), sizes);
            attend(task(i), task(std::min(i + 1, count - 1)), work);  // that is most likely the next one, too
        });
    }

  private:
    struct Piece {  // a segment of a row of the batch
        int64_t batch_row;
        Segment segment;
        std::vector<Span> seen;
        bool masked;  // some query does not see all of its keys

        int64_t keys() const { return segment.hi - segment.lo; }
    };

    struct Task {
        const Piece* piece;
        int64_t head;  // of the keys
    };

    struct Block {  // of queries
        int64_t first_lane, lanes;
        const T* query[kBlockLanes];
        T* out[kBlockLanes];
        int32_t lo[kBlockLanes], hi[kBlockLanes];
        float factor[kBlockLanes];  // of the sums of weighted values
    };

    struct Keys {  // of a segment: [first, last) is what some lane sees, [all_first, all_last) what every lane does
        int64_t first, last, all_first, all_last;
    };

    struct Sizes {  // of a worker's memory, in units
        int64_t keys, values, queries, scores, weights;
        int64_t total() const { return keys + values + queries + scores + weights; }
    };

    struct Workspace {
        uint32_t* keys;     // [keys][units of D]
        uint32_t* values;   // [units of keys][out_vectors_ * kLanes]
        uint32_t* queries;  // [units of D][kBlockLanes]
        float* scores;      // [keys][kBlockLanes]; weights in the end, [units of keys][kBlockLanes]
        uint32_t* weights;  // with AMX these as rows, [kBlockLanes][units of keys]

        Workspace(uint32_t* memory, const Sizes& sizes)
            : keys(memory),
              values(keys + sizes.keys),
              queries(values + sizes.values),
              scores(reinterpret_cast<float*>(queries + sizes.queries)),
              weights(queries + sizes.queries + sizes.scores) {}
    };

    void add(int64_t batch_row, const SpanTable& spans, const Segment& segment) {
        bool masked = false;
        for (int64_t query = segment.first; query < segment.last; query++) {
            const Span span = spans(0, query);
            masked |= span.lo != segment.lo || span.hi != segment.hi;
        }
        pieces_.push_back({batch_row, segment, covered(spans, segment), masked});
        pairs_ += static_cast<double>(segment.last - segment.first) * pieces_.back().keys();
        keys_ = std::max(keys_, round_up(pieces_.back().keys(), kTileRows));
    }

    Sizes workspace() const {
        return {round_up(keys_ * units_ + kLanes, 16), round_up(depth<Operand>(keys_) * out_vectors_ * kLanes, 16),
                units_ * kBlockLanes, keys_ * kBlockLanes, kHasAmx ? kBlockLanes * weight_row() : 0};
    }

    int64_t weight_row() const { return round_up(depth<Operand>(keys_), kLanes); }

    // ---- a segment, one key head

    void attend(const Task& task, const Task& next, const Workspace& work) const {
        const Piece& piece = *task.piece;
        Prefetcher prefetcher;
        ask_for(next, prefetcher);
        pack_token_rows<Operand>(HeadRows<const T>(call_.k, piece.batch_row, task.head), piece.segment.lo,
                                 piece.segment.lo + round_up(piece.keys(), kTileRows), piece.seen, work.keys);
        pack_values(HeadRows<const T>(call_.v, piece.batch_row, task.head), piece, work.values);
        const int64_t lanes = (piece.segment.last - piece.segment.first) * group_, vectors = ceil_div(lanes, kLanes);
        const int64_t blocks = ceil_div(vectors, kBlockVectors);
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t first = vectors * i / blocks * kLanes, last = vectors * (i + 1) / blocks * kLanes;
            Block block = find_block(task, first, std::min(last, lanes) - first);
            pack_lanes_of<Operand>([&](int64_t lane) { return block.query[lane]; }, 1, block.lanes, call_.q.dim, units_,
                                   static_cast<int>(last - first), kBlockLanes, work.queries);
            in_pieces<kTileVectors>((last - first) / kLanes, [&](auto width, int64_t vector) {
                weigh<width.value>(task, vector * kLanes, block, work, prefetcher);
            });
            if constexpr (kHasAmx) lay_weights_in_rows(piece, block, work);
            in_pieces<kOutVectors>(out_vectors_, [&](auto width, int64_t vector) {
                write_out<width.value>(piece, vector * kLanes, block, work, prefetcher);
            });
        }
    }

    void ask_for(const Task& next, Prefetcher& prefetcher) const {
        const Segment& segment = next.piece->segment;
        for (const Heads* x : {&call_.k, &call_.v}) {
            const HeadRows<const T> rows(*x, next.piece->batch_row, next.head);
            prefetcher.add(rows.row(segment.lo), rows.stride, segment.hi - segment.lo, rows.dim);
        }
        for (const Heads* x : {&call_.q, &call_.out}) {
            const HeadRows<const T> rows(*x, next.piece->batch_row, next.head * group_);
            const int64_t together = x->head_stride == x->dim ? group_ : 1;  // heads of the group that lie together
            prefetcher.add(rows.row(segment.first), rows.stride, segment.last - segment.first, together * rows.dim);
        }
    }

    // Keys past the last count as zero.
    void pack_values(const HeadRows<const T>& from, const Piece& piece, uint32_t* packed) const {
        const uint32_t* end = packed + depth<Operand>(piece.keys()) * out_vectors_ * kLanes;
        for (int64_t key = piece.segment.lo; key < piece.segment.hi; key += kPack) {
            const T* row = from.row(key);
            const T* second = kPack == 2 && key + 1 < piece.segment.hi ? from.row(key + 1) : nullptr;
            for (int64_t d = 0; d < from.dim; d += kLanes, packed += kLanes) {
                UVec lanes = load_units<FloatOperand>(row, 1, d, from.dim);
                if constexpr (kPack == 2) {  // of widened bfloat16
                    lanes = lanes >> 16 | (second ? load_units<FloatOperand>(second, 1, d, from.dim) : UVec{});
                }
                store_bits(packed, lanes);
            }
        }
        for (; packed < end; packed += kLanes) store_bits(packed, UVec{});
    }

    // ---- a block of queries

    Block find_block(const Task& task, int64_t first_lane, int64_t lanes) const {
        const Piece& piece = *task.piece;
        const SpanTable spans(call_.spans, piece.batch_row, call_.k.tokens);
        Block block;
        block.first_lane = first_lane, block.lanes = lanes;
        find_rows(call_.q, task, first_lane, lanes, block.query);
        find_rows(call_.out, task, first_lane, lanes, block.out);
        for (int64_t lane = 0; lane < lanes && piece.masked; lane++) {
            const Span span = spans(0, piece.segment.first + (first_lane + lane) / group_);
            block.lo[lane] = span.lo, block.hi[lane] = span.hi;
        }
        // Without a mask lanes see everything; those past the last, of which nobody reads a result, see what it sees.
        const int64_t known = piece.masked ? lanes : 0;
        std::fill_n(block.lo + known, kBlockLanes - known, piece.masked ? block.lo[lanes - 1] : 0);
        std::fill_n(block.hi + known, kBlockLanes - known, piece.masked ? block.hi[lanes - 1] : INT32_MAX);
        return block;
    }
    // The rows of x that belong to lanes: heads of the group one after the other, then the next token.
    template <class Row>
    void find_rows(const Heads& x, const Task& task, int64_t first_lane, int64_t lanes, Row* rows) const {
        const int64_t token = task.piece->segment.first + first_lane / group_;
        int64_t of_group = first_lane % group_;
        auto row =
            const_cast<Row>(HeadRows<const T>(x, task.piece->batch_row, task.head * group_ + of_group).row(token));
        for (int64_t lane = 0; lane < lanes; lane++, of_group++) {
            if (of_group == group_) of_group = 0, row += x.token_stride - group_ * x.head_stride;
            rows[lane] = row;
            row += x.head_stride;
        }
    }

    // What kCount lanes see, from a whole step of keys on.
    template <int kCount>
    Keys seen_by(const Piece& piece, const Block& block, int64_t lane, int64_t step) const {
        const int64_t keys = piece.keys(), first_key = piece.segment.lo;
        if (!piece.masked) return {0, keys, 0, keys};
        Span some{INT32_MAX, 0}, all{0, INT32_MAX};
        for (int i = 0; i < kCount; i++) {  // no branches: compilers take several lanes at once
            const int32_t lo = block.lo[lane + i], hi = block.hi[lane + i];
            const bool sees = lo < hi;
            some = {std::min(some.lo, sees ? lo : INT32_MAX), std::max(some.hi, sees ? hi : 0)};
            all = {std::max(all.lo, lo), std::min(all.hi, hi)};
        }
        // Of so few keys AMX takes less time for all of them than for less at a time.
        if (kHasAmx && keys <= 2 * kKeyStep) return {0, keys, all.lo - first_key, all.hi - first_key};
        if (some.empty()) return {0, 0, 0, 0};
        return {(some.lo - first_key) / step * step, some.hi - first_key, all.lo - first_key, all.hi - first_key};
    }

    // The weights of the keys that kVectors vectors of lanes see, their sums' inverse and the logarithm.
    template <int kVectors>
    void weigh(const Task& task, int64_t lane, Block& block, const Workspace& work, Prefetcher& prefetcher) const {
        const int64_t keys = task.piece->keys();
        const Keys seen = seen_by<kVectors * kLanes>(*task.piece, block, lane, kTileRows);
        const int64_t longest = longest_chain(units_);
        float* scores = work.scores + lane;
        Vec highest[kVectors];
        std::fill_n(highest, kVectors, splat(-kInfinity));
        for (int64_t key = seen.first; key < seen.last; key += kTileRows) {
            float* to = scores + key * kBlockLanes;
            const bool done = logits_.deferred && seen.all_first <= key && key + kTileRows <= seen.all_last;
            Vec top[kVectors];
            std::fill_n(top, kVectors, splat(-kInfinity));
            multiply_in_chains<Operand, kTileRows, kVectors>(
                work.keys + key * units_, units_, work.queries + lane, kBlockLanes, units_, longest,
                [&](int r, int v, Vec sum) MMK_INLINE_LAMBDA {
                    store(to + r * kBlockLanes + v * kLanes, sum);
                    top[v] = max(sum, top[v]);
                },
                [&]() MMK_INLINE_LAMBDA { prefetcher.step(); });
            for (int v = 0; v < kVectors; v++) {
                if (!done) {
                    top[v] = logits_.refine<kBlockLanes>(to + v * kLanes, std::min<int64_t>(kTileRows, keys - key),
                                                         static_cast<int32_t>(task.piece->segment.lo + key),
                                                         block.lo + lane + v * kLanes, block.hi + lane + v * kLanes);
                }
                highest[v] = max(top[v], highest[v]);
            }
        }
        const TwoFloats base = logits_.base();
        for (int v = 0; v < kVectors; v++) {
            const Vec now = highest[v] * splat(base.first);
            // Lanes that saw nothing: any finite reference gives them weights of 0.
            const Vec sum = exponentiate(scores + v * kLanes, seen.first, seen.last, base,
                                         select(now == splat(-kInfinity), Vec{}, now));
            if (kHasAmx) clear_beside(scores + v * kLanes, seen.first, seen.last);
            store(block.factor + lane + v * kLanes, select(sum == Vec{}, Vec{}, 1.0f / sum));
            store_lse(task, block, lane + v * kLanes, log_of_scaled(now, sum));
        }
    }

    // Logits of the keys [first, last) become weights in their place, two keys to a unit for bfloat16; their sum.
    Vec exponentiate(float* logits, int64_t first, int64_t last, const TwoFloats& base, Vec reference) const {
        Vec sum{}, part{};
        if (last % kPack != 0) store(logits + last * kBlockLanes, splat(-kInfinity));  // there is room for a whole tile
        for (int64_t key = first; key < last; key += kPack) {
            Vec weights[kPack];
            MMK_UNROLL for (int j = 0; j < kPack; j++) {
                weights[j] = weight<T>(load(logits + (key + j) * kBlockLanes), base, reference);
                part += weights[j];
            }
            if ((key + kPack) % kSumGroup == 0) sum += part, part = Vec{};
            auto* to = reinterpret_cast<uint32_t*>(logits) + key / kPack * kBlockLanes;
            if constexpr (kPack == 1) {
                store_bits(to, as_bits(weights[0]));
            } else {
                store_bits(to, to_bfloat16_pairs(weights[0], weights[1]));
            }
        }
        return sum + part;
    }

    // Weights of the keys beside [first, last), up to whole steps of keys: zero.
    static void clear_beside(float* weights, int64_t first, int64_t last) {
        const auto clear = [&](int64_t from, int64_t to) {
            for (int64_t unit = from; unit < to; unit++) store(weights + unit * kBlockLanes, Vec{});
        };
        clear(first / kKeyStep * kKeyStep / kPack, first / kPack);
        clear(ceil_div(last, kPack), round_up(last, kKeyStep) / kPack);
    }

    void lay_weights_in_rows(const Piece& piece, const Block& block, const Workspace& work) const {
        const auto* weights = reinterpret_cast<const uint32_t*>(work.scores);
        const int64_t row = weight_row();
        for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
            const Keys seen = seen_by<kLanes>(piece, block, lane, kKeyStep);
            const int64_t last = depth<Operand>(seen.last);
            for (int64_t unit = seen.first / kPack; unit < last; unit += kLanes) {
                UVec units[kLanes];
                for (int i = 0; i < kLanes; i++) units[i] = load_bits(weights + (unit + i) * kBlockLanes + lane);
                transpose(units);
                uint32_t* to = work.weights + lane * row + unit;
                for (int i = 0; i < kLanes; i++) store_bits(to + i * row, units[i]);
            }
        }
    }

    void store_lse(const Task& task, const Block& block, int64_t lane, Vec lse) const {
        const int64_t count = std::min<int64_t>(kLanes, block.lanes - lane), first = block.first_lane + lane;
        float* row = call_.lse + (task.piece->batch_row * call_.q.heads + task.head * group_) * call_.q.tokens +
                     task.piece->segment.first;
        if (group_ == 1) return store_first(row + first, lse, static_cast<int>(count));
        float lanes[kLanes];
        store(lanes, lse);
        for (int64_t i = 0; i < count; i++) {
            row[(first + i) % group_ * call_.q.tokens + (first + i) / group_] = lanes[i];
        }
    }

    // kVectors vectors of every row of the output, from column d on.
    template <int kVectors>
    void write_out(const Piece& piece, int64_t d, const Block& block, const Workspace& work,
                   Prefetcher& prefetcher) const {
        constexpr int kRows = out_rows(kVectors);
        const auto* by_keys = reinterpret_cast<const uint32_t*>(work.scores);
        const int64_t row = out_vectors_ * kLanes, dim = call_.v.dim;
        for (int64_t lane = 0; lane < block.lanes; lane += kRows) {
            const Keys seen = seen_by<kRows>(piece, block, lane, kKeyStep);
            const int64_t unit = seen.first / kPack;
            const Broadcast weights = kHasAmx ? Broadcast{work.weights + lane * weight_row() + unit, weight_row(), 1}
                                              : Broadcast{by_keys + unit * kBlockLanes + lane, 1, kBlockLanes};
            micro_kernel<Operand, kRows, kVectors>(
                weights.a, weights.row, weights.unit, work.values + unit * row + d, row,
                depth<Operand>(seen.last) - unit,
                [&](int r, int v, Vec sum) {
                    if (lane + r >= block.lanes) return;
                    const int64_t at = d + v * kLanes;
                    const Vec result = sum * splat(block.factor[lane + r]);
                    if (at + kLanes <= dim) {
                        store(block.out[lane + r] + at, result);
                    } else {
                        store_first(block.out[lane + r] + at, result, static_cast<int>(dim - at));
                    }
                },
                [&]() MMK_INLINE_LAMBDA { prefetcher.step(); });
        }
    }

    const SpanAttention& call_;
    const Logits logits_;
    const int64_t group_, units_, out_vectors_;
    std::vector<Piece> pieces_;
    double pairs_ = 0;
    int64_t keys_ = 0;  // the most of a segment, rounded up to whole tiles
};

}  // namespace

void span_short(const SpanAttention& call, const std::vector<RowSegment>& segments) {
    with_element_type(call.q.dtype, [&](auto type) { Short<decltype(type)>(call, segments).run(); });
}

}  // namespace mmk::MMK_ISA
