// The passes of the contrastive losses over tiles of the logits, for sm_90a: TMA, wgmma, a persistent grid.
//
//   CLIP, pass 1:  of each row and each column of a tile of S the maximum m and the sum of exp(S - m); the diagonal
//   CLIP, pass 2:  N dS_ij = exp(S_ij - m_i) / 2 r_i + exp(S_ij - m'_j) / 2 r'_j - (1 - e) d_ij - e/N, and its sum with
//                  I T^T
//   SigLIP:        N dS_ij = -z / (1 + exp(x)), its sum, its sum with I T^T, and the loss, log(1 + exp(-x)) summed
//
// A block has the multiprocessor to itself and walks over tiles of 128 x 256 logits. One thread copies 64 columns of
// both features at a time, four steps ahead, also while a tile is being finished. Two warpgroups multiply, 64 rows
// each. The second lets the first go ahead by a few steps: so one takes exponentials while the other has the tensor
// cores, instead of both waiting for the same. What they found is joined by the second, which comes later anyway.
//
// Memory moved: (128 + 256) D numbers of features a tile, mostly out of the L2 cache: 16 rows of tiles are walked
// column by column. Two exponentials a logit take 4096 cycles a tile, its products 16 D: from D of about 300 on the
// products are the limit if L2 delivers 48 bytes a cycle and multiprocessor, and not much more than 40 if it does not.
#include <algorithm>
#include <climits>
#include <cmath>

#include "contrastive_device.h"
#include "contrastive_tiles.h"
#include "tensor_map.h"
#include "wgmma.h"

namespace mmk::cuda {
namespace {

constexpr int kTileRows = 128, kTileColumns = 256,
              kStep = 64;                // a step's rows have 128 bytes, the width of the swizzle
constexpr int kStages = 4, kGroups = 2;  // groups: the warpgroups that multiply
constexpr int kConsumers = kGroups * kWarpgroup, kConsumerWarps = kConsumers / kWarp,
              kThreads = kConsumers + kWarpgroup;
constexpr int kImageBytes = kTileRows * kStep * 2, kTextBytes = kTileColumns * kStep * 2;
constexpr int kStageBytes = kImageBytes + kTextBytes;
constexpr int kLead = kStages - 1;  // steps that the first group goes ahead
constexpr int kWalkedRows = 16;     // of tiles, walked column by column

enum Barrier { kLeadTaken = 1, kLeft, kJoined, kGroup };  // kGroup: and the one after it, of each warpgroup

// ---- tiles

struct Tile {
    int m, n;  // its number in either direction
    int row0, column0;
};

// Where a thread that multiplies stands. It holds, in d[i], row `row` + 8 (i / 2 % 2) of the tile and column `column`
// + 8 (i / 4) + i % 2.
struct Place {
    int group, thread, warp, lane;  // thread: of its group; warp: of the block
    int row, column;

    MMK_DEVICE Place() {
        const int thread_of_block = static_cast<int>(threadIdx.x);
        warp = __shfl_sync(kAllLanes, thread_of_block / kWarp, 0);  // the same for the warp, as the compiler sees it
        lane = thread_of_block % kWarp;
        group = warp / (kWarpgroup / kWarp);
        thread = thread_of_block % kWarpgroup;
        row = warp * 16 + lane / 4;
        column = lane % 4 * 2;
    }
};

// Of a thread's row j, columns of the tile from its first one on: it has the first `ends[j]`, the one on the diagonal
// is `diagonal` + 8 j.
struct Bounds {
    int ends[2], diagonal;

    MMK_DEVICE Bounds(const Tile& tile, const Place& place, int end_row, int count) {
        const int row = tile.row0 + place.row, column = tile.column0 + place.column;
#pragma unroll
        for (int j = 0; j < 2; j++) ends[j] = row + 8 * j < end_row ? count - column : 0;
        diagonal = row - column;
    }
};

struct Walk {
    int tiles_m, tiles_n, first_row;

