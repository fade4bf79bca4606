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
// Where ids say what belongs together, P_i are the positives of row i, n_i of them. Of one, q_ii is its q; several stay
// in the sums, and then
//
//   loss of the row  log r_i + f ln 2 (m_i - mean q over P_i),   w_i = v_i = 1 / 2 r_i,   t_i = (1 - e) / 2 n_i
//
// whereas of one v_i = 0 and t_i is half its r_i / (a_i + r_i) less e; on P_i the row's share of N dS_ij is
// 2^(f (q_ij - m_i)) v_i - t_i. The mean is over the rows, and over the columns, that have a positive. Pairs that are
// to be ignored are in no sum, and their dS is 0.
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
// Memory moved beyond the operands: 16 N^2 / 128 bytes of parts, 24 with positives by ids, written and read; 6 N^2
// bytes of dS, one third written here. Memory held: O(N D), and workspaces that do not grow with N^2.
#include <algorithm>
#include <climits>

#include "cuda/contrastive/device.h"

namespace mmk::cuda {
namespace {

constexpr size_t kWorkspace = size_t{64} << 20;  // for parts; more would not be faster
constexpr int kFoldThreads = 128, kSumThreads = 1024;

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
    const float* parts;  // (2, tiles, length), or (3, ...) with the sums over positives
    float* statistics;   // (2 or 3, plane), from the first of the rows or columns on
    int tiles, length;
    int64_t plane;
    bool first;
};

template <bool kPositives>
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
    if constexpr (kPositives) {
        float& positive = fold.statistics[2 * fold.plane + x];
        float sum = fold.first ? 0.0f : positive;
        for (int tile = 0; tile < fold.tiles; tile++) {
            sum += fold.parts[2 * plane + static_cast<int64_t>(tile) * fold.length + x];
        }
        positive = sum;
    }
}

Error fold_statistics(const Fold& rows, const Fold& columns, const Pairs& pairs, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(divided_up(std::max(rows.length, columns.length), kFoldThreads));
    const Launch at{"fold_statistics", dim3(blocks, 2), kFoldThreads, 0, stream};
    const float* const scale = pairs.scale;
    if (pairs.same == Same::kPositive) return launch(at, fold_statistics_kernel<true>, rows, columns, scale);
    return launch(at, fold_statistics_kernel<false>, rows, columns, scale);
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
            weight = fade / (1.0f + rest);
        } else {  // NaN comes here, too
            const float total = exp2f(lead) + others.sum;
            loss = logf(total) - lead * static_cast<float>(kLn2);
            missed = others.sum / total;
            weight = 1.0f / total;
        }
    }
};

// The loss; one block, so that the order is fixed. Sums become weights. Those without an own pair have none.
__global__ __launch_bounds__(kSumThreads) void clip_weights_kernel(const ClipWeights p) {
    const Pairs& pairs = p.pairs;
    const Logits logits(*pairs.scale);
    const int64_t images = pairs.images, texts = pairs.texts;
    const double scale = *pairs.scale, smoothing = p.label_smoothing;
    const float own_target = p.label_smoothing * (p.row_share + p.column_share);
    double total = 0.0;
    for (int i = static_cast<int>(threadIdx.x); i < pairs.images; i += kSumThreads) {
        float& of_row = p.rows[images + i];
        if (i < pairs.first || i >= pairs.last) {
            of_row = p.own[i] = 0.0f;
            continue;
        }
        const int j = i + pairs.offset;
        float& of_column = p.columns[texts + j];
        const float own = p.rows[2 * images + i];
        const OwnPair row(own, {p.rows[i], of_row}, logits), column(own, {p.columns[j], of_column}, logits);
        total += p.row_share * row.loss + p.column_share * column.loss;
        total += smoothing * (p.row_share + p.column_share) * fabs(scale) * own;
        of_row = p.row_share * row.weight;
        of_column = p.column_share * column.weight;
        p.own[i] = own_target - (p.row_share * row.missed + p.column_share * column.missed);
    }
    for (int j = static_cast<int>(threadIdx.x); j < pairs.texts; j += kSumThreads) {
        if (j - pairs.offset < pairs.first || j - pairs.offset >= pairs.last) p.columns[texts + j] = 0.0f;
    }
    total = block_sum(total);
    if (threadIdx.x != 0) return;
    if (p.products != nullptr) {
        const double means = p.row_share * p.products[0] / texts + p.column_share * p.products[1] / images;
        total -= smoothing * scale * means;
    }
    *p.loss = static_cast<float>(total / p.count);
}

