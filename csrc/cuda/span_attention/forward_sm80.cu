// Span attention, forward, for sm_80 and later.
//
//   s_ij = scale q_i k_j, or softcap tanh(scale q_i k_j / softcap);  lse_i = log sum_j exp(s_ij) over the keys i sees
//   out_i = sum_j exp(s_ij - lse_i) v_j;  a query that sees nothing: out = 0, lse = -inf
//
// A block of four warps makes 64 queries of one head, a warp 16 of them, and walks the keys between the first and the
// last that any of them sees. Of heads up to 80 numbers it makes 128: a warp has two tiles of 16, for both of which it
// reads keys and values from shared memory once. Of heads above 256 numbers two warps have the same queries, and half
// of the numbers each: see add_parts; both make all weights. Keys and values take turns in shared memory: the values of
// a step are under way while its scores are computed, the keys of the next while its values are added. The maximum, the
// sum of the weights and the weighted values stay in registers.
//
// Memory moved, in numbers: a block reads its q once and as many k and v as it walks, and writes its out and lse once.
// Keys are read again by every block of 64 queries that sees them, mostly out of the L2 cache.
//
// Isolation. What lies beyond the hull of the block's spans is loaded as zero. Within it, where not every query sees
// every key, masked scores are -inf whatever the key held; values that are NaN or infinite are made zero in shared
// memory and their row is flagged, and the weights of just the queries that see a flagged row become NaN.
#include "cuda/span_attention/device.h"

namespace mmk::cuda {
namespace {

template <int kWidth>
struct Tile {
    static constexpr int kKeys = kWidth <= 128 ? 64 : 32;
    static constexpr int kParts = kWidth <= 256 ? 1 : 2, kColumns = kWidth / kParts;
    static constexpr int kTiles = kWidth <= 80 ? 2 : 1, kWarpRows = 16 * kTiles, kGroups = 4;  // of warps
    static constexpr bool kKeepQueries = kWidth <= 128 && kTiles == 1;  // in registers; others need them for values
    static constexpr bool kKeepSpans = kTiles == 1 || kWidth <= 64;     // there, too, or read where a step is masked
    static constexpr int kRows = kGroups * kWarpRows, kThreads = kGroups * kParts * kWarp;
    static constexpr int kGroupTile = kParts == 1 ? 0 : kParts * kKeys / 8 * kWarp;  // float4s of add_parts
    static constexpr size_t kTileBytes = sizeof(uint16_t) * (kRows + 2 * kKeys) * Row<kWidth>::kPitch;
    static constexpr size_t kSharedBytes = kTileBytes + kGroups * kGroupTile * sizeof(float4);
};

// Two warps with the same rows: what the part of the numbers of a head that is the warp's own gives to the scores
// becomes what all give. `shared` is for these warps alone; between two uses of it a block has to meet at a barrier.
template <int kParts, int kTiles>
MMK_DEVICE void add_parts(float (&x)[kTiles][4], float4* shared, int group, int part, int lane) {
    if constexpr (kParts == 2) {
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
            shared[(part * kTiles + n) * kWarp + lane] = {x[n][0], x[n][1], x[n][2], x[n][3]};
        }
        named_barrier_sync(1 + group, kParts * kWarp);
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
            const float4 its = shared[((1 - part) * kTiles + n) * kWarp + lane];
            x[n][0] += its.x, x[n][1] += its.y, x[n][2] += its.z, x[n][3] += its.w;
        }
    }
}

// Sixteen queries of a warp.
template <class T, int kWidth>
struct Attention {
    static constexpr int kKeys = Tile<kWidth>::kKeys, kColumns = Tile<kWidth>::kColumns;
    float s[kKeys / 8][4];                                               // scores, then weights
    float o[kColumns / 8][4] = {};                                       // sum of weighted values
    float top[2] = {-INFINITY, -INFINITY};                               // largest score so far, in units of log 2
    float total[2] = {};                                                 // this lane's share of the sum of weights
    uint32_t q[Tile<kWidth>::kKeepQueries ? kColumns / 16 : 1][4] = {};  // the queries

