// Span attention, forward, for Hopper (sm_90a). What it computes: span_attention_forward.cu, for sm_80.
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
#include "span_attention_device.h"
#include "tensor_map.h"
#include "wgmma.h"

namespace mmk::cuda {
namespace {

constexpr int kGroups = 2, kGroupRows = 64, kRows = kGroups * kGroupRows;
constexpr int kThreads = (1 + kGroups) * kWarpgroup, kScanners = 3;
constexpr int kConsumerWarps = kGroups * kWarpgroup / kWarp;
constexpr int kFewRegisters = 24, kManyRegisters = 240;  // of 168 a thread

template <int kWidth>
struct Tiling {
    static constexpr int kKeys = kWidth <= 128 ? 128 : kWidth <= 192 ? 112 : 64;  // as many as registers hold
    static constexpr int kStages = kWidth <= 96 ? 3 : 2;
    static constexpr int kPiece = kWidth % 64 == 0 ? 64 : kWidth % 32 == 0 ? 32 : 16;  // columns
    static constexpr int kPitch = kPiece * 2, kPieces = kWidth / kPiece;               // bytes of a row of a piece
    static constexpr int kBytes = kKeys * kWidth * 2, kQueryBytes = kRows * kWidth * 2;
    static constexpr Swizzle kSwizzle = kPiece == 64 ? Swizzle::k128 : kPiece == 32 ? Swizzle::k64 : Swizzle::k32;
};

// After the tiles in shared memory.
template <int kWidth>
struct Control {
    static constexpr int kStages = Tiling<kWidth>::kStages;
    uint64_t query_full, query_empty;
    uint64_t key_full[kStages], key_empty[kStages];
    uint64_t value_full[kStages], value_clean[kStages], value_empty[kStages];  // clean: full, and looked through
    int some_spoilt[kStages][kScanners], spoilt[kStages][Tiling<kWidth>::kKeys];

    MMK_DEVICE void init() {
        mbarrier_init(&query_full, 1);
        mbarrier_init(&query_empty, kConsumerWarps);
        for (int stage = 0; stage < kStages; stage++) {
            mbarrier_init(&key_full[stage], 1);
            mbarrier_init(&key_empty[stage], kConsumerWarps);
            mbarrier_init(&value_full[stage], 1);
            mbarrier_init(&value_clean[stage], kScanners);
            mbarrier_init(&value_empty[stage], kConsumerWarps + kScanners);
        }
        mbarrier_init_fence();
    }
};

template <int kWidth>
struct Shared {
    static constexpr size_t kBytes =
        Tiling<kWidth>::kQueryBytes + 2 * Tiling<kWidth>::kStages * Tiling<kWidth>::kBytes + sizeof(Control<kWidth>);
    unsigned char *queries, *keys, *values;
    Control<kWidth>* control;

    MMK_DEVICE explicit Shared(unsigned char* begin)
        : queries(begin),
          keys(queries + Tiling<kWidth>::kQueryBytes),
          values(keys + Tiling<kWidth>::kStages * Tiling<kWidth>::kBytes),
          control(reinterpret_cast<Control<kWidth>*>(values + Tiling<kWidth>::kStages * Tiling<kWidth>::kBytes)) {}
};

// Where in a ring of stages, and the parity of its barriers' phase.
template <int kStages>
struct Position {
    int stage = 0, parity = 0;
    MMK_DEVICE Position after() const {
        return stage + 1 < kStages ? Position{stage + 1, parity} : Position{0, parity ^ 1};
    }
    MMK_DEVICE Position before() const {
        return stage > 0 ? Position{stage - 1, parity} : Position{kStages - 1, parity ^ 1};
    }
};

// ---- work

struct Queries {
    int row0, head, batch;
};

// Calls f of what the block has to do, in order. Heads that share keys are neighbours.
template <class F>
MMK_DEVICE void each_tile(const SpanAttention& p, const F& f) {
    const unsigned blocks = (static_cast<unsigned>(p.queries) + kRows - 1) / kRows, beside = p.heads * p.batch;
    for (unsigned round = 0; round * gridDim.x < blocks * beside; round++) {
        const unsigned tile = round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
        if (tile >= blocks * beside) continue;
        const int row0 = static_cast<int>(blocks - 1 - tile / beside) * kRows, rest = static_cast<int>(tile % beside);
        f(Queries{row0, rest % p.heads, rest / p.heads});
    }
}

// Over the steps of a tile: blocks of keys between the first and the last that any query sees, run by run.
template <int kKeys>
struct Walk {
    Queries at;
    int run = -1, key0 = 0;
    Hull hull{};

