// d_q of span attention on Hopper: see backward_sm90.cu. A block owns 128 queries of a head and walks
// the keys they see, 128 at a time:
//
//   s = q k^T and dp = d_out v^T;  p = exp(s - lse) while the second is under way;  ds = p (dp - delta);  d_q += ds k
//
// Of its registers, a thread that computes has 64 for s, 64 for dp and half a head's width for d_q.
#include "cuda/span_attention/backward_sm90.h"

namespace mmk::cuda {
namespace {

using namespace sm90;

constexpr int kKeys = 128;  // in a step

template <int kWidth>
struct QueryShared {
    static constexpr int kStages = kWidth <= 96 ? 3 : 2;
    Tile<kWidth, kBlockRows> q, d_out;
    struct {
        Tile<kWidth, kKeys> k, v;
    } stages[kStages];
    Ring<kStages> ring;
};

// Calls f of every step.
template <class F>
MMK_DEVICE void walk_keys(const SpanAttention& p, const Place& block, const F& f) {
    const int key_head = block.head / (p.heads / p.key_heads);
    for (int run = 0; run < p.runs; run++) {
        const int64_t slice = first_slice(p, block.batch) + run;
        const Hull first = hull_of<kGroupRows>(p, slice, block.row);
        const Hull second = hull_of<kGroupRows>(p, slice, block.row + kGroupRows);
        const int end = max(first.end, second.end);
#pragma unroll 1
        for (int key = min(first.first, second.first); key < end; key += kKeys) {
            const Step step{
                run, {key, key_head, block.batch}, {how(first, key, key + kKeys), how(second, key, key + kKeys)}};
            if (step.concerns_anyone()) f(step);
        }
    }
}

template <int kWidth>
MMK_DEVICE void copy_keys(QueryShared<kWidth>& shared, const Maps& maps, const SpanAttention& p, const Place& block) {
    auto& ring = shared.ring;
    mbarrier_arrive_expect(&ring.own, sizeof(shared.q) + sizeof(shared.d_out));
    shared.q.load(maps.q, block, &ring.own, kBoxRows);
    shared.d_out.load(maps.d_out, block, &ring.own, kBoxRows);
    Turn<QueryShared<kWidth>::kStages> turn;
    walk_keys(p, block, [&](const Step& step) {
        auto& stage = shared.stages[turn.stage];
        uint64_t* const full = &ring.full[turn.stage];
        ring.post(turn, step);
        mbarrier_arrive_expect(full, sizeof(stage.k) + sizeof(stage.v));
        stage.k.load(maps.k, step.rows, full, kBoxRows);
        stage.v.load(maps.v, step.rows, full, kBoxRows);
        turn.advance();
    });
    ring.post(turn, {kNoRun, block, {kNothing, kNothing}});
}

template <class T, int kWidth>
MMK_DEVICE void help_with_keys(QueryShared<kWidth>& shared, int helper) {
    shared.ring.help([&](auto turn, const Step& step) {
        if (!step.is_masked()) return;
        auto& stage = shared.stages[turn.stage];
        shared.ring.wait_for_tiles(turn);
#pragma unroll 1
        for (int i = helper * 16; i < static_cast<int>(sizeof(stage.k)); i += kHelperWarps * kWarp * 16) {
            if (make_finite<T>(stage.k.bytes + i)) {  // the same place in v is of the same key
                *reinterpret_cast<uint4*>(stage.v.bytes + i) = {~0u, ~0u, ~0u, ~0u};
            }
        }
        async_proxy_fence();
    });
}

// What a thread knows of its two queries.
struct OwnQueries {
    int row, lo[2], hi[2];
    float lse[2], delta[2];

    MMK_DEVICE OwnQueries(const Call& call, const Place& block, int row) : row(row), lo{}, hi{} {
        const SpanAttention& p = call.forward;
        const RowTerms* const terms =
            workspace_of(call).terms + (static_cast<int64_t>(block.batch) * p.heads + block.head) * p.queries;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const RowTerms own = row + 8 * i < p.queries ? terms[row + 8 * i] : RowTerms{0, 0};
            lse[i] = own.lse;
            delta[i] = own.delta;
        }
    }
    MMK_DEVICE void look(const SpanAttention& p, int64_t slice) {
        const Spans spans(p, slice, row);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            lo[i] = spans.lo[i];
            hi[i] = spans.hi[i];
        }
    }
    template <bool kCapped>
    MMK_DEVICE void weigh(float (&s)[kKeys / 2], const Scores& scores) const {
#pragma unroll
        for (int i = 0; i < kKeys / 2; i++) scores.weigh<kCapped>(s[i], lse[i / 2 % 2]);
    }
    // ds into the place of the weights; `key` is the first of which the thread holds a score.
    template <bool kMasked>
    MMK_DEVICE void differentiate(float (&s)[kKeys / 2], const float (&dp)[kKeys / 2], int key) const {
#pragma unroll
        for (int i = 0; i < kKeys / 2; i++) {
            const int query = i / 2 % 2, at = key + i / 4 * 8 + i % 2;
            s[i] *= dp[i] - delta[query];
            if (kMasked && !(lo[query] <= at && at < hi[query])) s[i] = 0;
        }
    }
};