    MMK_DEVICE Walk(const Pairs& pairs, int row0, int row_count)
        : tiles_m((row_count + kTileRows - 1) / kTileRows),
          tiles_n((pairs.count + kTileColumns - 1) / kTileColumns),
          first_row(row0) {}
    MMK_DEVICE int size() const { return tiles_m * tiles_n; }
    MMK_DEVICE Tile at(int index) const {
        const TileAt at = grouped_tile<kWalkedRows>(index, tiles_m, tiles_n);
        return {at.row, at.column, first_row + at.row * kTileRows, at.column * kTileColumns};
    }
};

// ---- the ring of stages in shared memory

struct Ring {
    unsigned char* stages;
    uint64_t *full, *empty;
    int stage = 0, parity = 0;

    MMK_DEVICE explicit Ring(unsigned char* shared)
        : stages(shared), full(reinterpret_cast<uint64_t*>(shared + kStages * kStageBytes)), empty(full + kStages) {}
    MMK_DEVICE unsigned char* image() const { return stages + stage * kStageBytes; }
    MMK_DEVICE unsigned char* text() const { return image() + kImageBytes; }
    MMK_DEVICE void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};
constexpr int kRingBytes = kStages * kStageBytes + 1024;  // with its barriers; a multiple of the repeat of swizzles

MMK_DEVICE void start(const Ring& ring) {
    for (int stage = 0; stage < kStages; stage++) {
        mbarrier_init(ring.full + stage, 1);
        mbarrier_init(ring.empty + stage, kConsumerWarps);
    }
    mbarrier_init_fence();
}

// The one thread that copies.
MMK_DEVICE void produce(Ring& ring, const CUtensorMap* image, const CUtensorMap* text, const Walk& walk, int steps) {
    for (int index = static_cast<int>(blockIdx.x); index < walk.size(); index += static_cast<int>(gridDim.x)) {
        const Tile tile = walk.at(index);
        for (int step = 0; step < steps; step++) {
            uint64_t* const full = ring.full + ring.stage;
            mbarrier_wait(ring.empty + ring.stage, ring.parity ^ 1);
            mbarrier_arrive_expect(full, kStageBytes);
            tensor_load(ring.image(), image, {step * kStep, tile.row0}, full);
            tensor_load(ring.text(), text, {step * kStep, tile.column0}, full);
            ring.advance();
        }
    }
}

constexpr int kHeld = kTileColumns / 2;  // numbers of a tile that a thread holds

// d = the group's rows of image text^T
template <class T>
MMK_DEVICE void multiply(float (&d)[kHeld], Ring& ring, const Place& place, int steps) {
    // The first group cannot be a whole tile ahead of the second, nor reach the barrier again before that does, if
    // tiles are longer than the ring.
    const bool turns = steps > kStages;
    if (turns && place.group == 1) named_barrier_sync(kLeadTaken, kConsumers);
    int previous = 0;
    for (int step = 0; step < steps; step++) {
        if (turns && place.group == 0 && step == kLead) named_barrier_arrive(kLeadTaken, kConsumers);
        mbarrier_wait(ring.full + ring.stage, ring.parity);
        const uint32_t image = shared_address(ring.image()) + place.group * (kImageBytes / kGroups);
        const uint32_t text = shared_address(ring.text());
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStep / 16; k++) {
            const uint64_t a = matrix_descriptor(image + k * 32, 16, 1024, Swizzle::k128);
            const uint64_t b = matrix_descriptor(text + k * 32, 16, 1024, Swizzle::k128);
            wgmma<T, Major::kK, Major::kK>(d, a, b, step > 0 || k > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();  // the step before is done
        if (step > 0 && place.lane == 0) mbarrier_arrive(ring.empty + previous);
        previous = ring.stage;
        ring.advance();
    }
    wgmma_wait<0>(d);
    if (place.lane == 0) mbarrier_arrive(ring.empty + previous);
}

// ---- what the groups join: the first leaves its part in shared memory and goes on, the second makes the whole of it

MMK_DEVICE void before_leaving(const Place& place, bool first_tile) {
    if (place.group == 0 && !first_tile) named_barrier_sync(kJoined, kConsumers);
}
// True for the group that joins.
MMK_DEVICE bool leave(const Place& place) {
    if (place.group == 0) {
        named_barrier_arrive(kLeft, kConsumers);
        return false;
    }
    named_barrier_sync(kLeft, kConsumers);
    return true;
}
MMK_DEVICE void after_joining(bool last_tile) {
    if (!last_tile) named_barrier_arrive(kJoined, kConsumers);
    named_barrier_sync(kGroup + 1, kWarpgroup);
}

// Sums over the tile, in float32 and a fixed order; x: the thread's own. `shared`: kConsumerWarps of each.
template <int kSums>
MMK_DEVICE void sum_tile(float (&x)[kSums], float* shared, const Place& place, bool first_tile, bool last_tile,
                         float* sums, int64_t tile, int64_t tiles) {
#pragma unroll
    for (int i = 0; i < kSums; i++) {
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) x[i] += __shfl_xor_sync(kAllLanes, x[i], lanes);
    }
    before_leaving(place, first_tile);
    if (place.lane == 0) {
#pragma unroll
        for (int i = 0; i < kSums; i++) shared[i * kConsumerWarps + place.warp] = x[i];
    }
    if (!leave(place)) return;
    if (place.thread < kSums) {
        float sum = 0;
        for (int warp = 0; warp < kConsumerWarps; warp++) sum += shared[place.thread * kConsumerWarps + warp];
        sums[place.thread * tiles + tile] = sum;
    }
    after_joining(last_tile);
}

// ---- CLIP, pass 1

MMK_DEVICE Statistic statistic_of(float x, float y) { return {fmaxf(x, y), 1.0f + exp2_approx(-fabsf(x - y))}; }

// Eight lanes 4 g + t hold the same columns, each of rows of its own. Lanes l and l ^ 4 kHalf share them out; after
// kHalf = 4, 2, 1 lane 4 g + t has the g-th eighth of the columns, of all rows.
template <int kHalf, int kColumns>
MMK_DEVICE void share_out(Statistic (&x)[kColumns], int lane) {
    constexpr int kKept = kColumns / 8 * kHalf;
    const bool upper = (lane & 4 * kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kKept; i++) {
        const Statistic kept = upper ? x[i + kKept] : x[i], given = upper ? x[i] : x[i + kKept];
        const float maximum = __shfl_xor_sync(kAllLanes, given.maximum, 4 * kHalf);
        const float sum = __shfl_xor_sync(kAllLanes, given.sum, 4 * kHalf);
        x[i] = merged(kept, {maximum, sum});
    }
}

template <class T>
struct ClipStatisticsPass {
    using Call = StatisticsTiles;
    static constexpr int kSharedBytes = kConsumerWarps * kTileColumns * static_cast<int>(sizeof(Statistic));

