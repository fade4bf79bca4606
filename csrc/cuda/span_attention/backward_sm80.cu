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
// registers for both sums: d_k and d_v are a launch each. The tiles of a step are copied while those of the last are
// multiplied; one barrier a step.
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

constexpr int kRows = 64, kThreads = 128;  // rows kept by a block, sixteen a warp
constexpr int kFlags = 3;  // sets of flags: one in use, one being raised for the next step, one being cleared

// Walks through keys, for d_q.
template <int kWidth>
struct QueryTile {
    static constexpr int kStep = kWidth <= 80 ? 64 : kWidth <= 128 ? 32 : 16;
    static constexpr bool kKeepQueries = kWidth <= 128;  // in registers, as d_out is
    static constexpr bool kOneBuffer = kWidth > 128;     // for d_out, until it is in registers, then for q
    static constexpr int kRowsHeld = (kOneBuffer ? 1 : 2) * kRows + 4 * kStep;
    static constexpr size_t kSharedBytes = sizeof(uint16_t) * kRowsHeld * Row<kWidth>::kPitch;
};

// Walks through queries, for d_k, d_v or both.
template <int kWidth>
struct KeyTile {
    static constexpr int kStep = kWidth <= 80 ? 64 : kWidth <= 128 ? 32 : 16;
    static constexpr bool kBoth = kWidth <= 128;
    static constexpr bool kKeepKeys = kWidth <= 80 || kWidth > 128;  // in registers
    static constexpr bool kOneBuffer = kWidth > 128;                 // for k, until it is in registers, then for v
    static constexpr int kRowsHeld = (kOneBuffer ? 1 : 2) * kRows + 4 * kStep;
    static constexpr size_t kSharedBytes = sizeof(uint16_t) * kRowsHeld * Row<kWidth>::kPitch;
};

// Sixteen rows as the left operand of every product with them: kept in registers, or read when they are needed.
template <class T, int kWidth, bool kKept>
struct Rows {
    const T* rows;
    uint32_t numbers[kKept ? kWidth / 16 : 1][4];

    MMK_DEVICE void keep(int lane) {
        if constexpr (kKept) {
#pragma unroll
            for (int k = 0; k < kWidth / 16; k++) left_operand<kWidth>(numbers[k], rows, k * 16, lane);
        }
    }
    MMK_DEVICE const uint32_t* operand(int k, int lane) {
        if constexpr (!kKept) left_operand<kWidth>(numbers[0], rows, k * 16, lane);
        return numbers[kKept ? k : 0];
    }
};

// x (16, kStep) = left right^T
template <int kWidth, int kStep, class T, bool kKept>
MMK_DEVICE void multiply(float (&x)[kStep / 8][4], Rows<T, kWidth, kKept>& left, const T* right, int lane) {
#pragma unroll
    for (int n = 0; n < kStep / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) x[n][e] = 0;
    }
#pragma unroll
    for (int k = 0; k < kWidth / 16; k++) {
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

// sum (16, kWidth) += x (16, kStep) rows, x rounded to T
template <int kWidth, int kStep, class T>
MMK_DEVICE void add_product(float (&sum)[kWidth / 8][4], const float (&x)[kStep / 8][4], const T* rows, int lane) {
#pragma unroll
    for (int k = 0; k < kStep / 16; k++) {
        uint32_t a[4];
        left_operand<T>(a, x[2 * k], x[2 * k + 1]);
#pragma unroll
        for (int n = 0; n < kWidth / 16; n++) {
            uint32_t b[4];
            right_operand<kWidth>(b, rows + k * 16 * Row<kWidth>::kPitch, n * 16, lane);
            mma<T>(sum[2 * n], a, b);
            mma<T>(sum[2 * n + 1], a, b + 2);
        }
    }
}

// Calls f(n, e, i, column) of element e of tile n, which is in the row i of the thread's two.
template <int kStep, class F>
MMK_DEVICE void each(int lane, const F& f) {
#pragma unroll
    for (int n = 0; n < kStep / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) f(n, e, e / 2, n * 8 + lane % 4 * 2 + e % 2);
    }
}

// ---- d_q

// ds of the warp's sixteen queries, in the place of d_out v.
template <int kStep>
MMK_DEVICE void query_weights(float (&s)[kStep / 8][4], float (&ds)[kStep / 8][4], const Factors& factors,
                              const RowTerms* rows, int lane) {
    const RowTerms terms[2] = {rows[lane / 4], rows[lane / 4 + 8]};
    if (!factors.plain) each<kStep>(lane, [&](int n, int e, int, int) { s[n][e] = factors.apply(s[n][e]); });
    each<kStep>(lane, [&](int n, int e, int i, int) {
        ds[n][e] = exp2_approx(s[n][e] * factors.after - terms[i].lse) * (ds[n][e] - terms[i].delta);
    });
    if (factors.capped) each<kStep>(lane, [&](int n, int e, int, int) { ds[n][e] *= 1.0f - s[n][e] * s[n][e]; });
}

