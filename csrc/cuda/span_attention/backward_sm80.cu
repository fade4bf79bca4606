// Span attention, backward, for sm_80 and later. With s and lse of the forward, by mma:
//
//   p_ij = exp(s_ij - lse_i);  ds_ij = p_ij (d_out_i v_j - delta_i) [times 1 - (s_ij / softcap)^2]
//   d_q_i = scale sum_j ds_ij k_j;  d_k_j = scale sum_i ds_ij q_i;  d_v_j = sum_i p_ij d_out_i
//
// Three launches: span_attention_prepare makes delta and finds the queries that see a block of keys; one kernel keeps
// 64 queries and walks the keys that they see, for d_q; another keeps 64 keys of one head and walks the queries that
// see them, of all heads that share these keys, for d_k and d_v. Every sum has one owner and one order: no atomics, the
// same bits in every run. The price is that s and d_out v are computed twice, seven products instead of five.
//
// A warp owns sixteen of the rows kept. In the second kernel it computes the transposes, k q and v d_out, so that
// results of the first products are operands of the second ones in the registers they are in. Wide heads have not the
// registers for both sums: d_k and d_v are a launch each. Of heads above 256 numbers a block keeps 32 rows, and four
// warps have the same rows, and a quarter of the numbers each. A warp makes the sums of its own columns, and of the
// first products what these give to each score; of a quarter of the scores it adds what all four give, makes p and ds,
// and gives them to the others.
//
// The tiles of a step are copied while those of the last are multiplied; one barrier of the block a step.
//
// Memory moved, in numbers: what is kept and the gradients once; what is walked once a block that walks it, mostly out
// of the L2 cache. What limits it is shared memory: an ldmatrix feeds two products, which take as long as it does on
// sm_80.
//
// Isolation, as in the forward. What lies beyond the hull of the block's spans is loaded as zero, or not at all. In a
// step where not every query sees every key, p and ds are made zero for pairs that do not see each other whatever was
// computed; the rows that are walked are made finite in shared memory and flagged, and p and ds of just the pairs that
// see a flagged row become NaN.
#include "cuda/span_attention/device.h"

namespace mmk::cuda {
namespace {

constexpr int kFlags = 3;  // sets of flags: one in use, one being raised for the next step, one being cleared

// A block of either kernel.
template <int kWidth>
struct Block {
    static constexpr int kParts = kWidth <= 256 ? 1 : 4, kColumns = kWidth / kParts;  // a warp's
    static constexpr int kRows = kParts == 1 ? 64 : 32;                               // kept, sixteen a warp
    static constexpr int kThreads = kRows / 16 * kParts * kWarp;
    static constexpr int kStep = kWidth <= 80 ? 64 : kWidth <= 128 ? 32 : 16;  // rows walked at a time
    static constexpr bool kOneBuffer = kWidth > 128 && kWidth <= 512;  // for d_out or k until in registers, then q or v
    static constexpr int kRowsHeld = (kOneBuffer ? 1 : 2) * kRows + 4 * kStep;
    static constexpr size_t kTileBytes = sizeof(uint16_t) * kRowsHeld * Row<kWidth>::kPitch;
    static constexpr size_t kGroupBytes = kParts == 1 ? 0 : kParts * 16 * kStep * 2 * sizeof(float);  // see Warp
    static constexpr size_t kSharedBytes = kTileBytes + kRows / 16 * kGroupBytes;
};

// Walks through keys, for d_q. d_out is in registers.
template <int kWidth>
struct QueryTile : Block<kWidth> {
    static constexpr bool kKeepQueries = kWidth <= 128 || kWidth > 256;  // in registers, too
};

// Walks through queries, for d_k, d_v or both.
template <int kWidth>
struct KeyTile : Block<kWidth> {
    static constexpr bool kBoth = kWidth <= 128 || kWidth > 256;
    static constexpr bool kKeepKeys = kWidth <= 80 || Block<kWidth>::kOneBuffer;  // in registers
};

// What a warp is of its block: of the 16 rows of its group it has the columns from column0 on; and of the scores of a
// step, with which all warps of a group begin and end, each thread has kOwn to itself.
template <int kWidth>
struct Warp {
    static constexpr int kParts = Block<kWidth>::kParts, kTiles = Block<kWidth>::kStep / 8, kOwn = 4 * kTiles / kParts;
    static_assert(kParts == 1 || kOwn == 2);
    int lane, group, part, column0;
    unsigned char* shared;  // the group's: of kParts pairs of scores what kParts warps give to each

