// Pass 1 of CLIP over a tile of the logits on Hopper: of each row and each column the maximum and the sum of
// exponentials, without own pairs, and the sum over positives where ids say them. Part of tiles_sm90.cu.
#pragma once
#include "cuda/contrastive/passes.h"
#include "cuda/contrastive/tiles_sm90.h"

namespace mmk::cuda::contrastive_sm90 {

MMK_DEVICE Statistic statistic_of(float x, float y, const Logits& logits) {
    return {fmaxf(x, y), 1.0f + logits.fade(x, y)};
}

// Eight lanes 4 g + t hold the same columns, each of rows of its own. Lanes l and l ^ 4 kHalf share them out; after
// kHalf = 4, 2, 1 lane 4 g + t has the g-th eighth of the columns, of all rows.
template <int kHalf, int kColumns>
MMK_DEVICE void share_out(Statistic (&x)[kColumns], int lane, const Logits& logits) {
    constexpr int kKept = kColumns / 8 * kHalf;
    const bool upper = (lane & 4 * kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kKept; i++) {
        const Statistic kept = upper ? x[i + kKept] : x[i], given = upper ? x[i] : x[i + kKept];
        const float maximum = __shfl_xor_sync(kAllLanes, given.maximum, 4 * kHalf);
        const float sum = __shfl_xor_sync(kAllLanes, given.sum, 4 * kHalf);
        x[i] = merged(kept, {maximum, sum}, logits);
    }
}

// The same of sums.
template <int kHalf, int kColumns>
MMK_DEVICE void share_out(float (&x)[kColumns], int lane) {
    constexpr int kKept = kColumns / 8 * kHalf;
    const bool upper = (lane & 4 * kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kKept; i++) {
        const float kept = upper ? x[i + kKept] : x[i], given = upper ? x[i] : x[i + kKept];
        x[i] = kept + __shfl_xor_sync(kAllLanes, given, 4 * kHalf);
    }
}

template <class T, Same kSame>
struct ClipStatisticsPass {
    using Call = StatisticsTiles;
    static constexpr bool kIds = kSame != Same::kNothing, kPositives = kSame == Same::kPositive;
    static constexpr int kNumbers = kConsumerWarps * kTileColumns;  // of each warp and column one
    static constexpr int kFoundBytes = kNumbers * static_cast<int>(sizeof(Statistic));
    static constexpr int kIdsBytes = Ids<false>::kBytes, kAloneBytes = Ids<true>::kBytes;
    static constexpr int kSharedBytes = kFoundBytes + (kIds ? kIdsBytes : 0) +
                                        (kPositives ? kAloneBytes + kNumbers * static_cast<int>(sizeof(float)) : 0);
    static constexpr int kColumns = 64;  // found at a time

    const Call& call;
    const Place& place;
    Statistic* found;  // [warp][column]: over the warp's rows
    Ids<false> ids;
    Ids<true> alone;
    float* positives;  // [warp][column], too
    Logits logits;

    MMK_DEVICE ClipStatisticsPass(const Call& call, const Place& place, unsigned char* shared, const CUtensorMap*)
        : call(call),
          place(place),
          found(reinterpret_cast<Statistic*>(shared)),
          ids(shared + kFoundBytes, place),
          alone(shared + kFoundBytes + kIdsBytes, place),
          positives(reinterpret_cast<float*>(shared + kFoundBytes + kIdsBytes + kAloneBytes)),
          logits(*call.pairs.scale) {}

    MMK_DEVICE void prepare(const Tile& tile) {
        if constexpr (kIds) ids.load(call, tile, place);
        if constexpr (kPositives) alone.load(call, tile, place);
    }