    MMK_DEVICE void keep_queries(const T* queries, int lane) {
        if constexpr (Tile<kWidth>::kKeepQueries) {
#pragma unroll
            for (int k = 0; k < kColumns / 16; k++) left_operand<kWidth>(q[k], queries, k * 16, lane);
        }
    }

    // For the products of columns k on, of which the queries are kept, or read.
    MMK_DEVICE const uint32_t* operand(const T* queries, int k, int lane) {
        if constexpr (!Tile<kWidth>::kKeepQueries) left_operand<kWidth>(q[0], queries, k * 16, lane);
        return q[Tile<kWidth>::kKeepQueries ? k : 0];
    }

    // Calls f(s, i, column) of each score: query i of the thread's two.
    template <class F>
    MMK_DEVICE void each(int lane, const F& f) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) f(s[n][e], e / 2, n * 8 + lane % 4 * 2 + e % 2);
        }
    }

    // Scores into weights relative to the largest score so far; what was summed before fades by as much as that rose.
    MMK_DEVICE void weigh(float factor) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float largest = -INFINITY;
#pragma unroll
            for (int n = 0; n < kKeys / 8; n++) largest = fmaxf(largest, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
            largest = fmaxf(top[i], largest * factor);
            const float pivot = largest == -INFINITY ? 0.0f : largest;  // -inf - -inf is NaN
            const float fade = exp2_approx(top[i] - pivot);
            top[i] = largest;
            total[i] *= fade;
#pragma unroll
            for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
                for (int e = 2 * i; e < 2 * i + 2; e++) total[i] += s[n][e] = exp2_approx(s[n][e] * factor - pivot);
            }
#pragma unroll
            for (int n = 0; n < kColumns / 8; n++) {
                o[n][2 * i] *= fade;
                o[n][2 * i + 1] *= fade;
            }
        }
    }

    // What the weights become where values were not finite: see Isolation.
    MMK_DEVICE void make_nan(const int* non_finite, const Spans& spans, int j0, int lane) {
        each(lane, [&](float& weight, int i, int column) {
            if (non_finite[column] != 0 && spans.see(i, j0 + column)) weight = NAN;
        });
    }

    // The warp's rows of `out`, by way of its own rows of shared memory, and of lse if it is not null.
    MMK_DEVICE void store(T* through, const Matrix<T>& out, float* lse, int present, int lane) {
        float factors[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            total[i] += __shfl_xor_sync(kAllLanes, total[i], 1);
            total[i] += __shfl_xor_sync(kAllLanes, total[i], 2);
            const bool empty = total[i] == 0;
            factors[i] = empty ? 0.0f : 1.0f / total[i];
            const int row = lane / 4 + 8 * i;
            if (lse != nullptr && lane % 4 == 0 && row < present)
                lse[row] = empty ? -INFINITY : (top[i] + log2f(total[i])) * kLn2;
        }
        store_rows<kWidth, kColumns>(through, o, factors, out, present, lane);
    }
};

// s = q keys^T over the warp's columns, to which all pointers point.
template <class T, int kWidth>
MMK_DEVICE void score(Attention<T, kWidth> (&tiles)[Tile<kWidth>::kTiles], const T* queries, const T* keys, int lane) {
    constexpr int kPitch = Row<kWidth>::kPitch;
    for (auto& tile : tiles) tile.each(lane, [](float& s, int, int) { s = 0; });
#pragma unroll
    for (int k = 0; k < Tile<kWidth>::kColumns / 16; k++) {
        const uint32_t* a[Tile<kWidth>::kTiles];
#pragma unroll
        for (int i = 0; i < Tile<kWidth>::kTiles; i++) a[i] = tiles[i].operand(queries + i * 16 * kPitch, k, lane);
#pragma unroll
        for (int n = 0; n < Tile<kWidth>::kKeys / 16; n++) {
            uint32_t b[4];
            transposed_operand<kWidth>(b, keys + n * 16 * kPitch, k * 16, lane);
#pragma unroll
            for (int i = 0; i < Tile<kWidth>::kTiles; i++) {
                mma<T>(tiles[i].s[2 * n], a[i], b);
                mma<T>(tiles[i].s[2 * n + 1], a[i], b + 2);
            }
        }
    }
}