    static constexpr int kColumns = 64;  // found at a time

    const Call& call;
    const Place& place;
    Statistic* found;  // [warp][column]: over the warp's rows
    float factor;

    MMK_DEVICE ClipStatisticsPass(const Call& call, const Place& place, unsigned char* shared, const CUtensorMap*)
        : call(call), place(place), found(reinterpret_cast<Statistic*>(shared)), factor(log2_scale(call.pairs)) {}

    MMK_DEVICE void prepare(const Tile&) {}

    MMK_DEVICE void finish(float (&d)[kHeld], const Tile& tile, const Walk& walk, bool first_tile, bool last_tile) {
        const Bounds bounds(tile, place, call.row0 + call.row_count, call.pairs.count);
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            const bool inside = i / 4 * 8 + i % 2 < bounds.ends[i / 2 % 2];
            d[i] = inside ? rounded_product(d[i], factor) : kLowest;
        }
        store_diagonal(d, tile, bounds);
        store_rows(d, tile, walk, bounds);
        before_leaving(place, first_tile);
#pragma unroll
        for (int strip = 0; strip < kTileColumns / kColumns; strip++) find_columns(d, strip);
        if (!leave(place)) return;
        store_columns(tile, walk);
        after_joining(last_tile);
    }

    MMK_DEVICE void store_diagonal(const float (&d)[kHeld], const Tile& tile, const Bounds& bounds) const {
        if (tile.row0 + kTileRows <= tile.column0 || tile.column0 + kTileColumns <= tile.row0) return;
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            const int right = i / 4 * 8 + i % 2, j = i / 2 % 2;
            if (right == bounds.diagonal + 8 * j && right < bounds.ends[j]) {
                call.diagonal[tile.row0 + place.row + 8 * j] = d[i];
            }
        }
    }

