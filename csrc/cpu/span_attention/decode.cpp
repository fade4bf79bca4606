// Attention of few queries against many keys, such as one token a sequence against its cache:
//
//   S_mj = scale <q_m, k_j>,  P_mj = exp(S_mj - max_j S_mj),  O_m = sum_j P_mj v_j / sum_j P_mj
//
// The rows m of a segment (see segments.h) and a key head are its queries times the query heads that share the key
// head. K and V are read once, where they lie, and 4 M (D + Dv) operations a key leave no time to copy or transpose
// them: for few rows this is as fast as memory is. So both products have the head's dimension in the lanes. A score is
// the sum over the lanes of one accumulator, and kLanes of them are summed together; a row of the output is kept in
// accumulators while the keys pass.
//
// The keys of a segment are cut into chunks, whose size depends on the sizes of the tensors alone. A chunk of all heads
// is a task: its scores, their softmax, its output; chunks are merged afterwards in their order. So results are the
// same to the bit for any number of threads. Keys are visited kStep at a time for one head after the other, in the
// order in which they lie in memory, and every line that is read asks for the same line of the next visit: rows of a
// cache lie too far apart for the processor to foresee them.
#include "cpu/span_attention/decode.h"

#include "cpu/product/lane_sums.h"
#include "cpu/product/matmul.h"
#include "cpu/span_attention/head_rows.h"

namespace mmk::MMK_ISA {

namespace {

constexpr int64_t kStep = 64;                 // keys of a visit
constexpr int64_t kChunkBytes = 1 << 20;      // of keys and values in a task,
constexpr int64_t kLeast = 128, kMost = 512;  // and how many keys that may be

// ---- products

// kLanes units from the first n elements at p, which may be any number; zero past them.
template <class Operand, class T>
MMK_INLINE UVec first_units(const T* p, int64_t n) {
    constexpr int64_t kAll = kLanes * Operand::kPack;
    if constexpr (Operand::kPack == 1) {
        return as_bits(n >= kAll ? load(p) : load_first(p, static_cast<int>(n)));
    } else {
        return n >= kAll ? load_bits(reinterpret_cast<const uint32_t*>(p)) : load_first_pairs(p, static_cast<int>(n));
    }
}

// Asks for the line that lies `ahead` bytes after p, wherever that is.
MMK_INLINE void fetch(const void* p, intptr_t ahead) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + ahead), 0, 2);
}

// s[r * s_row + j] = <query r, key j> for kRows queries, whose units are q_row apart, and kLanes / kRows keys, of which
// those past the last of `keys` are that one again. `ahead` bytes after every key lies one that will be wanted next.
template <int kRows, class T>
MMK_INLINE void score_tile(const uint32_t* q, int64_t q_row, const T* k, int64_t k_row, int64_t keys, int64_t dim,
                           int64_t ahead, float* s, int64_t s_row) {
    using Operand = OperandOf<T>;
    constexpr int kKeys = kLanes / kRows, kAtOnce = std::min(kKeys, 8);  // as many as there are registers to point
    constexpr int kWide = kLanes * Operand::kPack;
    Vec sums[kLanes];
    MMK_UNROLL for (int j0 = 0; j0 < kKeys; j0 += kAtOnce) {
        const T* key[kAtOnce];
        MMK_UNROLL for (int j = 0; j < kAtOnce; j++) key[j] = k + std::min<int64_t>(j0 + j, keys - 1) * k_row;
        Vec c[kAtOnce][kRows] = {};
        const auto step = [&](int64_t d, int64_t left) MMK_INLINE_LAMBDA {
            UVec query[kRows];
            MMK_UNROLL for (int r = 0; r < kRows; r++) query[r] = load_bits(q + r * q_row + d / Operand::kPack);
            MMK_UNROLL for (int j = 0; j < kAtOnce; j++) {
                fetch(key[j] + d, ahead);
                const UVec lanes = first_units<Operand>(key[j] + d, left);
                MMK_UNROLL for (int r = 0; r < kRows; r++) c[j][r] = Operand::multiply_add(c[j][r], query[r], lanes);
            }
        };
        int64_t d = 0;
        for (; d + kWide <= dim; d += kWide) step(d, kWide);
        if (d < dim) step(d, dim - d);
        MMK_UNROLL for (int j = 0; j < kAtOnce; j++) {
            MMK_UNROLL for (int r = 0; r < kRows; r++) sums[r * kKeys + j0 + j] = c[j][r];
        }
    }
    float scores[kLanes];
    store(scores, lane_sums(sums));
    MMK_UNROLL for (int r = 0; r < kRows; r++) memcpy(s + r * s_row, scores + r * kKeys, kKeys * sizeof(float));
}

