// The sweep that makes dS of the products, tile by tile, and both gradients of it.
#pragma once
#include "cpu/contrastive/weights.h"

namespace mmk::MMK_ISA {

// The second sweep works on blocks of kBlock x kBlock tiles of dS, which with the panels they meet fill the L2 cache:
// rows of dI and dT, and of the features, come from beyond it once a block.
constexpr int kBlock = 2;

struct Term {
    Vec loss, d_logit;
};

// dS of CLIP.
struct ClipTerms {
    Weights rows, columns;
    Logits logits;

    template <Matches kMatches>
    MMK_INLINE Term at(int64_t i, int64_t j, Vec product, const Match& match) const {
        if constexpr (kMatches == Matches::kIds) {
            const auto part = [&](Vec max, Vec weight, Vec positive_weight, Vec target) {
                const Vec under = product * logits.sign - max;  // above 0: a single positive, and of no weight
                const Vec exp = exp2((under > Vec{} ? Vec{} : under) * logits.factor);
                return select(match.positive, exp * positive_weight - target, exp * weight);
            };
            const Vec row =
                part(splat(rows.max[i]), splat(rows.weight[i]), splat(rows.positive_weight[i]), splat(rows.target[i]));
            const Vec column = part(load(columns.max + j), load(columns.weight + j), load(columns.positive_weight + j),
                                    load(columns.target + j));
            return {Vec{}, select(match.hidden, Vec{}, row + column)};
        } else {
            const Vec row = logits.exp(product, splat(rows.max[i])) * splat(rows.weight[i]);
            const Vec column = logits.exp(product, load(columns.max + j)) * load(columns.weight + j);
            if constexpr (kMatches == Matches::kNone) return {Vec{}, row + column};
            const Vec target = splat(rows.target[i]) + load(columns.target + j);
            return {Vec{}, select(match.own, -target, row + column)};
        }
    }
};

static MMK_INLINE Vec exp(Vec x) { return exp2(x * splat(static_cast<float>(kLog2e))); }

// log(1 + x) for x in [0, 1], to the rounding of float32: minimax in the relative error.
static MMK_INLINE Vec log1p(Vec x) {
    constexpr float kCoefficients[] = {-0.0033184739f, 0.020204589f,  -0.057664447f, 0.10680555f,  -0.15355396f,
                                       0.196954f,      -0.249585873f, 0.333305113f,  -0.499999328f};
    Vec p{};
    MMK_UNROLL for (float coefficient : kCoefficients) p = p * x + splat(coefficient);
    return p * x * x + x;
}

// Loss and dS of SigLIP.
struct SigLipTerms {
    Vec scale, bias;

    template <Matches kMatches>
    MMK_INLINE Term at(int64_t, int64_t, Vec product, const Match& match) const {
        const Vec logit = product * scale + bias;
        const Vec y = select(match.positive, -logit, logit);  // loss = log(1 + exp(y)), its derivative sigmoid(y)
        const Vec small = exp(y > Vec{} ? -y : y), sigmoid = (y > Vec{} ? splat(1.0f) : small) / (small + 1.0f);
        const Term term{max(y, Vec{}) + log1p(small), select(match.positive, -sigmoid, sigmoid)};
        if constexpr (kMatches != Matches::kIds) return term;
        return {select(match.hidden, Vec{}, term.loss), select(match.hidden, Vec{}, term.d_logit)};
    }
};

struct Sums {
    double loss = 0, products = 0, d_logits = 0;  // of the terms' losses, of dS p, of dS

    void operator+=(const Sums& other) {
        loss += other.loss;
        products += other.products;
        d_logits += other.d_logits;
    }
};

// A tile of g = s/N dS as the broadcast operands of both gradients, in kTile * kTile units of memory.
template <class Operand>
struct GradientTile;

template <>
struct GradientTile<FloatOperand> {  // one layout serves both; it may take the place of p
    [[maybe_unused]] static constexpr bool kInPlace = true;
    float *g, *scratch;  // scratch: unused

    void put(int64_t r, int64_t c, const Vec (&rows)[1]) const { store(g + r * kTile + c, rows[0]); }
    const uint32_t* by_rows() const { return reinterpret_cast<const uint32_t*>(g); }
    const uint32_t* by_columns() const { return by_rows(); }
    void finish(int64_t, int64_t) const {}
};

#if MMK_HAS_BF16
template <>
struct GradientTile<BFloat16Operand> {  // pairs along a row for dI, then pairs along a column for dT
    static constexpr bool kInPlace = false;
    float *g, *scratch;  // scratch: kTile * kTile / 2 units, with AMX

