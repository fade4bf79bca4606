// The contrastive losses of CLIP and SigLIP on N pairs of features of D numbers, with all gradients.
//
// With p = I T^T (N x N), s the scale, b the bias, e the label smoothing:
//
//   CLIP     S = s p,  a_i = exp S_ii,  r_i = sum of exp S_ij over j other than i,  c_j the same over i other than j
//            loss = 1/2N sum_i [log(1 + r_i / a_i) + log(1 + c_i / a_i)] + e s/N (sum_i p_ii - 1/N sum_ij p_ij)
//            dS_ij = exp(S_ij) / 2 (1 / (a_i + r_i) + 1 / (a_j + c_j)) - e/N                    off the diagonal
//            dS_ii = e (1 - 1/N) - (r_i / (a_i + r_i) + c_i / (a_i + c_i)) / 2
//   SigLIP   S = s p + b,  z = 2 eye - 1
//            loss = 1/N sum_ij log(1 + exp(-z_ij S_ij))                 dS = -z sigmoid(-z S)
//   and      dI = s/N dS T,  dT = s/N dS^T I,  ds = 1/N sum dS p,  db = 1/N sum dS
//
// The N x N numbers exist a tile at a time (pairs.h). SigLIP takes one sweep over the tiles: product, loss and dS, both
// gradients; 6 N^2 D operations. CLIP takes two, since no entry of dS is known before all of its row and column is: a
// first one for r and c, a second one for the gradients. One tile of dS feeds both gradients, so that is 8 N^2 D
// operations, where eager code that spells the logits out twice takes 12 and moves N^2 numbers a dozen times.
//
// Online maximum. exp(S) overflows at S = 89, which scale 100 exceeds. A fixed offset would turn the sums into plain
// additions, but holds only for features of unit length and loses rows whose every logit lies 87 below it; rows and
// columns therefore keep their own running maximum, and sums relative to it, for any features and any scale. It costs a
// second exponential an entry, next to the D multiply-adds (4 % of the time at D = 512).
//
// Small losses. A pair that is told apart well has a loss, and probabilities short of 1, of some 1e-9: the difference
// of two numbers of float32 near 1 would leave nothing of them. So the diagonal stays out of the sums: r and c are sums
// of small numbers, and both the loss and dS_ii are made of their ratio to a. Where the diagonal is not the largest,
// with m that maximum, log(1 + r / a) is (m - S_ii) + log(exp(S_ii - m) + r exp(-m)), two terms of which neither is
// negative.
//
// Differences first. exp(S - m) is 2^(|s| / ln 2 (q - m)), q being p or, where s is negative, -p, and m a maximum of q.
// The difference of products that are close is exact, which leaves the exponent a relative error of one rounding.
// The logit itself, rounded before the subtraction, would be wrong by 4e-6 at 100, and a compiler that fuses
// s p - m in one place and not in another would make that a probability of 1 + 4e-6 for the maximum.
//
// Bounded store. Tiles of p that fit into kStoredTiles are kept from the first sweep, so that the second need not
// compute them again (6 N^2 D where all fit); the others are recomputed: memory stays O(N D).
//
// Diagonal waves. The second sweep adds to rows of dI and of dT at once. Tiles are therefore taken in waves
// (i, i + t mod n): see run_grid. No two tasks at work share a row of dI or dT, nothing is locked or added atomically,
// every row is summed in one order, and the result is the same to the bit for any number of threads.
//
// Memory moved. The second sweep takes blocks of 2 x 2 tiles. A block reads 2 kTile rows of I, of T, of dI and of dT
// from beyond the L2 cache and writes those of dI and dT back: 12 kTile D numbers for 16 kTile^2 D operations, 48
// operations a byte in float32. What is as large as N x N is moved at most twice, the tiles kept.
#include <cmath>

#include "cpu/contrastive/call.h"
#include "cpu/contrastive/pairs.h"

