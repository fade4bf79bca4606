// Span attention, forward, for sm_80 and later.
//
//   s_ij = scale q_i k_j, or softcap tanh(scale q_i k_j / softcap);  lse_i = log sum_j exp(s_ij) over the keys i sees
//   out_i = sum_j exp(s_ij - lse_i) v_j;  a query that sees nothing: out = 0, lse = -inf
//
// A block of four warps makes 64 queries of one head, a warp 16 of them, and walks the keys between the first and the
// last that any of them sees. Keys and values take turns in shared memory: the values of a step are under way while its
// scores are computed, the keys of the next while its values are added. The maximum, the sum of the weights and the
// weighted values stay in registers.
//
// Memory moved, in numbers: a block reads its q once and as many k and v as it walks, and writes its out and lse once.
// Keys are read again by every block of 64 queries that sees them, mostly out of the L2 cache.
//
// Isolation. What lies beyond the hull of the block's spans is loaded as zero. Within it, where not every query sees
// every key, masked scores are -inf whatever the key held; values that are NaN or infinite are made zero in shared
// memory and their row is flagged, and the weights of just the queries that see a flagged row become NaN.
#include <algorithm>
#include <climits>
#include <cmath>

#include "ptx.h"
#include "span_attention.h"

namespace mmk::cuda {
namespace {

constexpr int kRows = 64, kThreads = 128;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Heads of up to kWidth numbers, a multiple of 16; columns beyond a head's width are zero.
template <int kWidth>
struct Tile {
    static constexpr int kKeys = kWidth <= 128 ? 64 : 32;
    static constexpr int kPitch = kWidth + 8;  // eight rows of ldmatrix fall into different banks
    static constexpr int kChunks = kWidth / 8;
    static constexpr bool kKeepQueries = kWidth <= 128;  // in registers; wider heads need them for their values
    static constexpr size_t kSharedBytes = sizeof(uint16_t) * (kRows + 2 * kKeys) * kPitch;
};

// ---- memory

// Some rows of one head, `width` numbers each.
template <class T>
struct Matrix {
    T* data;
    int64_t stride;
    int width;
    bool aligned;  // every eighth number of every row lies at 16 bytes
};

template <class T>
MMK_DEVICE Matrix<T> matrix(const Heads& x, int width, int64_t batch, int64_t row, int64_t head) {
    const bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.batch | x.row | x.head | width) % 8 == 0;
    return {static_cast<T*>(x.data) + batch * x.batch + row * x.row + head * x.head, x.row, width, aligned};
}

// The first `present` of kCount rows, zeros for the others.
template <int kWidth, int kCount, class T>
MMK_DEVICE void load_rows(T* to, const Matrix<T>& from, int64_t row0, int present) {
    constexpr int kChunks = Tile<kWidth>::kChunks;
    const T* const rows = from.data + row0 * from.stride;
    for (int i = static_cast<int>(threadIdx.x); i < kCount * kChunks; i += kThreads) {
        const int row = i / kChunks, column = i % kChunks * 8;
        const bool inside = row < present && column < from.width;
        const T* const numbers = inside ? rows + row * from.stride + column : rows;
        T* const target = to + row * Tile<kWidth>::kPitch + column;
        if (from.aligned) {
            cp_async<16>(target, numbers, inside);
        } else {
            for (int j = 0; j < 8; j++) target[j] = inside && column + j < from.width ? numbers[j] : T(0.0f);
        }
    }
}

// Both halves, or zero for one that is NaN or infinite.
template <class T>
MMK_DEVICE uint32_t finite(uint32_t numbers) {
    constexpr uint32_t kExponent = std::is_same_v<T, BFloat16> ? 0x7F80 : 0x7C00;
    if ((numbers & kExponent) == kExponent) numbers &= 0xFFFF0000;
    if ((numbers & kExponent << 16) == kExponent << 16) numbers &= 0x0000FFFF;
    return numbers;
}

// Makes the thread's own share of a loaded tile finite, and counts in spoilt[row] where it was not.
template <int kWidth, int kCount, class T>
MMK_DEVICE void make_finite(T* tile, int* spoilt) {
    constexpr int kChunks = Tile<kWidth>::kChunks;
    for (int i = static_cast<int>(threadIdx.x); i < kCount * kChunks; i += kThreads) {
        const int row = i / kChunks, column = i % kChunks * 8;
        uint4* const chunk = reinterpret_cast<uint4*>(tile + row * Tile<kWidth>::kPitch + column);
        const uint4 was = *chunk;
        const uint4 is = {finite<T>(was.x), finite<T>(was.y), finite<T>(was.z), finite<T>(was.w)};
        if (is.x == was.x && is.y == was.y && is.z == was.z && is.w == was.w) continue;
        *chunk = is;
        atomicAdd(&spoilt[row], 1);
    }
}

// ---- spans

// Keys that any of a block's queries sees lie in [first, end); those in [common_first, common_end) every one sees.
struct Hull {
    int first, end, common_first, common_end;
};

MMK_DEVICE Hull block_hull(const SpanAttention& p, int64_t slice, int block) {
    const int count = (p.queries + kHullRows - 1) / kHullRows;
    Hull all{p.keys, 0, 0, p.keys};
    for (int i = 0; i < kRows / kHullRows; i++) {
        const int entry = block * (kRows / kHullRows) + i;
        if (entry >= count) break;
        const int32_t* const hull = p.hulls + (slice * count + entry) * 4;
        all.first = min(all.first, max(hull[0], 0));
        all.end = max(all.end, min(hull[1], p.keys));
        all.common_first = max(all.common_first, hull[2]);
        all.common_end = min(all.common_end, hull[3]);
    }
    return all;
}

// The spans of the two queries a thread holds numbers of: row0 and row0 + 8.
struct Spans {
    int lo[2], hi[2];

