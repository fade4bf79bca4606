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
#include "attention_backward_plan.h"

namespace mmk::MMK_ISA {

constexpr int kBlockRows = 96, kBlockKeys = 96;
constexpr int kBlockPanels = kBlockKeys / kTileColumns;
static_assert(kBlockRows % kTileRows == 0 && kBlockKeys % kTileColumns == 0);

// A chain of float32 additions loses digits as it grows; a score of more units is the sum of several. Shorter where a
// product is rounded before it is added.
constexpr int64_t kLongestChain = kLanes == 4 ? 24 : 128;

constexpr float kLog2e = 1.44269504f;

// ---- memory

// Deals out parts of one piece of memory, each on a cache line. From nothing it only counts.
class Carver {
  public:
    explicit Carver(uint32_t* memory) : memory_(memory) {}
    template <class T = float>
    T* take(int64_t count) {
        uint32_t* part = memory_ == nullptr ? nullptr : memory_ + used_;
        used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64) / 4;
        return reinterpret_cast<T*>(part);
    }
    int64_t used() const { return used_; }

  private:
    uint32_t* memory_;
    int64_t used_ = 0;
};

template <class T>
static MMK_INLINE void store_up_to(T* p, Vec v, int64_t count) {
    if (count >= kLanes) {
        store(p, v);
    } else {
        store_first(p, v, static_cast<int>(count));
    }
}

// Pairs of elements of two rows, the lower half from the first.
static MMK_INLINE UVec pair(HalfLanes low, HalfLanes high) {
    return __builtin_convertvector(low, UVec) | __builtin_convertvector(high, UVec) << 16;
}

// Rows of a tensor as units along the columns, and as units along the rows: in float32 the same memory, while pairs
// have a second one. Zero past the last column.
template <class Operand>
class PackedRows {
  public:
    using Element = ElementOf<Operand>;

    PackedRows(int64_t rows, int64_t columns, Carver& memory)
        : stride(row_units(ceil_div(round_up(columns, kLanes), Operand::kPack))),
          across_stride(Operand::kPack == 1 ? stride : row_units(columns)),
          columns_(columns),
          along_(memory.take<uint32_t>(rows * stride)),
          across_(Operand::kPack == 1 ? along_ : memory.take<uint32_t>(rows / Operand::kPack * across_stride)) {}

    // Row r; nullptr: zeros.
    template <class T>
    MMK_INLINE void put(int64_t r, const T* from) {
        Element* to = element(r, 0);
        int64_t d = 0;
        for (; from != nullptr && d + kLanes <= columns_; d += kLanes) copy(from + d, to + d);
        if (d >= columns_) return;
        T last[kLanes] = {};
        if (from != nullptr) memcpy(last, from + d, (columns_ - d) * sizeof(T));
        copy(last, to + d);
        for (d += kLanes; d < columns_; d += kLanes) memset(to + d, 0, kLanes * sizeof(Element));
    }
    // Rows [first, last) are put; first and last are even.
    void finish(int64_t first, int64_t last) {
        if constexpr (Operand::kPack == 2) {
            for (int64_t r = first; r < last; r += 2) {
                for (int64_t d = 0; d < columns_; d += kLanes) {
                    HalfLanes low, high;
                    memcpy(&low, element(r, d), sizeof low);
                    memcpy(&high, element(r + 1, d), sizeof high);
                    store_bits(across_ + r / 2 * across_stride + d, pair(low, high));
                }
            }
        }
    }

    const uint32_t* along(int64_t r) const { return along_ + r * stride; }
    const uint32_t* across(int64_t r, int64_t column) const {
        return across_ + r / Operand::kPack * across_stride + column;
    }
    int64_t units() const { return ceil_div(columns_, Operand::kPack); }  // of a row

    const int64_t stride, across_stride;

  private:
    Element* element(int64_t r, int64_t d) const { return reinterpret_cast<Element*>(along_ + r * stride) + d; }
    template <class T>
    static MMK_INLINE void copy(const T* from, Element* to) {
        if constexpr (std::is_same_v<T, Element>) {
            memcpy(to, from, kLanes * sizeof(T));
        } else {
            store(to, load(from));
        }
    }

