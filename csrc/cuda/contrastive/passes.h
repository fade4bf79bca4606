// What the contrastive losses of every architecture share: the passes over tiles of the logits, which each has kernels
// of its own for, and what surrounds them: the walk over chunks of rows, and sums in fixed order (passes.cu).
#pragma once
#include <type_traits>

#include "cuda/contrastive/call.h"
#include "cuda/isa/launch.h"

namespace mmk::cuda {

constexpr int kSmallestTile = 128;  // either way, of any architecture: workspaces are measured by it

// A logit that is not there. Finite, since -inf - -inf is NaN.
constexpr float kLowest = -3.4e38f;

// Rows [row0, row0 + row_count) of S by tiles: pass 1 of CLIP. A part is what one tile finds of a row or of a
// column.
struct StatisticsTiles {
    Pairs pairs;
    int row0, row_count;
    float* row_parts;     // (2, tiles along a row, row_count): the first two statistics; kPositive: all, (3, ...)
    float* column_parts;  // (2, tiles along a column of these rows, texts)
    float *row_own, *column_own;  // (images), (texts): q of own pairs, of which those of these rows are written
};

// The same rows: pass 2 of CLIP, or the one pass of SigLIP.
struct GradientTiles {
    Pairs pairs;
    int row0, row_count;
    void* ds;  // null in SigLIP: only the loss is wanted
    int64_t ds_stride;
    float* sums;                  // (1 or 3, tiles): CLIP's sum of N dS (I T^T); SigLIP's loss, that, and sum of N dS
    const float *rows, *columns;  // CLIP's softmax weights
    const float* own;             // CLIP's, count dS of own pairs; not with kPositive
};

template <class Tiles>
struct TilePass {
    int rows, columns;  // of a tile
    Error (*run)(const Tiles& call, cudaStream_t stream);
};

// run(std::integral_constant<Same, kSame>{}): kernels are compiled for each, so that those of no ids compare none.
template <class Run>
Error run_by_same(Same same, const Run& run) {
    if (same == Same::kPositive) return run(std::integral_constant<Same, Same::kPositive>{});
    if (same == Same::kIgnored) return run(std::integral_constant<Same, Same::kIgnored>{});
    return run(std::integral_constant<Same, Same::kNothing>{});
}

Error clip_statistics_by(TilePass<StatisticsTiles> pass, const ClipStatistics& call, cudaStream_t stream);
Error clip_gradient_by(TilePass<GradientTiles> pass, const ClipGradient& call, cudaStream_t stream);
Error siglip_by(TilePass<GradientTiles> pass, const LogitRows& call, cudaStream_t stream);

}  // namespace mmk::cuda