    MMK_DEVICE Warp(int thread, unsigned char* shared)
        : lane(thread % kWarp), group(thread / kWarp / kParts), part(thread / kWarp % kParts) {
        column0 = part * Block<kWidth>::kColumns;
        this->shared = shared + Block<kWidth>::kTileBytes + group * Block<kWidth>::kGroupBytes;
    }

    // Calls f(x, i, column) of each of the thread's own scores, by number, which is in the row i of its two. A tile of
    // results has two pairs of neighbours.
    template <class F>
    MMK_DEVICE void each(const F& f) const {
#pragma unroll
        for (int x = 0; x < kOwn; x++) {
            const int pair = part * kOwn / 2 + x / 2;
            f(x, pair % 2, pair / 2 * 8 + lane % 4 * 2 + x % 2);
        }
    }

    // The thread's own of both scores, from what the warp's columns give to all.
    MMK_DEVICE void collect(float (&s)[kOwn], float (&ds)[kOwn], const float (&s_part)[kTiles][4],
                            const float (&ds_part)[kTiles][4]) const {
        if constexpr (kParts == 1) {
            each([&](int x, int, int) { s[x] = s_part[x / 4][x % 4], ds[x] = ds_part[x / 4][x % 4]; });
        } else {
#pragma unroll
            for (int pair = 0; pair < kParts; pair++) {
                const float* const its_s = &s_part[pair / 2][pair % 2 * 2];
                const float* const its_ds = &ds_part[pair / 2][pair % 2 * 2];
                sums(pair)[part * kWarp + lane] = {its_s[0], its_s[1], its_ds[0], its_ds[1]};
            }
            meet();
            float4 sum = sums(part)[lane];
#pragma unroll
            for (int other = 1; other < kParts; other++) {
                const float4 its = sums(part)[other * kWarp + lane];
                sum = {sum.x + its.x, sum.y + its.y, sum.z + its.z, sum.w + its.w};
            }
            s[0] = sum.x, s[1] = sum.y, ds[0] = sum.z, ds[1] = sum.w;
        }
    }

    // All of some, rounded to T, as left operands.
    template <class T, int kCount>
    MMK_DEVICE void distribute(uint32_t (&to)[kCount][kTiles / 2][4], const float (*own)[kOwn]) const {
        if constexpr (kParts == 1) {
#pragma unroll
            for (int i = 0; i < kCount * 2 * kTiles; i++) {
                const int which = i / (2 * kTiles), pair = i % (2 * kTiles);
                to[which][pair / 4][pair % 4] = pack2<T>(own[which][2 * pair], own[which][2 * pair + 1]);
            }
        } else {
            __syncwarp();  // other lanes may still read the sums
#pragma unroll
            for (int i = 0; i < kCount; i++) packed(part)[i * kWarp + lane] = pack2<T>(own[i][0], own[i][1]);
            meet();
#pragma unroll
            for (int i = 0; i < kCount * kParts; i++) {
                to[i / kParts][0][i % kParts] = packed(i % kParts)[i / kParts * kWarp + lane];
            }
        }
    }

  private:
    MMK_DEVICE float4* sums(int pair) const { return reinterpret_cast<float4*>(shared) + pair * kParts * kWarp; }
    MMK_DEVICE uint32_t* packed(int pair) const { return reinterpret_cast<uint32_t*>(sums(pair)); }
    MMK_DEVICE void meet() const { named_barrier_sync(1 + group, kParts * kWarp); }
};

// A warp's columns of sixteen rows as the left operand of every product with them: kept in registers, or read when they
// are needed.
template <class T, int kWidth, bool kKept>
struct Rows {
    static constexpr int kColumns = Block<kWidth>::kColumns;
    const T* rows;
    uint32_t numbers[kKept ? kColumns / 16 : 1][4];

