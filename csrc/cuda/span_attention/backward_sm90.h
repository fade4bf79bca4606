// What the two kernels of span attention's backward on Hopper have in common: the ring in which steps go round, scores,
// and what they are launched with. backward_sm90.cu says how they work.
#pragma once
#include "cuda/isa/cluster.h"
#include "cuda/span_attention/tiles_sm90.h"

namespace mmk::cuda::sm90 {

constexpr int kBoxRows = 64;  // of a tile, that come and go at a time

// A block has the registers it is launched with, 168 a thread, to share out: with more, taking them waits for ever.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + kGroups * kConsumerRegisters <= 3 * 168);

// The warpgroup's rows of a gradient, by way of its rows of a tile that nobody reads any more.
template <class T, int kWidth>
MMK_DEVICE void store(const float (&d)[kWidth / 2], float factor, Tile<kWidth, kBlockRows>& through, int group,
                      const CUtensorMap& map, const Place& to) {
    using Through = Tile<kWidth, kBlockRows>;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, lane = thread % kWarp;
    const int own = group * kGroupRows + thread / kWarp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kWidth / 2; i += 2) {
        *through.at(own + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2) = pack2<T>(d[i] * factor, d[i + 1] * factor);
    }
    async_proxy_fence();
    named_barrier_sync(1 + group, kWarpgroup);
    if (__shfl_sync(kAllLanes, thread / kWarp, 0) != 0 || !elect_one()) return;
#pragma unroll
    for (int column = 0; column < kWidth; column += Through::kColumns) {
        tensor_store(
            &map, {column, to.head, to.row + group * kGroupRows, to.batch},
            through.bytes + column / Through::kColumns * Through::kSlab + group * kGroupRows * Through::kPitch);
    }
    bulk_store_commit();
    bulk_store_wait_read<0>();
}

// ---- steps, and the ring in which they go round

// What a warpgroup's rows and the rows of a step have to do with each other.
enum How { kNothing, kEverything, kMasked };

// Of queries with this hull and keys from `first` to `end`.
MMK_DEVICE int how(const Hull& hull, int first, int end) {
    if (hull.end <= first || end <= hull.first) return kNothing;
    return hull.common_first <= first && end <= hull.common_end ? kEverything : kMasked;
}

constexpr int kNoRun = -1;  // the run of the step after the last

struct Step {
    int run;
    Place rows;  // of the step after the last, the block's own
    int how[kGroups];

    MMK_DEVICE bool concerns_anyone() const { return how[0] != kNothing || how[1] != kNothing; }
    MMK_DEVICE bool is_masked() const { return how[0] == kMasked || how[1] == kMasked; }
};

template <int kStages>
struct Ring {
    uint64_t own;              // the block's own rows are here
    uint64_t posted[kStages];  // the step is known
    uint64_t full[kStages];    // its tiles are here
    uint64_t ready[kStages];   // the helpers are done with it
    uint64_t empty[kStages];   // no warp needs the stage
    Step steps[kStages];

    MMK_DEVICE void init() {
        mbarrier_init(&own, 1);
        for (int stage = 0; stage < kStages; stage++) {
            mbarrier_init(&posted[stage], 1);
            mbarrier_init(&full[stage], 1);
            mbarrier_init(&ready[stage], kHelperWarps);
            mbarrier_init(&empty[stage], kGroups * kWarpgroup / kWarp);
        }
        mbarrier_init_fence();
    }

