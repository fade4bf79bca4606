// CLIP's first sweep: of each row and each column of the logits, the maximum and the sum of exponentials.
#pragma once
#include <cmath>

#include "cpu/contrastive/matches.h"

namespace mmk::MMK_ISA {

// 272 MiB: every tile up to N = 8352, a quarter of them at 16384. More would buy a quarter of the time at most.
constexpr int64_t kStoredTiles = (272 << 20) / (kTile * kTile * sizeof(float));

// Less than all logits, and finite: times a scale of 0 it is 0.
constexpr float kLowest = -3.4e38f;

// How the products become logits: q = sign p, S - m = (q - m) factor in units of log 2.
struct Logits {
    explicit Logits(double scale)
        : sign(splat(scale < 0 ? -1.0f : 1.0f)), factor(splat(static_cast<float>(std::abs(scale) * kLog2e))) {}

    MMK_INLINE Vec exp(Vec product, Vec high) const { return exp2((product * sign - high) * factor); }
    MMK_INLINE Vec fade(Vec from, Vec to) const { return exp2((from - to) * factor); }

    Vec sign, factor;
};

// The first n lanes of v, n >= 1, and `other` past them.
static MMK_INLINE Vec keep(Vec v, int64_t n, Vec other) {
    return n >= kLanes ? v : select(lane_index() < static_cast<int32_t>(n), v, other);
}

// body(first, left): lanes from `first` on, the first `left` of them real.
template <class Body>
void for_vectors(int64_t count, Body&& body) {
    for (int64_t i = 0; i < count; i += kLanes) body(i, count - i);
}

// ---- the tiles of p that are kept between the sweeps

class Store {
  public:
    // Where less than a quarter of the tiles would fit, memory is worth more than the little time gained: with D = 512,
    // a call takes less than 512 MB up to N = 40 000.
    Store(const Tiling& rows, const Tiling& columns, bool wanted)
        : columns_(columns.tiles),
          kept_(wanted && rows.tiles * columns.tiles <= 4 * kStoredTiles
                    ? std::min(kStoredTiles, rows.tiles * columns.tiles)
                    : 0),
          memory_(kept_ * kTile * kTile) {}
    // Where tile (a, b) is kept, nullptr if it is not.
    float* at(int64_t a, int64_t b) const {
        const int64_t i = a * columns_ + b;
        return i < kept_ ? memory_.get() + i * kTile * kTile : nullptr;
    }

  private:
    int64_t columns_, kept_;
    Scratch<float> memory_;
};

// ---- statistics

// Those of `count` rows or columns, with room for a whole tile's.
class LogSumExp {
  public:
    explicit LogSumExp(int64_t count)
        : count_(count),
          memory_(3 * round_up(count, kTile)),
          max(memory_.get()),
          sum(max + round_up(count, kTile)),
          positive(sum + round_up(count, kTile)) {
        std::fill_n(max, round_up(count, kTile), kLowest);
        std::fill_n(sum, 2 * round_up(count, kTile), 0.0f);
    }
    LogSumExp(int64_t count, const Statistics& from) : LogSumExp(count) {
        std::copy_n(from.max, count, max);
        std::copy_n(from.sum, count, sum);
        std::copy_n(from.positive, count, positive);
    }
    void copy_to(const Statistics& to) const {
        std::copy_n(max, count_, to.max);
        std::copy_n(sum, count_, to.sum);
        std::copy_n(positive, count_, to.positive);
    }
    Statistics from(int64_t first) const { return {max + first, sum + first, positive + first}; }

  private:
    int64_t count_;
    Scratch<float> memory_;