namespace mmk::MMK_ISA {
namespace {

// 272 MiB: every tile up to N = 8352, a quarter of them at 16384. More would buy a quarter of the time at most.
constexpr int64_t kStoredTiles = (272 << 20) / (kTile * kTile * sizeof(float));

// The second sweep works on blocks of kBlock x kBlock tiles of dS, which with the panels they meet fill the L2 cache:
// rows of dI and dT, and of the features, come from beyond it once a block.
constexpr int kBlock = 2;

// Less than all logits, and finite: times a scale of 0 it is 0.
constexpr float kLowest = -3.4e38f;

Vec exp(Vec x) { return exp2(x * splat(static_cast<float>(kLog2e))); }

// How the products become logits: q = sign p, S - m = (q - m) factor in units of log 2.
struct Logits {
    explicit Logits(double scale)
        : sign(splat(scale < 0 ? -1.0f : 1.0f)), factor(splat(static_cast<float>(std::abs(scale) * kLog2e))) {}

    MMK_INLINE Vec exp(Vec product, Vec high) const { return exp2((product * sign - high) * factor); }
    MMK_INLINE Vec fade(Vec from, Vec to) const { return exp2((from - to) * factor); }

    Vec sign, factor;
};

// The first n lanes of v, n >= 1, and `other` past them.
MMK_INLINE Vec keep(Vec v, int64_t n, Vec other) {
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
    Store(const Tiling& tiling, bool wanted)
        : tiles_(tiling.tiles),
          kept_(wanted && tiling.tiles * tiling.tiles <= 4 * kStoredTiles
                    ? std::min(kStoredTiles, tiling.tiles * tiling.tiles)
                    : 0),
          memory_(kept_ * kTile * kTile) {}
    // Where tile (a, b) is kept, nullptr if it is not.
    float* at(int64_t a, int64_t b) const {
        const int64_t i = a * tiles_ + b;
        return i < kept_ ? memory_.get() + i * kTile * kTile : nullptr;
    }

  private:
    int64_t tiles_, kept_;
    Scratch<float> memory_;
};

// ---- CLIP, first sweep: maximum and sum of exponentials of every row and column, the diagonal left out

// A running maximum of q, and the sum of exp(S - its logit), for each of `count` rows or columns.
class LogSumExp {
  public:
    explicit LogSumExp(int64_t count)
        : memory_(2 * round_up(count, kTile)), max(memory_.get()), sum(max + round_up(count, kTile)) {
        std::fill_n(max, round_up(count, kTile), kLowest);
        std::fill_n(sum, round_up(count, kTile), 0.0f);
    }

  private:
    Scratch<float> memory_;

