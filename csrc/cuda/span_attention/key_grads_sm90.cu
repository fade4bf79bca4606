// d_k and d_v of span attention on Hopper: see backward_sm90.cu. A block owns 128 keys of a head and
// walks the queries that see them, 64 at a time, of every head of the group:
//
//   s = k q^T and dp = v d_out^T;  p = exp(s - lse) while the second is under way;  d_v += p d_out;
//   ds = p (dp - delta) while that is;  d_k += ds q
//
// Where there are no more blocks than multiprocessors, two share the keys: they are a cluster, take every other step,
// and the first adds the sums of the second to its own, out of that one's shared memory. So the first keys of a causal
// text, which all its queries see, no longer take twice as long as the mean.
//
// Of its registers, a thread that computes has 32 for s, 32 for dp, 16 for p rounded and a head's width for both sums:
// 208 for heads of 128. Heads of 64 leave room for the block's own k and v, so that a step reads them once less from
// shared memory, which would limit them else.
#include "cuda/span_attention/backward_sm90.h"

namespace mmk::cuda {
namespace {

using namespace sm90;

constexpr int kQueries = 64;       // in a step
constexpr int kWorthSharing = 16;  // steps, of all queries: the sums that are handed over are 1 KiB times the width

template <int kWidth>
struct KeyShared {
    static constexpr int kStages = 3;
    Tile<kWidth, kBlockRows> k, v;
    struct {
        Tile<kWidth, kQueries> q, d_out;
        float lse[kQueries], delta[kQueries];
        int lo[kQueries], hi[kQueries];
    } stages[kStages];
    Ring<kStages> ring;
};

// Calls f of every step that is the block's own.
template <class F>
MMK_DEVICE void walk_queries(const Call& call, const Place& block, const F& f) {
    const int own = cluster_rank();
    int step_number = 0;
    const SpanAttention& p = call.forward;
    const KeyBlock* const table = workspace_of(call).table;
    const int group = p.heads / p.key_heads, table_size = (p.keys + kTableKeys - 1) / kTableKeys;
    const int half = min(block.row + kGroupRows, p.keys), end = min(block.row + kBlockRows, p.keys);
    for (int run = 0; run < p.runs; run++) {
        const int64_t slice = first_slice(p, block.batch) + run;
        int first_row = p.queries, end_row = 0;
        for (int i = block.row / kTableKeys; i * kTableKeys < end; i++) {
            const KeyBlock seen_by = table[slice * table_size + i];
            first_row = min(first_row, seen_by.first * kHullRows);
            end_row = max(end_row, min(seen_by.end * kHullRows, p.queries));
        }
        for (int head = block.head * group; head < (block.head + 1) * group; head++) {
            for (int row = first_row; row < end_row; row += kQueries) {
                const Hull hull = hull_of<kQueries>(p, slice, row);
                const Step step{run, {row, head, block.batch}, {how(hull, block.row, half), how(hull, half, end)}};
                if (step.concerns_anyone() && step_number++ % call.sharers == own) f(step);
            }
        }
    }
}

template <int kWidth>
MMK_DEVICE void copy_queries(KeyShared<kWidth>& shared, const Maps& maps, const Call& call, const Place& block) {
    auto& ring = shared.ring;
    mbarrier_arrive_expect(&ring.own, sizeof(shared.k) + sizeof(shared.v));
    shared.k.load(maps.k, block, &ring.own, kBoxRows);
    shared.v.load(maps.v, block, &ring.own, kBoxRows);
    Turn<KeyShared<kWidth>::kStages> turn;
    walk_queries(call, block, [&](const Step& step) {
        auto& stage = shared.stages[turn.stage];
        uint64_t* const full = &ring.full[turn.stage];
        ring.post(turn, step);
        mbarrier_arrive_expect(full, sizeof(stage.q) + sizeof(stage.d_out));
        stage.q.load(maps.q, step.rows, full, kBoxRows);
        stage.d_out.load(maps.d_out, step.rows, full, kBoxRows);
        turn.advance();
    });
    ring.post(turn, {kNoRun, block, {kNothing, kNothing}});
}

// What is known of a step's queries: each warp of the helpers sees to every third row.
template <class Stage>
MMK_DEVICE void load_terms(Stage& stage, const Call& call, const Place& block, const Step& step, int helper) {
    const SpanAttention& p = call.forward;
    const RowTerms* const terms =
        workspace_of(call).terms + (static_cast<int64_t>(block.batch) * p.heads + step.rows.head) * p.queries;
    const int64_t spans = (first_slice(p, block.batch) + step.run) * p.queries;
    const int i = helper % kWarp * kHelperWarps + helper / kWarp, row = step.rows.row + i;
    if (i >= kQueries) return;
    const bool exists = row < p.queries;
    const RowTerms own = exists ? terms[row] : RowTerms{0, 0};
    stage.lse[i] = own.lse;
    stage.delta[i] = own.delta;
    stage.lo[i] = exists ? p.lo[spans + row] : 0;
    stage.hi[i] = exists ? p.hi[spans + row] : 0;
}

// Lanes 0 to 15 of a warp look at a row of q, the others at the same of d_out.
template <class T, class Stage>
MMK_DEVICE void make_rows_finite(Stage& stage, int helper) {
    using Rows = decltype(stage.q);
    constexpr int kChunks = Rows::kColumns / 8;  // of a row of a slab
    const int lane = helper % kWarp, slab = lane % 16 / kChunks * Rows::kSlab, chunk = lane % kChunks * 16;
    unsigned char* const chunks = (lane < 16 ? stage.q.bytes : stage.d_out.bytes) + slab + chunk;
#pragma unroll 1
    for (int row = helper / kWarp; row < kQueries; row += kHelperWarps) {
        const bool non_finite = slab < Rows::kBytes && make_finite<T>(chunks + row * Rows::kPitch);
        if (__any_sync(kAllLanes, non_finite) && lane == 0) stage.lse[row] = NAN;
    }
}

template <class T, int kWidth>
MMK_DEVICE void help_with_queries(KeyShared<kWidth>& shared, const Call& call, const Place& block, int helper) {
    shared.ring.help([&](auto turn, const Step& step) {
        auto& stage = shared.stages[turn.stage];
        load_terms(stage, call, block, step, helper);
        if (!step.is_masked()) return;
        shared.ring.wait_for_tiles(turn);
        __syncwarp();
        make_rows_finite<T>(stage, helper);
        async_proxy_fence();
    });
}

// ---- of a step of queries, in the registers of a thread: its two keys are `key` and key + 8

// Calls f(index of the score, its query, its key) for pairs of queries and two keys.
template <class F>
MMK_DEVICE void each_pair(int key, int lane, const F& f) {
#pragma unroll
    for (int i = 0; i < kQueries / 2; i += 2) f(i, i / 4 * 8 + lane % 4 * 2, key + i / 2 % 2 * 8);
}

template <class Stage>
struct Sees {  // does a pair of queries see a key?
    bool first, second;
    MMK_DEVICE Sees(const Stage& stage, int query, int key) {
        const int2 lo = *reinterpret_cast<const int2*>(stage.lo + query);
        const int2 hi = *reinterpret_cast<const int2*>(stage.hi + query);
        first = (lo.x <= key) & (key < hi.x);
        second = (lo.y <= key) & (key < hi.y);
    }
};

// Scores into weights, and these rounded for the product with d_out. Where nothing is seen they are zero.
template <class T, class Stage>
MMK_DEVICE void weigh(float (&s)[kQueries / 2], uint32_t (&left)[kQueries / 16][4], const Scores& scores,
                      const Stage& stage, bool masked, int key, int lane) {
    each_pair(key, lane, [&](int i, int query, int) {
        const float2 lse = *reinterpret_cast<const float2*>(stage.lse + query);
        scores.weigh<false>(s[i], lse.x);
        scores.weigh<false>(s[i + 1], lse.y);
    });
    if (masked) {
        each_pair(key, lane, [&](int i, int query, int at) {
            const Sees<Stage> sees(stage, query, at);
            s[i] = sees.first ? s[i] : 0;
            s[i + 1] = sees.second ? s[i + 1] : 0;
        });
    }
    each_pair(key, lane, [&](int i, int, int) { left[i / 8][i / 2 % 4] = pack2<T>(s[i], s[i + 1]); });
}

// The same with a cap, whose slope the weights that stay are multiplied with.
template <class T, class Stage>
MMK_DEVICE void weigh_capped(float (&s)[kQueries / 2], uint32_t (&left)[kQueries / 16][4], const Scores& scores,
                             const Stage& stage, int key, int lane) {
    each_pair(key, lane, [&](int i, int query, int at) {
        const float2 lse = *reinterpret_cast<const float2*>(stage.lse + query);
        const Sees<Stage> sees(stage, query, at);
        const float first = scores.weigh<true>(s[i], lse.x), second = scores.weigh<true>(s[i + 1], lse.y);
        s[i] = sees.first ? s[i] : 0;
        s[i + 1] = sees.second ? s[i + 1] : 0;
        left[i / 8][i / 2 % 4] = pack2<T>(sees.first ? first : 0, sees.second ? second : 0);
    });
}

// ds, rounded for the product with q. Masked, what has no weight stays zero, whatever it is multiplied with.
template <class T, bool kIsMasked, class Stage>
MMK_DEVICE void differentiate(uint32_t (&left)[kQueries / 16][4], const float (&s)[kQueries / 2],
                              const float (&dp)[kQueries / 2], const Stage& stage, int lane) {
    each_pair(0, lane, [&](int i, int query, int) {
        const float2 delta = *reinterpret_cast<const float2*>(stage.delta + query);
        const float first = s[i] * (dp[i] - delta.x), second = s[i + 1] * (dp[i + 1] - delta.y);
        left[i / 8][i / 2 % 4] = pack2<T>(kIsMasked && s[i] == 0 ? 0 : first, kIsMasked && s[i + 1] == 0 ? 0 : second);
    });
}

// What a cluster's blocks have summed up, in the registers of the first; the others have nothing left to do.
template <int kWidth>
MMK_DEVICE bool add_sharers(float (&dk)[kWidth / 2], float (&dv)[kWidth / 2], KeyShared<kWidth>& shared, int group,
                            int thread) {
    static_assert(kGroups * kWarpgroup * kWidth * sizeof(float) <= offsetof(KeyShared<kWidth>, ring));
    constexpr int kStride = kGroups * kWarpgroup, kCount = kWidth / 8;
    float4* const sums = reinterpret_cast<float4*>(&shared) + group * kWarpgroup + thread;
    const bool first = cluster_rank() == 0;
    cluster_sync();  // no step needs its tiles any more
#pragma unroll
    for (int i = 0; i < kCount && !first; i++) {
        sums[i * kStride] = {dk[4 * i], dk[4 * i + 1], dk[4 * i + 2], dk[4 * i + 3]};
        sums[(kCount + i) * kStride] = {dv[4 * i], dv[4 * i + 1], dv[4 * i + 2], dv[4 * i + 3]};
    }
    cluster_sync();  // the sums are there
#pragma unroll
    for (int i = 0; i < kCount && first; i++) {
        const float4 k = load_from(1, sums + i * kStride), v = load_from(1, sums + (kCount + i) * kStride);
        dk[4 * i] += k.x, dk[4 * i + 1] += k.y, dk[4 * i + 2] += k.z, dk[4 * i + 3] += k.w;
        dv[4 * i] += v.x, dv[4 * i + 1] += v.y, dv[4 * i + 2] += v.z, dv[4 * i + 3] += v.w;
    }
    cluster_sync();  // and read
    return first;
}

template <class T, int kWidth>
MMK_DEVICE void compute_key_grads(KeyShared<kWidth>& shared, const Maps& maps, const Call& call, const Place& block,
                                  int group) {
    const SpanAttention& p = call.forward;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, lane = thread % kWarp;
    const int key = block.row + group * kGroupRows + thread / kWarp * 16 + lane / 4;
    const Scores& scores = call.scores;
    float dk[kWidth / 2] = {}, dv[kWidth / 2] = {};
    mbarrier_wait(&shared.ring.own, 0);
    constexpr bool kHeld = kWidth <= 64;
    uint32_t k_left[kWidth / 16][4], v_left[kWidth / 16][4];
    if constexpr (kHeld) {
        hold(k_left, shared.k, key - block.row, lane);
        hold(v_left, shared.v, key - block.row, lane);
    }
    const Place rows = shared.ring.compute(group, [&](auto turn, const Step& step) {
        const bool masked = step.how[group] == kMasked;
        auto& stage = shared.stages[turn.stage];
        float s[kQueries / 2], dp[kQueries / 2];
        uint32_t p_left[kQueries / 16][4], ds_left[kQueries / 16][4];
        wgmma_fence();
        if constexpr (kHeld) {
            multiply<T>(s, k_left, stage.q);
            multiply<T>(dp, v_left, stage.d_out);
        } else {
            multiply<T>(s, shared.k, group * kGroupRows, stage.q);
            multiply<T>(dp, shared.v, group * kGroupRows, stage.d_out);
        }
        wgmma_wait<1>(s);
        if (scores.capped) {
            weigh_capped<T>(s, p_left, scores, stage, key, lane);
        } else {
            weigh<T>(s, p_left, scores, stage, masked, key, lane);
        }
        wgmma_fence();
        add_product<T>(dv, p_left, stage.d_out);
        wgmma_wait<1>(dp);
        masked ? differentiate<T, true>(ds_left, s, dp, stage, lane)
               : differentiate<T, false>(ds_left, s, dp, stage, lane);
        wgmma_fence();
        add_product<T>(dk, ds_left, stage.q);
        wgmma_wait<0>(dk, dv);
    });
    if (call.sharers > 1 && !add_sharers<kWidth>(dk, dv, shared, group, thread)) return;
    store<T>(dk, p.scale, shared.k, group, maps.d_k, rows);
    store<T>(dv, 1.0f, shared.v, group, maps.d_v, rows);
}

template <class T, int kWidth>
__global__ __launch_bounds__(kThreads, 1) void key_grads_kernel(const __grid_constant__ Maps maps,
                                                                const __grid_constant__ Call call) {
#if MMK_SM90A
    MMK_DYNAMIC_SHARED(raw);
    auto& shared = *reinterpret_cast<KeyShared<kWidth>*>(raw);
    const SpanAttention& p = call.forward;
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = __shfl_sync(kAllLanes, thread / kWarp, 0);

    // The first keys of a causal text are seen by the most queries: their blocks begin first.
    const int blocks = (p.keys + kBlockRows - 1) / kBlockRows, number = static_cast<int>(blockIdx.x) / call.sharers;
    const int rest = number / blocks;
    const Place block{number % blocks * kBlockRows, rest % p.key_heads, rest / p.key_heads};

    if (thread == 0) shared.ring.init();
    __syncthreads();
    if (warp >= kWarpgroup / kWarp) {
        take_registers<kConsumerRegisters>();
        compute_key_grads<T>(shared, maps, call, block, warp / (kWarpgroup / kWarp) - 1);
        return;
    }
    release_registers<kProducerRegisters>();
    if (warp > 0) {
        help_with_queries<T>(shared, call, block, thread - kWarp);
    } else if (elect_one()) {
        copy_queries(shared, maps, call, block);
    }
#endif
}

}  // namespace

Error sm90::launch_key_grads(Call call, cudaStream_t stream) {
    const SpanAttention& p = call.forward;
    const unsigned blocks = count_blocks(p.keys, p.key_heads, p.batch);
    const int64_t most_steps = (int64_t{p.queries} + kQueries - 1) / kQueries * (p.heads / p.key_heads);
    int multiprocessors = 0;
    if (Error error = count_multiprocessors(multiprocessors)) return error;
    if (blocks <= static_cast<unsigned>(multiprocessors) && most_steps >= kWorthSharing) call.sharers = 2;
    return with_type_and_width(p, [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int kWidth = decltype(width)::value;
        const auto sharers = static_cast<unsigned>(call.sharers);
        const Launch at{"span_attention_key_grads_sm90", blocks * sharers, kThreads,
                        sizeof(KeyShared<kWidth>),       stream,           sharers};
        Maps maps;
        if (Error error = encode_all<T, kWidth>(maps, at.kernel, call)) return error;
        return launch(at, key_grads_kernel<T, kWidth>, maps, call);
    });
}

}  // namespace mmk::cuda