    MMK_DEVICE Spans(const SpanAttention& p, int64_t slice, int row0) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = row0 + 8 * i;
            const bool inside = row < p.queries;
            lo[i] = inside ? p.lo[slice * p.queries + row] : 0;
            hi[i] = inside ? min(p.hi[slice * p.queries + row], p.keys) : 0;
        }
    }
    MMK_DEVICE bool see(int i, int key) const { return lo[i] <= key && key < hi[i]; }
};

// ---- mathematics. In the registers of lane 4 g + t, element e of tile n is row g + 8 (e / 2), column 8 n + 2 t + e
// % 2.

// Scores are multiplied by `before`, bounded by tanh if there is a cap, and multiplied by `after` > 0, which leaves
// them in units of log 2: the largest of a row can be sought before that.
struct Factors {
    float before, after;
    bool plain, capped;

    MMK_DEVICE explicit Factors(const SpanAttention& p) : plain(p.softcap == 0 && p.scale > 0), capped(p.softcap > 0) {
        before = capped ? p.scale / p.softcap : p.scale;
        after = (capped ? p.softcap : plain ? p.scale : 1.0f) * kLog2E;
    }
    MMK_DEVICE float apply(float score) const {
        const float x = score * before;
        return capped ? 1.0f - 2.0f / (1.0f + exp2_approx(x * (2 * kLog2E))) : x;
    }
};

template <class T, int kWidth>
struct Attention {
    static constexpr int kKeys = Tile<kWidth>::kKeys, kPitch = Tile<kWidth>::kPitch;
    float s[kKeys / 8][4];                                             // scores, then weights
    float o[kWidth / 8][4] = {};                                       // sum of weighted values
    float top[2] = {-INFINITY, -INFINITY};                             // largest score so far, in units of log 2
    float total[2] = {};                                               // this lane's share of the sum of weights
    uint32_t q[Tile<kWidth>::kKeepQueries ? kWidth / 16 : 1][4] = {};  // the queries

    MMK_DEVICE void load_queries(const T* queries, int column, int lane, uint32_t (&to)[4]) {
        ldmatrix_x4(to, queries + lane % 16 * kPitch + column + lane / 16 * 8);
    }

    MMK_DEVICE void keep_queries(const T* queries, int lane) {
        if constexpr (Tile<kWidth>::kKeepQueries) {
#pragma unroll
            for (int k = 0; k < kWidth / 16; k++) load_queries(queries, k * 16, lane, q[k]);
        }
    }

    // s = q keys^T
    MMK_DEVICE void score(const T* queries, const T* keys, int lane) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] = 0;
        }