// Of narrow heads ptxas would rather hold three blocks than every register.
template <class T, int kWidth>
__global__ __launch_bounds__(kThreads, kWidth <= 32 ? 2 : 1) void span_attention_query_gradient_kernel(
    const SpanAttentionBackward call) {
    using Tile = QueryTile<kWidth>;
    constexpr int kStep = Tile::kStep, kPitch = Row<kWidth>::kPitch, kStage = 2 * kStep * kPitch;
    MMK_DYNAMIC_SHARED(shared);
    MMK_SHARED(int, non_finite, kFlags* kStep);
    MMK_SHARED(RowTerms, row_terms, kRows);
    T *const queries = reinterpret_cast<T*>(shared), *const d_outs = queries + (Tile::kOneBuffer ? 0 : kRows * kPitch);
    T* const stages = d_outs + kRows * kPitch;  // two of them: keys, then values
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;

    // The last blocks of a causal text are the longest: they begin first.
    const SpanAttention& p = call.forward;
    const int blocks = (p.queries + kRows - 1) / kRows;
    const int rest = static_cast<int>(blockIdx.x) / blocks, head = rest % p.heads, batch = rest / p.heads;
    const int row0 = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * kRows, warp_row0 = row0 + warp * 16;
    const int key_head = head / (p.heads / p.key_heads);
    const Factors factors(p);

    Rows<T, kWidth, Tile::kKeepQueries> q{queries + warp * 16 * kPitch, {}};
    Rows<T, kWidth, true> d_out{d_outs + warp * 16 * kPitch, {}};
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

    float d_q[kWidth / 8][4] = {};
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

            float s[kStep / 8][4], ds[kStep / 8][4];
            multiply<kWidth, kStep>(s, q, keys, lane);
            multiply<kWidth, kStep>(ds, d_out, values, lane);
            query_weights<kStep>(s, ds, factors, row_terms + warp * 16, lane);
            if (masked) {
                const Spans spans(p, slice, warp_row0 + lane / 4);  // read when needed: registers are dear
                each<kStep>(lane, [&](int n, int e, int i, int column) {
                    if (flags[column] != 0) ds[n][e] = NAN;
                    if (!spans.see(i, j0 + column)) ds[n][e] = 0;
                });
            }
            add_product<kWidth, kStep>(d_q, ds, keys, lane);
        }
    }

    cp_async_wait<0>();
    __syncthreads();  // without any step, queries are still on their way
    const float scales[2] = {p.scale, p.scale};
    store_rows<kWidth>(queries + warp * 16 * kPitch, d_q, scales,
                       matrix<T>(call.d_q, p.head_size, batch, warp_row0, head), p.queries - warp_row0, lane);
}

// ---- d_k and d_v

// The steps of a block of keys: kStep queries of one head after another, of those that see any of the keys, in every
// run and every head that shares the keys.
template <int kStep>
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

// p and ds of the warp's sixteen keys, in the places of q k and d_out v.
template <int kStep, bool kCapped>
MMK_DEVICE void key_weights(float (&s)[kStep / 8][4], float (&ds)[kStep / 8][4], const Factors& factors,
                            const StepRows<kStep>& rows, int lane) {
    if (!factors.plain) each<kStep>(lane, [&](int n, int e, int, int) { s[n][e] = factors.apply(s[n][e]); });
#pragma unroll
    for (int n = 0; n < kStep / 8; n++) {
        const float4 terms = rows.terms[n * 4 + lane % 4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float x = s[n][e];
            s[n][e] = exp2_approx(x * factors.after - (e % 2 == 0 ? terms.x : terms.z));
            ds[n][e] = s[n][e] * (ds[n][e] - (e % 2 == 0 ? terms.y : terms.w));
            if (kCapped) ds[n][e] *= 1.0f - x * x;
        }
    }
}