  public:
    float *const max, *const sum;
};

// Raises a maximum to at least `least` and returns its sum relative to the new one.
MMK_INLINE Vec rescale(float* max_at, const float* sum_at, Vec least, const Logits& logits) {
    const Vec old = load(max_at), now = max(least, old);
    store(max_at, now);
    return load(sum_at) * logits.fade(old, now);
}

// One tile of products enters the sums of its rows and columns, but for its diagonal if that is the diagonal of p.
// Returns the sum of all its products.
template <bool kOnDiagonal>
double accumulate(const float* p, int64_t rows, int64_t columns, const Logits& logits, float* row_max, float* row_sum,
                  float* column_max, float* column_sum) {
    const auto others = [](Vec v, int64_t r, int64_t c, Vec own) {
        return kOnDiagonal ? select(lane_index() == static_cast<int32_t>(r - c), own, v) : v;
    };
    const Vec lowest = splat(kLowest);
    float highest[kTile];  // of each row of the tile
    Vec top[kTile / kLanes], bottom[kTile / kLanes];
    std::fill_n(highest, kTile, kLowest);
    std::fill_n(top, kTile / kLanes, lowest);
    double total = 0;
    for (int64_t r = 0; r < rows; r++) {
        Vec most = lowest, products{};
        for_vectors(columns, [&](int64_t c, int64_t left) {
            const Vec product = load(p + r * kTile + c);
            const Vec q = others(keep(product * logits.sign, left, lowest), r, c, lowest);
            products += product;
            most = max(q, most);
            top[c / kLanes] = max(q, top[c / kLanes]);
        });
        highest[r] = max(most);
        total += static_cast<double>(sum(products));
    }
    for_vectors(rows, [&](int64_t r, int64_t) {
        store(row_sum + r, rescale(row_max + r, row_sum + r, load(highest + r), logits));
    });
    for_vectors(columns, [&](int64_t c, int64_t) {
        bottom[c / kLanes] = rescale(column_max + c, column_sum + c, top[c / kLanes], logits);
        top[c / kLanes] = load(column_max + c);
    });
    for (int64_t r = 0; r < rows; r++) {
        const Vec high = splat(row_max[r]);
        Vec row{};
        for_vectors(columns, [&](int64_t c, int64_t left) {
            const Vec product = load(p + r * kTile + c);
            row += others(keep(logits.exp(product, high), left, Vec{}), r, c, Vec{});
            bottom[c / kLanes] += others(logits.exp(product, top[c / kLanes]), r, c, Vec{});
        });
        row_sum[r] += sum(row);
    }
    for_vectors(columns, [&](int64_t c, int64_t) { store(column_sum + c, bottom[c / kLanes]); });
    return total;
}

// What the first sweep finds. A band of rows has its own sums of the columns, merged in the order of the bands.
struct Softmax {
    explicit Softmax(const Tiling& tiling)
        : rows(tiling.rows), columns(tiling.rows), diagonal(tiling.padded()), missed(tiling.padded()) {}

    LogSumExp rows, columns;
    Scratch<float> diagonal;  // of p, from the very tiles that enter the sums
    Scratch<float> missed;    // by the own pairs: see judge
    double products = 0;      // sum of p
};

template <class T>
void first_sweep(const Pairs<T>& pairs, const Store& stored, const Logits& logits, int threads, Softmax& softmax) {
    const Tiling& tiling = pairs.tiling;
    const Bands bands(tiling, 1);
    const int64_t width = round_up(tiling.rows, kTile);
    LogSumExp columns(bands.count * width);
    Scratch<double> products(bands.count);
    for_each(bands.count, threads, [&](int64_t band, int64_t) {
        alignas(64) float local[kTile * kTile];
        double total = 0;
        for (int64_t a = bands.first(band); a < bands.last(band); a++) {
            for (int64_t b = 0; b < tiling.tiles; b++) {
                float* p = stored.at(a, b) == nullptr ? local : stored.at(a, b);
                const int64_t i = tiling.first(a), j = tiling.first(b);
                pairs.products(a, b, p);
                total += (a == b ? accumulate<true> : accumulate<false>)(p, tiling.count(a), tiling.count(b), logits,
                                                                         softmax.rows.max + i, softmax.rows.sum + i,
                                                                         columns.max + band * width + j,
                                                                         columns.sum + band * width + j);
                for (int64_t r = 0; a == b && r < tiling.count(a); r++)
                    softmax.diagonal.get()[i + r] = p[r * kTile + r];
            }
        }
        products.get()[band] = total;
    });
    for (int64_t band = 0; band < bands.count; band++) {
        softmax.products += products.get()[band];
        for_vectors(tiling.rows, [&](int64_t j, int64_t) {
            const Vec high = load(columns.max + band * width + j);
            const Vec before = rescale(softmax.columns.max + j, softmax.columns.sum + j, high, logits);
            const Vec fade = logits.fade(high, load(softmax.columns.max + j));
            store(softmax.columns.sum + j, before + load(columns.sum + band * width + j) * fade);
        });
    }
}

// What a row or a column says of its own pair. q_ii is the diagonal's product; x, r: the maximum off it, and the sum.
struct OwnPair {
    double loss;    // log(1 + r / a)
    double missed;  // r / (a + r): what the own pair's probability is short of 1
    double weight;  // times exp(S - x): the probability of any other pair