#pragma unroll
        for (int k = 0; k < kWidth / 16; k++) {
            if constexpr (!Tile<kWidth>::kKeepQueries) load_queries(queries, k * 16, lane, q[0]);
#pragma unroll
            for (int n = 0; n < kKeys / 16; n++) {
                uint32_t b[4];
                ldmatrix_x4(b, keys + (n * 16 + lane / 16 * 8 + lane % 8) * kPitch + k * 16 + lane / 8 % 2 * 8);
                mma<T>(s[2 * n], q[Tile<kWidth>::kKeepQueries ? k : 0], b);
                mma<T>(s[2 * n + 1], q[Tile<kWidth>::kKeepQueries ? k : 0], b + 2);
            }
        }
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
            for (int n = 0; n < kWidth / 8; n++) {
                o[n][2 * i] *= fade;
                o[n][2 * i + 1] *= fade;
            }
        }
    }

    // o += s values, the weights rounded to T
    MMK_DEVICE void add(const T* values, int lane) {
#pragma unroll
        for (int k = 0; k < kKeys / 16; k++) {
            const float *left = s[2 * k], *right = s[2 * k + 1];
            const uint32_t a[4] = {pack2<T>(left[0], left[1]), pack2<T>(left[2], left[3]), pack2<T>(right[0], right[1]),
                                   pack2<T>(right[2], right[3])};
#pragma unroll
            for (int n = 0; n < kWidth / 16; n++) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, values + (k * 16 + lane % 16) * kPitch + n * 16 + lane / 16 * 8);
                mma<T>(o[2 * n], a, b);
                mma<T>(o[2 * n + 1], a, b + 2);
            }
        }
    }

    // What the weights become where values were not finite: see Isolation.
    MMK_DEVICE void spoil(const int* spoilt, const Spans& spans, int j0, int lane) {
        each(lane, [&](float& weight, int i, int column) {
            if (spoilt[column] != 0 && spans.see(i, j0 + column)) weight = NAN;
        });
    }

    // The warp's rows of `out`, by way of its own rows of shared memory, and of lse.
    MMK_DEVICE void store(T* through, const Matrix<T>& out, float* lse, int present, int lane) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            total[i] += __shfl_xor_sync(kAllLanes, total[i], 1);
            total[i] += __shfl_xor_sync(kAllLanes, total[i], 2);
            const bool empty = total[i] == 0;
            const float factor = empty ? 0.0f : 1.0f / total[i];
            const int row = lane / 4 + 8 * i;
#pragma unroll
            for (int n = 0; n < kWidth / 8; n++) {
                const uint32_t both = pack2<T>(o[n][2 * i] * factor, o[n][2 * i + 1] * factor);
                memcpy(through + row * kPitch + n * 8 + lane % 4 * 2, &both, sizeof both);
            }
            if (lane % 4 == 0 && row < present) lse[row] = empty ? -INFINITY : (top[i] + log2f(total[i])) * kLn2;
        }
        __syncwarp();
        for (int i = lane; i < 16 * Tile<kWidth>::kChunks; i += kWarp) {
            const int row = i / Tile<kWidth>::kChunks, column = i % Tile<kWidth>::kChunks * 8;
            if (row >= present || column >= out.width) continue;
            const T* const from = through + row * kPitch + column;
            T* const to = out.data + row * out.stride + column;
            if (out.aligned) {
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            } else {
                for (int j = 0; j < 8 && column + j < out.width; j++) to[j] = from[j];
            }
        }
    }
};