    MMK_DEVICE void keep(int lane) {
        if constexpr (kKept) {
#pragma unroll
            for (int k = 0; k < kColumns / 16; k++) left_operand<kWidth>(numbers[k], rows, k * 16, lane);
        }
    }
    MMK_DEVICE const uint32_t* operand(int k, int lane) {
        if constexpr (!kKept) left_operand<kWidth>(numbers[0], rows, k * 16, lane);
        return numbers[kKept ? k : 0];
    }
};

// x (16, kStep) = left right^T over the warp's columns
template <int kWidth, int kStep, class T, bool kKept>
MMK_DEVICE void multiply(float (&x)[kStep / 8][4], Rows<T, kWidth, kKept>& left, const T* right, int lane) {
#pragma unroll
    for (int n = 0; n < kStep / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) x[n][e] = 0;
    }
#pragma unroll
    for (int k = 0; k < Block<kWidth>::kColumns / 16; k++) {
        const uint32_t* const a = left.operand(k, lane);
#pragma unroll
        for (int n = 0; n < kStep / 16; n++) {
            uint32_t b[4];
            transposed_operand<kWidth>(b, right + n * 16 * Row<kWidth>::kPitch, k * 16, lane);
            mma<T>(x[2 * n], a, b);
            mma<T>(x[2 * n + 1], a, b + 2);
        }
    }
}

// sum += x (16, 16 kSteps) rows for the warp's columns
template <class T, int kWidth, int kSteps>
MMK_DEVICE void add_product(float (&sum)[Block<kWidth>::kColumns / 8][4], const uint32_t (&x)[kSteps][4], const T* rows,
                            int lane) {
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
#pragma unroll
        for (int n = 0; n < Block<kWidth>::kColumns / 16; n++) {
            uint32_t b[4];
            right_operand<kWidth>(b, rows + k * 16 * Row<kWidth>::kPitch, n * 16, lane);
            mma<T>(sum[2 * n], x[k], b);
            mma<T>(sum[2 * n + 1], x[k], b + 2);
        }
    }
}

// ---- d_q

// ds of the thread's own scores of queries, in the place of d_out v.
template <int kWidth, int kOwn>
MMK_DEVICE void query_weights(float (&s)[kOwn], float (&ds)[kOwn], const Factors& factors, const RowTerms* rows,
                              const Warp<kWidth>& warp) {
    const RowTerms first = rows[warp.lane / 4], second = rows[warp.lane / 4 + 8];
    if (!factors.plain) warp.each([&](int x, int, int) { s[x] = factors.apply(s[x]); });
    warp.each([&](int x, int i, int) {
        const RowTerms terms = i == 0 ? first : second;
        ds[x] = exp2_approx(s[x] * factors.after - terms.lse) * (ds[x] - terms.delta);
    });
    if (factors.capped) warp.each([&](int x, int, int) { ds[x] *= 1.0f - s[x] * s[x]; });
}

