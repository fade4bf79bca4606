// Span attention, forward, for Hopper (sm_90a). What it computes: forward_sm80.cu.
//
// A block makes 128 queries of one head at a time, each of two warpgroups 64 of them. The third warpgroup serves these:
// one lane of it copies queries, keys and values by TMA, as far ahead as there are stages, into the next tile too; its
// other warps look through values, see below. Products are wgmma's, with scores and sums in registers:
//   - scores of a step and the sum over the values of the step before it are issued together, and the softmax of the
//     step is computed while the latter is under way;
//   - the two warpgroups take turns at issuing, so that one multiplies while the other is at its softmax.
// The grid is one block a multiprocessor. Tiles go round in a fixed order, the longest of a causal text first, and back
// and forth over the blocks, so that none gets the longest of every round.
//
// Memory moved: q, out and lse once; keys and values once for every 128 queries that see them, mostly from the L2
// cache. What limits it, for 64 queries and 128 keys: products take D / 64 512 cycles of the tensor cores, exponentials
// 512 cycles, so wide heads are bound by the former, heads of 64 by both.
//
// Layout. Rows of tiles are cut into pieces as wide as a swizzle that divides the width: 64 columns, or 32 (96), or
// 16 (80). Columns beyond a head's width, and rows beyond the tensor, are zero: so TMA loads what lies outside.
//
// Isolation. Where not every query of a tile sees every key of a step, masked scores are -inf whatever the key held.
// The idle warps make NaN and infinite values zero and flag their rows, and the weights of just the queries that see a
// flagged row become NaN.
#include "cuda/span_attention/softmax_sm90.h"
#include "cuda/span_attention/tiles_sm90.h"

namespace mmk::cuda {
namespace {

using namespace sm90;

constexpr int kConsumerWarps = kGroups * kWarpgroup / kWarp;
constexpr int kFewRegisters = 24, kManyRegisters = 240;  // of 168 a thread

template <int kWidth>
struct Tiling {
    static constexpr int kKeys = kWidth <= 128 ? 128 : kWidth <= 192 ? 112 : 64;  // as many as registers hold
    static constexpr int kStages = kWidth <= 96 ? 3 : 2;
};

// Barriers, and what is said of the values.
template <int kWidth>
struct Control {
    static constexpr int kStages = Tiling<kWidth>::kStages;
    uint64_t query_full, query_empty;
    uint64_t key_full[kStages], key_empty[kStages];
    uint64_t value_full[kStages], value_clean[kStages], value_empty[kStages];  // clean: full, and looked through
    int some_non_finite[kStages][kHelperWarps], non_finite[kStages][Tiling<kWidth>::kKeys];

    MMK_DEVICE void init() {
        mbarrier_init(&query_full, 1);
        mbarrier_init(&query_empty, kConsumerWarps);
        for (int stage = 0; stage < kStages; stage++) {
            mbarrier_init(&key_full[stage], 1);
            mbarrier_init(&key_empty[stage], kConsumerWarps);
            mbarrier_init(&value_full[stage], 1);
            mbarrier_init(&value_clean[stage], kHelperWarps);
            mbarrier_init(&value_empty[stage], kConsumerWarps + kHelperWarps);
        }
        mbarrier_init_fence();
    }
};

template <int kWidth>
struct Shared {
    using Keys = Tile<kWidth, Tiling<kWidth>::kKeys>;
    Tile<kWidth, kBlockRows> queries;
    Keys keys[Tiling<kWidth>::kStages], values[Tiling<kWidth>::kStages];
    Control<kWidth> control;
};

// ---- work

// Calls f of what the block has to do, in order. Heads that share keys are neighbours.
template <class F>
MMK_DEVICE void each_tile(const SpanAttention& p, const F& f) {
    const unsigned blocks = (static_cast<unsigned>(p.queries) + kBlockRows - 1) / kBlockRows,
                   beside = p.heads * p.batch;
    for (unsigned round = 0; round * gridDim.x < blocks * beside; round++) {
        const unsigned tile = round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
        if (tile >= blocks * beside) continue;
        const int row = static_cast<int>(blocks - 1 - tile / beside) * kBlockRows,
                  rest = static_cast<int>(tile % beside);
        f(Place{row, rest % p.heads, rest / p.heads});
    }
}

// Over the steps of a tile: blocks of keys between the first and the last that any query sees, run by run.
template <int kKeys>
struct Walk {
    Place at;
    int run = -1, key0 = 0;
    Hull hull{};

    MMK_DEVICE explicit Walk(const Place& at) : at(at) {}