template <class T, int kWidth, bool kWantKeys, bool kWantValues>
__global__ __launch_bounds__(kThreads, kWidth <= 32 ? 2 : 1) void span_attention_key_gradient_kernel(
    const SpanAttentionBackward call) {
    using Tile = KeyTile<kWidth>;
    constexpr int kStep = Tile::kStep, kPitch = Row<kWidth>::kPitch, kStage = 2 * kStep * kPitch;
    static_assert(kRows == kTableKeys);
    MMK_DYNAMIC_SHARED(shared);
    MMK_SHARED(int, non_finite, kFlags* kStep);
    MMK_SHARED(StepRows<kStep>, step_rows, 2);
    T *const keys = reinterpret_cast<T*>(shared), *const values = keys + (Tile::kOneBuffer ? 0 : kRows * kPitch);
    T* const stages = values + kRows * kPitch;  // two of them: q, then d_out
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;

    // The first keys of a causal text are seen by most: their blocks begin first.
    const SpanAttention& p = call.forward;
    const int blocks = (p.keys + kRows - 1) / kRows;
    const int rest = static_cast<int>(blockIdx.x) / blocks, key_head = rest % p.key_heads, batch = rest / p.key_heads;
    const int key0 = static_cast<int>(blockIdx.x) % blocks * kRows, warp_key0 = key0 + warp * 16;
    const Workspace workspace = workspace_of(call);
    const Factors factors(p);

    Rows<T, kWidth, Tile::kKeepKeys> k{keys + warp * 16 * kPitch, {}};
    Rows<T, kWidth, false> v{values + warp * 16 * kPitch, {}};
    const auto load_values = [&] {
        load_rows<kWidth, kRows, kThreads>(values, matrix<T>(p.v, p.value_size, batch, key0, key_head), 0,
                                           p.keys - key0);
    };
    load_rows<kWidth, kRows, kThreads>(keys, matrix<T>(p.k, p.head_size, batch, key0, key_head), 0, p.keys - key0);
    if constexpr (kWantKeys && !Tile::kOneBuffer) load_values();
    cp_async_commit();

    int turn = 0;
    Walk<kStep> walk(p, workspace.table, batch, key0, key_head);
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

    float d_k[kWantKeys ? kWidth / 8 : 1][4] = {}, d_v[kWantValues ? kWidth / 8 : 1][4] = {};
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

        float s[kStep / 8][4], ds[kStep / 8][4] = {};
        multiply<kWidth, kStep>(s, k, queries, lane);
        if constexpr (kWantKeys) multiply<kWidth, kStep>(ds, v, d_outs, lane);
        if (factors.capped) {
            key_weights<kStep, true>(s, ds, factors, rows, lane);
        } else {
            key_weights<kStep, false>(s, ds, factors, rows, lane);
        }
        if (masked) {
            each<kStep>(lane, [&](int n, int e, int i, int column) {
                const int key = warp_key0 + lane / 4 + 8 * i;
                if (flags[column] != 0) s[n][e] = ds[n][e] = NAN;
                if (key < rows.lo[column] || key >= rows.hi[column]) s[n][e] = ds[n][e] = 0;
            });
        }
        if constexpr (kWantValues) add_product<kWidth, kStep>(d_v, s, d_outs, lane);
        if constexpr (kWantKeys) add_product<kWidth, kStep>(d_k, ds, queries, lane);
    }

    cp_async_wait<0>();
    __syncthreads();  // without any step, values may still be on their way
    const int present = p.keys - warp_key0;
    if constexpr (kWantKeys) {
        const float scales[2] = {p.scale, p.scale};
        store_rows<kWidth>(keys + warp * 16 * kPitch, d_k, scales,
                           matrix<T>(call.d_k, p.head_size, batch, warp_key0, key_head), present, lane);
    }
    if constexpr (kWantValues) {
        const float ones[2] = {1, 1};
        store_rows<kWidth>(values + warp * 16 * kPitch, d_v, ones,
                           matrix<T>(call.d_v, p.value_size, batch, warp_key0, key_head), present, lane);
    }
}

template <class T, int kWidth, bool kWantKeys, bool kWantValues>
Error run_keys(const SpanAttentionBackward& call, unsigned blocks, cudaStream_t stream) {
    const Launch at{"span_attention_key_gradient", blocks, kThreads, KeyTile<kWidth>::kSharedBytes, stream};
    return launch(at, span_attention_key_gradient_kernel<T, kWidth, kWantKeys, kWantValues>, call);
}

template <class T>
Error run(const SpanAttentionBackward& call, unsigned query_blocks, unsigned key_blocks, cudaStream_t stream) {
    return with_width(call.forward, [&](auto width) -> Error {
        constexpr int kWidth = decltype(width)::value;
        if (query_blocks > 0) {
            const Launch at{"span_attention_query_gradient", query_blocks, kThreads, QueryTile<kWidth>::kSharedBytes,
                            stream};
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
    const SpanAttention& p = call.forward;
    if (Error error = wrong_sizes("span_attention_backward", p)) return error;
    const auto blocks = [&](int rows, int heads) { return (int64_t{rows} + kRows - 1) / kRows * heads * p.batch; };
    const int64_t query_blocks = blocks(p.queries, p.heads), key_blocks = blocks(p.keys, p.key_heads);
    if (std::max(query_blocks, key_blocks) > INT_MAX || std::max(p.queries, p.keys) > INT_MAX - 2 * kRows) {
        return Error("span_attention_backward: more queries or keys than 32 bits number");
    }
    if (Error error = span_attention_prepare(call, stream)) return error;
    const auto queries = static_cast<unsigned>(query_blocks), keys = static_cast<unsigned>(key_blocks);
    return p.bfloat16 ? run<BFloat16>(call, queries, keys, stream) : run<Float16>(call, queries, keys, stream);
}

}  // namespace mmk::cuda