// Of narrow heads ptxas would rather hold three blocks than every register.
template <class T, int kWidth>
__global__ __launch_bounds__(Block<kWidth>::kThreads, kWidth <= 32 ? 2 : 1) void span_attention_query_gradient_kernel(
    const SpanAttentionBackward call) {
    using Tile = QueryTile<kWidth>;
    constexpr int kRows = Tile::kRows, kThreads = Tile::kThreads, kStep = Tile::kStep, kPitch = Row<kWidth>::kPitch,
                  kStage = 2 * kStep * kPitch;
    MMK_DYNAMIC_SHARED(shared);
    MMK_SHARED(int, non_finite, kFlags* kStep);
    MMK_SHARED(RowTerms, row_terms, kRows);
    T *const queries = reinterpret_cast<T*>(shared), *const d_outs = queries + (Tile::kOneBuffer ? 0 : kRows * kPitch);
    T* const stages = d_outs + kRows * kPitch;  // two of them: keys, then values
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
    const Warp<kWidth> warp(thread, shared);

    // The last blocks of a causal text are the longest: they begin first.
    const SpanAttention& p = call.forward;
    const int blocks = (p.queries + kRows - 1) / kRows;
    const int rest = static_cast<int>(blockIdx.x) / blocks, head = rest % p.heads, batch = rest / p.heads;
    const int row0 = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * kRows, warp_row0 = row0 + warp.group * 16;
    const int key_head = head / (p.heads / p.key_heads);
    const Factors factors(p);

    const int own = warp.group * 16 * kPitch + warp.column0;
    Rows<T, kWidth, Tile::kKeepQueries> q{queries + own, {}};
    Rows<T, kWidth, true> d_out{d_outs + own, {}};
    load_rows<kWidth, kRows, kThreads>(d_outs, matrix<T>(call.d_out, p.value_size, batch, row0, head), 0,
                                       p.queries - row0);
    cp_async_commit();
    if constexpr (Tile::kOneBuffer) {
        cp_async_wait<0>();
        __syncthreads();  // d_out is here
        d_out.keep(lane);
        __syncthreads();  // and in registers
    }
    load_rows<kWidth, kRows, kThreads>(queries, matrix<T>(p.q, p.head_size, batch, row0, head), 0, p.queries - row0);
    if (thread < kRows) {
        const int64_t line = (static_cast<int64_t>(batch) * p.heads + head) * p.queries + row0;
        const bool inside = thread < p.queries - row0;
        cp_async<8>(&row_terms[thread], workspace_of(call).terms + line + (inside ? thread : 0), inside);
    }
    cp_async_commit();
    for (int i = thread; i < kFlags * kStep; i += kThreads) non_finite[i] = 0;
    __syncthreads();  // the flags are here, q is under way

    float d_q[Tile::kColumns / 8][4] = {};
    int turn = 0;
    const auto load = [&](int j0, int end) {
        T* const keys = stages + turn % 2 * kStage;
        const int its_head = kWidth > 192 ? opaque(key_head) : key_head;  // the widest heads have no register to spare
        const auto k = matrix<T>(p.k, p.head_size, batch, j0, its_head);
        const auto v = matrix<T>(p.v, p.value_size, batch, j0, its_head);
        load_rows<kWidth, kStep, kThreads>(keys, k, 0, end - j0);
        load_rows<kWidth, kStep, kThreads>(keys + kStep * kPitch, v, 0, end - j0);
        cp_async_commit();
    };
    for (int run = 0; run < p.runs; run++) {
        const int64_t slice = first_slice(p, batch) + run;
        const Hull hull = hull_of<kRows>(p, slice, row0);
        if (hull.first >= hull.end) continue;
        load(hull.first, hull.end);
        for (int j0 = hull.first; j0 < hull.end; j0 += kStep) {
            T *const keys = stages + turn % 2 * kStage, *const values = keys + kStep * kPitch;
            int* const flags = non_finite + turn % kFlags * kStep;
            const bool masked = j0 < hull.common_first || j0 + kStep > hull.common_end;
            cp_async_wait<0>();
            if (masked) make_finite<kWidth, kStep, kThreads>(keys, flags);
            __syncthreads();  // the tiles of this step are here, and nobody needs those of the last
            if (turn == 0) {
                if constexpr (!Tile::kOneBuffer) d_out.keep(lane);
                q.keep(lane);
            }
            turn++;
            if (hull.end - j0 > kStep) load(j0 + kStep, hull.end);
            if (thread < kStep) non_finite[(turn + 1) % kFlags * kStep + thread] = 0;

            float s_part[kStep / 8][4], ds_part[kStep / 8][4], own[2][Warp<kWidth>::kOwn];
            auto &s = own[0], &ds = own[1];
            multiply<kWidth, kStep>(s_part, q, keys + warp.column0, lane);
            multiply<kWidth, kStep>(ds_part, d_out, values + warp.column0, lane);
            warp.collect(s, ds, s_part, ds_part);
            query_weights(s, ds, factors, row_terms + warp.group * 16, warp);
            if (masked) {
                const Spans spans(p, slice, warp_row0 + lane / 4);  // read when needed: registers are dear
                warp.each([&](int x, int i, int column) {
                    if (flags[column] != 0) ds[x] = NAN;
                    if (!spans.see(i, j0 + column)) ds[x] = 0;
                });
            }
            uint32_t weights[1][kStep / 16][4];
            warp.template distribute<T>(weights, &ds);
            add_product<T, kWidth>(d_q, weights[0], keys + warp.column0, lane);
        }
    }

    cp_async_wait<0>();
    __syncthreads();  // without any step, queries are still on their way
    const float scales[2] = {p.scale, p.scale};
    const auto to = columns(matrix<T>(call.d_q, p.head_size, batch, warp_row0, head), warp.column0);
    store_rows<kWidth, Tile::kColumns>(queries + own, d_q, scales, to, p.queries - warp_row0, lane);
}