template <class T, int kWidth>
MMK_DEVICE void compute_query_grad(QueryShared<kWidth>& shared, const Maps& maps, const Call& call, const Place& block,
                                   int group) {
    const SpanAttention& p = call.forward;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, lane = thread % kWarp;
    const Scores& scores = call.scores;
    OwnQueries own(call, block, block.row + group * kGroupRows + thread / kWarp * 16 + lane / 4);
    float dq[kWidth / 2] = {};
    mbarrier_wait(&shared.ring.own, 0);
    int run = kNoRun;
    const Place rows = shared.ring.compute(group, [&](auto turn, const Step& step) {
        if (run != step.run) own.look(p, first_slice(p, step.rows.batch) + step.run);
        run = step.run;
        auto& stage = shared.stages[turn.stage];
        float s[kKeys / 2], dp[kKeys / 2];
        uint32_t left[kKeys / 16][4];
        wgmma_fence();
        multiply<T>(s, shared.q, group * kGroupRows, stage.k);
        multiply<T>(dp, shared.d_out, group * kGroupRows, stage.v);
        wgmma_wait<1>(s);
        scores.capped ? own.weigh<true>(s, scores) : own.weigh<false>(s, scores);
        wgmma_wait<0>(dp);
        const int key = step.rows.row + lane % 4 * 2;
        step.how[group] == kMasked ? own.differentiate<true>(s, dp, key) : own.differentiate<false>(s, dp, key);
#pragma unroll
        for (int i = 0; i < kKeys / 4; i++) left[i / 4][i % 4] = pack2<T>(s[2 * i], s[2 * i + 1]);
        wgmma_fence();
        add_product<T>(dq, left, stage.k);
        wgmma_wait<0>(dq);
    });
    store<T>(dq, p.scale, shared.q, group, maps.d_q, rows);
}

template <class T, int kWidth>
__global__ __launch_bounds__(kThreads, 1) void query_grad_kernel(const __grid_constant__ Maps maps,
                                                                 const __grid_constant__ Call call) {
#if MMK_SM90A
    MMK_DYNAMIC_SHARED(raw);
    auto& shared = *reinterpret_cast<QueryShared<kWidth>*>(raw);
    const SpanAttention& p = call.forward;
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = __shfl_sync(kAllLanes, thread / kWarp, 0);

    // The last blocks of a causal text are the longest: they begin first.
    const int blocks = (p.queries + kBlockRows - 1) / kBlockRows;
    const int rest = static_cast<int>(blockIdx.x) / blocks;
    const int row = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * kBlockRows;
    const Place block{row, rest % p.heads, rest / p.heads};

    if (thread == 0) shared.ring.init();
    __syncthreads();
    if (warp >= kWarpgroup / kWarp) {
        take_registers<kConsumerRegisters>();
        compute_query_grad<T>(shared, maps, call, block, warp / (kWarpgroup / kWarp) - 1);
        return;
    }
    release_registers<kProducerRegisters>();
    if (warp > 0) {
        help_with_keys<T>(shared, thread - kWarp);
    } else if (elect_one()) {
        copy_keys(shared, maps, p, block);
    }
#endif
}

}  // namespace

Error sm90::launch_query_grad(const Call& call, cudaStream_t stream) {
    const SpanAttention& p = call.forward;
    return with_type_and_width(p, [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int kWidth = decltype(width)::value;
        const Launch at{"span_attention_query_grad_sm90", count_blocks(p.queries, p.heads, p.batch), kThreads,
                        sizeof(QueryShared<kWidth>), stream};
        Maps maps;
        if (Error error = encode_all<T, kWidth>(maps, at.kernel, call)) return error;
        return launch(at, query_grad_kernel<T, kWidth>, maps, call);
    });
}

}  // namespace mmk::cuda
