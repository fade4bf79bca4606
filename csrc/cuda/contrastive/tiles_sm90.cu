// The passes of the contrastive losses over tiles of the logits, for sm_90a: TMA, wgmma, a persistent grid.
//
//   CLIP, pass 1:  of each row and each column of a tile, but for the diagonal, the maximum m of q and the sum of
//                  2^(f (q - m)); the diagonal of q
//   CLIP, pass 2:  N dS_ij = 2^(f (q_ij - m_i)) w_i + 2^(f (q_ij - m'_j)) w'_j off the diagonal, and its sum with
//                  I T^T (of N pairs; see call.h for others)
//   SigLIP:        N dS_ij = -z / (1 + exp(x)), its sum, its sum with I T^T, and the loss, log(1 + exp(-x)) summed
//
// A block has the multiprocessor to itself and walks over tiles of 128 x 256 logits, beside the other block of its
// cluster, which has the tile below. One thread copies 64 columns of the features at a time, the images' and half of
// the texts', which go to both blocks, up to four steps ahead, also while a tile is being finished. Two warpgroups
// multiply, 64 rows each, and keep their 128 numbers a thread in registers for all that follows; they are kept some
// steps apart, so that one takes its exponentials while the other has the tensor cores, instead of both waiting for the
// same.
//
// What limits it: products take 16 D cycles a tile; two exponentials a logit (SigLIP: one and a reciprocal) 4096, more
// than all other instructions where nothing is said by ids. So from D = 300 on products can hide the rest. They need 32
// bytes a cycle and multiprocessor from the L2 cache (48 without clusters), where 16 rows of tiles are walked column by
// column; about 40 are known to come.
//
// Where ids say what belongs together, or what counts nowhere, a thread compares those of its two rows with those of a
// tile's columns, in shared memory; the positives of rows and columns are summed beside their others in pass 1, and
// have weights of their own in pass 2.
//
// Memory moved: (128 + 256) D numbers of features a tile; 8 N^2 (1/256 + 1/128) bytes of statistics, or 2 N^2 of ds.
#include <algorithm>

#include "cuda/contrastive/passes.h"
#include "cuda/contrastive/statistics_sm90.h"
#include "cuda/contrastive/tiles_sm90.h"

namespace mmk::cuda {
namespace {

using namespace contrastive_sm90;

// ---- CLIP, pass 2

// Of a row or a column: half its softmax, times what ds is stored with.
struct SoftmaxWeight {
    float maximum, weight;

    MMK_DEVICE float of(float q, const Logits& logits) const { return logits.exp(q, maximum) * weight; }
    MMK_DEVICE float of(float q, bool positive, const PositiveWeight& its, const Logits& logits) const {
        const float e = logits.exp_up_to_1(q, maximum);
        return positive ? e * its.weight - its.target : e * weight;
    }
    MMK_DEVICE SoftmaxWeight scaled() const { return {maximum, weight * kGradientScale}; }
};
MMK_DEVICE SoftmaxWeight weight_at(const float* weights, int i, int count) {
    if (i >= count) return {0.0f, 0.0f};
    return {weights[i], weights[int64_t{count} + i]};
}

template <class T, Same kSame>
struct ClipGradientPass {
    using Call = GradientTiles;
    static constexpr bool kIds = kSame != Same::kNothing, kPositives = kSame == Same::kPositive;
    static constexpr int kWeightsBytes = kTileColumns * static_cast<int>(sizeof(SoftmaxWeight));     // of a group
    static constexpr int kPositivesBytes = kTileColumns * static_cast<int>(sizeof(PositiveWeight));  // of a group
    static constexpr int kSumsAt = kStripsBytes + kGroups * kWeightsBytes;
    static constexpr int kIdsAt = kSumsAt + kConsumerWarps * static_cast<int>(sizeof(float));
    static constexpr int kPositivesAt = kIdsAt + (kIds ? Ids<false>::kBytes : 0);
    static constexpr int kSharedBytes = kPositivesAt + (kPositives ? kGroups * kPositivesBytes : 0);

