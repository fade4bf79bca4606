// Tiles of the logits on Hopper: how a block walks over them, fills them by TMA and wgmma, and lets go of what was made
// of them. Part of tiles_sm90.cu.
#pragma once
#include "cuda/contrastive/device.h"
#include "cuda/isa/cluster.h"
#include "cuda/isa/tensor_map.h"
#include "cuda/isa/wgmma.h"

namespace mmk::cuda::contrastive_sm90 {

// 64 columns of features, 128 bytes a row, are a step; of the warpgroups two multiply, and a thread of the third
// copies.
constexpr int kTileRows = 128, kTileColumns = 256, kStep = 64, kStages = 4, kGroups = 2;
constexpr int kConsumers = kGroups * kWarpgroup, kConsumerWarps = kConsumers / kWarp;
constexpr int kThreads = kConsumers + kWarpgroup;
constexpr int kImageBytes = kTileRows * kStep * 2, kTextBytes = kTileColumns * kStep * 2;
constexpr int kStageBytes = kImageBytes + kTextBytes;
constexpr int kLead = kStages - 1;       // steps by which the first group goes ahead of the second
constexpr int kCluster = 2;              // blocks, of neighbouring rows of tiles, that share the text's
constexpr int kWalkedRows = 16;          // of tiles, walked column by column
constexpr int kHeld = kTileColumns / 2;  // numbers of a tile that a thread holds
constexpr int kMostShared = 227 * 1024;  // that a block may have

enum Barrier { kAhead = 1, kLeft, kJoined, kGroup };  // kGroup + i: of warpgroup i

// ---- tiles

struct Tile {
    int m, n;                // its number in either direction
    int row0, column0, own;  // own: the column, counted from column0 on, at the offset from row0

    template <class Call>
    MMK_DEVICE bool whole(const Call& call) const {
        return row0 + kTileRows <= call.row0 + call.row_count && column0 + kTileColumns <= call.pairs.texts;
    }
    // The last row of tiles, if the cluster has no more.
    template <class Call>
    MMK_DEVICE bool exists(const Call& call) const {
        return row0 < call.row0 + call.row_count;
    }
    MMK_DEVICE bool crosses_own_pairs() const { return own < kTileColumns && own > -kTileRows; }
    // Every pair is there, and none belongs together.
    MMK_DEVICE bool plain(const GradientTiles& call) const { return whole(call) && !crosses_own_pairs(); }
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

// Of a thread's row j, columns of the tile from its first one on: it has the first `ends[j]`, its own pair is at
// `own` + 8 j.
struct Bounds {
    int ends[2], own;

    MMK_DEVICE Bounds(const Tile& tile, const Place& place, int end_row, const Pairs& pairs) {
        const int row = tile.row0 + place.row, column = tile.column0 + place.column;
#pragma unroll
        for (int j = 0; j < 2; j++) ends[j] = row + 8 * j < end_row ? pairs.texts - column : 0;
        own = tile.own + place.row - place.column;
    }
};

// The ids of a tile: of the thread's rows, and of its columns, of which a thread needs so many that they go through
// shared memory, each group's own. kAlone: of those that have one positive.
template <bool kAlone>
struct Ids {
    static constexpr int kBytes = kGroups * kTileColumns * static_cast<int>(sizeof(int));

    int* columns;
    int row[2], mine[kTileColumns / kWarpgroup];  // mine: columns that the thread puts there

    MMK_DEVICE Ids(unsigned char* shared, const Place& place)
        : columns(reinterpret_cast<int*>(shared) + place.group * kTileColumns) {}

    // Loads only: nothing waits for them before the products are done.
    template <class Call>
    MMK_DEVICE void load(const Call& call, const Tile& tile, const Place& place) {
        const int end = call.row0 + call.row_count;
#pragma unroll
        for (int j = 0; j < 2; j++) row[j] = image_id<kAlone>(call.pairs, tile.row0 + place.row + 8 * j, end);
#pragma unroll
        for (int i = 0; i < kTileColumns / kWarpgroup; i++) {
            const int column = tile.column0 + i * kWarpgroup + place.thread;
            mine[i] = text_id<kAlone>(call.pairs, column, call.pairs.texts);
        }
    }
    // Between two barriers of the group.
    MMK_DEVICE void put(const Place& place) const {
#pragma unroll
        for (int i = 0; i < kTileColumns / kWarpgroup; i++) columns[i * kWarpgroup + place.thread] = mine[i];
    }
    // Of columns `column` and the next, the first one being even.
    MMK_DEVICE int2 at(int column) const { return *reinterpret_cast<const int2*>(columns + column); }
};

// Of a cluster: a step is a tile of each of its blocks, side by side in one column.
struct Walk {
    int tiles_m, tiles_n, first_row, offset;