    int64_t columns_;
    uint32_t *along_, *across_;
};

// ---- the query rows of a task

template <class Operand>
struct QueryRows {
    QueryRows(int64_t rows, int64_t dim, int64_t value_dim, Carver& memory)
        : q(rows, dim, memory),
          d_out(rows, value_dim, memory),
          lse(memory.take(rows)),
          delta(memory.take(rows)),
          d_q_stride(round_up(dim, kLanes)),
          d_q(memory.take(rows * d_q_stride)) {}

    PackedRows<Operand> q, d_out;
    float *lse, *delta;  // lse in base 2
    int64_t d_q_stride;
    float* d_q;  // float32, not scaled yet
};

// ---- P and dS of a row block

#if defined(__AVX512BF16__)
// Two rows rounded to bfloat16, one after the other, and their pairs.
struct Narrowed {
    explicit Narrowed(Vec first, Vec second) : rows((__m512i)_mm512_cvtne2ps_pbh(second, first)) {}
    UVec pairs() const {
        typedef uint16_t Halves __attribute__((vector_size(64)));
        const Halves zip = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return (UVec)_mm512_permutexvar_epi16((__m512i)zip, rows);
    }
    __m512i rows;
};
#endif

struct Lanes {  // a vector operand: unit u at at + u * stride
    const uint32_t* at;
    int64_t stride;
};

// P of one panel of keys, and dS of the whole key block, each the vector operand of a product that sums over query
// rows; dS is the broadcast operand of dQ besides, which sums over keys. In float32 one memory serves everything; pairs
// lie along the rows in the first place, along the keys in the second.
template <class Operand>
class Weights {
  public:
    explicit Weights(Carver& memory)
        : p_(memory.take((kPairs ? kTileRows : kBlockRows) * kTileColumns)),
          d_scores_(memory.take<uint32_t>(kBlockRows * kScoreRow)),
          p_pairs_(memory.take<uint32_t>(kPairs ? kBlockRows / 2 * kTileColumns : 0)),
          d_scores_pairs_(memory.take<uint32_t>(kPairs ? kBlockRows / 2 * kTileColumns : 0)) {}

    // P as floats, of the tile at work.
    float* p_row(int64_t row) const { return p_ + (kPairs ? row % kTileRows : row) * kTileColumns; }

    // kPack rows from `row` on; `lane` counts in the panel, `key` in the block.
    MMK_INLINE void put_p(int64_t row, int64_t lane, const Vec (&p)[Operand::kPack]) const {
#if defined(__AVX512BF16__)
        if constexpr (kPairs) store_bits(p_pairs_ + row / 2 * kTileColumns + lane, Narrowed(p[0], p[1]).pairs());
#endif
        if constexpr (!kPairs) store(p_row(row) + lane, p[0]);
    }
    MMK_INLINE void put_d_scores(int64_t row, [[maybe_unused]] int64_t lane, int64_t key,
                                 const Vec (&d)[Operand::kPack]) const {
#if defined(__AVX512BF16__)
        if constexpr (kPairs) {
            const Narrowed two(d[0], d[1]);
            store_bits(d_scores_pairs_ + row / 2 * kTileColumns + lane, two.pairs());
            uint32_t* by_key = d_scores_ + row * kScoreRow + key / 2;
            memcpy(by_key, &two.rows, 32);
            memcpy(by_key + kScoreRow, reinterpret_cast<const char*>(&two.rows) + 32, 32);
        }
#endif
        if constexpr (!kPairs) store_bits(d_scores_ + row * kScoreRow + key, as_bits(d[0]));
    }