    MMK_DEVICE void store_rows(const float (&d)[kHeld], const Tile& tile, const Walk& walk,
                               const Bounds& bounds) const {
        float* const parts = call.row_parts + static_cast<int64_t>(tile.n) * call.row_count;
        const int row = tile.row0 - call.row0 + place.row;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float top = kLowest, sum = 0;
#pragma unroll
            for (int i = 0; i < kHeld; i += 4) top = fmaxf(top, fmaxf(d[i + 2 * j], d[i + 2 * j + 1]));
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
#pragma unroll
            for (int i = 0; i < kHeld; i += 4) {
                sum += exp2_approx(d[i + 2 * j] - top) + exp2_approx(d[i + 2 * j + 1] - top);
            }
            sum += __shfl_xor_sync(kAllLanes, sum, 1);
            sum += __shfl_xor_sync(kAllLanes, sum, 2);
            if (place.lane % 4 == 0 && bounds.ends[j] > 0) {
                parts[row + 8 * j] = top;
                parts[static_cast<int64_t>(walk.tiles_n) * call.row_count + row + 8 * j] = sum;
            }
        }
    }

    // Over the warp's sixteen rows; a lane ends with two columns of the strip.
    MMK_DEVICE void find_columns(const float (&d)[kHeld], int strip) const {
        Statistic x[kColumns / 4];
#pragma unroll
        for (int i = 0; i < kColumns / 4; i++) {
            const int first = strip * (kColumns / 2) + i / 2 * 4 + i % 2;
            x[i] = statistic_of(d[first], d[first + 2]);
        }
        share_out<4>(x, place.lane);
        share_out<2>(x, place.lane);
        share_out<1>(x, place.lane);
        Statistic* const to = found + place.warp * kTileColumns + strip * kColumns + place.lane / 4 * 8 + place.column;
        *reinterpret_cast<float4*>(to) = float4{x[0].maximum, x[0].sum, x[1].maximum, x[1].sum};
    }

    MMK_DEVICE void store_columns(const Tile& tile, const Walk& walk) const {
        float* const parts = call.column_parts + static_cast<int64_t>(tile.m) * call.pairs.count + tile.column0;
#pragma unroll
        for (int i = 0; i < kTileColumns / kWarpgroup; i++) {
            const int column = i * kWarpgroup + place.thread;
            Statistic all = found[column];
#pragma unroll
            for (int warp = 1; warp < kConsumerWarps; warp++) all = merged(all, found[warp * kTileColumns + column]);
            if (column >= call.pairs.count - tile.column0) continue;
            parts[column] = all.maximum;
            parts[static_cast<int64_t>(walk.tiles_m) * call.pairs.count + column] = all.sum;
        }
    }
};

// ---- ds, 16-bit numbers: a warp's rows of a strip at a time, by way of shared memory, where two strips take turns

constexpr int kStrip = 32;  // columns
constexpr int kStripBytes = 16 * kStrip * 2;

struct Strips {
    uint32_t* shared;  // of the warp
    const CUtensorMap* map;
    const Place& place;

    MMK_DEVICE Strips(unsigned char* shared, const CUtensorMap* map, const Place& place)
        : shared(reinterpret_cast<uint32_t*>(shared + place.warp * 2 * kStripBytes)), map(map), place(place) {}

    MMK_DEVICE void begin() const {
        if (elect_one()) bulk_store_wait_read<1>();  // of the strip before the one before
        __syncwarp();
    }
    // Columns place.column + 8 n and the next of row place.row + 8 j. Rows of 64 bytes, in chunks of 16 that lie where
    // the swizzle has them: what a warp puts at a time falls into different banks.
    MMK_DEVICE void put(int strip, int n, int j, uint32_t both) const {
        const int row = place.lane / 4 + 8 * j, chunk = n ^ row / 2 % 4;
        shared[strip % 2 * (kStripBytes / 4) + row * (kStrip / 2) + chunk * 4 + place.lane % 4] = both;
    }
    MMK_DEVICE void send(int strip, int row, int column) const {
        async_proxy_fence();
        __syncwarp();
        if (elect_one()) {
            tensor_store(map, {column, row}, shared + strip % 2 * (kStripBytes / 4));
            bulk_store_commit();
        }
    }
    MMK_DEVICE void finish() const {
        if (elect_one()) bulk_store_wait_read<0>();
    }
};
constexpr int kStripsBytes = kConsumerWarps * 2 * kStripBytes;