    void put(int64_t r, int64_t c, const Vec (&rows)[2]) const {
        const HalfLanes low = to_bfloat16(rows[0]), high = to_bfloat16(rows[1]);
        BFloat16* along_rows = reinterpret_cast<BFloat16*>(g) + r * kTile + c;
        memcpy(along_rows, &low, sizeof low);
        memcpy(along_rows + kTile, &high, sizeof high);
        uint32_t* along_columns = kHasAmx ? reinterpret_cast<uint32_t*>(scratch) : columns();
        store_bits(along_columns + r / 2 * kTile + c,
                   __builtin_convertvector(low, UVec) | __builtin_convertvector(high, UVec) << 16);
    }
    // Once all is put: with AMX the pairs along a column lie side by side.
    void finish(int64_t rows, int64_t tile_columns) const {
        if constexpr (!kHasAmx) return;
        const auto* from = reinterpret_cast<const uint32_t*>(scratch);
        for (int64_t u = 0; u < depth<BFloat16Operand>(rows); u += kDepthStep) {
            for (int64_t c = 0; c < tile_columns; c += kLanes) {
                UVec block[kLanes] = {};
                for (int i = 0; i < kDepthStep; i++) block[i] = load_bits(from + (u + i) * kTile + c);
                transpose(block);
                for (int i = 0; i < kLanes; i++) {
                    memcpy(columns() + (c + i) * (kTile / 2) + u, &block[i], kDepthStep * sizeof(uint32_t));
                }
            }
        }
    }
    const uint32_t* by_rows() const { return reinterpret_cast<const uint32_t*>(g); }
    const uint32_t* by_columns() const { return columns(); }