// kWide columns of a value, or with pairs those of two, each beside the other's: in two vectors then, which hold
// alternate groups of four columns until in_order sorts their sums. `second` is null where there is none.
template <class Operand, class T>
MMK_INLINE void value_units(const T* first, [[maybe_unused]] const T* second, int64_t left,
                            UVec (&lanes)[Operand::kPack]) {
    if constexpr (Operand::kPack == 1) {
        lanes[0] = first_units<Operand>(first, left);
    } else {
#if MMK_HAS_BF16
        const UVec a = first_units<Operand>(first, left);
        const UVec b = second == nullptr ? UVec{} : first_units<Operand>(second, left);
        lanes[0] = zip_low(a, b), lanes[1] = zip_high(a, b);
#endif
    }
}
[[maybe_unused]] MMK_INLINE void in_order(Vec (&)[1]) {}
#if MMK_HAS_BF16
[[maybe_unused]] MMK_INLINE void in_order(Vec (&c)[2]) { undo_zip(c[0], c[1]); }
#endif

// o[r][lanes] += sum over the keys of P(r, key) V(key)[lanes], for kRows rows, whose units are p_row apart, and the
// columns of kVectors vectors of units, of which `columns` are there.
template <int kRows, int kVectors, class T>
MMK_INLINE void output_tile(const uint32_t* p, int64_t p_row, const T* v, int64_t v_row, int64_t keys, int64_t columns,
                            int64_t ahead, float* o, int64_t o_row) {
    using Operand = OperandOf<T>;
    constexpr int kPack = Operand::kPack, kWide = kLanes * kPack;
    Vec c[kRows][kVectors][kPack] = {};
    const auto step = [&](int64_t j, bool pair) MMK_INLINE_LAMBDA {
        UVec weight[kRows];
        MMK_UNROLL for (int r = 0; r < kRows; r++) weight[r] = splat_bits(p[r * p_row + j / kPack]);
        MMK_UNROLL for (int x = 0; x < kVectors; x++) {
            const T* at = v + j * v_row + x * kWide;
            UVec lanes[kPack];
            value_units<Operand>(at, pair ? at + v_row : nullptr,
                                 x + 1 < kVectors ? kWide : columns - (kVectors - 1) * kWide, lanes);
            MMK_UNROLL for (int i = 0; i < kPack; i++) fetch(at + i * v_row, ahead);
            MMK_UNROLL for (int r = 0; r < kRows; r++) {
                MMK_UNROLL for (int i = 0; i < kPack; i++) {
                    c[r][x][i] = Operand::multiply_add(c[r][x][i], weight[r], lanes[i]);
                }
            }
        }
    };
    int64_t j = 0;
    for (; j + kPack <= keys; j += kPack) step(j, kPack == 2);
    if (j < keys) step(j, false);
    MMK_UNROLL for (int r = 0; r < kRows; r++) {
        MMK_UNROLL for (int x = 0; x < kVectors; x++) {
            in_order(c[r][x]);
            MMK_UNROLL for (int i = 0; i < kPack; i++) {
                float* at = o + r * o_row + x * kWide + i * kLanes;
                store(at, load(at) + c[r][x][i]);
            }
        }
    }
}