template <class T, int kWidth>
__global__ __launch_bounds__(kThreads) void span_attention_forward_kernel(const SpanAttention p) {
    constexpr int kKeys = Tile<kWidth>::kKeys, kPitch = Tile<kWidth>::kPitch;
    MMK_DYNAMIC_SHARED(shared);
    MMK_SHARED(int, spoilt, 2 * kKeys);  // by turns: one half is cleared while the other is in use
    T *const queries = reinterpret_cast<T*>(shared), *const keys = queries + kRows * kPitch;
    T* const values = keys + kKeys * kPitch;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;

    // The last blocks of a causal text are the longest: they begin first.
    const int blocks = (p.queries + kRows - 1) / kRows;
    const int rest = static_cast<int>(blockIdx.x) / blocks, head = rest % p.heads, batch = rest / p.heads;
    const int block = blocks - 1 - static_cast<int>(blockIdx.x) % blocks;
    const int row0 = block * kRows, warp_row0 = row0 + warp * 16, key_head = head / (p.heads / p.key_heads);
    const auto k = matrix<T>(p.k, p.head_size, batch, 0, key_head);
    const auto v = matrix<T>(p.v, p.value_size, batch, 0, key_head);
    const Factors factors(p);
    T* const own_queries = queries + warp * 16 * kPitch;

    Attention<T, kWidth> attention;
    load_rows<kWidth, kRows>(queries, matrix<T>(p.q, p.head_size, batch, row0, head), 0, p.queries - row0);
    cp_async_commit();
    if (thread < kKeys) spoilt[thread] = 0;
    int turn = 0;
    for (int run = 0; run < p.runs; run++) {
        const int64_t slice = static_cast<int64_t>(p.spans_by_batch ? batch : 0) * p.runs + run;
        const Hull hull = block_hull(p, slice, block);
        if (hull.first >= hull.end) continue;
        const Spans spans(p, slice, warp_row0 + lane / 4);
        load_rows<kWidth, kKeys>(keys, k, hull.first, hull.end - hull.first);
        cp_async_commit();
        for (int j0 = hull.first; j0 < hull.end; j0 += kKeys, turn++) {
            int *const flags = spoilt + turn % 2 * kKeys, *const next_flags = spoilt + (turn + 1) % 2 * kKeys;
            cp_async_wait<0>();
            __syncthreads();  // the keys are here, and nobody needs the values and flags of the last step
            load_rows<kWidth, kKeys>(values, v, j0, hull.end - j0);
            cp_async_commit();
            if (thread < kKeys) next_flags[thread] = 0;
            if (turn == 0) attention.keep_queries(own_queries, lane);

            attention.score(own_queries, keys, lane);
            if (!factors.plain) attention.each(lane, [&](float& s, int, int) { s = factors.apply(s); });
            const bool masked = j0 < hull.common_first || j0 + kKeys > hull.common_end;
            if (masked) {
                attention.each(lane, [&](float& s, int i, int column) {
                    if (!spans.see(i, j0 + column)) s = -INFINITY;
                });
            }
            attention.weigh(factors.after);

            cp_async_wait<0>();
            if (masked) make_finite<kWidth, kKeys>(values, flags);
            __syncthreads();  // the values are here, and nobody needs the keys
            if (hull.end - j0 > kKeys) load_rows<kWidth, kKeys>(keys, k, j0 + kKeys, hull.end - j0 - kKeys);
            cp_async_commit();
            if (masked) attention.spoil(flags, spans, j0, lane);
            attention.add(values, lane);
        }
    }
    cp_async_wait<0>();
    __syncthreads();  // without any step, queries are still on their way

    const auto out = matrix<T>(p.out, p.value_size, batch, warp_row0, head);
    float* const lse = p.lse + (static_cast<int64_t>(batch) * p.heads + head) * p.queries + warp_row0;
    attention.store(own_queries, out, lse, p.queries - warp_row0, lane);
}

template <class T, int kWidth>
Error run(const SpanAttention& call, unsigned blocks, cudaStream_t stream) {
    const Launch at{"span_attention_forward", blocks, kThreads, Tile<kWidth>::kSharedBytes, stream};
    return launch(at, span_attention_forward_kernel<T, kWidth>, call);
}

template <class T>
Error run(const SpanAttention& call, unsigned blocks, cudaStream_t stream) {
    const int width = std::max(call.head_size, call.value_size);
    if (width <= 32) return run<T, 32>(call, blocks, stream);
    if (width <= 64) return run<T, 64>(call, blocks, stream);
    if (width <= 80) return run<T, 80>(call, blocks, stream);  // 72 and 80 are too common to be padded to 128
    if (width <= 96) return run<T, 96>(call, blocks, stream);
    if (width <= 128) return run<T, 128>(call, blocks, stream);
    if (width <= 192) return run<T, 192>(call, blocks, stream);
    return run<T, 256>(call, blocks, stream);
}

}  // namespace

Error span_attention_forward(const SpanAttention& call, cudaStream_t stream) {
    const auto is_head = [](int size) { return size >= 1 && size <= kLargestHead; };
    if (!is_head(call.head_size) || !is_head(call.value_size)) {
        return Error("span_attention_forward: it serves heads of 1 to " + std::to_string(kLargestHead) + " numbers");
    }
    if (call.key_heads < 1 || call.heads % call.key_heads != 0) {
        return Error("span_attention_forward: the heads of q have to be a multiple of those of k and v");
    }
    const int64_t blocks = (int64_t{call.queries} + kRows - 1) / kRows * call.heads * call.batch;
    if (blocks > INT_MAX || call.queries > INT_MAX - kRows || call.keys > INT_MAX - kRows) {
        return Error("span_attention_forward: more queries or keys than 32 bits number");
    }
    if (blocks == 0) return {};
    const auto count = static_cast<unsigned>(blocks);
    return call.bfloat16 ? run<BFloat16>(call, count, stream) : run<Float16>(call, count, stream);
}

}  // namespace mmk::cuda