    OwnPair(double q_ii, double x, double r, double factor) {
        const double lead = factor * (q_ii - x);
        if (lead >= 0) {
            const double fade = std::exp2(-lead), rest = r * fade;
            loss = std::log1p(rest);
            missed = rest / (1 + rest);
            weight = fade / (1 + rest);
        } else {  // NaN comes here, too
            const double total = std::exp2(lead) + r;
            loss = std::log(total) - lead * kLn2;
            missed = r / total;
            weight = 1 / total;
        }
    }
};

// Returns the sum of the own pairs' losses in both directions; leaves what they missed, the mean of both, and in place
// of the sums half the weights.
double judge(Softmax& softmax, int64_t count, double scale) {
    double loss = 0;
    for (int64_t i = 0; i < count; i++) {
        const double own = softmax.diagonal.get()[i], factor = std::abs(scale) * kLog2e;
        const double q_ii = scale < 0 ? -own : own;
        float &row_sum = softmax.rows.sum[i], &column_sum = softmax.columns.sum[i];
        const OwnPair row(q_ii, softmax.rows.max[i], row_sum, factor);
        const OwnPair column(q_ii, softmax.columns.max[i], column_sum, factor);
        loss += row.loss + column.loss;
        row_sum = static_cast<float>(row.weight / 2);
        column_sum = static_cast<float>(column.weight / 2);
        softmax.missed.get()[i] = static_cast<float>((row.missed + column.missed) / 2);
    }
    return loss;
}

// ---- the sweep that makes dS

struct Term {
    Vec loss, d_logit;
};

// dS of CLIP, once the first sweep is done.
struct ClipTerms {
    const float *row_max, *row_weight, *column_max, *column_weight, *missed;
    Logits logits;
    Vec own, other;  // what the smoothing adds on the diagonal, and takes off it

    MMK_INLINE Term operator()(int64_t i, int64_t j, Vec product, IVec on_diagonal) const {
        const Vec row = logits.exp(product, splat(row_max[i])) * splat(row_weight[i]);
        const Vec column = logits.exp(product, load(column_max + j)) * load(column_weight + j);
        return {Vec{}, select(on_diagonal, own - splat(missed[i]), row + column - other)};
    }
};

// log(1 + x) for x in [0, 1], to the rounding of float32: minimax in the relative error.
MMK_INLINE Vec log1p(Vec x) {
    constexpr float kCoefficients[] = {-0.0033184739f, 0.020204589f,  -0.057664447f, 0.10680555f,  -0.15355396f,
                                       0.196954f,      -0.249585873f, 0.333305113f,  -0.499999328f};
    Vec p{};
    MMK_UNROLL for (float coefficient : kCoefficients) p = p * x + splat(coefficient);
    return p * x * x + x;
}

// Loss and dS of SigLIP.
struct SigLipTerms {
    Vec scale, bias;