    MMK_DEVICE explicit Walk(const Queries& at) : at(at) {}

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
        return Spans(p, first_slice(p, at.batch) + max(run, 0), at.row0 + row);
    }

  private:
    MMK_DEVICE Hull hull_of_run(const SpanAttention& p, int which) const {
        return hull_of<kRows>(p, first_slice(p, at.batch) + which, at.row0);
    }
};

// ---- the warps that serve

template <int kWidth, int kCount>
MMK_DEVICE void load(unsigned char* to, const CUtensorMap* map, int row0, int head, int batch, uint64_t* full) {
    using Tile = Tiling<kWidth>;
    mbarrier_arrive_expect(full, kCount * kWidth * 2);
    for (int i = 0; i < Tile::kPieces; i++) {
        tensor_load(to + i * kCount * Tile::kPitch, map, {i * Tile::kPiece, head, row0, batch}, full);
    }
}

template <int kWidth>
MMK_DEVICE void copy_tiles(const SpanAttention& p, const CUtensorMap* map_q, const CUtensorMap* map_k,
                           const CUtensorMap* map_v, const Shared<kWidth>& shared) {
    using Tile = Tiling<kWidth>;
    Control<kWidth>& control = *shared.control;
    Position<1> query;
    Position<Tile::kStages> at;
    each_tile(p, [&](const Queries& tile) {
        const int key_head = tile.head / (p.heads / p.key_heads);
        Walk<Tile::kKeys> walk(tile);
        for (bool begun = false; walk.advance(p); at = at.after()) {
            mbarrier_wait(&control.key_empty[at.stage], at.parity ^ 1);
            load<kWidth, Tile::kKeys>(shared.keys + at.stage * Tile::kBytes, map_k, walk.key0, key_head, tile.batch,
                                      &control.key_full[at.stage]);
            if (!begun) {  // the last tile's are needed longer than some stage of the keys
                mbarrier_wait(&control.query_empty, query.parity ^ 1);
                load<kWidth, kRows>(shared.queries, map_q, tile.row0, tile.head, tile.batch, &control.query_full);
                query = query.after();
                begun = true;
            }
            mbarrier_wait(&control.value_empty[at.stage], at.parity ^ 1);
            load<kWidth, Tile::kKeys>(shared.values + at.stage * Tile::kBytes, map_v, walk.key0, key_head, tile.batch,
                                      &control.value_full[at.stage]);
        }
    });
}

// Is one of eight numbers NaN or infinite?
template <class T>
MMK_DEVICE bool spoilt(const uint4& x) {
    constexpr uint32_t kExponent = std::is_same_v<T, BFloat16> ? 0x7F807F80 : 0x7C007C00;
    constexpr uint32_t kLowest =
        kExponent & ~(kExponent << 1);  // added to an exponent of ones it carries into the sign
    const auto carry = [](uint32_t two) { return (two & kExponent) + kLowest; };
    return ((carry(x.x) | carry(x.y) | carry(x.z) | carry(x.w)) & 0x80008000) != 0;
}

// A warp's share of a tile: makes it finite, and says which rows were not.
template <class T, int kWidth>
MMK_DEVICE void scan(unsigned char* tile, int* spoilt_rows, int* some_spoilt, int scanner, int lane) {
    using Tile = Tiling<kWidth>;
    constexpr int kLanes = Tile::kPitch / 16, kStep = kWarp / kLanes;  // lanes at a row, rows at a time
    static_assert(Tile::kKeys % kStep == 0);
    uint32_t any = 0;
    for (int row = scanner * kStep; row < Tile::kKeys; row += kScanners * kStep) {
        bool found = false;
#pragma unroll
        for (int i = 0; i < Tile::kPieces; i++) {
            unsigned char* const chunk = tile + (i * Tile::kKeys + row) * Tile::kPitch + lane * 16;
            const uint4 x = *reinterpret_cast<const uint4*>(chunk);
            if (!spoilt<T>(x)) continue;
            *reinterpret_cast<uint4*>(chunk) = {finite<T>(x.x), finite<T>(x.y), finite<T>(x.z), finite<T>(x.w)};
            found = true;
        }
        const uint32_t votes = __ballot_sync(kAllLanes, found);
        if (lane % kLanes == 0) spoilt_rows[row + lane / kLanes] = (votes >> lane & ((1u << kLanes) - 1)) != 0;
        any |= votes;
    }
    if (lane == 0) some_spoilt[scanner] = any != 0;
}

template <class T, int kWidth>
MMK_DEVICE void scan_values(const SpanAttention& p, const Shared<kWidth>& shared, int scanner, int lane) {
    using Tile = Tiling<kWidth>;
    Control<kWidth>& control = *shared.control;
    Position<Tile::kStages> at;
    each_tile(p, [&](const Queries& tile) {
        for (Walk<Tile::kKeys> walk(tile); walk.advance(p); at = at.after()) {
            mbarrier_wait(&control.value_full[at.stage], at.parity);
            if (walk.masked()) {
                scan<T, kWidth>(shared.values + at.stage * Tile::kBytes, control.spoilt[at.stage],
                                control.some_spoilt[at.stage], scanner, lane);
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

// What thread 32 w + 4 g + t of a warpgroup holds of its 64 queries: rows 16 w + g and, eight further, i = 1. Element e
// of `s` and of `o`: i = e / 2 % 2, column 8 (e / 4) + 2 t + e % 2.
template <class T, int kWidth>
struct Attention {
    using Tile = Tiling<kWidth>;
    float s[Tile::kKeys / 2];               // scores, then weights
    uint32_t weights[Tile::kKeys / 16][4];  // rounded, as the left operand of a product
    float o[kWidth / 2] = {};               // sum of weighted values
    float top[2] = {-INFINITY, -INFINITY};  // largest score so far, in units of log 2
    float total[2] = {};                    // this thread's share of the sum of weights
    float fade[2];                          // by how much the last step lessens what was summed before

    // s = q keys^T
    MMK_DEVICE void score(uint32_t queries, uint32_t keys) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kWidth; k += 16) {
            const int piece = k / Tile::kPiece, within = k % Tile::kPiece * 2;
            const uint32_t a = queries + piece * kRows * Tile::kPitch + within;
            const uint32_t b = keys + piece * Tile::kKeys * Tile::kPitch + within;
            wgmma<T, Major::kK, Major::kK>(s, matrix_descriptor(a, 16, 8 * Tile::kPitch, Tile::kSwizzle),
                                           matrix_descriptor(b, 16, 8 * Tile::kPitch, Tile::kSwizzle), k > 0);
        }
        wgmma_commit();
    }

    // o += weights values
    MMK_DEVICE void add(uint32_t values) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < Tile::kKeys / 16; k++) {
            const uint64_t b = matrix_descriptor(values + k * 16 * Tile::kPitch, Tile::kKeys * Tile::kPitch,
                                                 8 * Tile::kPitch, Tile::kSwizzle);
            wgmma<T, Major::kOther>(o, weights[k], b, true);
        }
        wgmma_commit();
    }

    // Calls f(s, i, column) of each score.
    template <class F>
    MMK_DEVICE void each(int lane, const F& f) {
#pragma unroll
        for (int e = 0; e < Tile::kKeys / 2; e++) f(s[e], e / 2 % 2, e / 4 * 8 + lane % 4 * 2 + e % 2);
    }

    // Scores into weights relative to the largest score so far.
    MMK_DEVICE void weigh(float factor) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float largest = -INFINITY;
#pragma unroll
            for (int e = 2 * i; e < Tile::kKeys / 2; e += 4) largest = fmaxf(largest, fmaxf(s[e], s[e + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
            largest = fmaxf(top[i], largest * factor);
            const float pivot = largest == -INFINITY ? 0.0f : largest;  // -inf - -inf is NaN
            fade[i] = exp2_approx(top[i] - pivot);
            top[i] = largest;
            total[i] *= fade[i];
#pragma unroll
            for (int e = 2 * i; e < Tile::kKeys / 2; e += 4) {
                s[e] = exp2_approx(s[e] * factor - pivot);
                s[e + 1] = exp2_approx(s[e + 1] * factor - pivot);
                total[i] += s[e] + s[e + 1];
            }
        }
    }

    MMK_DEVICE void lessen() {
#pragma unroll
        for (int e = 0; e < kWidth / 2; e++) o[e] *= fade[e / 2 % 2];
    }

    MMK_DEVICE void round_weights() {
#pragma unroll
        for (int e = 0; e < Tile::kKeys / 4; e++) weights[e / 4][e % 4] = pack2<T>(s[2 * e], s[2 * e + 1]);
    }

    // What the weights become where values were not finite.
    MMK_DEVICE void spoil(const int* spoilt_rows, const Spans& spans, int key0, int lane) {
#pragma unroll
        for (int e = 0; e < Tile::kKeys / 4; e++) {
            const int i = e % 2, column = e / 2 * 8 + lane % 4 * 2;
            const auto nan = [&](int c) { return spoilt_rows[c] != 0 && spans.see(i, key0 + c) ? 0x7FFFu : 0u; };
            weights[e / 4][e % 4] |= nan(column) | nan(column + 1) << 16;
        }
    }

    // The warp's rows of `out` and of lse.
    MMK_DEVICE void store(const Matrix<T>& out, float* lse, int present, int lane) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            total[i] += __shfl_xor_sync(kAllLanes, total[i], 1);
            total[i] += __shfl_xor_sync(kAllLanes, total[i], 2);
            const bool empty = total[i] == 0;
            const float factor = empty ? 0.0f : 1.0f / total[i];
            const int row = lane / 4 + 8 * i;
            if (lane % 4 == 0 && row < present) lse[row] = empty ? -INFINITY : (top[i] + log2f(total[i])) * kLn2;
#pragma unroll
            for (int n = 0; n < kWidth / 8; n += 4) {
                uint32_t both[4] = {};
#pragma unroll
                for (int j = 0; j < 4 && n + j < kWidth / 8; j++) {
                    const int e = (n + j) * 4 + 2 * i;
                    both[j] = pack2<T>(o[e] * factor, o[e + 1] * factor);
                }
                gather(both, lane);
                if (row < present) store_chunk(out, row, (n + lane % 4) * 8, both);
            }
        }
    }

  private:
    // Lane 4 g + t has two of the eight columns of four chunks, and gets the eight of chunk t: a transposition.
    MMK_DEVICE static void gather(uint32_t (&x)[4], int lane) {
#pragma unroll
        for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                const int low = bit == 1 ? 2 * pair : pair, high = low + bit;
                const bool upper = (lane & bit) != 0;
                const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? x[low] : x[high], bit);
                (upper ? x[low] : x[high]) = other;
            }
        }
    }

    MMK_DEVICE static void store_chunk(const Matrix<T>& out, int row, int column, const uint32_t (&chunk)[4]) {
        if (column >= out.width) return;
        T* const to = out.data + row * out.stride + column;
        if (out.aligned) {
            *reinterpret_cast<uint4*>(to) = {chunk[0], chunk[1], chunk[2], chunk[3]};
            return;
        }
        T numbers[8];
        memcpy(numbers, chunk, sizeof numbers);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (column + j < out.width) to[j] = numbers[j];
        }
    }
};