    const Call& call;
    const Place& place;
    Strips strips;
    SoftmaxWeight* columns;  // of the tile, for this group
    float* sums;
    Ids<false> ids;
    PositiveWeight* column_positives;
    Logits logits;
    SoftmaxWeight row[2], column[kTileColumns / kWarpgroup];  // of the tile that is multiplied; the thread's columns
    PositiveWeight row_positive[2], column_positive[kTileColumns / kWarpgroup];

    MMK_DEVICE ClipGradientPass(const Call& call, const Place& place, unsigned char* shared, const CUtensorMap* ds)
        : call(call),
          place(place),
          strips(shared, ds, place),
          columns(reinterpret_cast<SoftmaxWeight*>(shared + kStripsBytes + place.group * kWeightsBytes)),
          sums(reinterpret_cast<float*>(shared + kSumsAt)),
          ids(shared + kIdsAt, place),
          column_positives(reinterpret_cast<PositiveWeight*>(shared + kPositivesAt + place.group * kPositivesBytes)),
          logits(*call.pairs.scale) {}

    // Loads only: nothing waits for them before the products are done.
    MMK_DEVICE void prepare(const Tile& tile) {
#pragma unroll
        for (int j = 0; j < 2; j++) row[j] = weight_at(call.rows, tile.row0 + place.row + 8 * j, call.pairs.images);
#pragma unroll
        for (int i = 0; i < kTileColumns / kWarpgroup; i++) {
            column[i] = weight_at(call.columns, tile.column0 + i * kWarpgroup + place.thread, call.pairs.texts);
        }
        if constexpr (kIds) ids.load(call, tile, place);
        if constexpr (kPositives) prepare_positives(tile);
    }
    MMK_DEVICE void prepare_positives(const Tile& tile) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            row_positive[j] = PositiveWeight::at(call.rows, tile.row0 + place.row + 8 * j, call.pairs.images);
        }
#pragma unroll
        for (int i = 0; i < kTileColumns / kWarpgroup; i++) {
            const int at = tile.column0 + i * kWarpgroup + place.thread;
            column_positive[i] = PositiveWeight::at(call.columns, at, call.pairs.texts);
        }
    }

    MMK_DEVICE void finish(float (&d)[kHeld], const Tile& tile, const Walk& walk, bool first_tile, bool last_tile) {
        named_barrier_sync(kGroup + place.group, kWarpgroup);  // nobody reads those of the tile before
#pragma unroll
        for (int i = 0; i < kTileColumns / kWarpgroup; i++) {
            if constexpr (kPositives) column_positives[i * kWarpgroup + place.thread] = scaled(column_positive[i]);
            columns[i * kWarpgroup + place.thread] = column[i].scaled();
        }
        if constexpr (kIds) ids.put(place);
        named_barrier_sync(kGroup + place.group, kWarpgroup);

        float total[1] = {0};
        if (tile.plain(call)) {
            write<true>(d, tile, total[0]);
        } else {
            write<false>(d, tile, total[0]);
        }
        if (last_tile) strips.finish();
        total[0] *= 1 / kGradientScale;
        sum_tile(total, sums, place, first_tile, last_tile, call.sums, tile.exists(call), walk.number_of(tile),
                 walk.size());
    }

    static MMK_DEVICE PositiveWeight scaled(const PositiveWeight& x) {
        return {x.weight * kGradientScale, x.target * kGradientScale};
    }

    MMK_DEVICE float own_slope(int row) const { return row < call.row0 + call.row_count ? call.own[row] : 0.0f; }