    // To the next step; is there one?
    MMK_DEVICE bool advance(const SpanAttention& p) {
        key0 += kKeys;
        while (run < 0 || key0 >= hull.end) {
            if (++run >= p.runs) return false;
            hull = hull_of_run(p, run);
            key0 = hull.first;
        }
        return true;
    }
    // Is there one behind this?
    MMK_DEVICE bool more(const SpanAttention& p) const {
        if (hull.end - key0 > kKeys) return true;
        for (int later = run + 1; later < p.runs; later++) {
            const Hull its = hull_of_run(p, later);
            if (its.first < its.end) return true;
        }
        return false;
    }
    MMK_DEVICE bool masked() const { return key0 < hull.common_first || key0 + kKeys > hull.common_end; }
    MMK_DEVICE Spans spans(const SpanAttention& p, int row) const {
        return Spans(p, first_slice(p, at.batch) + max(run, 0), at.row + row);
    }

  private:
    MMK_DEVICE Hull hull_of_run(const SpanAttention& p, int which) const {
        return hull_of<kBlockRows>(p, first_slice(p, at.batch) + which, at.row);
    }
};

// ---- the warps that serve

template <int kWidth>
MMK_DEVICE void copy_tiles(const SpanAttention& p, const CUtensorMap& map_q, const CUtensorMap& map_k,
                           const CUtensorMap& map_v, Shared<kWidth>& shared) {
    Control<kWidth>& control = shared.control;
    const auto load = [](auto& to, const CUtensorMap& map, const Place& from, uint64_t* full) {
        mbarrier_arrive_expect(full, sizeof to);
        to.load(map, from, full);
    };
    Turn<1> query;
    Turn<Tiling<kWidth>::kStages> at;
    each_tile(p, [&](const Place& tile) {
        const int key_head = tile.head / (p.heads / p.key_heads);
        Walk<Tiling<kWidth>::kKeys> walk(tile);
        for (bool begun = false; walk.advance(p); at.advance()) {
            const Place keys{walk.key0, key_head, tile.batch};
            mbarrier_wait(&control.key_empty[at.stage], at.parity ^ 1);
            load(shared.keys[at.stage], map_k, keys, &control.key_full[at.stage]);
            if (!begun) {  // the last tile's are needed longer than some stage of the keys
                mbarrier_wait(&control.query_empty, query.parity ^ 1);
                load(shared.queries, map_q, tile, &control.query_full);
                query.advance();
                begun = true;
            }
            mbarrier_wait(&control.value_empty[at.stage], at.parity ^ 1);
            load(shared.values[at.stage], map_v, keys, &control.value_full[at.stage]);
        }
    });
}

// A warp's share of a tile: makes it finite, and says which rows were not.
template <class T, int kWidth, int kRows>
MMK_DEVICE void scan(Tile<kWidth, kRows>& tile, int* non_finite_rows, int* some_non_finite, int helper, int lane) {
    using Values = Tile<kWidth, kRows>;
    constexpr int kLanes = Values::kPitch / 16, kStep = kWarp / kLanes;  // lanes at a row, rows at a time
    static_assert(kRows % kStep == 0);
    uint32_t any = 0;
    for (int row = helper * kStep; row < kRows; row += kHelperWarps * kStep) {
        bool found = false;
#pragma unroll
        for (int slab = 0; slab < Values::kBytes; slab += Values::kSlab) {
            found |= make_finite<T>(tile.bytes + slab + row * Values::kPitch + lane * 16);
        }
        const uint32_t votes = __ballot_sync(kAllLanes, found);
        if (lane % kLanes == 0) non_finite_rows[row + lane / kLanes] = (votes >> lane & ((1u << kLanes) - 1)) != 0;
        any |= votes;
    }
    if (lane == 0) some_non_finite[helper] = any != 0;
}

template <class T, int kWidth>
MMK_DEVICE void scan_values(const SpanAttention& p, Shared<kWidth>& shared, int helper, int lane) {
    Control<kWidth>& control = shared.control;
    Turn<Tiling<kWidth>::kStages> at;
    each_tile(p, [&](const Place& tile) {
        for (Walk<Tiling<kWidth>::kKeys> walk(tile); walk.advance(p); at.advance()) {
            mbarrier_wait(&control.value_full[at.stage], at.parity);
            if (walk.masked()) {
                scan<T>(shared.values[at.stage], control.non_finite[at.stage], control.some_non_finite[at.stage],
                        helper, lane);
                async_proxy_fence();
            }
            __syncwarp();
            if (lane == 0) {
                mbarrier_arrive(&control.value_clean[at.stage]);
                mbarrier_arrive(&control.value_empty[at.stage]);
            }
        }
    });
}

// ---- the warps that compute

// The two warpgroups' turns at issuing products: `group` waits for its own, and gives the other its.
struct Turns {
    static constexpr int kMine = 1;  // the first of two named barriers
    int group;
    MMK_DEVICE void take() const { named_barrier_sync(kMine + group, kGroups * kWarpgroup); }
    MMK_DEVICE void pass() const { named_barrier_arrive(kMine + 1 - group, kGroups * kWarpgroup); }
};

template <class T, int kWidth>
struct Consumer {
    using Keys = typename Shared<kWidth>::Keys;
    static constexpr int kKeys = Tiling<kWidth>::kKeys;
    const SpanAttention& p;
    Shared<kWidth>& shared;
    int group, row, lane;  // row: the first of the two the thread holds, of the tile's
    Turns turns;
    Turn<1> query;
    Turn<Tiling<kWidth>::kStages> at;  // of the step