// The two warpgroups' turns at issuing products: `group` waits for its own, and gives the other its.
struct Turns {
    static constexpr int kMine = 1;  // the first of two named barriers
    int group;
    MMK_DEVICE void take() const { named_barrier_sync(kMine + group, kGroups * kWarpgroup); }
    MMK_DEVICE void pass() const { named_barrier_arrive(kMine + 1 - group, kGroups * kWarpgroup); }
};

template <class T, int kWidth>
struct Consumer {
    using Tile = Tiling<kWidth>;
    const SpanAttention& p;
    const Shared<kWidth>& shared;
    int group, row, lane;  // row: the first of the two the thread holds, of the tile's
    Turns turns;
    Position<1> query;
    Position<Tile::kStages> at;  // of the step

    MMK_DEVICE Consumer(const SpanAttention& p, const Shared<kWidth>& shared, int warp, int lane)
        : p(p), shared(shared), group(warp / 4), row(warp * 16 + lane / 4), lane(lane), turns{group} {}

    // Each warp for itself, since it has waited for its own reads only.
    MMK_DEVICE void release(uint64_t* empty) const {
        if (lane == 0) mbarrier_arrive(empty);
    }
    MMK_DEVICE static uint32_t tile_of(const unsigned char* tiles, const Position<Tile::kStages>& at) {
        return shared_address(tiles) + at.stage * Tile::kBytes;
    }

