// The contrastive losses: no matrix of all logits, any scale, features of any length, the same bits in every run.
//
// CLIP, with p = I T^T, q = p or -p by the sign of the scale s, f = |s| / ln 2, m and r the maximum of q and the sum of
// 2^(f (q - m)) over a row without its diagonal, m' and r' over a column, e the smoothing:
//
//   g_i = f (q_ii - m_i),  a_i = 2^min(g_i, 0),  r_i falls to r_i 2^-max(g_i, 0),  the same for a column
//   loss  = 1/2N sum_i [log(1 + r_i / a_i) + log(1 + r'_i / a'_i)] + e s/N [sum_i p_ii - (sum I)(sum T) / N]
//   dS_ij = [2^(f (q_ij - m_i)) w_i + 2^(f (q_ij - m'_j)) w'_j - e/N] / N,   w_i = 2^-max(g_i, 0) / 2 (a_i + r_i)
//   dS_ii = [e (1 - 1/N) - (r_i / (a_i + r_i) + r'_i / (a'_i + r'_i)) / 2] / N
//   dI = s dS T,  dT = s dS^T I,  ds = sum dS p
//
// Pass 1 computes p by tiles and leaves a (maximum, sum) pair of each row and each column of a tile; this file's
// kernels fold them in a fixed order, and make the loss, the weights w and the dS_ii of them. The diagonal stays out of
// the sums because a small loss, and what a probability is short of 1, would drown in the rounding of its 1. The
// maximum is subtracted before the scale is applied: the difference of products that are close is exact, where a
// rounded logit of 100 is wrong by 4e-6. (sum I)(sum T), the sum of all products, is the caller's, and subtracted in
// float64.
//
// Pass 2 recomputes the tiles, to the same bits, and writes N dS times 2^15 for a chunk of rows, which two products of
// a library turn into dI and a part of dT. 8 N^2 D operations in all: 2 for S, 2 for S again, 4 for the gradients. A
// fused backward would keep a float32 accumulator of tile x D in registers, and D is 512 to 1024 here.
//
// SigLIP, with y = -z (s I T^T + b), z = 2 eye - 1, has no normaliser and one pass, 6 N^2 D operations:
//
//   loss = 1/N sum_ij log(1 + exp y_ij),   dS = -z / (1 + exp(-y)) / N,   db = sum dS
//
// Memory moved beyond the operands: 16 N^2 / 128 bytes of parts, written and read; 6 N^2 bytes of dS, one third written
// here. Memory held: O(N D), and workspaces that do not grow with N^2.
#include <algorithm>
#include <climits>

#include "cuda/contrastive/device.h"

namespace mmk::cuda {
namespace {

constexpr size_t kWorkspace = size_t{64} << 20;  // for parts; more would not be faster
constexpr int kFoldThreads = 128, kSumThreads = 1024;
constexpr double kLn2 = 0.6931471805599453;

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- sums in fixed order

// The sum over the block's kSumThreads threads, in the first one.
MMK_DEVICE double block_sum(double x) {
    constexpr int kWarps = kSumThreads / kWarp;
    MMK_SHARED(double, of_warp, kWarps);
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = kWarp / 2; i > 0; i /= 2) x += __shfl_xor_sync(kAllLanes, x, i);
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    if (warp != 0) return 0.0;
    x = of_warp[lane];
#pragma unroll
    for (int i = kWarp / 2; i > 0; i /= 2) x += __shfl_xor_sync(kAllLanes, x, i);
    return x;
}

// Statistics of `length` rows or columns from their parts, and from what is there already unless it is the first fold.
struct Fold {
    const float* parts;  // (2, tiles, length)
    float* statistics;   // (2, plane), from the first of the rows or columns on
    int tiles, length;
    int64_t plane;
    bool first;
};

__global__ __launch_bounds__(kFoldThreads) void fold_statistics_kernel(const Fold rows, const Fold columns,
                                                                       const float* scale) {
    const Logits logits(*scale);
    const Fold fold = blockIdx.y == 0 ? rows : columns;
    const int x = static_cast<int>(blockIdx.x) * kFoldThreads + static_cast<int>(threadIdx.x);
    if (x >= fold.length) return;
    const int64_t plane = static_cast<int64_t>(fold.tiles) * fold.length;
    Statistic total{kLowest, 0.0f};
    if (!fold.first) total = {fold.statistics[x], fold.statistics[fold.plane + x]};
    constexpr int kAtOnce = 8;  // loads under way
    for (int tile = 0; tile < fold.tiles; tile += kAtOnce) {
        Statistic parts[kAtOnce];
        float maximum = total.maximum;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const float* const at = fold.parts + static_cast<int64_t>(tile + i) * fold.length + x;
            parts[i] = tile + i < fold.tiles ? Statistic{at[0], at[plane]} : Statistic{kLowest, 0.0f};
            maximum = fmaxf(maximum, parts[i].maximum);
        }
        total = {maximum, total.sum * logits.exp(total.maximum, maximum)};
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) total.sum += parts[i].sum * logits.exp(parts[i].maximum, maximum);
    }
    fold.statistics[x] = total.maximum;
    fold.statistics[fold.plane + x] = total.sum;
}