    MMK_DEVICE Consumer(const SpanAttention& p, Shared<kWidth>& shared, int warp, int lane)
        : p(p), shared(shared), group(warp / 4), row(warp * 16 + lane / 4), lane(lane), turns{group} {}

    // Each warp for itself, since it has waited for its own reads only.
    MMK_DEVICE void release(uint64_t* empty) const {
        if (lane == 0) mbarrier_arrive(empty);
    }
    MMK_DEVICE void score(float (&s)[kKeys / 2], const Keys& keys) const {
        wgmma_fence();
        multiply<T>(s, shared.queries, group * kGroupRows, keys);
    }
    MMK_DEVICE static void add(Attention<T, kWidth, kKeys>& attention, const Keys& values) {
        wgmma_fence();
        add_product<T>(attention.o, attention.weights, values);
    }

    MMK_DEVICE void attend(const Place& tile, const Factors& factors, Attention<T, kWidth, kKeys>& attention) {
        Control<kWidth>& control = shared.control;
        Walk<kKeys> walk(tile);
        Spans spans = walk.spans(p, row);  // mostly the first run is it: no need to wait for its hull first
        if (!walk.advance(p)) return;
        if (walk.run > 0) spans = walk.spans(p, row);

        mbarrier_wait(&control.query_full, query.parity);
        query.advance();
        mbarrier_wait(&control.key_full[at.stage], at.parity);
        turns.take();
        score(attention.s, shared.keys[at.stage]);
        turns.pass();
        wgmma_wait<0>(attention.s);
        for (bool first = true;; first = false) {
            release(&control.key_empty[at.stage]);
            const bool masked = walk.masked();
            if (!factors.plain) {
                if (factors.capped) {
                    attention.each(lane, [&](float& s, int, int) { s = factors.cap(s); });
                } else {
                    attention.each(lane, [&](float& s, int, int) { s *= factors.before; });
                }
            }
            if (masked) mask<kKeys>(attention, spans, walk.hull, walk.key0, lane);
            attention.weigh(factors.after);

            // That one waits for keys here matters to ptxas too: within one basic block it would wait for the values'
            // product before the softmax.
            const bool more = walk.more(p);
            if (more) {
                mbarrier_wait(&control.key_full[at.after().stage], at.after().parity);
            } else {
                release(&control.query_empty);
            }
            wgmma_wait<0>(attention.o);
            if (!first) release(&control.value_empty[at.before().stage]);
            attention.lessen();
            attention.round_weights();
            mbarrier_wait(&control.value_full[at.stage], at.parity);
            if (masked) {
                mbarrier_wait(&control.value_clean[at.stage], at.parity);
                const int* const some = control.some_non_finite[at.stage];
                if ((some[0] | some[1] | some[2]) != 0) {
                    attention.make_nan(control.non_finite[at.stage], spans, walk.key0, lane);
                }
            }
            turns.take();
            if (!more) break;
            const int run = walk.run;
            walk.advance(p);
            if (walk.run != run) spans = walk.spans(p, row);
            at.advance();
            score(attention.s, shared.keys[at.stage]);
            add(attention, shared.values[at.before().stage]);
            turns.pass();
            wgmma_wait<1>(attention.s);
        }
        add(attention, shared.values[at.stage]);
        turns.pass();
        wgmma_wait<0>(attention.o);
        release(&control.value_empty[at.stage]);
        at.advance();
    }