    MMK_INLINE Term operator()(int64_t, int64_t, Vec product, IVec on_diagonal) const {
        const Vec logit = product * scale + bias;
        const Vec y = select(on_diagonal, -logit, logit);  // loss = log(1 + exp(y)), its derivative sigmoid(y)
        const Vec small = exp(y > Vec{} ? -y : y), sigmoid = (y > Vec{} ? splat(1.0f) : small) / (small + 1.0f);
        return {max(y, Vec{}) + log1p(small), select(on_diagonal, -sigmoid, sigmoid)};
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

// Tile (a, b) of p becomes one of g; the sums run over the tile. The diagonal of g is kept apart in float32: it is far
// larger than its neighbours, and its rounding to a half type would dominate the error of the gradients.
template <class T, class Terms>
Sums weigh(const Pairs<T>& pairs, const Terms& terms, int64_t a, int64_t b, const float* p, Vec factor,
           GradientTile<OperandOf<T>> tile, float* diagonal) {
    constexpr int kPack = OperandOf<T>::kPack;
    const int64_t rows = pairs.tiling.count(a), columns = pairs.tiling.count(b);
    const int64_t first_row = pairs.tiling.first(a), first_column = pairs.tiling.first(b);
    Sums sums;
    for (int64_t r = 0; r < round_up(rows, kTileRows); r += kPack) {
        Vec loss{}, products{}, d_logits{};
        for_vectors(columns, [&](int64_t c, int64_t left) {
            Vec g[kPack] = {};
            for (int64_t h = 0; h < kPack && r + h < rows; h++) {
                const int64_t i = first_row + r + h, j = first_column + c;
                const IVec on_diagonal = lane_index() == static_cast<int32_t>(i - j);
                const Vec product = load(p + (r + h) * kTile + c);
                const Term term = terms(i, j, product, on_diagonal);
                const Vec d_logit = keep(term.d_logit, left, Vec{});
                loss += keep(term.loss, left, Vec{});
                products += d_logit * product;
                d_logits += d_logit;
                g[h] = d_logit * factor;
                if (i - j >= 0 && i - j < kLanes) {
                    diagonal[i] = g[h][i - j];
                    g[h] = select(on_diagonal, Vec{}, g[h]);
                }
            }
            tile.put(r, c, g);
        });
        sums += {sum(loss), sum(products), sum(d_logits)};
    }
    tile.finish(rows, columns);
    return sums;
}

// Row i of a gradient: adds the diagonal of g times the other features.
template <class T>
void finish_row(const Pairs<T>& pairs, const float* sum, int64_t i, float diagonal, const Rows<T>& other,
                const Matrix& result) {
    float* row = static_cast<float*>(result.data) + i * result.row_stride;
    for_vectors(result.columns, [&](int64_t d, int64_t left) {
        const Vec value = pairs.gradient_at(sum, i, d) + splat(diagonal) * other.floats(i, d);
        if (left >= kLanes) {
            store(row + d, value);
        } else {
            store_first(row + d, value, static_cast<int>(left));
        }
    });
}

template <class Body>
void for_pairs_of_bands(int64_t bands, int threads, Body&& body) {
    const auto task = [](void* context, int64_t worker, int64_t i, int64_t j) {
        const TileShapes shapes;
        (*static_cast<Body*>(context))(worker, i, j);
    };
    run_grid(bands, threads, task, &body);
}

template <class T, class Terms>
Sums second_sweep(const Pairs<T>& pairs, const Contrastive& call, const Store& stored, const Terms& terms,
                  int threads) {
    using Tile = GradientTile<OperandOf<T>>;
    const Tiling& tiling = pairs.tiling;
    const Bands bands(tiling, tiling.tiles < 16 ? 1 : kBlock);
    const int64_t size = call.with_grads ? tiling.padded() * pairs.panels * kPanel : 0;
    Scratch<float> d_image(size), d_text(size);
    const Vec factor = splat(static_cast<float>(call.scale / static_cast<double>(tiling.rows)));
    constexpr int64_t kTileSize = kTile * kTile, kWorkSize = (kBlock * kBlock + 1) * kTileSize + kTileSize / 2;
    Scratch<float> diagonal(tiling.padded()), work(threads * kWorkSize);
    Scratch<Sums> sums(bands.count * bands.count);

    // Tiles [a, a_end) x [b, b_end) of g; `fresh`: no task has added to these rows of dI and dT yet
    const auto block = [&](float* memory, int64_t a, int64_t a_end, int64_t b, int64_t b_end, bool fresh_a,
                           bool fresh_b) {
        Sums total;
        Tile g[kBlock][kBlock];
        for (int64_t i = a; i < a_end; i++) {
            for (int64_t j = b; j < b_end; j++) {
                float* const own = memory + ((i - a) * kBlock + j - b) * kTileSize;
                float* p = stored.at(i, j);
                if (p == nullptr) pairs.products(i, j, p = Tile::kInPlace ? own : memory + kBlock * kBlock * kTileSize);
                g[i - a][j - b] = {Tile::kInPlace ? p : own, memory + (kBlock * kBlock + 1) * kTileSize};
                total += weigh(pairs, terms, i, j, p, factor, g[i - a][j - b], diagonal.get());
            }
        }
        for (int64_t d = 0; call.with_grads && d < pairs.panels; d++) {
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
    for_pairs_of_bands(bands.count, threads, [&](int64_t worker, int64_t i, int64_t j) {
        Sums total;
        for (int64_t a = bands.first(i); a < bands.last(i); a += kBlock) {
            for (int64_t b = bands.first(j); b < bands.last(j); b += kBlock) {
                total += block(work.get() + worker * kWorkSize, a, std::min(a + kBlock, bands.last(i)), b,
                               std::min(b + kBlock, bands.last(j)), i == j && b == bands.first(j),
                               i == j && a == bands.first(i));
            }
        }
        sums.get()[i * bands.count + j] = total;
    });
    for_each(call.with_grads ? tiling.tiles : 0, threads, [&](int64_t a, int64_t) {
        for (int64_t i = tiling.first(a); i < tiling.first(a) + tiling.count(a); i++) {
            finish_row(pairs, d_image.get(), i, diagonal.get()[i], pairs.text, call.d_image);
            finish_row(pairs, d_text.get(), i, diagonal.get()[i], pairs.image, call.d_text);
        }
    });
    Sums total;
    for (int64_t k = 0; k < bands.count * bands.count; k++) total += sums.get()[k];
    return total;
}

// ---- the losses

double operations(const Contrastive& call) {
    return 2.0 * static_cast<double>(call.image.rows) * static_cast<double>(call.image.rows) *
           static_cast<double>(call.image.columns);
}

template <class T>
ContrastiveResult clip(const Contrastive& call) {
    const int threads = useful_threads(operations(call));
    // The largest block first: freed last, it is the last that scratch.cpp would part with.
    const Store stored(Tiling(call.image.rows), call.with_grads);
    const Pairs<T> pairs(call.image, call.text, call.with_grads, threads);
    const int64_t count = pairs.tiling.rows;
    const double n = static_cast<double>(count), smoothing = call.label_smoothing;
    const Logits logits(call.scale);
    Softmax softmax(pairs.tiling);
    first_sweep(pairs, stored, logits, threads, softmax);

    double diagonal = 0;
    for (int64_t i = 0; i < count; i++) diagonal += static_cast<double>(softmax.diagonal.get()[i]);
    ContrastiveResult result{};
    result.loss = judge(softmax, count, call.scale) / (2 * n);
    result.loss += smoothing * call.scale * (diagonal - softmax.products / n) / n;
    if (!call.with_grads) return result;

    const ClipTerms terms{softmax.rows.max,
                          softmax.rows.sum,
                          softmax.columns.max,
                          softmax.columns.sum,
                          softmax.missed.get(),
                          logits,
                          splat(static_cast<float>(smoothing - smoothing / n)),
                          splat(static_cast<float>(smoothing / n))};
    result.d_scale = second_sweep(pairs, call, stored, terms, threads).products / n;
    return result;
}

template <class T>
ContrastiveResult siglip(const Contrastive& call) {
    const int threads = useful_threads(operations(call));
    const Pairs<T> pairs(call.image, call.text, call.with_grads, threads);
    const SigLipTerms terms{splat(static_cast<float>(call.scale)), splat(static_cast<float>(call.bias))};
    const Sums sums = second_sweep(pairs, call, Store(pairs.tiling, false), terms, threads);
    const double n = static_cast<double>(pairs.tiling.rows);
    return {sums.loss / n, sums.products / n, sums.d_logits / n};
}

}  // namespace

ContrastiveResult clip_loss(const Contrastive& call) {
    return with_element_type(call.image.dtype, [&](auto type) { return clip<decltype(type)>(call); });
}

ContrastiveResult siglip_loss(const Contrastive& call) {
    return with_element_type(call.image.dtype, [&](auto type) { return siglip<decltype(type)>(call); });
}

}  // namespace mmk::MMK_ISA