// f(constant, row) for [0, rows) in tiles of four rows, two, one.
template <class Body>
MMK_INLINE void for_row_tiles(int64_t rows, Body&& body) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) body(std::integral_constant<int, 4>(), r);
    if (r + 2 <= rows) body(std::integral_constant<int, 2>(), r), r += 2;
    if (r < rows) body(std::integral_constant<int, 1>(), r);
}

// f(constant, first) for [0, vectors) vectors in tiles as even as can be, which leave kRows rows enough registers.
template <int kRows, int kPack, int kVectors, class Body>
MMK_INLINE void for_column_tile(int vectors, Body&& body) {
    if constexpr (kVectors > 1) {
        if (vectors < kVectors) return for_column_tile<kRows, kPack, kVectors - 1>(vectors, body);
    }
    body(std::integral_constant<int, kVectors>());
}

// ---- softmax

// Rows of scores become weights; `sum` of them, and `max` of what was their exponent, in powers of two.
struct RowSum {
    float max, sum;
};

// What is between a product of q and k and its exponent, in powers of two: after * capped(s). The factor is applied
// where the maximum is taken off, and in two floats, so that large weights, whose exponents are near zero, lose
// nothing.
struct Scale {
    float before, cap;  // cap 0: none
    TwoFloats after;

    explicit Scale(const SpanAttention& call)
        : before(static_cast<float>(call.softcap > 0 ? call.scale / call.softcap : 0)),
          cap(static_cast<float>(call.softcap)),
          after((call.softcap > 0 ? call.softcap : call.scale) * kLog2e) {
        if (after.first == 0) after = TwoFloats(1e-37);  // 0, but the product with `blind` is infinite
    }
    MMK_INLINE Vec capped(Vec s) const { return cap > 0 ? tanh(s * splat(before)) : s; }
    // What stands for a key that is not seen: after * blind is -inf.
    MMK_INLINE Vec blind() const { return splat(after.first > 0 ? -__builtin_inff() : __builtin_inff()); }
    MMK_INLINE Vec power(Vec s, Vec max) const {
        const Vec finite = select(s * s < splat(__builtin_inff()), s, Vec{});
        return (splat(after.first) * s - max) + splat(after.rest) * finite;
    }
};

// The weights of the keys [lo, hi) of `count`, 0 for the others up to a whole vector. Those for pairs are bfloat16, in
// the first half of the row.
template <class Operand>
RowSum softmax(float* row, int64_t count, int64_t lo, int64_t hi, const Scale& scale) {
    const int64_t padded = round_up(count, kLanes);
    Vec max = splat(-__builtin_inff());
    for (int64_t j = 0; j < padded; j += kLanes) {
        Vec s = scale.capped(load(row + j));
        if (j < lo || j + kLanes > hi) {
            const IVec key = lane_index() + static_cast<int32_t>(j);
            s = select((key >= static_cast<int32_t>(lo)) & (key < static_cast<int32_t>(hi)), s, scale.blind());
        }
        store(row + j, s);
        max = mmk::MMK_ISA::max(s * splat(scale.after.first), max);
    }
    const float top = mmk::MMK_ISA::max(max);
    const Vec zero = splat(top == -__builtin_inff() ? 0.0f : top);
    Vec total{};
    for (int64_t j = 0; j < padded; j += kLanes) {
        const Vec weight = exp2(scale.power(load(row + j), zero));
        total += weight;
        if constexpr (Operand::kPack == 1) {
            store(row + j, weight);
        } else {
            store(reinterpret_cast<BFloat16*>(row) + j, weight);
        }
    }
    return {top, sum(total)};
}

// ---- one call

struct Chunk {  // keys [lo, hi) of a segment
    int64_t segment;
    int32_t lo, hi;
};