    MMK_DEVICE void attend(const Queries& tile, const Factors& factors, Attention<T, kWidth>& attention) {
        Control<kWidth>& control = *shared.control;
        const uint32_t queries = shared_address(shared.queries) + group * kGroupRows * Tile::kPitch;
        Walk<Tile::kKeys> walk(tile);
        Spans spans = walk.spans(p, row);  // mostly the first run is it: no need to wait for its hull first
        if (!walk.advance(p)) return;
        if (walk.run > 0) spans = walk.spans(p, row);

        mbarrier_wait(&control.query_full, query.parity);
        query = query.after();
        mbarrier_wait(&control.key_full[at.stage], at.parity);
        turns.take();
        attention.score(queries, tile_of(shared.keys, at));
        turns.pass();
        wgmma_wait<0>(attention.s);
        for (bool first = true;; first = false) {
            release(&control.key_empty[at.stage]);
            if (factors.capped) {
                attention.each(lane, [&](float& s, int, int) { s = factors.cap(s); });
            } else if (!factors.plain) {
                attention.each(lane, [&](float& s, int, int) { s *= factors.before; });
            }
            if (walk.masked()) {
                attention.each(lane, [&](float& s, int i, int column) {
                    if (!spans.see(i, walk.key0 + column)) s = -INFINITY;
                });
            }
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
            if (walk.masked()) {
                mbarrier_wait(&control.value_clean[at.stage], at.parity);
                const int* const some = control.some_spoilt[at.stage];
                if ((some[0] | some[1] | some[2]) != 0) {
                    attention.spoil(control.spoilt[at.stage], spans, walk.key0, lane);
                }
            }
            turns.take();
            if (!more) break;
            const int run = walk.run;
            walk.advance(p);
            if (walk.run != run) spans = walk.spans(p, row);
            at = at.after();
            attention.score(queries, tile_of(shared.keys, at));
            attention.add(tile_of(shared.values, at.before()));
            turns.pass();
            wgmma_wait<1>(attention.s);
        }
        attention.add(tile_of(shared.values, at));
        turns.pass();
        wgmma_wait<0>(attention.o);
        release(&control.value_empty[at.stage]);
        at = at.after();
    }