// ---- CLIP, pass 2

// Of a row or a column: half its softmax, times what ds is stored with.
struct SoftmaxWeight {
    float maximum, weight;

    MMK_DEVICE float of(float s) const { return exp2_approx(s - maximum) * weight; }
};
MMK_DEVICE SoftmaxWeight softmax_weight(const float* statistics, int i, int count) {
    if (i >= count) return {0, 0};
    return {statistics[i], 0.5f * kGradientScale * reciprocal_approx(statistics[int64_t{count} + i])};
}

template <class T>
struct ClipGradientPass {
    using Call = GradientTiles;
    static constexpr int kWeightsBytes = kTileColumns * static_cast<int>(sizeof(SoftmaxWeight));  // of a group
    static constexpr int kSharedBytes = kStripsBytes + kGroups * kWeightsBytes + kConsumerWarps * 4;

    const Call& call;
    const Place& place;
    Strips strips;
    SoftmaxWeight* columns;  // of the tile, for this group
    float* sums;
    float factor;
    SoftmaxWeight row[2], column[kTileColumns / kWarpgroup];  // of the tile to come; columns: the thread's share

    MMK_DEVICE ClipGradientPass(const Call& call, const Place& place, unsigned char* shared, const CUtensorMap* ds)
        : call(call),
          place(place),
          strips(shared, ds, place),
          columns(reinterpret_cast<SoftmaxWeight*>(shared + kStripsBytes + place.group * kWeightsBytes)),
          sums(reinterpret_cast<float*>(shared + kStripsBytes + kGroups * kWeightsBytes)),
          factor(log2_scale(call.pairs)) {}

    MMK_DEVICE void prepare(const Tile& tile) {
        const int count = call.pairs.count;
#pragma unroll
        for (int j = 0; j < 2; j++) row[j] = softmax_weight(call.rows, tile.row0 + place.row + 8 * j, count);
#pragma unroll
        for (int i = 0; i < kTileColumns / kWarpgroup; i++) {
            column[i] = softmax_weight(call.columns, tile.column0 + i * kWarpgroup + place.thread, count);
        }
    }

    MMK_DEVICE void finish(float (&d)[kHeld], const Tile& tile, const Walk& walk, bool first_tile, bool last_tile) {
        named_barrier_sync(kGroup + place.group, kWarpgroup);  // nobody reads those of the tile before
#pragma unroll
        for (int i = 0; i < kTileColumns / kWarpgroup; i++) columns[i * kWarpgroup + place.thread] = column[i];
        named_barrier_sync(kGroup + place.group, kWarpgroup);

        const Bounds bounds(tile, place, call.row0 + call.row_count, call.pairs.count);
        const float off_target = call.off_target * kGradientScale, on_target = call.on_target * kGradientScale;
        float total[1] = {0};
#pragma unroll
        for (int strip = 0; strip < kTileColumns / kStrip; strip++) {
            strips.begin();
#pragma unroll
            for (int n = 0; n < kStrip / 8; n++) {
                const int right = strip * kStrip + n * 8;
                const float4 both = *reinterpret_cast<const float4*>(columns + right + place.column);
                const SoftmaxWeight pair[2] = {{both.x, both.y}, {both.z, both.w}};
                float ds[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float product = d[right / 2 + i], s = rounded_product(product, factor);
                    const int e = i % 2, j = i / 2;
                    ds[i] = row[j].of(s) + (pair[e].of(s) - off_target);
                    if (right + e == bounds.diagonal + 8 * j) ds[i] -= on_target;
                    if (right + e >= bounds.ends[j]) ds[i] = 0;
                    total[0] += ds[i] * product;
                }
                strips.put(strip, n, 0, pack2<T>(ds[0], ds[1]));
                strips.put(strip, n, 1, pack2<T>(ds[2], ds[3]));
            }
            strips.send(strip, tile.row0 - call.row0 + place.warp * 16, tile.column0 + strip * kStrip);
        }
        if (last_tile) strips.finish();
        total[0] *= 1 / kGradientScale;
        const int64_t number = static_cast<int64_t>(tile.m) * walk.tiles_n + tile.n;
        sum_tile(total, sums, place, first_tile, last_tile, call.sums, number, walk.size());
    }
};

// ---- SigLIP