Error fold_statistics(const Fold& rows, const Fold& columns, const float* scale, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(divided_up(std::max(rows.length, columns.length), kFoldThreads));
    return launch(Launch{"fold_statistics", dim3(blocks, 2), kFoldThreads, 0, stream}, fold_statistics_kernel, rows,
                  columns, scale);
}

// What a row or a column says of its own pair, from what it says of the others.
struct OwnPair {
    float loss, missed, weight;  // log(1 + r / a), r / (a + r), w

    MMK_DEVICE OwnPair(float q_ii, const Statistic& others, const Logits& logits) {
        const float lead = (q_ii - others.maximum) * logits.factor;
        if (lead >= 0.0f) {
            const float fade = exp2f(-lead), rest = others.sum * fade;
            loss = log1pf(rest);
            missed = rest / (1.0f + rest);
            weight = 0.5f * fade / (1.0f + rest);
        } else {  // NaN comes here, too
            const float total = exp2f(lead) + others.sum;
            loss = logf(total) - lead * static_cast<float>(kLn2);
            missed = others.sum / total;
            weight = 0.5f / total;
        }
    }
};

// The loss; one block, so that the order is fixed. Sums become weights, and the diagonal of q that of N dS.
__global__ __launch_bounds__(kSumThreads) void clip_loss_kernel(const ClipForward p) {
    const int count = p.pairs.count;
    const Logits logits(*p.pairs.scale);
    const float own_target = p.label_smoothing * (1.0f - 1.0f / static_cast<float>(count));
    const double scale = *p.pairs.scale, smoothing = p.label_smoothing;
    double total = 0.0;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kSumThreads) {
        float &of_row = p.rows[int64_t{count} + i], &of_column = p.columns[int64_t{count} + i], &own = p.diagonal[i];
        const OwnPair row(own, {p.rows[i], of_row}, logits), column(own, {p.columns[i], of_column}, logits);
        total += 0.5f * (row.loss + column.loss) + smoothing * fabs(scale) * own;
        of_row = row.weight;
        of_column = column.weight;
        own = own_target - 0.5f * (row.missed + column.missed);
    }
    total = block_sum(total);
    if (threadIdx.x != 0) return;
    if (p.products != nullptr) total -= smoothing * scale * (*p.products / count);
    *p.loss = static_cast<float>(total / count);
}

// Block k adds what the tiles left of sum k to totals[k].
struct TileSums {
    const float* sums;  // (sums, tiles)
    double* totals;
    float* means;
    int64_t tiles;
    int count;
    bool first;
};

__global__ __launch_bounds__(kSumThreads) void add_tile_sums_kernel(const TileSums p) {
    const float* const sums = p.sums + blockIdx.x * p.tiles;
    double total = 0.0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < p.tiles; i += kSumThreads) total += sums[i];
    total = block_sum(total);
    if (threadIdx.x != 0) return;
    if (!p.first) total += p.totals[blockIdx.x];
    p.totals[blockIdx.x] = total;
    p.means[blockIdx.x] = static_cast<float>(total / p.count);
}

// ---- the walk

Error checked(const char* name, const Pairs& pairs, int64_t row0, int64_t rows) {
    if (pairs.count < 1) return Error(std::string(name) + ": no pairs have no mean");
    if (pairs.width < 0 || row0 < 0 || rows < 0 || row0 + rows > pairs.count) {
        return Error(std::string(name) + ": it takes rows from the first to the last of the features");
    }
    return {};
}

template <class Tiles>
int64_t number_of(const TilePass<Tiles>& pass, int64_t rows, int64_t count) {
    return divided_up(rows, pass.rows) * divided_up(count, pass.columns);
}

template <class Tiles>
Error run(const char* name, const TilePass<Tiles>& pass, const Tiles& call, cudaStream_t stream) {
    if (pass.rows < kSmallestTile || pass.columns < kSmallestTile) return Error(std::string(name) + ": tiny tiles");
    const int64_t tiles = number_of(pass, call.row_count, call.pairs.count);
    if (tiles == 0) return {};
    if (tiles > INT_MAX || call.pairs.count > INT_MAX - pass.columns) {
        return Error(std::string(name) + ": more pairs than 32 bits number");
    }
    return pass.run(call, stream);
}