    Lanes p(int64_t row, int64_t lane) const {
        if constexpr (kPairs) return {p_pairs_ + row / 2 * kTileColumns + lane, kTileColumns};
        return {reinterpret_cast<const uint32_t*>(p_row(row) + lane), kTileColumns};
    }
    Lanes d_scores(int64_t row, int64_t lane, int64_t key) const {
        if constexpr (kPairs) return {d_scores_pairs_ + row / 2 * kTileColumns + lane, kTileColumns};
        return {d_scores_ + row * kScoreRow + key, kScoreRow};
    }
    Broadcast d_scores_by_key(int64_t row, int64_t unit) const {
        return {d_scores_ + row * kScoreRow + unit, kScoreRow, 1};
    }

  private:
    static constexpr bool kPairs = Operand::kPack == 2;
    static constexpr int64_t kScoreRow = kPairs ? kBlockKeys / 2 : kBlockKeys + 16;  // an odd number of cache lines

    float* p_;
    uint32_t *d_scores_, *p_pairs_, *d_scores_pairs_;
};

// ---- the key block

// Scores become probabilities: exp2(score * scale - lse), with a cap exp2(tanh(score * scale) * cap - lse).
struct Softmax {
    float scale, cap;  // cap 0: none

    Softmax(double scale_, double softcap)
        : scale(static_cast<float>(softcap == 0 ? scale_ * static_cast<double>(kLog2e) : scale_ / softcap)),
          cap(static_cast<float>(softcap) * kLog2e) {}
};

struct VectorRange {  // of a panel
    int64_t first, last;
    int64_t count() const { return last - first; }
    bool operator==(const VectorRange& other) const { return first == other.first && last == other.last; }
};