    MMK_DEVICE Walk(const Pairs& pairs, int row0, int row_count)
        : tiles_m((row_count + kTileRows - 1) / kTileRows),
          tiles_n((pairs.texts + kTileColumns - 1) / kTileColumns),
          first_row(row0),
          offset(pairs.offset) {}
    MMK_DEVICE int size() const { return tiles_m * tiles_n; }  // in tiles
    MMK_DEVICE int rows_of_steps() const { return (tiles_m + kCluster - 1) / kCluster; }
    MMK_DEVICE int steps() const { return rows_of_steps() * tiles_n; }
    MMK_DEVICE int number_of(const Tile& tile) const { return tile.m * tiles_n + tile.n; }
    // This block's tile of a step.
    MMK_DEVICE Tile at(int step) const {
        const TileAt at = grouped_tile<kWalkedRows / kCluster>(step, rows_of_steps(), tiles_n);
        const int m = at.row * kCluster + cluster_rank();
        const int row0 = first_row + m * kTileRows, column0 = at.column * kTileColumns;
        return {m, at.column, row0, column0, row0 + offset - column0};
    }
};
// The steps of a cluster: from the first on, every so many.
MMK_DEVICE int first_step() { return static_cast<int>(blockIdx.x) / kCluster; }
MMK_DEVICE int stride_of_steps() { return static_cast<int>(gridDim.x) / kCluster; }

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
        mbarrier_init(ring.empty + stage, kCluster * kConsumerWarps);
    }
    mbarrier_init_fence();
}

// The one thread of a block that copies: the block's own rows, and its share of the text's to every block.
MMK_DEVICE void produce(Ring& ring, const CUtensorMap* image, const CUtensorMap* text, const Walk& walk, int steps) {
    constexpr int kShare = kTileColumns / kCluster;
    constexpr uint16_t kEveryBlock = (1 << kCluster) - 1;
    const int rank = cluster_rank();
    for (int index = first_step(); index < walk.steps(); index += stride_of_steps()) {
        const Tile tile = walk.at(index);
        for (int step = 0; step < steps; step++) {
            uint64_t* const full = ring.full + ring.stage;
            mbarrier_wait(ring.empty + ring.stage, ring.parity ^ 1);  // in every block
            mbarrier_arrive_expect(full, kStageBytes);
            tensor_load(ring.image(), image, {step * kStep, tile.row0}, full);
            tensor_multicast(ring.text() + rank * (kTextBytes / kCluster), text,
                             {step * kStep, tile.column0 + rank * kShare}, full, kEveryBlock);
            ring.advance();
        }
    }
}

// ---- products

// A warp has read a stage, which any block of the cluster may write to.
MMK_DEVICE void release(uint64_t* empty, const Place& place) {
    if (place.lane < kCluster) mbarrier_arrive_at(empty, place.lane);
}

// d = the group's rows of image text^T.
//
// The second group begins a tile when the first has done kLead steps of it, and so ends it later: one takes
// exponentials while the other has the tensor cores. The ring keeps the first from coming here again before the second
// has left the barrier, if tiles are longer than the ring; shorter ones are too short to take turns in.
template <class T>
MMK_DEVICE void multiply(float (&d)[kHeld], Ring& ring, const Place& place, int steps) {
    const bool turns = steps > kStages;
    if (turns && place.group == 1) named_barrier_sync(kAhead, kConsumers);
    int previous = 0;
    for (int step = 0; step < steps; step++) {
        if (turns && place.group == 0 && step == kLead) named_barrier_arrive(kAhead, kConsumers);
        mbarrier_wait(ring.full + ring.stage, ring.parity);
        const uint32_t rows = shared_address(ring.image()) + place.group * (kImageBytes / kGroups);
        const uint64_t image = matrix_descriptor(rows, 16, 1024, Swizzle::k128);
        const uint64_t text = matrix_descriptor(shared_address(ring.text()), 16, 1024, Swizzle::k128);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStep / 16; k++) {
            wgmma<T, Major::kK, Major::kK>(d, advanced(image, k * 32), advanced(text, k * 32), step > 0 || k > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();  // the step before is done
        if (step > 0) release(ring.empty + previous, place);
        previous = ring.stage;
        ring.advance();
    }
    wgmma_wait<0>(d);
    release(ring.empty + previous, place);
}

// ---- what both groups found: the first leaves its part in shared memory and goes on, the second comes later and joins
// them
//
//   before_leaving(place, first_tile);
//   ... both write to shared memory ...
//   if (!leave(place)) return;
//   ... the second reads it ...
//   after_joining(last_tile);

MMK_DEVICE void before_leaving(const Place& place, bool first_tile) {
    if (place.group == 0 && !first_tile) named_barrier_sync(kJoined, kConsumers);
}
// True for the group that joins, which sees what both wrote.
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
                         float* sums, bool exists, int64_t tile, int64_t tiles) {
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
    if (exists && place.thread < kSums) {
        float sum = 0;
        for (int warp = 0; warp < kConsumerWarps; warp++) sum += shared[place.thread * kConsumerWarps + warp];
        sums[place.thread * tiles + tile] = sum;
    }
    after_joining(last_tile);
}

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

}  // namespace mmk::cuda::contrastive_sm90