// A row or a column in the loss: its own, and the mean of q over its positives; 0 of one that has none.
struct Term {
    float loss, mean;
};

// Of one of `count`: `of` is where its statistics are, which become weights. positives: how many ids say that it has.
MMK_DEVICE Term weigh(float* of, int64_t count, int positives, float share, float smoothing, const Logits& logits) {
    float &weight = of[count], &positive_weight = of[2 * count], &target = of[3 * count];
    const Statistic others{of[0], weight};
    const float sum = positive_weight, number = static_cast<float>(positives);
    weight = positive_weight = target = 0.0f;
    if (positives == 0) return {0.0f, 0.0f};
    const float mean = sum / number;
    if (positives == 1) {
        const OwnPair only(mean, others, logits);
        weight = share * only.weight;
        target = share * (only.missed - smoothing);
        return {only.loss, mean};
    }
    weight = positive_weight = share / others.sum;
    target = share * ((1.0f - smoothing) / number);
    return {logf(others.sum) + (others.maximum - mean) * logits.factor * static_cast<float>(kLn2), mean};
}

// clip_weights_kernel where ids say what belongs together.
__global__ __launch_bounds__(kSumThreads) void clip_weights_by_ids_kernel(const ClipWeights p) {
    const Pairs& pairs = p.pairs;
    const Logits logits(*pairs.scale);
    const double scale = *pairs.scale, smoothing = p.label_smoothing;
    const auto row_share = static_cast<float>(p.shares[0]), column_share = static_cast<float>(p.shares[1]);
    double total = 0.0;
    const auto add = [&](const Term& of, float share) {
        total += share * of.loss;
        total += smoothing * share * fabs(scale) * of.mean;
    };
    for (int i = static_cast<int>(threadIdx.x); i < pairs.images; i += kSumThreads) {
        const int positives = pairs.image_counts[i];
        add(weigh(p.rows + i, pairs.images, positives, row_share, p.label_smoothing, logits), row_share);
    }
    for (int j = static_cast<int>(threadIdx.x); j < pairs.texts; j += kSumThreads) {
        const int positives = pairs.text_counts[j];
        add(weigh(p.columns + j, pairs.texts, positives, column_share, p.label_smoothing, logits), column_share);
    }
    total = block_sum(total);
    if (threadIdx.x != 0) return;
    if (p.products != nullptr) {
        const double means = row_share * p.products[0] / pairs.texts + column_share * p.products[1] / pairs.images;
        total -= smoothing * scale * means;
    }
    *p.loss = static_cast<float>(total / p.shares[2]);
}

// Block k adds what the tiles left of sum k to totals[k].
struct TileSums {
    const float* sums;  // (sums, tiles)
    double* totals;
    float* means;
    int64_t tiles;
    double count;
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
    if (pairs.images < 1 || pairs.texts < 1) return Error(std::string(name) + ": no pairs have no mean");
    if (pairs.width < 0 || row0 < 0 || rows < 0 || row0 + rows > pairs.images) {
        return Error(std::string(name) + ": it takes rows from the first to the last of the features");
    }
    const int64_t first = pairs.first, last = pairs.last, offset = pairs.offset;
    if (first < last && (first < 0 || last > pairs.images || first + offset < 0 || last + offset > pairs.texts)) {
        return Error(std::string(name) + ": an image's own text lies outside the texts");
    }
    const bool has_ids = pairs.image_ids != nullptr && pairs.text_ids != nullptr;
    const bool has_counts = pairs.image_counts != nullptr && pairs.text_counts != nullptr;
    if (has_ids != (pairs.same != Same::kNothing) || has_counts != (pairs.same == Same::kPositive)) {
        return Error(std::string(name) + ": ids and counts come with what they are for");
    }
    return {};
}