  public:
    float *const max, *const sum, *const positive;
};

// Raises a maximum to at least `least` and returns its sum relative to the new one.
static MMK_INLINE Vec rescale(float* max_at, const float* sum_at, Vec least, const Logits& logits) {
    const Vec old = load(max_at), now = max(least, old);
    store(max_at, now);
    return load(sum_at) * logits.fade(old, now);
}

// One tile of products, from row i and column j on, enters the statistics of its rows and columns.
template <Matches kMatches>
static void accumulate(const float* p, int64_t i, int64_t rows, int64_t j, int64_t columns, const Logits& logits,
                       const Matcher& matcher, const Statistics& of_rows, const Statistics& of_columns) {
    const Vec lowest = splat(kLowest);
    float highest[kTile];  // of each row of the tile
    Vec top[kTile / kLanes], bottom[kTile / kLanes];
    std::fill_n(highest, kTile, kLowest);
    std::fill_n(top, kTile / kLanes, lowest);
    for (int64_t r = 0; r < rows; r++) {
        Vec most = lowest, positive{};
        for_vectors(columns, [&](int64_t c, int64_t left) {
            const Vec q = load(p + r * kTile + c) * logits.sign, present = keep(q, left, lowest);
            const Match match = matcher.at<kMatches>(i + r, j + c);
            most = max(select(match.of_row, lowest, present), most);
            top[c / kLanes] = max(select(match.of_column, lowest, present), top[c / kLanes]);
            if constexpr (kMatches != Matches::kNone) {
                const Vec own = keep(select(match.positive, q, Vec{}), left, Vec{});
                positive += own;
                store(of_columns.positive + c, load(of_columns.positive + c) + own);
            }
        });
        highest[r] = max(most);
        if constexpr (kMatches != Matches::kNone) of_rows.positive[r] += sum(positive);
    }
    for_vectors(rows, [&](int64_t r, int64_t) {
        store(of_rows.sum + r, rescale(of_rows.max + r, of_rows.sum + r, load(highest + r), logits));
    });
    for_vectors(columns, [&](int64_t c, int64_t) {
        bottom[c / kLanes] = rescale(of_columns.max + c, of_columns.sum + c, top[c / kLanes], logits);
        top[c / kLanes] = load(of_columns.max + c);
    });
    for (int64_t r = 0; r < rows; r++) {
        const Vec high = splat(of_rows.max[r]);
        Vec row{};
        for_vectors(columns, [&](int64_t c, int64_t left) {
            const Vec product = load(p + r * kTile + c);
            const Match match = matcher.at<kMatches>(i + r, j + c);
            row += select(match.of_row, Vec{}, keep(logits.exp(product, high), left, Vec{}));
            bottom[c / kLanes] += select(match.of_column, Vec{}, logits.exp(product, top[c / kLanes]));
        });
        of_rows.sum[r] += sum(row);
    }
    for_vectors(columns, [&](int64_t c, int64_t) { store(of_columns.sum + c, bottom[c / kLanes]); });
}

// A band of rows has its own statistics of the columns, merged in the order of the bands.
template <class T>
static void first_sweep(const Pairs<T>& pairs, const Store& stored, const Logits& logits, const Matcher& matcher,
                        int threads, LogSumExp& rows, LogSumExp& columns) {
    const Bands bands(pairs.rows, 1);
    const int64_t width = round_up(pairs.columns.rows, kTile);
    LogSumExp of_bands(bands.count * width);
    for_each(bands.count, threads, [&](int64_t band, int64_t) {
        alignas(64) float local[kTile * kTile];
        for (int64_t a = bands.first(band); a < bands.last(band); a++) {
            for (int64_t b = 0; b < pairs.columns.tiles; b++) {
                float* p = stored.at(a, b) == nullptr ? local : stored.at(a, b);
                const int64_t i = pairs.rows.first(a), j = pairs.columns.first(b);
                const int64_t row_count = pairs.rows.count(a), column_count = pairs.columns.count(b);
                pairs.products(a, b, p);
                with_matches(matcher.in_tile(i, row_count, j, column_count), [&](auto matches) {
                    accumulate<decltype(matches)::value>(p, i, row_count, j, column_count, logits, matcher,
                                                         rows.from(i), of_bands.from(band * width + j));
                });
            }
        }
    });
    for (int64_t band = 0; band < bands.count; band++) {
        const Statistics of_band = of_bands.from(band * width);
        for_vectors(pairs.columns.rows, [&](int64_t j, int64_t) {
            const Vec high = load(of_band.max + j);
            const Vec before = rescale(columns.max + j, columns.sum + j, high, logits);
            const Vec fade = logits.fade(high, load(columns.max + j));
            store(columns.sum + j, before + load(of_band.sum + j) * fade);
            store(columns.positive + j, load(columns.positive + j) + load(of_band.positive + j));
        });
    }
}

}  // namespace mmk::MMK_ISA