    MMK_DEVICE void finish(float (&d)[kHeld], const Tile& tile, const Walk& walk, bool first_tile, bool last_tile) {
        if constexpr (kIds) {
            named_barrier_sync(kGroup + place.group, kWarpgroup);  // nobody reads those of the tile before
            ids.put(place);
            if constexpr (kPositives) alone.put(place);
            named_barrier_sync(kGroup + place.group, kWarpgroup);
        }
        const Bounds bounds(tile, place, call.row0 + call.row_count, call.pairs);
#pragma unroll
        for (int i = 0; i < kHeld; i++) d[i] *= logits.sign;
        if (!tile.whole(call)) {
            __syncwarp();  // keeps this a branch
#pragma unroll
            for (int i = 0; i < kHeld; i++) {
                if (i / 4 * 8 + i % 2 >= bounds.ends[i / 2 % 2]) d[i] = kLowest;
            }
        }
        if constexpr (!kPositives) take_own(d, tile, bounds);
        if constexpr (kSame == Same::kIgnored) ignore_same(d);
        store_rows(d, tile, walk, bounds);
        before_leaving(place, first_tile);
#pragma unroll
        for (int strip = 0; strip < kTileColumns / kColumns; strip++) {
            find_columns(d, strip);
            if constexpr (kPositives) find_positives(d, strip);
        }
        if (!leave(place)) return;
        store_columns(tile, walk);
        after_joining(last_tile);
    }

    MMK_DEVICE void take_own(float (&d)[kHeld], const Tile& tile, const Bounds& bounds) const {
        if (!tile.crosses_own_pairs()) return;
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            const int right = i / 4 * 8 + i % 2, j = i / 2 % 2;
            if (right == bounds.own + 8 * j && right < bounds.ends[j]) {
                call.row_own[tile.row0 + place.row + 8 * j] = d[i];
                call.column_own[tile.column0 + place.column + right] = d[i];
                d[i] = kLowest;
            }
        }
    }