struct Group {  // a segment of a row of the batch
    Segment segment;
    int64_t batch_row, first_chunk, chunks;
    int64_t first_record;
};

template <class T>
class Decode {
  public:
    Decode(const SpanAttention& call, const std::vector<RowSegment>& segments)
        : call_(call),
          scale_(call),
          heads_(call.k.heads),
          shared_(call.q.heads / call.k.heads),
          q_row_(round_up(call.q.dim, kWide) / kPack),
          record_(round_up(call.v.dim, kWide) + kLanes),
          chunk_keys_(std::clamp(kChunkBytes / key_bytes(), kLeast, kMost) / kStep * kStep) {
        for (const RowSegment& each : segments) add(each.segment, each.batch_row);
    }

    void run() const {
        // A key costs the time of four times as many operations as it has bytes.
        const int threads = useful_threads(4.0 * static_cast<double>(keys_) * static_cast<double>(key_bytes()));
        const int64_t q_size = most_rows_ * q_row_, s_size = most_rows_ * chunk_keys_;
        const int64_t own = q_size + s_size + most_rows_ * record_;
        const Scratch<float> records(records_ * record_), work(threads * own);
        for_each(static_cast<int64_t>(chunks_.size()), threads, [&](int64_t i, int64_t worker) {
            const Group& group = groups_[static_cast<size_t>(chunks_[static_cast<size_t>(i)].segment)];
            float* q = work.get() + worker * own;
            float* s = q + q_size;
            if (group.chunks == 1) {
                attend(group, i, reinterpret_cast<uint32_t*>(q), s, s + s_size);
                for (int64_t h = 0; h < heads_; h++) merge(group, h, s + s_size);
            } else {
                const int64_t record = group.first_record + (i - group.first_chunk) * rows(group) * heads_;
                attend(group, i, reinterpret_cast<uint32_t*>(q), s, records.get() + record * record_);
            }
        });
        if (records_ == 0) return;
        for_each(static_cast<int64_t>(groups_.size()) * heads_, threads, [&](int64_t i, int64_t) {
            const Group& group = groups_[static_cast<size_t>(i / heads_)];
            if (group.chunks > 1) merge(group, i % heads_, records.get() + group.first_record * record_);
        });
    }

  private:
    using Operand = OperandOf<T>;
    static constexpr int kPack = Operand::kPack, kWide = kLanes * kPack;

    int64_t key_bytes() const { return heads_ * (call_.q.dim + call_.v.dim) * int64_t{sizeof(T)}; }
    int64_t rows(const Group& group) const { return (group.segment.last - group.segment.first) * shared_; }

    void add(const Segment& segment, int64_t batch_row) {
        const int64_t keys = segment.hi - segment.lo, chunks = std::max<int64_t>(1, ceil_div(keys, chunk_keys_));
        const Group group{segment, batch_row, static_cast<int64_t>(chunks_.size()), chunks, records_};
        for (int64_t i = 0; i < chunks; i++) {
            const auto lo = static_cast<int32_t>(segment.lo + i * chunk_keys_);
            chunks_.push_back({static_cast<int64_t>(groups_.size()), lo,
                               static_cast<int32_t>(std::min<int64_t>(lo + chunk_keys_, segment.hi))});
        }
        groups_.push_back(group);
        keys_ += keys;
        most_rows_ = std::max(most_rows_, rows(group) * heads_);
        if (chunks > 1) records_ += chunks * rows(group) * heads_;
    }

    static const T* at(const Heads& x, int64_t batch_row, int64_t token, int64_t head) {
        return HeadRows<const T>(x, batch_row, head).row(token);
    }