    // kPlain: no mask is needed but by ids, as in nearly every tile.
    template <bool kPlain>
    MMK_DEVICE void write(const float (&d)[kHeld], const Tile& tile, float& total) const {
        const Bounds bounds(tile, place, call.row0 + call.row_count, call.pairs);
        const SoftmaxWeight weights[2] = {row[0].scaled(), row[1].scaled()};
        const PositiveWeight row_positives[2] = {scaled(row_positive[0]), scaled(row_positive[1])};
        constexpr bool kByPlace = !kPlain && !kPositives;
        float own[2];
#pragma unroll
        for (int j = 0; j < 2 && kByPlace; j++) own[j] = own_slope(tile.row0 + place.row + 8 * j) * kGradientScale;
#pragma unroll
        for (int strip = 0; strip < kTileColumns / kStrip; strip++) {
            strips.begin();
#pragma unroll
            for (int n = 0; n < kStrip / 8; n++) {
                const int right = strip * kStrip + n * 8;
                const float4 both = *reinterpret_cast<const float4*>(columns + right + place.column);
                const SoftmaxWeight pair[2] = {{both.x, both.y}, {both.z, both.w}};
                const int2 id = kIds ? ids.at(place.column + right) : int2{};
                float4 of_pair{};
                if constexpr (kPositives) {
                    of_pair = *reinterpret_cast<const float4*>(column_positives + right + place.column);
                }
                const PositiveWeight positives[2] = {{of_pair.x, of_pair.y}, {of_pair.z, of_pair.w}};
                float ds[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float product = d[right / 2 + i], q = product * logits.sign;
                    const int e = i % 2, j = i / 2;
                    const bool same = kIds && (e == 0 ? id.x : id.y) == ids.row[j];
                    if constexpr (kPositives) {
                        ds[i] = weights[j].of(q, same, row_positives[j], logits) +
                                pair[e].of(q, same, positives[e], logits);
                    } else {
                        ds[i] = weights[j].of(q, logits) + pair[e].of(q, logits);
                    }
                    if (kSame == Same::kIgnored && same) ds[i] = 0;
                    if (kByPlace && right + e == bounds.own + 8 * j) ds[i] = own[j];
                    if (!kPlain && right + e >= bounds.ends[j]) ds[i] = 0;
                    total += ds[i] * product;
                }
                strips.put(strip, n, 0, pack2<T>(ds[0], ds[1]));
                strips.put(strip, n, 1, pack2<T>(ds[2], ds[3]));
            }
            strips.send(strip, tile.row0 - call.row0 + place.warp * 16, tile.column0 + strip * kStrip);
        }
    }
};

// ---- SigLIP

template <class T, Same kSame, bool kWithGradient>
struct SigLipPass {
    using Call = GradientTiles;
    static constexpr bool kIds = kSame != Same::kNothing;
    static constexpr int kSums = kWithGradient ? 3 : 1;
    static constexpr int kIdsAt = kStripsBytes + kConsumerWarps * kSums * static_cast<int>(sizeof(float));
    static constexpr int kSharedBytes = kIdsAt + (kIds ? Ids<false>::kBytes : 0);

    const Call& call;
    const Place& place;
    Strips strips;
    float* sums;
    Ids<false> ids;
    float scale, bias, factor, offset;  // the last two: in units of log 2

    MMK_DEVICE SigLipPass(const Call& call, const Place& place, unsigned char* shared, const CUtensorMap* ds)
        : call(call),
          place(place),
          strips(shared, ds, place),
          sums(reinterpret_cast<float*>(shared + kStripsBytes)),
          ids(shared + kIdsAt, place),
          scale(*call.pairs.scale),
          bias(*call.pairs.bias),
          factor(static_cast<float>(scale * kLog2E)),
          offset(static_cast<float>(bias * kLog2E)) {}

    MMK_DEVICE void prepare(const Tile& tile) {
        if constexpr (kIds) ids.load(call, tile, place);
    }

    MMK_DEVICE void finish(float (&d)[kHeld], const Tile& tile, const Walk& walk, bool first_tile, bool last_tile) {
        if constexpr (kIds) {
            named_barrier_sync(kGroup + place.group, kWarpgroup);  // nobody reads those of the tile before
            ids.put(place);
            named_barrier_sync(kGroup + place.group, kWarpgroup);
        }
        float total[kSums] = {};
        if (!tile.plain(call)) {
            write<false>(d, tile, total);
        } else if constexpr (kIds) {
            write<true>(d, tile, total);
        } else {
            write_negatives(d, tile, total);
        }
        if (kWithGradient && last_tile) strips.finish();
        sum_tile(total, sums, place, first_tile, last_tile, call.sums, tile.exists(call), walk.number_of(tile),
                 walk.size());
    }