Error gradient(const char* name, TilePass<GradientTiles> pass, const LogitRows& to, GradientTiles call, int sums,
               cudaStream_t stream) {
    const Pairs& pairs = to.pairs;
    if (Error error = checked(name, pairs, to.row0, to.row_count)) return error;
    if (to.ds != nullptr &&
        (to.ds_stride % 8 != 0 || to.ds_stride < pairs.count || reinterpret_cast<uintptr_t>(to.ds) % 16 != 0)) {
        return Error(std::string(name) + ": rows of ds have to begin at multiples of 16 bytes, and to hold a row of S");
    }
    const int64_t tiles = number_of(pass, to.row_count, pairs.count);
    if (to.workspace_bytes < static_cast<size_t>(tiles * sums) * sizeof(float)) {
        return Error(std::string(name) + ": the workspace is smaller than gradient_workspace() says");
    }
    call.pairs = pairs;
    call.row0 = to.row0;
    call.row_count = to.row_count;
    call.ds = to.ds;
    call.ds_stride = to.ds_stride;
    call.sums = static_cast<float*>(to.workspace);
    if (Error error = run(name, pass, call, stream)) return error;
    const TileSums added{call.sums, to.totals, to.means, tiles, pairs.count, to.row0 == 0};
    return launch(Launch{"add_tile_sums", static_cast<unsigned>(sums), kSumThreads, 0, stream}, add_tile_sums_kernel,
                  added);
}

}  // namespace

size_t clip_forward_workspace(int count) {
    const auto n = static_cast<size_t>(std::max(count, 0));
    const size_t tiles = (n + kSmallestTile - 1) / kSmallestTile;
    const size_t row_of_tiles = 2 * sizeof(float) * (tiles * kSmallestTile + n);
    return row_of_tiles * std::min(tiles, std::max(kWorkspace / std::max(row_of_tiles, size_t{1}), size_t{2}));
}

size_t gradient_workspace(int count, int row_count) {
    const auto tiles = [](int n) { return static_cast<size_t>((int64_t{n} + kSmallestTile - 1) / kSmallestTile); };
    return 3 * sizeof(float) * tiles(std::max(count, 0)) * tiles(std::max(row_count, 0));
}

Error clip_forward_by(TilePass<StatisticsTiles> pass, const ClipForward& call, cudaStream_t stream) {
    const Pairs& pairs = call.pairs;
    if (Error error = checked("clip_forward", pairs, 0, pairs.count)) return error;
    if (call.label_smoothing != 0.0f && call.products == nullptr) {
        return Error("clip_forward: with a label smoothing it takes the sum of all products");
    }
    const int64_t count = pairs.count, columns = divided_up(count, pass.columns);
    const int64_t rows_of_tile = std::min<int64_t>(pass.rows, count);
    const int64_t bytes = int64_t{2 * sizeof(float)} * (columns * rows_of_tile + count);  // parts of one row of tiles
    const int64_t rows_at_once = static_cast<int64_t>(call.workspace_bytes) / bytes * pass.rows;
    if (rows_at_once == 0) return Error("clip_forward: the workspace is smaller than clip_forward_workspace() says");

    for (int64_t row0 = 0; row0 < count; row0 += rows_at_once) {
        const int64_t rows = std::min(rows_at_once, count - row0), tiles = divided_up(rows, pass.rows);
        float* const row_parts = static_cast<float*>(call.workspace);
        float* const column_parts = row_parts + 2 * columns * rows;
        const int first = static_cast<int>(row0), length = static_cast<int>(rows);
        const StatisticsTiles parts{pairs, first, length, row_parts, column_parts, call.diagonal};
        if (Error error = run("clip_statistics", pass, parts, stream)) return error;
        const Fold of_rows{row_parts, call.rows + row0, static_cast<int>(columns), length, count, true};
        const Fold of_columns{column_parts, call.columns, static_cast<int>(tiles), pairs.count, count, row0 == 0};
        if (Error error = fold_statistics(of_rows, of_columns, pairs.scale, stream)) return error;
    }
    return launch(Launch{"clip_loss", 1, kSumThreads, 0, stream}, clip_loss_kernel, call);
}

Error clip_gradient_by(TilePass<GradientTiles> pass, const ClipGradient& call, cudaStream_t stream) {
    if (call.to.ds == nullptr) return Error("clip_gradient: it has nowhere to write ds to");
    GradientTiles tiles{};
    tiles.rows = call.rows;
    tiles.columns = call.columns;
    tiles.diagonal = call.diagonal;
    tiles.off_target = call.label_smoothing / static_cast<float>(call.to.pairs.count);
    return gradient("clip_gradient", pass, call.to, tiles, 1, stream);
}

Error siglip_by(TilePass<GradientTiles> pass, const LogitRows& call, cudaStream_t stream) {
    return gradient("siglip", pass, call, GradientTiles{}, call.ds == nullptr ? 1 : 3, stream);
}

}  // namespace mmk::cuda