// ---- d_k and d_v

// The steps of a block of kRows keys: kStep queries of one head after another, of those that see any of the keys, in
// every run and every head that shares the keys.
template <int kRows, int kStep>
struct Walk {
    const SpanAttention& p;
    const KeyBlock* entry;  // of the block, in the first run
    int64_t slice;
    int key0, first_head, run, head, first, end, row0;
    bool masked;  // whether some query of the step does not see some key of the block

    MMK_DEVICE Walk(const SpanAttention& p, const KeyBlock* table, int batch, int key0, int key_head)
        : p(p), slice(first_slice(p, batch) - 1), key0(key0), run(-1), end(0), row0(0), masked(false) {
        entry = table + first_slice(p, batch) * key_blocks() + key0 / kTableKeys;
        first_head = key_head * (p.heads / p.key_heads);
        head = first_head + p.heads / p.key_heads - 1;  // the next of which is that of the next run
        first = 0;
    }

    MMK_DEVICE int key_blocks() const { return (p.keys + kTableKeys - 1) / kTableKeys; }

    MMK_DEVICE bool next_run() {
        while (++run < p.runs) {
            slice++;
            const KeyBlock queries = entry[static_cast<int64_t>(run) * key_blocks()];
            first = queries.first * kHullRows;
            end = min(queries.end * kHullRows, p.queries);
            if (first < end) return true;
        }
        return false;
    }

    // Goes to the next step, if there is one.
    MMK_DEVICE bool next() {
        constexpr int kGroups = kStep < kHullRows ? kHullRows : kStep;
        const int key_end = min(key0 + kRows, p.keys);
        for (;;) {
            row0 += kStep;
            if (row0 >= end) {
                if (++head == first_head + p.heads / p.key_heads) {
                    head = first_head;
                    if (!next_run()) return false;
                }
                row0 = first;
            }
            const Hull hull = hull_of<kGroups>(p, slice, row0 / kHullRows * kHullRows);
            masked = hull.common_first > key0 || hull.common_end < key_end;
            if (hull.first < key_end && hull.end > key0) return true;
        }
    }
};

// What a step knows of its queries, besides q and d_out.
template <int kStep>
struct StepRows {
    float4 terms[kStep / 2];  // lse, delta, lse, delta: RowTerms of two queries
    int lo[kStep], hi[kStep];
};

// p and ds of the thread's own scores of keys, in the places of q k and d_out v.
template <bool kCapped, int kWidth, int kOwn, int kStep>
MMK_DEVICE void key_weights(float (&s)[kOwn], float (&ds)[kOwn], const Factors& factors, const StepRows<kStep>& rows,
                            const Warp<kWidth>& warp) {
    if (!factors.plain) warp.each([&](int x, int, int) { s[x] = factors.apply(s[x]); });
    warp.each([&](int x, int, int column) {
        const float4 terms = rows.terms[(column - x % 2) >> 1];
        const float score = s[x];
        s[x] = exp2_approx(score * factors.after - (x % 2 == 0 ? terms.x : terms.z));
        ds[x] = s[x] * (ds[x] - (x % 2 == 0 ? terms.y : terms.w));
        if (kCapped) ds[x] *= 1.0f - score * score;
    });
}