    // Every pair is there, and none belongs together. With e = exp(logit), the loss of a thread's sixteen of a strip is
    // one log(1 + x) of their product, x = (1 + e_1) ... (1 + e_16) - 1, unless they are so large that it overflows.
    MMK_DEVICE void write_negatives(const float (&d)[kHeld], const Tile& tile, float (&total)[kSums]) const {
#pragma unroll
        for (int strip = 0; strip < kTileColumns / kStrip; strip++) {
            if constexpr (kWithGradient) strips.begin();
            const int from = strip * (kStrip / 2);
            float e[kStrip / 2];
#pragma unroll
            for (int i = 0; i < kStrip / 2; i++) e[i] = exp2_approx(exponent(d[from + i]));
            const float beyond_1 = product_beyond_1(e);
            if (__all_sync(kAllLanes, beyond_1 < 0x1p64f)) {
                total[0] += log1p_approx(beyond_1);
#pragma unroll
                for (int i = 0; i < kStrip / 2 && kWithGradient; i++) {  // times kGradientScale
                    e[i] *= reciprocal_approx(fmaf(e[i], 1 / kGradientScale, 1 / kGradientScale));
                }
            } else {
                __syncwarp();  // keeps this a branch
#pragma unroll
                for (int i = 0; i < kStrip / 2; i++) {
                    const Sigmoid pair(exponent(d[from + i]) * static_cast<float>(kLn2));
                    total[0] += pair.loss;
                    e[i] = pair.slope * kGradientScale;
                }
            }
            if constexpr (kWithGradient) {
#pragma unroll
                for (int i = 0; i < kStrip / 2; i++) {
                    total[1] += e[i] * d[from + i];
                    total[2] += e[i];
                }
#pragma unroll
                for (int i = 0; i < kStrip / 2; i += 2) strips.put(strip, i / 4, i / 2 % 2, pack2<T>(e[i], e[i + 1]));
                strips.send(strip, tile.row0 - call.row0 + place.warp * 16, tile.column0 + strip * kStrip);
            }
        }
        if constexpr (kWithGradient) {
            total[1] *= 1 / kGradientScale;
            total[2] *= 1 / kGradientScale;
            total[0] -= static_cast<float>(factor * kLn2 - scale) * total[1];
            total[0] -= static_cast<float>(offset * kLn2 - bias) * total[2];
        }
    }
    // e to the power of a logit is 2 to that of this. With the gradient at hand one multiply-add will do: by how much
    // the rounding of its terms moves all logits is taken off the loss, to first order, with the sums of their slopes.
    MMK_DEVICE float exponent(float product) const {
        if constexpr (kWithGradient) return fmaf(product, factor, offset);
        return fmaf(product, scale, bias) * static_cast<float>(kLog2E);
    }