    // Calls body(first key of kStep, head, bytes from there to where the next visit is) in the order of memory, and the
    // last one with the distance to `next`.
    template <class Body>
    void visit(const Heads& x, int64_t batch_row, const Chunk& chunk, const void* next, Body&& body) const {
        const int64_t steps = ceil_div(chunk.hi - chunk.lo, kStep), count = steps * heads_;
        const bool heads_inside = std::abs(x.head_stride) < std::abs(x.token_stride);
        const auto step = [&](int64_t i) { return heads_inside ? i / heads_ : i % steps; };
        const auto head = [&](int64_t i) { return heads_inside ? i % heads_ : i / steps; };
        const auto place = [&](int64_t i) -> const void* {
            return i == count ? next : at(x, batch_row, chunk.lo + step(i) * kStep, head(i));
        };
        for (int64_t i = 0; i < count; i++) {
            body(step(i) * kStep, head(i),
                 reinterpret_cast<intptr_t>(place(i + 1)) - reinterpret_cast<intptr_t>(place(i)));
        }
    }

    // Row m of key head h of the segment is row h * rows + m of q, s and the records.
    void attend(const Group& group, int64_t index, uint32_t* q, float* s, float* records) const {
        const Chunk& chunk = chunks_[static_cast<size_t>(index)];
        const bool last = index + 1 == static_cast<int64_t>(chunks_.size());
        const Chunk& next = last ? chunk : chunks_[static_cast<size_t>(index + 1)];
        const int64_t next_row = groups_[static_cast<size_t>(next.segment)].batch_row;
        gather(group, q);
        score(group, chunk, q, at(call_.v, group.batch_row, chunk.lo, 0), s);
        weigh(group, chunk, s, records);
        output(group, chunk, s, at(call_.k, next_row, next.lo, 0), records);
    }

    void gather(const Group& group, uint32_t* q) const {
        for (int64_t h = 0; h < heads_; h++) {
            for (int64_t m = 0; m < rows(group); m++, q += q_row_) {
                const T* row =
                    at(call_.q, group.batch_row, group.segment.first + m / shared_, h * shared_ + m % shared_);
                for (int64_t d = 0; d < call_.q.dim; d += kWide) {
                    store_bits(q + d / kPack, first_units<Operand>(row + d, call_.q.dim - d));
                }
            }
        }
    }

    void score(const Group& group, const Chunk& chunk, const uint32_t* q, const T* next, float* s) const {
        const int64_t all = chunk.hi - chunk.lo, k_row = call_.k.token_stride;
        visit(call_.k, group.batch_row, chunk, next, [&](int64_t first, int64_t h, intptr_t ahead) {
            const T* k = at(call_.k, group.batch_row, chunk.lo + first, h);
            const int64_t keys = std::min(kStep, all - first);
            for_row_tiles(rows(group), [&](auto tile, int64_t m) {
                constexpr int kRows = std::min(tile.value, kLanes), kKeys = kLanes / kRows;
                const int64_t row = h * rows(group) + m;
                for (int64_t j = 0; j < keys; j += kKeys) {
                    score_tile<kRows>(q + row * q_row_, q_row_, k + j * k_row, k_row, keys - j, call_.q.dim,
                                      m == 0 ? ahead : 0, s + row * chunk_keys_ + first + j, chunk_keys_);
                }
            });
        });
    }

    void weigh(const Group& group, const Chunk& chunk, float* s, float* records) const {
        const SpanTable spans(call_.spans, group.batch_row, call_.k.tokens);
        for (int64_t m = 0; m < rows(group); m++) {
            const Span span = spans(0, group.segment.first + m / shared_);
            for (int64_t h = 0; h < heads_; h++) {
                const int64_t row = h * rows(group) + m;
                float* record = records + row * record_;
                const RowSum sum =
                    softmax<Operand>(s + row * chunk_keys_, chunk.hi - chunk.lo, std::max(span.lo, chunk.lo) - chunk.lo,
                                     std::min(span.hi, chunk.hi) - chunk.lo, scale_);
                for (int64_t d = 0; d < record_; d += kLanes) store(record + d, Vec{});
                memcpy(record + record_ - kLanes, &sum, sizeof sum);
            }
        }
    }