template <class T, int kWidth, bool kWantKeys, bool kWantValues>
__global__ __launch_bounds__(Block<kWidth>::kThreads, kWidth <= 32 ? 2 : 1) void span_attention_key_gradient_kernel(
    const SpanAttentionBackward call) {
    using Tile = KeyTile<kWidth>;
    constexpr int kRows = Tile::kRows, kThreads = Tile::kThreads, kStep = Tile::kStep, kPitch = Row<kWidth>::kPitch;
    constexpr int kStage = 2 * kStep * kPitch;
    static_assert(kTableKeys % kRows == 0);
    MMK_DYNAMIC_SHARED(shared);
    MMK_SHARED(int, non_finite, kFlags* kStep);
    MMK_SHARED(StepRows<kStep>, step_rows, 2);
    T *const keys = reinterpret_cast<T*>(shared), *const values = keys + (Tile::kOneBuffer ? 0 : kRows * kPitch);
    T* const stages = values + kRows * kPitch;  // two of them: q, then d_out
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
    const Warp<kWidth> warp(thread, shared);

    // The first keys of a causal text are seen by most: their blocks begin first.
    const SpanAttention& p = call.forward;
    const int blocks = (p.keys + kRows - 1) / kRows;
    const int rest = static_cast<int>(blockIdx.x) / blocks, key_head = rest % p.key_heads, batch = rest / p.key_heads;
    const int key0 = static_cast<int>(blockIdx.x) % blocks * kRows, warp_key0 = key0 + warp.group * 16;
    const Workspace workspace = workspace_of(call);
    const Factors factors(p);

    const int own = warp.group * 16 * kPitch + warp.column0;
    Rows<T, kWidth, Tile::kKeepKeys> k{keys + own, {}};
    Rows<T, kWidth, false> v{values + own, {}};
    const auto load_values = [&] {
        load_rows<kWidth, kRows, kThreads>(values, matrix<T>(p.v, p.value_size, batch, key0, key_head), 0,
                                           p.keys - key0);
    };
    load_rows<kWidth, kRows, kThreads>(keys, matrix<T>(p.k, p.head_size, batch, key0, key_head), 0, p.keys - key0);
    if constexpr (kWantKeys && !Tile::kOneBuffer) load_values();
    cp_async_commit();

    int turn = 0;
    Walk<kRows, kStep> walk(p, workspace.table, batch, key0, key_head);
    const auto load = [&] {
        T* const queries = stages + turn % 2 * kStage;
        const int present = p.queries - walk.row0, its_batch = kWidth > 192 ? opaque(batch) : batch;
        const auto q = matrix<T>(p.q, p.head_size, its_batch, walk.row0, walk.head);
        const auto d_out = matrix<T>(call.d_out, p.value_size, its_batch, walk.row0, walk.head);
        load_rows<kWidth, kStep, kThreads>(queries, q, 0, present);
        load_rows<kWidth, kStep, kThreads>(queries + kStep * kPitch, d_out, 0, present);
        if (thread < kStep) {
            StepRows<kStep>& rows = step_rows[turn % 2];
            const bool inside = thread < present;
            const int64_t row = inside ? walk.row0 + thread : 0;
            const int64_t line = (static_cast<int64_t>(its_batch) * p.heads + walk.head) * p.queries + row;
            cp_async<8>(reinterpret_cast<RowTerms*>(rows.terms) + thread, workspace.terms + line, inside);
            cp_async<4>(&rows.lo[thread], p.lo + walk.slice * p.queries + row, inside);
            cp_async<4>(&rows.hi[thread], p.hi + walk.slice * p.queries + row, inside);
        }
    };
    bool more = walk.next();
    if (more) load();
    cp_async_commit();
    for (int i = thread; i < kFlags * kStep; i += kThreads) non_finite[i] = 0;
    cp_async_wait<1>();
    __syncthreads();  // k and the flags are here
    k.keep(lane);
    if constexpr (kWantKeys && Tile::kOneBuffer) {
        __syncthreads();  // and k is in registers
        load_values();
        cp_async_commit();
    }

    float d_k[kWantKeys ? Tile::kColumns / 8 : 1][4] = {}, d_v[kWantValues ? Tile::kColumns / 8 : 1][4] = {};
    while (more) {
        T *const queries = stages + turn % 2 * kStage, *const d_outs = queries + kStep * kPitch;
        int* const flags = non_finite + turn % kFlags * kStep;
        const StepRows<kStep>& rows = step_rows[turn % 2];
        const bool masked = walk.masked;
        more = walk.next();  // reads hulls, while copies are under way
        cp_async_wait<0>();
        if (masked) {
            make_finite<kWidth, kStep, kThreads>(queries, flags);
            make_finite<kWidth, kStep, kThreads>(d_outs, flags);
        }
        __syncthreads();  // the tiles of this step are here, and nobody needs those of the last
        turn++;
        if (more) load();
        cp_async_commit();
        if (thread < kStep) non_finite[(turn + 1) % kFlags * kStep + thread] = 0;

        float s_part[kStep / 8][4], ds_part[kStep / 8][4] = {}, own[2][Warp<kWidth>::kOwn];
        auto &s = own[0], &ds = own[1];
        multiply<kWidth, kStep>(s_part, k, queries + warp.column0, lane);
        if constexpr (kWantKeys) multiply<kWidth, kStep>(ds_part, v, d_outs + warp.column0, lane);
        warp.collect(s, ds, s_part, ds_part);
        if (factors.capped) {
            key_weights<true>(s, ds, factors, rows, warp);
        } else {
            key_weights<false>(s, ds, factors, rows, warp);
        }
        if (masked) {
            warp.each([&](int x, int i, int column) {
                const int key = warp_key0 + lane / 4 + 8 * i;
                if (flags[column] != 0) s[x] = ds[x] = NAN;
                if (key < rows.lo[column] || key >= rows.hi[column]) s[x] = ds[x] = 0;
            });
        }
        uint32_t weights[2][kStep / 16][4];
        warp.template distribute<T>(weights, own);
        if constexpr (kWantValues) add_product<T, kWidth>(d_v, weights[0], d_outs + warp.column0, lane);
        if constexpr (kWantKeys) add_product<T, kWidth>(d_k, weights[1], queries + warp.column0, lane);
    }

    cp_async_wait<0>();
    __syncthreads();  // without any step, values may still be on their way
    const int present = p.keys - warp_key0;
    if constexpr (kWantKeys) {
        const float scales[2] = {p.scale, p.scale};
        const auto to = columns(matrix<T>(call.d_k, p.head_size, batch, warp_key0, key_head), warp.column0);
        store_rows<kWidth, Tile::kColumns>(keys + own, d_k, scales, to, present, lane);
    }
    if constexpr (kWantValues) {
        const float ones[2] = {1, 1};
        const auto to = columns(matrix<T>(call.d_v, p.value_size, batch, warp_key0, key_head), warp.column0);
        store_rows<kWidth, Tile::kColumns>(values + own, d_v, ones, to, present, lane);
    }
}