  private:
    uint32_t* columns() const { return reinterpret_cast<uint32_t*>(g) + kTile / 2 * kTile; }
};
#endif

// Tile (a, b) of p becomes one of g, zero up to the depths of both gradients; the sums run over the tile. A row's own
// pair is kept apart in float32: it is far larger than its neighbours, and its rounding to a half type would dominate
// the error of the gradients.
template <Matches kMatches, class T, class Terms>
static Sums weigh(const Pairs<T>& pairs, const Matcher& matcher, const Terms& terms, int64_t a, int64_t b,
                  const float* p, Vec factor, GradientTile<OperandOf<T>> tile, float* own) {
    constexpr int kPack = OperandOf<T>::kPack;
    const int64_t rows = pairs.rows.count(a), columns = pairs.columns.count(b);
    const int64_t first_row = pairs.rows.first(a), first_column = pairs.columns.first(b);
    constexpr int64_t kStep = kDepthStep * kPack;  // rows, or columns, of a product's least depth
    Sums sums;
    for (int64_t r = 0; r < round_up(rows, std::max<int64_t>(kTileRows, kStep)); r += kPack) {
        Vec loss{}, products{}, d_logits{};
        for_vectors(round_up(columns, kStep), [&](int64_t c, int64_t) {
            const int64_t left = columns - c;
            Vec g[kPack] = {};
            for (int64_t h = 0; h < kPack && r + h < rows && left > 0; h++) {
                const int64_t i = first_row + r + h, j = first_column + c;
                const Match match = matcher.at<kMatches>(i, j);
                const Vec product = load(p + (r + h) * kTile + c);
                const Term term = terms.template at<kMatches>(i, j, product, match);
                const Vec d_logit = keep(term.d_logit, left, Vec{});
                loss += keep(term.loss, left, Vec{});
                products += d_logit * product;
                d_logits += d_logit;
                g[h] = d_logit * factor;
                if constexpr (kMatches != Matches::kNone) {
                    const int64_t lane = matcher.own(i) - j;
                    if (lane >= 0 && lane < kLanes) own[i] = g[h][lane];
                    g[h] = select(match.own, Vec{}, g[h]);
                }
            }
            tile.put(r, c, g);
        });
        sums += {sum(loss), sum(products), sum(d_logits)};
    }
    tile.finish(rows, columns);
    return sums;
}

// Row i of a gradient: adds g of its own pair times the feature that belongs to it: row `other` of the others, negative
// where none does.
template <class T>
static void finish_row(const Pairs<T>& pairs, const Tiling& tiling, const float* sum, int64_t i, float own,
                       const Rows<T>& others, int64_t other, const Matrix& result) {
    float* row = static_cast<float*>(result.data) + i * result.row_stride;
    for_vectors(result.columns, [&](int64_t d, int64_t left) {
        Vec value = pairs.gradient_at(tiling, sum, i, d);
        if (other >= 0) value += splat(own) * others.floats(other, d);
        if (left >= kLanes) {
            store(row + d, value);
        } else {
            store_first(row + d, value, static_cast<int>(left));
        }
    });
}

template <class Body>
static void for_pairs_of_bands(int64_t bands, int threads, Body&& body) {
    const auto task = [](void* context, int64_t worker, int64_t i, int64_t j) {
        const TileShapes shapes;
        (*static_cast<Body*>(context))(worker, i, j);
    };
    run_grid(bands, threads, task, &body);
}

// The sums over the rectangle; g = factor dS.
template <class T, class Terms>
static Sums second_sweep(const Pairs<T>& pairs, const Matcher& matcher, const Store& stored, const Terms& terms,
                         double factor_of_g, const Gradients& gradients, int threads) {
    using Tile = GradientTile<OperandOf<T>>;
    const Tiling &rows = pairs.rows, &columns = pairs.columns;
    const Bands row_bands(rows, rows.tiles < 16 ? 1 : kBlock), column_bands(columns, columns.tiles < 16 ? 1 : kBlock);
    const bool wanted = gradients.wanted;
    Scratch<float> d_image(wanted ? rows.padded() * pairs.panels * kPanel : 0);
    Scratch<float> d_text(wanted ? columns.padded() * pairs.panels * kPanel : 0);
    const Vec factor = splat(static_cast<float>(factor_of_g));
    constexpr int64_t kTileSize = kTile * kTile, kWorkSize = (kBlock * kBlock + 1) * kTileSize + kTileSize / 2;
    Scratch<float> own(rows.padded()), work(threads * kWorkSize);
    Scratch<Sums> sums(row_bands.count * column_bands.count);

    // Tiles [a, a_end) x [b, b_end) of g; `fresh`: no task has added to these rows of dI and dT yet
    const auto block = [&](float* memory, int64_t a, int64_t a_end, int64_t b, int64_t b_end, bool fresh_a,
                           bool fresh_b) {
        Sums total;
        Tile g[kBlock][kBlock];
        for (int64_t i = a; i < a_end; i++) {
            for (int64_t j = b; j < b_end; j++) {
                float* const in_work = memory + ((i - a) * kBlock + j - b) * kTileSize;
                float* p = stored.at(i, j);
                if (p == nullptr)
                    pairs.products(i, j, p = Tile::kInPlace ? in_work : memory + kBlock * kBlock * kTileSize);
                const Tile tile{Tile::kInPlace ? p : in_work, memory + (kBlock * kBlock + 1) * kTileSize};
                g[i - a][j - b] = tile;
                total += with_matches(matcher.in_tile(rows.first(i), rows.count(i), columns.first(j), columns.count(j)),
                                      [&](auto matches) {
                                          return weigh<decltype(matches)::value>(pairs, matcher, terms, i, j, p, factor,
                                                                                 tile, own.get());
                                      });
            }
        }
        for (int64_t d = 0; wanted && d < pairs.panels; d++) {
            for (int64_t j = b; j < b_end; j++) {
                for (int64_t i = a; i < a_end; i++) {
                    pairs.add_to_image(i, j, g[i - a][j - b].by_rows(), d, d_image.get(), !fresh_a || j > b);
                }
            }
            for (int64_t i = a; i < a_end; i++) {
                for (int64_t j = b; j < b_end; j++) {
                    pairs.add_to_text(i, j, g[i - a][j - b].by_columns(), d, d_text.get(), !fresh_b || i > a);
                }
            }
        }
        return total;
    };
    // Waves over the smallest square around the bands. The first band of columns that meets band i of rows is i, or
    // the first one where there is no i; the first of rows that meets band j of columns is j, or the last one.
    for_pairs_of_bands(
        std::max(row_bands.count, column_bands.count), threads, [&](int64_t worker, int64_t i, int64_t j) {
            if (i >= row_bands.count || j >= column_bands.count) return;
            const bool first_of_rows = j == (i < column_bands.count ? i : 0);
            const bool first_of_columns = i == std::min(j, row_bands.count - 1);
            Sums total;
            for (int64_t a = row_bands.first(i); a < row_bands.last(i); a += kBlock) {
                for (int64_t b = column_bands.first(j); b < column_bands.last(j); b += kBlock) {
                    total +=
                        block(work.get() + worker * kWorkSize, a, std::min(a + kBlock, row_bands.last(i)), b,
                              std::min(b + kBlock, column_bands.last(j)), first_of_rows && b == column_bands.first(j),
                              first_of_columns && a == row_bands.first(i));
                }
            }
            sums.get()[i * column_bands.count + j] = total;
        });
    for_each(wanted ? rows.tiles : 0, threads, [&](int64_t a, int64_t) {
        for (int64_t i = rows.first(a); i < rows.first(a) + rows.count(a); i++)
            finish_row(pairs, rows, d_image.get(), i, own.get()[i], pairs.text, matcher.own(i), gradients.d_image);
    });
    for_each(wanted ? columns.tiles : 0, threads, [&](int64_t b, int64_t) {
        for (int64_t j = columns.first(b); j < columns.first(b) + columns.count(b); j++) {
            const int64_t i = matcher.owner(j);
            finish_row(pairs, columns, d_text.get(), j, i >= 0 ? own.get()[i] : 0, pairs.image, i, gradients.d_text);
        }
    });
    Sums total;
    for (int64_t k = 0; k < row_bands.count * column_bands.count; k++) total += sums.get()[k];
    return total;
}

}  // namespace mmk::MMK_ISA