template <class T, bool kWithGradient>
struct SigLipPass {
    using Call = GradientTiles;
    static constexpr int kSums = kWithGradient ? 3 : 1;
    static constexpr int kSharedBytes = kStripsBytes + kConsumerWarps * kSums * 4;

    const Call& call;
    const Place& place;
    Strips strips;
    float* sums;
    float scale, bias;

    MMK_DEVICE SigLipPass(const Call& call, const Place& place, unsigned char* shared, const CUtensorMap* ds)
        : call(call),
          place(place),
          strips(shared, ds, place),
          sums(reinterpret_cast<float*>(shared + kStripsBytes)),
          scale(*call.pairs.scale),
          bias(*call.pairs.bias) {}

    MMK_DEVICE void prepare(const Tile&) {}

    MMK_DEVICE void finish(float (&d)[kHeld], const Tile& tile, const Walk& walk, bool first_tile, bool last_tile) {
        const Bounds bounds(tile, place, call.row0 + call.row_count, call.pairs.count);
        float total[kSums] = {};
#pragma unroll
        for (int strip = 0; strip < kTileColumns / kStrip; strip++) {
            if constexpr (kWithGradient) strips.begin();
#pragma unroll
            for (int n = 0; n < kStrip / 8; n++) {
                const int right = strip * kStrip + n * 8;
                float ds[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float product = d[right / 2 + i];
                    const int e = i % 2, j = i / 2;
                    const bool positive = right + e == bounds.diagonal + 8 * j;
                    const float logit = product * scale + bias, y = positive ? -logit : logit;
                    const Sigmoid pair(right + e < bounds.ends[j] ? y : kLowest);  // of no pair: 0
                    total[0] += pair.loss;
                    if constexpr (kWithGradient) {
                        ds[i] = positive ? -pair.slope : pair.slope;
                        total[1] += ds[i] * product;
                        total[2] += ds[i];
                    }
                }
                if constexpr (kWithGradient) {
                    strips.put(strip, n, 0, pack2<T>(ds[0] * kGradientScale, ds[1] * kGradientScale));
                    strips.put(strip, n, 1, pack2<T>(ds[2] * kGradientScale, ds[3] * kGradientScale));
                }
            }
            if constexpr (kWithGradient) {
                strips.send(strip, tile.row0 - call.row0 + place.warp * 16, tile.column0 + strip * kStrip);
            }
        }
        if (kWithGradient && last_tile) strips.finish();
        const int64_t number = static_cast<int64_t>(tile.m) * walk.tiles_n + tile.n;
        sum_tile(total, sums, place, first_tile, last_tile, call.sums, number, walk.size());
    }
};

// ---- the kernel

template <class T, class Pass>
__global__ __launch_bounds__(kThreads, 1) void contrastive_sm90_kernel(const __grid_constant__ CUtensorMap image,
                                                                       const __grid_constant__ CUtensorMap text,
                                                                       const __grid_constant__ CUtensorMap ds,
                                                                       const __grid_constant__
                                                                       typename Pass::Call call) {
#if MMK_SM90A
    MMK_DYNAMIC_SHARED(shared);
    Ring ring(shared);
    if (threadIdx.x == 0) start(ring);
    __syncthreads();

    const Place place;
    const Walk walk(call.pairs, call.row0, call.row_count);
    const int steps = (call.pairs.width + kStep - 1) / kStep;
    if (place.warp >= kConsumerWarps) {
        release_registers<24>();
        if (place.warp == kConsumerWarps && elect_one()) produce(ring, &image, &text, walk, steps);
        return;
    }
    take_registers<240>();
    Pass pass(call, place, shared + kRingBytes, &ds);
    const int first = static_cast<int>(blockIdx.x), stride = static_cast<int>(gridDim.x);
    float d[kHeld];
    for (int index = first; index < walk.size(); index += stride) {
        const Tile tile = walk.at(index);
        pass.prepare(tile);
        multiply<T>(d, ring, place, steps);
        pass.finish(d, tile, walk, index == first, walk.size() - index <= stride);
    }
#endif
}

// ---- launching

struct Box {
    uint32_t columns, rows;
};