template <class Tiles>
int64_t number_of(const TilePass<Tiles>& pass, int64_t rows, int64_t columns) {
    return divided_up(rows, pass.rows) * divided_up(columns, pass.columns);
}

// The rows at which own pairs begin and end, if some image without one would meet a text at the offset.
struct Edges {
    int64_t first, last;

    Edges(const Pairs& pairs, int64_t end) : first(0), last(end) {
        const int64_t offset = pairs.offset;
        if (pairs.same == Same::kPositive) return;  // nothing goes by the offset
        if (pairs.first <= std::max<int64_t>(0, -offset) && pairs.last >= std::min<int64_t>(end, pairs.texts - offset))
            return;
        first = pairs.first;
        last = pairs.last;
    }
    // Of rows from this one on, how many lie before the next edge.
    int64_t before(int64_t row, int64_t rows) const {
        for (const int64_t edge : {first, last}) {
            if (row < edge) rows = std::min(rows, edge - row);
        }
        return rows;
    }
};

constexpr int kNowhere = -(1 << 30);  // an offset that leads to no text

template <class Tiles>
Error run(const char* name, const TilePass<Tiles>& pass, const Tiles& call, cudaStream_t stream) {
    if (pass.rows < kSmallestTile || pass.columns < kSmallestTile) return Error(std::string(name) + ": tiny tiles");
    const int64_t tiles = number_of(pass, call.row_count, call.pairs.texts);
    if (tiles == 0) return {};
    const int64_t most = std::max(int64_t{call.pairs.images} + std::abs(call.pairs.offset), int64_t{call.pairs.texts});
    if (tiles > INT_MAX || most > INT_MAX - pass.columns) {
        return Error(std::string(name) + ": more pairs than 32 bits number");
    }
    Tiles rows = call;
    const bool none_own = rows.row0 >= call.pairs.last || rows.row0 + rows.row_count <= call.pairs.first;
    if (none_own || call.pairs.same == Same::kPositive) rows.pairs.offset = kNowhere;
    return pass.run(rows, stream);
}

Error gradient(const char* name, TilePass<GradientTiles> pass, const LogitRows& to, GradientTiles call, int sums,
               cudaStream_t stream) {
    const Pairs& pairs = to.pairs;
    if (Error error = checked(name, pairs, to.row0, to.row_count)) return error;
    if (to.ds != nullptr &&
        (to.ds_stride % 8 != 0 || to.ds_stride < pairs.texts || reinterpret_cast<uintptr_t>(to.ds) % 16 != 0)) {
        return Error(std::string(name) + ": rows of ds have to begin at multiples of 16 bytes, and to hold a row of S");
    }
    if (Edges(pairs, pairs.images).before(to.row0, to.row_count) < to.row_count) {
        return Error(std::string(name) + ": own pairs end within these rows");
    }
    const int64_t tiles = number_of(pass, to.row_count, pairs.texts);
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
    const TileSums added{call.sums, to.totals, to.means, tiles, to.count, to.row0 == 0};
    return launch(Launch{"add_tile_sums", static_cast<unsigned>(sums), kSumThreads, 0, stream}, add_tile_sums_kernel,
                  added);
}

// Statistics that a tile leaves of a row or of a column.
int planes_of(const Pairs& pairs) { return pairs.same == Same::kPositive ? 3 : 2; }

}  // namespace

size_t clip_statistics_workspace(const Pairs& pairs) {
    const auto tiles = [](int count) {
        return (static_cast<size_t>(std::max(count, 0)) + kSmallestTile - 1) / kSmallestTile;
    };
    const size_t row_of_tiles = planes_of(pairs) * sizeof(float) *
                                (tiles(pairs.texts) * kSmallestTile + static_cast<size_t>(std::max(pairs.texts, 0)));
    const size_t at_once = std::max(kWorkspace / std::max(row_of_tiles, size_t{1}), size_t{2});
    return row_of_tiles * std::min(tiles(pairs.images), at_once);
}