    MMK_DEVICE void run() {
        const Factors factors(p);
        if (group == 1) turns.pass();  // the first is group 0's
        each_tile(p, [&](const Place& tile) {
            Attention<T, kWidth, kKeys> attention;
            attend(tile, factors, attention);
            const int row0 = tile.row + row - lane / 4;
            const auto out = matrix<T>(p.out, p.value_size, tile.batch, row0, tile.head);
            float* const lse = p.lse + (static_cast<int64_t>(tile.batch) * p.heads + tile.head) * p.queries + row0;
            attention.store(out, lse, p.queries - row0, lane);
        });
        if (group == 0) turns.take();  // that group 1 has passed to it
    }
};

template <class T, int kWidth>
__global__ __launch_bounds__(kThreads,
                             1) void span_attention_forward_sm90_kernel(const __grid_constant__ CUtensorMap map_q,
                                                                        const __grid_constant__ CUtensorMap map_k,
                                                                        const __grid_constant__ CUtensorMap map_v,
                                                                        const SpanAttention p) {
#if MMK_SM90A
    MMK_DYNAMIC_SHARED(begin);
    auto& shared = *reinterpret_cast<Shared<kWidth>*>(begin);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);  // nvcc knows it is the warp's
    if (threadIdx.x == 0) shared.control.init();
    __syncthreads();

    if (warp >= kWarpgroup / kWarp) {
        take_registers<kManyRegisters>();
        Consumer<T, kWidth>(p, shared, warp - kWarpgroup / kWarp, lane).run();
        return;
    }
    release_registers<kFewRegisters>();
    if (warp < kHelperWarps) {
        scan_values<T, kWidth>(p, shared, warp, lane);
    } else if (elect_one()) {
        copy_tiles<kWidth>(p, map_q, map_k, map_v, shared);
    }
#endif
}

// ---- launching

constexpr const char* kName = "span_attention_forward_sm90";
constexpr int kWidest = 256;

template <class T, int kWidth>
Error run(const SpanAttention& call, unsigned tiles, cudaStream_t stream) {
    constexpr int kKeys = Tiling<kWidth>::kKeys;
    CUtensorMap q, k, v;
    if (Error error = encode_heads<T, kWidth>(q, kName, call.q, call.batch, call.queries, call.heads, call.head_size,
                                              kBlockRows)) {
        return error;
    }
    k = v = q;  // without keys nothing is loaded
    if (call.keys > 0) {
        const auto encode_keys = [&](CUtensorMap& map, const Heads& x, int width) {
            return encode_heads<T, kWidth>(map, kName, x, call.batch, call.keys, call.key_heads, width, kKeys);
        };
        if (Error error = encode_keys(k, call.k, call.head_size)) return error;
        if (Error error = encode_keys(v, call.v, call.value_size)) return error;
    }
    int multiprocessors = 0;
    if (Error error = count_multiprocessors(multiprocessors)) return error;
    const unsigned blocks = std::min(tiles, static_cast<unsigned>(multiprocessors));
    const Launch at{kName, blocks, kThreads, sizeof(Shared<kWidth>), stream};
    return launch(at, span_attention_forward_sm90_kernel<T, kWidth>, q, k, v, call);
}

template <class T>
Error run(const SpanAttention& call, unsigned tiles, cudaStream_t stream) {
    const int width = std::max(call.head_size, call.value_size);
    if (width <= 64) return run<T, 64>(call, tiles, stream);
    if (width <= 80) return run<T, 80>(call, tiles, stream);
    if (width <= 96) return run<T, 96>(call, tiles, stream);
    if (width <= 128) return run<T, 128>(call, tiles, stream);
    if (width <= 192) return run<T, 192>(call, tiles, stream);
    return run<T, kWidest>(call, tiles, stream);
}

}  // namespace

bool span_attention_forward_sm90_serves(const SpanAttention& call) {
    return std::max(call.head_size, call.value_size) <= kWidest &&
           readable(call.q, call.batch, call.queries, call.heads) &&
           readable(call.k, call.batch, call.keys, call.key_heads) &&
           readable(call.v, call.batch, call.keys, call.key_heads);
}

Error span_attention_forward_sm90(const SpanAttention& call, cudaStream_t stream) {
    if (Error error = without_sm90a(kName)) return error;
    if (Error error = wrong_sizes(kName, call)) return error;
    if (!span_attention_forward_sm90_serves(call)) {
        return Error(std::string(kName) +
                     ": heads have to be of at most 256 numbers, and q, k and v to begin, and their strides to be, at "
                     "multiples of 16 bytes");
    }
    const int64_t tiles = (int64_t{call.queries} + kBlockRows - 1) / kBlockRows * call.heads * call.batch;
    if (tiles > INT_MAX || call.queries > INT_MAX - kBlockRows || call.keys > INT_MAX - kBlockRows) {
        return Error(std::string(kName) + ": more queries or keys than 32 bits number");
    }
    if (tiles == 0) return {};
    const auto count = static_cast<unsigned>(tiles);
    return call.bfloat16 ? run<BFloat16>(call, count, stream) : run<Float16>(call, count, stream);
}

}  // namespace mmk::cuda