// o += s values, the weights rounded to T.
template <class T, int kWidth>
MMK_DEVICE void add(Attention<T, kWidth> (&tiles)[Tile<kWidth>::kTiles], const T* values, int lane) {
#pragma unroll
    for (int k = 0; k < Tile<kWidth>::kKeys / 16; k++) {
        uint32_t a[Tile<kWidth>::kTiles][4];
#pragma unroll
        for (int i = 0; i < Tile<kWidth>::kTiles; i++) left_operand<T>(a[i], tiles[i].s[2 * k], tiles[i].s[2 * k + 1]);
#pragma unroll
        for (int n = 0; n < Tile<kWidth>::kColumns / 16; n++) {
            uint32_t b[4];
            right_operand<kWidth>(b, values + k * 16 * Row<kWidth>::kPitch, n * 16, lane);
#pragma unroll
            for (int i = 0; i < Tile<kWidth>::kTiles; i++) {
                mma<T>(tiles[i].o[2 * n], a[i], b);
                mma<T>(tiles[i].o[2 * n + 1], a[i], b + 2);
            }
        }
    }
}

template <class T, int kWidth>
__global__ __launch_bounds__(Tile<kWidth>::kThreads,
                             Tile<kWidth>::kParts == 1 ? 2
                                                       : 1) void span_attention_forward_kernel(const SpanAttention p) {
    constexpr int kKeys = Tile<kWidth>::kKeys, kPitch = Row<kWidth>::kPitch, kThreads = Tile<kWidth>::kThreads;
    constexpr int kRows = Tile<kWidth>::kRows, kParts = Tile<kWidth>::kParts, kTiles = Tile<kWidth>::kTiles;
    MMK_DYNAMIC_SHARED(shared);
    MMK_SHARED(int, non_finite, 2 * kKeys);  // by turns: one half is cleared while the other is in use
    T *const queries = reinterpret_cast<T*>(shared), *const keys = queries + kRows * kPitch;
    T* const values = keys + kKeys * kPitch;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const int group = warp / kParts, part = warp % kParts, column0 = part * Tile<kWidth>::kColumns;
    float4* const of_parts =
        reinterpret_cast<float4*>(shared + Tile<kWidth>::kTileBytes) + group * Tile<kWidth>::kGroupTile;

    // The last blocks of a causal text are the longest: they begin first.
    const int blocks = (p.queries + kRows - 1) / kRows;
    const int rest = static_cast<int>(blockIdx.x) / blocks, head = rest % p.heads, batch = rest / p.heads;
    const int block = blocks - 1 - static_cast<int>(blockIdx.x) % blocks;
    const int row0 = block * kRows, warp_row0 = row0 + group * 16 * kTiles, key_head = head / (p.heads / p.key_heads);
    const auto k = matrix<T>(p.k, p.head_size, batch, 0, key_head);
    const auto v = matrix<T>(p.v, p.value_size, batch, 0, key_head);
    const Factors factors(p);
    T* const own_queries = queries + group * 16 * kTiles * kPitch + column0;

    Attention<T, kWidth> tiles[kTiles];
    const auto each_tile = [&](const auto& f) {
#pragma unroll
        for (int i = 0; i < kTiles; i++) f(tiles[i], i);
    };
    load_rows<kWidth, kRows, kThreads>(queries, matrix<T>(p.q, p.head_size, batch, row0, head), 0, p.queries - row0);
    cp_async_commit();
    if (thread < kKeys) non_finite[thread] = 0;
    int turn = 0;
    for (int run = 0; run < p.runs; run++) {
        const int64_t slice = first_slice(p, batch) + run;
        const Hull hull = hull_of<kRows>(p, slice, row0);
        if (hull.first >= hull.end) continue;
        Spans spans[kTiles];
        const auto look = [&] {
            each_tile([&](auto&, int i) { spans[i] = Spans(p, slice, warp_row0 + i * 16 + lane / 4); });
        };
        if constexpr (Tile<kWidth>::kKeepSpans) look();
        load_rows<kWidth, kKeys, kThreads>(keys, k, hull.first, hull.end - hull.first);
        cp_async_commit();
        for (int j0 = hull.first; j0 < hull.end; j0 += kKeys, turn++) {
            int *const flags = non_finite + turn % 2 * kKeys, *const next_flags = non_finite + (turn + 1) % 2 * kKeys;
            cp_async_wait<0>();
            __syncthreads();  // the keys are here, and nobody needs the values and flags of the last step
            load_rows<kWidth, kKeys, kThreads>(values, v, j0, hull.end - j0);
            cp_async_commit();
            if (thread < kKeys) next_flags[thread] = 0;
            if (turn == 0)
                each_tile([&](auto& tile, int i) { tile.keep_queries(own_queries + i * 16 * kPitch, lane); });

            score(tiles, own_queries, keys + column0, lane);
            add_parts<kParts>(tiles[0].s, of_parts, group, part, lane);
            const bool masked = j0 < hull.common_first || j0 + kKeys > hull.common_end;
            if (masked && !Tile<kWidth>::kKeepSpans) look();
            each_tile([&](auto& tile, int i) {
                if (!factors.plain) tile.each(lane, [&](float& s, int, int) { s = factors.apply(s); });
                if (masked) mask<kKeys>(tile, spans[i], hull, j0, lane);
                tile.weigh(factors.after);
            });

            cp_async_wait<0>();
            if (masked) make_finite<kWidth, kKeys, kThreads>(values, flags);
            __syncthreads();  // the values are here, and nobody needs the keys
            if (hull.end - j0 > kKeys) load_rows<kWidth, kKeys, kThreads>(keys, k, j0 + kKeys, hull.end - j0 - kKeys);
            cp_async_commit();
            if (masked) each_tile([&](auto& tile, int i) { tile.make_nan(flags, spans[i], j0, lane); });
            add(tiles, values + column0, lane);
        }
    }
    cp_async_wait<0>();
    __syncthreads();  // without any step, queries are still on their way

    each_tile([&](auto& tile, int i) {
        const int its_row0 = warp_row0 + i * 16;
        const auto out = columns(matrix<T>(p.out, p.value_size, batch, its_row0, head), column0);
        float* const lse = p.lse + (static_cast<int64_t>(batch) * p.heads + head) * p.queries + its_row0;
        tile.store(own_queries + i * 16 * kPitch, out, part == 0 ? lse : nullptr, p.queries - its_row0, lane);
    });
}

constexpr const char* kName = "span_attention_forward";

template <class T>
Error run(const SpanAttention& call, cudaStream_t stream) {
    return with_width(call, [&](auto width) -> Error {
        constexpr int kWidth = decltype(width)::value, kRows = Tile<kWidth>::kRows;
        const int64_t blocks = (int64_t{call.queries} + kRows - 1) / kRows * call.heads * call.batch;
        if (blocks > INT_MAX || std::max(call.queries, call.keys) > INT_MAX - kRows) {
            return Error(std::string(kName) + ": more queries or keys than 32 bits number");
        }
        if (blocks == 0) return {};
        const Launch at{kName, static_cast<unsigned>(blocks), Tile<kWidth>::kThreads, Tile<kWidth>::kSharedBytes,
                        stream};
        return launch(at, span_attention_forward_kernel<T, kWidth>, call);
    });
}

}  // namespace

Error span_attention_forward(const SpanAttention& call, cudaStream_t stream) {
    if (Error error = wrong_sizes(kName, call)) return error;
    return call.bfloat16 ? run<BFloat16>(call, stream) : run<Float16>(call, stream);
}

}  // namespace mmk::cuda