    void output(const Group& group, const Chunk& chunk, const float* s, const T* next, float* records) const {
        const int64_t all = chunk.hi - chunk.lo, v_row = call_.v.token_stride;
        const int vectors = static_cast<int>(ceil_div(call_.v.dim, kWide));
        visit(call_.v, group.batch_row, chunk, next, [&](int64_t first, int64_t h, intptr_t ahead) {
            const T* v = at(call_.v, group.batch_row, chunk.lo + first, h);
            const int64_t keys = std::min(kStep, all - first);
            for_row_tiles(rows(group), [&](auto tile, int64_t m) {
                constexpr int kRows = tile.value, kMost = std::min(8, kRegisters / 2 / kRows / kPack);
                const int64_t row = h * rows(group) + m;
                const auto* p = reinterpret_cast<const uint32_t*>(s + row * chunk_keys_) + first / kPack;
                const int tiles = (vectors + kMost - 1) / kMost;
                for (int i = 0; i < tiles; i++) {
                    const int x = vectors * i / tiles;
                    for_column_tile<kRows, kPack, kMost>(vectors * (i + 1) / tiles - x, [&](auto width) {
                        output_tile<kRows, width.value>(p, chunk_keys_, v + x * kWide, v_row, keys,
                                                        call_.v.dim - x * kWide, m == 0 ? ahead : 0,
                                                        records + row * record_ + x * kWide, record_);
                    });
                }
            });
        });
    }

    // The rows of one key head: of the records of every chunk, one after the other, to the result.
    void merge(const Group& group, int64_t h, float* records) const {
        for (int64_t m = 0; m < rows(group); m++) {
            const int64_t query = group.segment.first + m / shared_, head = h * shared_ + m % shared_;
            merge_row(records + (h * rows(group) + m) * record_, rows(group) * heads_ * record_, group.chunks,
                      const_cast<T*>(at(call_.out, group.batch_row, query, head)),
                      call_.lse + (group.batch_row * call_.q.heads + head) * call_.q.tokens + query);
        }
    }

    void merge_row(float* records, int64_t next, int64_t count, T* out, float* lse) const {
        float* sums = records + record_ - kLanes;  // RowSum of every chunk; its max becomes its factor
        float top = -__builtin_inff(), total = 0;
        for (int64_t i = 0; i < count; i++) top = std::max(top, sums[i * next]);
        const float zero = top == -__builtin_inff() ? 0 : top;
        for (int64_t i = 0; i < count; i++) {
            sums[i * next] = exp2(splat(sums[i * next] - zero))[0];
            total += sums[i * next] * sums[i * next + 1];
        }
        *lse = static_cast<float>(__builtin_log(total) + kLn2 * zero);  // powers of two until here
        for (int64_t d = 0; d < call_.v.dim; d += kLanes) {
            Vec o{};
            for (int64_t i = 0; i < count; i++) {
                if (sums[i * next + 1] != 0) o += splat(sums[i * next]) * load(records + i * next + d);
            }
            const int64_t left = std::min<int64_t>(kLanes, call_.v.dim - d);
            store_first(out + d, total == 0 ? Vec{} : o / splat(total), static_cast<int>(left));
        }
    }

    const SpanAttention& call_;
    const Scale scale_;
    const int64_t heads_, shared_;  // key heads, and query heads that share one
    const int64_t q_row_, record_;  // units of a row of q, floats of a row's record: output, RowSum
    const int64_t chunk_keys_;      // at most, and between the rows of scores
    std::vector<Group> groups_;
    std::vector<Chunk> chunks_;
    int64_t keys_ = 0, most_rows_ = 0, records_ = 0;
};

}  // namespace

void span_decode(const SpanAttention& call, const std::vector<RowSegment>& segments) {
    with_element_type(call.q.dtype, [&](auto type) { Decode<decltype(type)>(call, segments).run(); });
}

}  // namespace mmk::MMK_ISA