    MMK_DEVICE void run() {
        const Factors factors(p);
        if (group == 1) turns.pass();  // the first is group 0's
        each_tile(p, [&](const Queries& tile) {
            Attention<T, kWidth> attention;
            attend(tile, factors, attention);
            const int row0 = tile.row0 + row - lane / 4;
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
    const Shared<kWidth> shared(begin);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);  // nvcc knows it is the warp's
    if (threadIdx.x == 0) shared.control->init();
    __syncthreads();

    if (warp >= kWarpgroup / kWarp) {
        take_registers<kManyRegisters>();
        Consumer<T, kWidth>(p, shared, warp - kWarpgroup / kWarp, lane).run();
        return;
    }
    release_registers<kFewRegisters>();
    if (warp < kScanners) {
        scan_values<T, kWidth>(p, shared, warp, lane);
    } else if (elect_one()) {
        copy_tiles<kWidth>(p, &map_q, &map_k, &map_v, shared);
    }
#endif
}

// ---- launching

constexpr int64_t kLargestStride = int64_t{1} << 39;  // in elements: a map holds 40 bits of bytes

// A dimension of one element is never stepped along.
bool readable(const Heads& x, int batch, int tokens, int heads) {
    const auto steps = [](int size, int64_t stride) {
        return size <= 1 || (stride % 8 == 0 && stride > 0 && stride < kLargestStride);
    };
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && steps(batch, x.batch) && steps(tokens, x.row) &&
           steps(heads, x.head);
}

template <class T, int kWidth>
Error encode_heads(CUtensorMap& map, const Heads& x, int batch, int tokens, int heads, int width, int rows) {
    using Tile = Tiling<kWidth>;
    const auto bytes = [](int size, int64_t stride) {
        return static_cast<uint64_t>(size <= 1 ? kLargestHead : stride) * sizeof(T);
    };
    const auto count = [](int size) { return static_cast<uint64_t>(size); };
    const TensorLayout<4> layout{x.data,
                                 {count(width), count(heads), count(tokens), count(batch)},
                                 {bytes(heads, x.head), bytes(tokens, x.row), bytes(batch, x.batch)},
                                 {Tile::kPiece, 1, static_cast<uint32_t>(rows), 1},
                                 static_cast<RowSwizzle>(Tile::kPitch)};
    return encode<T>(map, "span_attention_forward_sm90", layout);
}

template <class T, int kWidth>
Error run(const SpanAttention& call, unsigned tiles, cudaStream_t stream) {
    constexpr int kKeys = Tiling<kWidth>::kKeys;
    CUtensorMap q, k, v;
    if (Error error = encode_heads<T, kWidth>(q, call.q, call.batch, call.queries, call.heads, call.head_size, kRows)) {
        return error;
    }
    k = v = q;  // without keys nothing is loaded
    if (call.keys > 0) {
        const auto encode_keys = [&](CUtensorMap& map, const Heads& x, int width) {
            return encode_heads<T, kWidth>(map, x, call.batch, call.keys, call.key_heads, width, kKeys);
        };
        if (Error error = encode_keys(k, call.k, call.head_size)) return error;
        if (Error error = encode_keys(v, call.v, call.value_size)) return error;
    }
    int multiprocessors = 0;
    if (Error error = count_multiprocessors(multiprocessors)) return error;
    const unsigned blocks = std::min(tiles, static_cast<unsigned>(multiprocessors));
    const Launch at{"span_attention_forward_sm90", blocks, kThreads, Shared<kWidth>::kBytes, stream};
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
    return run<T, 256>(call, tiles, stream);
}

}  // namespace

bool span_attention_forward_sm90_serves(const SpanAttention& call) {
    return readable(call.q, call.batch, call.queries, call.heads) &&
           readable(call.k, call.batch, call.keys, call.key_heads) &&
           readable(call.v, call.batch, call.keys, call.key_heads);
}

Error span_attention_forward_sm90(const SpanAttention& call, cudaStream_t stream) {
    const std::string name = "span_attention_forward_sm90";
    if (Error error = without_sm90a(name.c_str())) return error;
    if (Error error = wrong_sizes(name, call)) return error;
    if (!span_attention_forward_sm90_serves(call)) {
        return Error(name + ": q, k and v have to begin, and their strides to be, at multiples of 16 bytes");
    }
    const int64_t tiles = (int64_t{call.queries} + kRows - 1) / kRows * call.heads * call.batch;
    if (tiles > INT_MAX || call.queries > INT_MAX - kRows || call.keys > INT_MAX - kRows) {
        return Error(name + ": more queries or keys than 32 bits number");
    }
    if (tiles == 0) return {};
    const auto count = static_cast<unsigned>(tiles);
    return call.bfloat16 ? run<BFloat16>(call, count, stream) : run<Float16>(call, count, stream);
}

}  // namespace mmk::cuda