template <class T, int kWidth, bool kWantKeys, bool kWantValues>
Error run_keys(const SpanAttentionBackward& call, unsigned blocks, cudaStream_t stream) {
    const Launch at{"span_attention_key_gradient", blocks, Block<kWidth>::kThreads, Block<kWidth>::kSharedBytes,
                    stream};
    return launch(at, span_attention_key_gradient_kernel<T, kWidth, kWantKeys, kWantValues>, call);
}

template <class T>
Error run(const SpanAttentionBackward& call, cudaStream_t stream) {
    const SpanAttention& p = call.forward;
    return with_width(p, [&](auto width) -> Error {
        constexpr int kWidth = decltype(width)::value, kRows = Block<kWidth>::kRows;
        const auto blocks = [&](int rows, int heads) { return (int64_t{rows} + kRows - 1) / kRows * heads * p.batch; };
        if (std::max(blocks(p.queries, p.heads), blocks(p.keys, p.key_heads)) > INT_MAX ||
            std::max(p.queries, p.keys) > INT_MAX - 2 * kRows) {
            return Error("span_attention_backward: more queries or keys than 32 bits number");
        }
        if (Error error = span_attention_prepare(call, stream)) return error;
        const auto query_blocks = static_cast<unsigned>(blocks(p.queries, p.heads));
        const auto key_blocks = static_cast<unsigned>(blocks(p.keys, p.key_heads));
        if (query_blocks > 0) {
            const Launch at{"span_attention_query_gradient", query_blocks, Block<kWidth>::kThreads,
                            Block<kWidth>::kSharedBytes, stream};
            if (Error error = launch(at, span_attention_query_gradient_kernel<T, kWidth>, call)) return error;
        }
        if (key_blocks == 0) return {};
        if constexpr (KeyTile<kWidth>::kBoth) {
            return run_keys<T, kWidth, true, true>(call, key_blocks, stream);
        } else {
            if (Error error = run_keys<T, kWidth, true, false>(call, key_blocks, stream)) return error;
            return run_keys<T, kWidth, false, true>(call, key_blocks, stream);
        }
    });
}

}  // namespace

Error span_attention_backward(const SpanAttentionBackward& call, cudaStream_t stream) {
    if (Error error = wrong_sizes("span_attention_backward", call.forward)) return error;
    return call.forward.bfloat16 ? run<BFloat16>(call, stream) : run<Float16>(call, stream);
}

}  // namespace mmk::cuda