size_t gradient_workspace(int texts, int row_count) {
    const auto tiles = [](int n) { return static_cast<size_t>((int64_t{n} + kSmallestTile - 1) / kSmallestTile); };
    return 3 * sizeof(float) * tiles(std::max(texts, 0)) * tiles(std::max(row_count, 0));
}

Error clip_statistics_by(TilePass<StatisticsTiles> pass, const ClipStatistics& call, cudaStream_t stream) {
    const Pairs& pairs = call.pairs;
    if (Error error = checked("clip_statistics", pairs, 0, pairs.images)) return error;
    const int64_t images = pairs.images, texts = pairs.texts, columns = divided_up(texts, pass.columns);
    const int64_t rows_of_tile = std::min<int64_t>(pass.rows, images);
    const int64_t planes = planes_of(pairs);
    const int64_t bytes = planes * int64_t{sizeof(float)} * (columns * rows_of_tile + texts);  // of one row of tiles
    const int64_t rows_at_once = static_cast<int64_t>(call.workspace_bytes) / bytes * pass.rows;
    if (rows_at_once == 0) {
        return Error("clip_statistics: the workspace is smaller than clip_statistics_workspace() says");
    }
    const Edges edges(pairs, images);
    for (int64_t row0 = 0, rows; row0 < images; row0 += rows) {
        rows = edges.before(row0, std::min(rows_at_once, images - row0));
        const int64_t tiles = divided_up(rows, pass.rows);
        float* const row_parts = static_cast<float*>(call.workspace);
        float* const column_parts = row_parts + planes * columns * rows;
        const int first = static_cast<int>(row0), length = static_cast<int>(rows);
        float *const row_own = call.rows + 2 * images, *const column_own = call.columns + 2 * texts;
        const StatisticsTiles parts{pairs, first, length, row_parts, column_parts, row_own, column_own};
        if (Error error = run("clip_statistics", pass, parts, stream)) return error;
        const Fold of_rows{row_parts, call.rows + row0, static_cast<int>(columns), length, images, !call.add};
        const Fold of_columns{column_parts, call.columns, static_cast<int>(tiles),
                              pairs.texts,  texts,        !call.add && row0 == 0};
        if (Error error = fold_statistics(of_rows, of_columns, pairs, stream)) return error;
    }
    return {};
}

Error clip_weights(const ClipWeights& call, cudaStream_t stream) {
    if (Error error = checked("clip_weights", call.pairs, 0, call.pairs.images)) return error;
    if (call.label_smoothing != 0.0f && call.products == nullptr) {
        return Error("clip_weights: with a label smoothing it takes the sums of products");
    }
    const bool by_ids = call.pairs.same == Same::kPositive;
    if (by_ids != (call.shares != nullptr))
        return Error("clip_weights: where ids say what belongs together, it takes shares on the device, and else none");
    return launch(Launch{"clip_weights", 1, kSumThreads, 0, stream},
                  by_ids ? clip_weights_by_ids_kernel : clip_weights_kernel, call);
}

Error clip_gradient_by(TilePass<GradientTiles> pass, const ClipGradient& call, cudaStream_t stream) {
    if (call.to.ds == nullptr) return Error("clip_gradient: it has nowhere to write ds to");
    GradientTiles tiles{};
    tiles.rows = call.rows;
    tiles.columns = call.columns;
    tiles.own = call.own;
    return gradient("clip_gradient", pass, call.to, tiles, 1, stream);
}

Error siglip_by(TilePass<GradientTiles> pass, const LogitRows& call, cudaStream_t stream) {
    return gradient("siglip", pass, call, GradientTiles{}, call.ds == nullptr ? 1 : 3, stream);
}

}  // namespace mmk::cuda