template <class T>
Error encode_rows(CUtensorMap& map, const char* kernel, const void* rows, int64_t stride, int count, int width,
                  const Box& box) {
    const TensorLayout<2> layout{rows,
                                 {static_cast<uint64_t>(width), static_cast<uint64_t>(count)},
                                 {static_cast<uint64_t>(stride) * sizeof(T)},
                                 {box.columns, box.rows},
                                 box.columns * sizeof(T) == 128 ? RowSwizzle::k128 : RowSwizzle::k64};
    return encode<T>(map, kernel, layout);
}

template <class T, class Pass>
Error run(const char* kernel, const typename Pass::Call& call, void* ds, int64_t ds_stride, cudaStream_t stream) {
    const Pairs& pairs = call.pairs;
    const auto encode_features = [&](CUtensorMap& map, const Features& features, uint32_t rows) {
        return encode_rows<T>(map, kernel, features.data, features.stride, pairs.count, pairs.width, {kStep, rows});
    };
    CUtensorMap image, text, of_ds{};
    if (Error error = encode_features(image, pairs.image, kTileRows)) return error;
    if (Error error = encode_features(text, pairs.text, kTileColumns)) return error;
    if (ds != nullptr) {  // columns up to the next multiple of 8 become zero
        const int columns = (pairs.count + 7) / 8 * 8;
        if (Error error = encode_rows<T>(of_ds, kernel, ds, ds_stride, call.row_count, columns, {kStrip, 16}))
            return error;
    }
    int blocks;
    if (Error error = count_multiprocessors(blocks)) return error;
    const auto tiles_of = [](int64_t size, int tile) { return (size + tile - 1) / tile; };
    const int64_t tiles = tiles_of(call.row_count, kTileRows) * tiles_of(pairs.count, kTileColumns);
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tiles, blocks)));
    const Launch at{kernel, grid, kThreads, kRingBytes + Pass::kSharedBytes, stream};
    return launch(at, contrastive_sm90_kernel<T, Pass>, image, text, of_ds, call);
}

Error clip_statistics(const StatisticsTiles& call, cudaStream_t stream) {
    const char* const kernel = "clip_statistics_sm90";
    if (call.pairs.bfloat16) return run<BFloat16, ClipStatisticsPass<BFloat16>>(kernel, call, nullptr, 0, stream);
    return run<Float16, ClipStatisticsPass<Float16>>(kernel, call, nullptr, 0, stream);
}

Error clip_gradient(const GradientTiles& call, cudaStream_t stream) {
    const char* const kernel = "clip_gradient_sm90";
    if (call.pairs.bfloat16) {
        return run<BFloat16, ClipGradientPass<BFloat16>>(kernel, call, call.ds, call.ds_stride, stream);
    }
    return run<Float16, ClipGradientPass<Float16>>(kernel, call, call.ds, call.ds_stride, stream);
}

template <class T>
Error siglip(const GradientTiles& call, cudaStream_t stream) {
    const char* const kernel = "siglip_sm90";
    if (call.ds == nullptr) return run<T, SigLipPass<T, false>>(kernel, call, nullptr, 0, stream);
    return run<T, SigLipPass<T, true>>(kernel, call, call.ds, call.ds_stride, stream);
}
Error siglip(const GradientTiles& call, cudaStream_t stream) {
    return call.pairs.bfloat16 ? siglip<BFloat16>(call, stream) : siglip<Float16>(call, stream);
}

template <class Tiles>
TilePass<Tiles> pass_by(Error (*run)(const Tiles&, cudaStream_t)) {
    return {kTileRows, kTileColumns, run};
}

}  // namespace

bool contrastive_sm90_serves(const Pairs& pairs) {
    const auto readable = [](const Features& x) {  // by TMA
        return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 8 == 0 && x.stride < int64_t{1} << 39;
    };
    return pairs.width > 0 && readable(pairs.image) && readable(pairs.text);
}

Error clip_forward_sm90(const ClipForward& call, cudaStream_t stream) {
    return clip_forward_by(pass_by<StatisticsTiles>(clip_statistics), call, stream);
}
Error clip_gradient_sm90(const ClipGradient& call, cudaStream_t stream) {
    return clip_gradient_by(pass_by<GradientTiles>(clip_gradient), call, stream);
}
Error siglip_sm90(const LogitRows& call, cudaStream_t stream) {
    return siglip_by(pass_by<GradientTiles>(siglip), call, stream);
}

}  // namespace mmk::cuda