    template <bool kPlain>
    MMK_DEVICE void write(const float (&d)[kHeld], const Tile& tile, float (&total)[kSums]) const {
        const Bounds bounds(tile, place, call.row0 + call.row_count, call.pairs);
#pragma unroll
        for (int strip = 0; strip < kTileColumns / kStrip; strip++) {
            if constexpr (kWithGradient) strips.begin();
#pragma unroll
            for (int n = 0; n < kStrip / 8; n++) {
                const int right = strip * kStrip + n * 8;
                const int2 id = kIds ? ids.at(place.column + right) : int2{};
                float ds[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float product = d[right / 2 + i], logit = product * scale + bias;
                    const int e = i % 2, j = i / 2;
                    const bool own = !kPlain && right + e == bounds.own + 8 * j;
                    const bool same = kIds && (e == 0 ? id.x : id.y) == ids.row[j];
                    const bool positive = kSame == Same::kPositive ? same : own;
                    const bool inside = kPlain || right + e < bounds.ends[j];
                    const bool counted = inside && (kSame != Same::kIgnored || own || !same);
                    const Sigmoid pair(!counted ? kLowest : positive ? -logit : logit);  // of no pair: 0
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
    cluster_sync();

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
    const int first = first_step(), stride = stride_of_steps();
    for (int index = first; index < walk.steps(); index += stride) {
        const Tile tile = walk.at(index);
        float d[kHeld];
        pass.prepare(tile);
        multiply<T>(d, ring, place, steps);
        pass.finish(d, tile, walk, index == first, walk.steps() - index <= stride);
    }
    cluster_sync();  // those of the other block still have to say here that they have read
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
    const auto encode_features = [&](CUtensorMap& map, const Features& features, int count, uint32_t rows) {
        return encode_rows<T>(map, kernel, features.data, features.stride, count, pairs.width, {kStep, rows});
    };
    CUtensorMap image, text, of_ds{};
    if (Error error = encode_features(image, pairs.image, pairs.images, kTileRows)) return error;
    if (Error error = encode_features(text, pairs.text, pairs.texts, kTileColumns / kCluster)) return error;
    if (ds != nullptr) {  // columns up to the next multiple of 8 become zero
        const int columns = (pairs.texts + 7) / 8 * 8;
        if (Error error = encode_rows<T>(of_ds, kernel, ds, ds_stride, call.row_count, columns, {kStrip, 16}))
            return error;
    }
    int multiprocessors;
    if (Error error = count_multiprocessors(multiprocessors)) return error;
    const auto tiles_of = [](int64_t size, int tile) { return (size + tile - 1) / tile; };
    const int64_t steps = tiles_of(call.row_count, kTileRows * kCluster) * tiles_of(pairs.texts, kTileColumns);
    static_assert(kRingBytes + Pass::kSharedBytes <= kMostShared);
    const auto clusters = static_cast<unsigned>(std::min<int64_t>(steps, multiprocessors / kCluster));
    const Launch at{kernel, kCluster * clusters, kThreads, kRingBytes + Pass::kSharedBytes, stream, kCluster};
    return launch(at, contrastive_sm90_kernel<T, Pass>, image, text, of_ds, call);
}

Error statistics_tiles(const StatisticsTiles& call, cudaStream_t stream) {
    const char* const kernel = "clip_statistics_sm90";
    return run_by_same(call.pairs.same, [&](auto same) {
        if (!call.pairs.bfloat16)
            return run<Float16, ClipStatisticsPass<Float16, same()>>(kernel, call, nullptr, 0, stream);
        return run<BFloat16, ClipStatisticsPass<BFloat16, same()>>(kernel, call, nullptr, 0, stream);
    });
}

Error gradient_tiles(const GradientTiles& call, cudaStream_t stream) {
    const char* const kernel = "clip_gradient_sm90";
    return run_by_same(call.pairs.same, [&](auto same) {
        if (!call.pairs.bfloat16) {
            return run<Float16, ClipGradientPass<Float16, same()>>(kernel, call, call.ds, call.ds_stride, stream);
        }
        return run<BFloat16, ClipGradientPass<BFloat16, same()>>(kernel, call, call.ds, call.ds_stride, stream);
    });
}

template <class T>
Error siglip(const GradientTiles& call, cudaStream_t stream) {
    const char* const kernel = "siglip_sm90";
    return run_by_same(call.pairs.same, [&](auto same) {
        if (call.ds == nullptr) return run<T, SigLipPass<T, same(), false>>(kernel, call, nullptr, 0, stream);
        return run<T, SigLipPass<T, same(), true>>(kernel, call, call.ds, call.ds_stride, stream);
    });
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
    const auto readable = [&](const Features& x) {  // by TMA
        return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 8 == 0 && x.stride >= pairs.width &&
               x.stride < int64_t{1} << 39;
    };
    return pairs.width > 0 && readable(pairs.image) && readable(pairs.text);
}

Error clip_statistics_sm90(const ClipStatistics& call, cudaStream_t stream) {
    if (Error error = without_sm90a("clip_statistics_sm90")) return error;
    return clip_statistics_by(pass_by<StatisticsTiles>(statistics_tiles), call, stream);
}
Error clip_gradient_sm90(const ClipGradient& call, cudaStream_t stream) {
    if (Error error = without_sm90a("clip_gradient_sm90")) return error;
    return clip_gradient_by(pass_by<GradientTiles>(gradient_tiles), call, stream);
}
Error siglip_sm90(const LogitRows& call, cudaStream_t stream) {
    if (Error error = without_sm90a("siglip_sm90")) return error;
    return siglip_by(pass_by<GradientTiles>(siglip), call, stream);
}

}  // namespace mmk::cuda