    // By the lane that copies, when the stage may be filled.
    MMK_DEVICE void post(Turn<kStages> turn, const Step& step) {
        mbarrier_wait(&empty[turn.stage], turn.parity ^ 1);
        steps[turn.stage] = step;
        mbarrier_arrive(&posted[turn.stage]);
    }
    // By the helpers: f(stage, step) of every step.
    template <class F>
    MMK_DEVICE void help(const F& f) {
        for (Turn<kStages> turn;; turn.advance()) {
            mbarrier_wait(&posted[turn.stage], turn.parity);
            const Step& step = steps[turn.stage];
            const bool last = step.run == kNoRun;
            if (!last) f(turn, step);
            __syncwarp();
            if (threadIdx.x % kWarp == 0) mbarrier_arrive(&ready[turn.stage]);
            if (last) break;
        }
    }
    // By the warps that compute: f(turn, step) of every step that concerns their group. Returns the block's own rows.
    template <class F>
    MMK_DEVICE Place compute(int group, const F& f) {
        for (Turn<kStages> turn;; turn.advance()) {
            mbarrier_wait(&ready[turn.stage], turn.parity);
            const Step& step = steps[turn.stage];
            if (step.run == kNoRun) return step.rows;
            if (step.how[group] != kNothing) {
                wait_for_tiles(turn);
                f(turn, step);
            }
            __syncwarp();
            if (threadIdx.x % kWarp == 0) mbarrier_arrive(&empty[turn.stage]);
        }
    }
    MMK_DEVICE void wait_for_tiles(Turn<kStages> turn) { mbarrier_wait(&full[turn.stage], turn.parity); }
};

// ---- scores

// Made on the host: the kernel has them in its parameters rather than in registers.
struct Scores {
    float before, after;
    bool capped;

    explicit Scores(const SpanAttention& p) : capped(p.softcap > 0) {
        before = capped ? p.scale / p.softcap * 2 * kLog2E : 0;
        after = (capped ? p.softcap : p.scale) * kLog2E;
    }

    // The weight of a score, which itself becomes the weight times the slope of the cap.
    template <bool kCapped>
    MMK_DEVICE float weigh(float& score, float lse) const {
        if constexpr (!kCapped) return score = exp2_approx(score * after - lse);
        const float bounded = 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(score * before));  // tanh
        const float weight = exp2_approx(bounded * after - lse);
        score = weight * (1.0f - bounded * bounded);
        return weight;
    }
};

struct Call : SpanAttentionBackward {
    explicit Call(const SpanAttentionBackward& call) : SpanAttentionBackward(call), scores(call.forward) {}
    Scores scores;
    int sharers = 1;  // blocks of a cluster that have the same keys and take turns at the steps
};

// ---- launching

struct Maps {
    CUtensorMap q, k, v, d_out, d_q, d_k, d_v;
};

template <class T, int kWidth>
Error encode_all(Maps& maps, const char* kernel, const Call& call) {
    const SpanAttention& p = call.forward;
    const auto of_queries = [&](CUtensorMap& map, const Heads& x, int width) {
        return encode_heads<T, kWidth>(map, kernel, x, p.batch, p.queries, p.heads, width, kBoxRows);
    };
    const auto of_keys = [&](CUtensorMap& map, const Heads& x, int width) {
        return encode_heads<T, kWidth>(map, kernel, x, p.batch, p.keys, p.key_heads, width, kBoxRows);
    };
    if (Error error = of_queries(maps.q, p.q, p.head_size)) return error;
    if (Error error = of_queries(maps.d_q, call.d_q, p.head_size)) return error;
    if (Error error = of_queries(maps.d_out, call.d_out, p.value_size)) return error;
    if (Error error = of_keys(maps.k, p.k, p.head_size)) return error;
    if (Error error = of_keys(maps.d_k, call.d_k, p.head_size)) return error;
    if (Error error = of_keys(maps.v, p.v, p.value_size)) return error;
    return of_keys(maps.d_v, call.d_v, p.value_size);
}

// Calls f(a number of the call's type, std::integral_constant<int, kWidth>()), of the widths that the kernels are
// compiled for the first that holds the call's heads.
template <class F>
Error with_type_and_width(const SpanAttention& call, const F& f) {
    const auto with_width = [&](auto type) {
        const int width = std::max(call.head_size, call.value_size);
        if (width <= 64) return f(type, std::integral_constant<int, 64>());
        if (width <= 80) return f(type, std::integral_constant<int, 80>());
        if (width <= 96) return f(type, std::integral_constant<int, 96>());
        return f(type, std::integral_constant<int, 128>());
    };
    return call.bfloat16 ? with_width(BFloat16()) : with_width(Float16());
}

inline unsigned count_blocks(int rows, int heads, int batch) {
    return static_cast<unsigned>((rows + kBlockRows - 1) / kBlockRows * heads * batch);
}

Error launch_query_grad(const Call& call, cudaStream_t stream);
Error launch_key_grads(Call call, cudaStream_t stream);

}  // namespace mmk::cuda::sm90