    MMK_DEVICE void ignore_same(float (&d)[kHeld]) const {
#pragma unroll
        for (int i = 0; i < kHeld; i += 4) {
            const int2 columns = ids.at(place.column + i / 4 * 8);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (columns.x == ids.row[j]) d[i + 2 * j] = kLowest;
                if (columns.y == ids.row[j]) d[i + 2 * j + 1] = kLowest;
            }
        }
    }

    // What d[i] and d[i + 1], of row j, are among the others of their row, or of their columns, and among the
    // positives.
    MMK_DEVICE float2 of_row(const float (&d)[kHeld], int i, int j) const {
        if constexpr (!kPositives) return {d[i], d[i + 1]};
        const int2 columns = ids.at(place.column + i / 4 * 8);
        return {columns.x == alone.row[j] ? kLowest : d[i], columns.y == alone.row[j] ? kLowest : d[i + 1]};
    }
    MMK_DEVICE float2 of_columns(const float (&d)[kHeld], int i, int j) const {
        if constexpr (!kPositives) return {d[i], d[i + 1]};
        const int2 columns = alone.at(place.column + i / 4 * 8);
        return {columns.x == ids.row[j] ? kLowest : d[i], columns.y == ids.row[j] ? kLowest : d[i + 1]};
    }
    // What was found by ids is not to be kept, in registers that there are not, but found again.
    MMK_DEVICE void look_again() const {
        if constexpr (kPositives) __syncwarp();
    }
    MMK_DEVICE float2 of_positives(const float (&d)[kHeld], int i, int j) const {
        const int2 columns = ids.at(place.column + i / 4 * 8);
        return {columns.x == ids.row[j] ? d[i] : 0.0f, columns.y == ids.row[j] ? d[i + 1] : 0.0f};
    }

    MMK_DEVICE void store_rows(const float (&d)[kHeld], const Tile& tile, const Walk& walk,
                               const Bounds& bounds) const {
        float* const parts = call.row_parts + static_cast<int64_t>(tile.n) * call.row_count;
        const int row = tile.row0 - call.row0 + place.row;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float top = kLowest, sum = 0;
            look_again();
#pragma unroll
            for (int i = 0; i < kHeld; i += 4) {
                const float2 q = of_row(d, i + 2 * j, j);
                top = fmaxf(top, fmaxf(q.x, q.y));
            }
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
            look_again();
#pragma unroll
            for (int i = 0; i < kHeld; i += 4) {
                const float2 q = of_row(d, i + 2 * j, j);
                sum += logits.exp(q.x, top) + logits.exp(q.y, top);
            }
            sum += __shfl_xor_sync(kAllLanes, sum, 1);
            sum += __shfl_xor_sync(kAllLanes, sum, 2);
            const int64_t plane = static_cast<int64_t>(walk.tiles_n) * call.row_count;
            if (place.lane % 4 == 0 && bounds.ends[j] > 0) {
                parts[row + 8 * j] = top;
                parts[plane + row + 8 * j] = sum;
            }
            if constexpr (kPositives) {
                float positive = 0;
                look_again();
#pragma unroll
                for (int i = 0; i < kHeld; i += 4) {
                    const float2 q = of_positives(d, i + 2 * j, j);
                    positive += q.x + q.y;
                }
                positive += __shfl_xor_sync(kAllLanes, positive, 1);
                positive += __shfl_xor_sync(kAllLanes, positive, 2);
                if (place.lane % 4 == 0 && bounds.ends[j] > 0) parts[2 * plane + row + 8 * j] = positive;
            }
        }
    }

    // Over the warp's sixteen rows; a lane ends with two columns of the strip.
    MMK_DEVICE void find_columns(const float (&d)[kHeld], int strip) const {
        Statistic x[kColumns / 4];
        look_again();
#pragma unroll
        for (int i = 0; i < kColumns / 4; i += 2) {
            const int first = strip * (kColumns / 2) + i * 2;
            const float2 upper = of_columns(d, first, 0), lower = of_columns(d, first + 2, 1);
            x[i] = statistic_of(upper.x, lower.x, logits);
            x[i + 1] = statistic_of(upper.y, lower.y, logits);
        }
        share_out<4>(x, place.lane, logits);
        share_out<2>(x, place.lane, logits);
        share_out<1>(x, place.lane, logits);
        Statistic* const to = found + place.warp * kTileColumns + strip * kColumns + place.lane / 4 * 8 + place.column;
        *reinterpret_cast<float4*>(to) = float4{x[0].maximum, x[0].sum, x[1].maximum, x[1].sum};
    }
    MMK_DEVICE void find_positives(const float (&d)[kHeld], int strip) const {
        float x[kColumns / 4];
        look_again();
#pragma unroll
        for (int i = 0; i < kColumns / 4; i += 2) {
            const int first = strip * (kColumns / 2) + i * 2;
            const float2 upper = of_positives(d, first, 0), lower = of_positives(d, first + 2, 1);
            x[i] = upper.x + lower.x;
            x[i + 1] = upper.y + lower.y;
        }
        share_out<4>(x, place.lane);
        share_out<2>(x, place.lane);
        share_out<1>(x, place.lane);
        float* const to = positives + place.warp * kTileColumns + strip * kColumns + place.lane / 4 * 8 + place.column;
        *reinterpret_cast<float2*>(to) = float2{x[0], x[1]};
    }

    MMK_DEVICE void store_columns(const Tile& tile, const Walk& walk) const {
        float* const parts = call.column_parts + static_cast<int64_t>(tile.m) * call.pairs.texts + tile.column0;
#pragma unroll
        for (int i = 0; i < kTileColumns / kWarpgroup; i++) {
            const int column = i * kWarpgroup + place.thread;
            Statistic all = found[column];
#pragma unroll
            for (int warp = 1; warp < kConsumerWarps; warp++)
                all = merged(all, found[warp * kTileColumns + column], logits);
            if (column >= call.pairs.texts - tile.column0 || !tile.exists(call)) continue;
            const int64_t plane = static_cast<int64_t>(walk.tiles_m) * call.pairs.texts;
            parts[column] = all.maximum;
            parts[plane + column] = all.sum;
            if constexpr (kPositives) {
                float positive = 0;
#pragma unroll
                for (int warp = 0; warp < kConsumerWarps; warp++) positive += positives[warp * kTileColumns + column];
                parts[2 * plane + column] = positive;
            }
        }
    }
};

}  // namespace mmk::cuda::contrastive_sm90