template <class Operand>
class KeyBlock {
  public:
    KeyBlock(int64_t dim, int64_t value_dim, Softmax softmax, Carver& memory)
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
    void store_gradients(const Plan& plan, float scale, T* d_k, int64_t k_stride, T* d_v, int64_t v_stride) const {
        for (int64_t p = 0; p < panels_.count; p++) {
            store_panel(plan, p, d_k_ + p * panel_size(dim_), dim_, scale, d_k, k_stride);
            store_panel(plan, p, d_v_ + p * panel_size(value_dim_), value_dim_, 1.0f, d_v, v_stride);
        }
    }

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
            const Vec lse = splat(rows.lse[row + i]);
            Vec x;
            if constexpr (kPlain) {
                x = exponential(score * splat(softmax_.scale) - lse);
            } else {
                x = score * splat(softmax_.scale);
                if (softmax_.cap != 0) {
                    x = tanh(x);
                    store(d_cap[i] + v * kLanes, splat(1.0f) - x * x);
                    x *= splat(softmax_.cap);
                }
                const IVec keys = lane_index() + static_cast<int32_t>(first_ + key + v * kLanes);
                x = select(sees(spans + i * runs, runs, keys), exponential(x - lse), Vec{});
            }
            store(weights_.p_row(r + i) + lane + v * kLanes, x);
            last[v][i % kPack] = x;
            if (i % kPack == kPack - 1) weights_.put_p(r + i - kPack + 1, lane + v * kLanes, last[v]);
        };
        multiply_rows<kVectors>(rows.q, row, {k_lanes(p) + lane, width}, to_p);
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
        multiply_rows<kVectors>(rows.d_out, row, {v_lanes(p) + lane, width}, to_d_scores);
    }

    // finish(row, vector, product of a row of the tile with the lanes of keys).
    template <int kVectors, class Finish>
    static MMK_INLINE void multiply_rows(const PackedRows<Operand>& rows, int64_t row, Lanes keys, Finish&& finish) {
        const uint32_t* a = rows.along(row);
        const int64_t units = rows.units(), chains = ceil_div(units, kLongestChain);
        const auto zero = [](int, int) { return Vec{}; };
        float before[kTileRows][kTileColumns];
        int64_t first = 0;
        for (int64_t i = 1; i < chains; i++) {
            const int64_t count = units * i / chains - first;
            const auto keep = [&](int r, int v, Vec sum) {
                float* at = before[r] + v * kLanes;
                store(at, i > 1 ? load(at) + sum : sum);
            };
            micro_kernel<Operand, kTileRows, kVectors>(a + first, rows.stride, 1, keys.at + first * keys.stride,
                                                       keys.stride, count, zero, keep);
            first += count;
        }
        const auto total = [&](int r, int v, Vec sum) MMK_INLINE_LAMBDA {
            finish(r, v, chains > 1 ? load(before[r] + v * kLanes) + sum : sum);
        };
        micro_kernel<Operand, kTileRows, kVectors>(a + first, rows.stride, 1, keys.at + first * keys.stride,
                                                   keys.stride, units - first, zero, total);
    }

    static MMK_INLINE Vec exponential(Vec x) { return Operand::kPack == 2 ? exp2_coarse(x) : exp2(x); }

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
    static void add_columns(const PackedRows<Operand>& rows, int64_t row, int64_t dim, Lanes lanes, int64_t vectors,
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
    static void add_columns(const PackedRows<Operand>& rows, int64_t row, int64_t dim, Lanes lanes, int64_t units,
                            float* sums) {
        int64_t d = 0;
        for (; d + kTileRows / 2 < dim; d += kTileRows) {
            add_product<kTileRows, kVectors>({rows.across(row, d), 1, rows.across_stride}, lanes, units,
                                             sums + d * kTileColumns, kTileColumns);
        }
        if (d < dim) {
            add_product<kTileRows / 2, kVectors>({rows.across(row, d), 1, rows.across_stride}, lanes, units,
                                                 sums + d * kTileColumns, kTileColumns);
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
            const int64_t begin = std::max(panels_.first(p) + range.first * kLanes, hull.lo - first_);
            if (begin > last) {
                add_to_queries(first, last, rows, row, r);
                first = begin;
            }
            last = std::min({panels_.first(p) + range.last * kLanes, hull.hi - first_, count_});
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
    static void add_rows(Broadcast weights, Lanes keys, int64_t vectors, int64_t units, float* sums, int64_t stride) {
        switch (vectors) {
            case 1:
                return add_product<kTileRows, 1>(weights, keys, units, sums, stride);
            case 2:
                return add_product<kTileRows, 2>(weights, keys, units, sums, stride);
            default:
                return add_product<kTileRows, kTileVectors>(weights, keys, units, sums, stride);
        }
    }

    // One of a.row and a.unit is 1.
    template <int kRows, int kVectors>
    static MMK_INLINE void add_product(Broadcast a, Lanes b, int64_t units, float* sums, int64_t stride) {
        const auto zero = [](int, int) { return Vec{}; };
        const auto add = [&](int r, int v, Vec sum) {
            float* at = sums + r * stride + v * kLanes;
            store(at, load(at) + sum);
        };
        if (a.unit == 1) {
            micro_kernel<Operand, kRows, kVectors>(a.a, a.row, 1, b.at, b.stride, units, zero, add);
        } else {
            micro_kernel<Operand, kRows, kVectors>(a.a, 1, a.unit, b.at, b.stride, units, zero, add);
        }
    }

    // sums: [dim][kTileColumns] of panel p, to its keys' rows of a gradient.
    template <class T>
    void store_panel(const Plan& plan, int64_t p, const float* sums, int64_t dim, float scale, T* gradient,
                     int64_t stride) const {
        for (int64_t l = 0; l < panels_.width(p); l += kLanes) {
            const int64_t first = panels_.first(p) + l, count = std::min<int64_t>(kLanes, count_ - first);
            for (int64_t d = 0; d < dim; d += kLanes) {
                UVec block[kLanes];
                MMK_UNROLL for (int i = 0; i < kLanes; i++) {
                    block[i] = as_bits(load(sums + (d + i) * kTileColumns + l) * splat(scale));
                }
                transpose(block);
                for (int64_t j = 0; j < count; j++) {
                    const Vec x = plan.seen(first_ + first + j) ? as_float(block[j]) : Vec{};
                    store_up_to(gradient + (first_ + first + j) * stride + d, x, dim - d);
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

}  // namespace mmk::MMK_ISA
