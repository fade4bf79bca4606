// The contrastive losses of CLIP and SigLIP on N pairs of features of D numbers, with all gradients.
//
// With p = I T^T (N x N), s the scale, b the bias, e the label smoothing:
//
//   CLIP     S = s p,  R_i = logsumexp_j S_ij,  C_j = logsumexp_i S_ij,  Y = (1 - e) eye + e / N
//            loss = 1/2N sum_i (R_i + C_i) - 1/N sum_ij Y_ij S_ij       dS = (exp(S - R) + exp(S - C)) / 2 - Y
//   SigLIP   S = s p + b,  z = 2 eye - 1
//            loss = 1/N sum_ij log(1 + exp(-z_ij S_ij))                 dS = -z sigmoid(-z S)
//   and      dI = s/N dS T,  dT = s/N dS^T I,  ds = 1/N sum dS p,  db = 1/N sum dS
//
// The N x N numbers exist a tile at a time (pairs.h). SigLIP takes one sweep over the tiles: product, loss and dS, both
// gradients; 6 N^2 D operations. CLIP takes two, since no entry of dS is known before all of its row and column is: a
// first one for R and C, a second one for the gradients. One tile of dS feeds both gradients, so that is 8 N^2 D
// operations, where eager code that spells the logits out twice takes 12 and moves N^2 numbers a dozen times.
//
// Online maximum. exp(S) overflows at S = 89, which scale 100 exceeds. A fixed offset would turn the sums into plain
// additions, but holds only for features of unit length and loses rows whose every logit lies 87 below it; rows and
// columns therefore keep their own running maximum, and sums relative to it, for any features and any scale. It costs a
// second exponential an entry, next to the D multiply-adds (4 % of the time at D = 512), and makes the largest term
// exactly 1, so that pairs that are told apart perfectly give a loss and gradients of exactly 0.
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
#include "contrastive.h"

#include <cmath>

#include "pairs.h"

namespace mmk::MMK_ISA {
namespace {

// 272 MiB: every tile up to N = 8352, a quarter of them at 16384. More would buy a quarter of the time at most.
constexpr int64_t kStoredTiles = (272 << 20) / (kTile * kTile * sizeof(float));

// The second sweep works on blocks of kBlock x kBlock tiles of dS, which with the panels they meet fill the L2 cache:
// rows of dI and dT, and of the features, come from beyond it once a block.
constexpr int kBlock = 2;

constexpr float kInfinity = __builtin_inff();

Vec exp(Vec x) { return exp2(x * splat(static_cast<float>(kLog2e))); }

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

// ---- CLIP, first sweep: maximum and sum of exponentials of every row and column

// A running maximum, and the sum of exp(x - maximum), for each of `count` rows or columns.
class LogSumExp {
  public:
    explicit LogSumExp(int64_t count)
        : memory_(2 * round_up(count, kTile)), max(memory_.get()), sum(max + round_up(count, kTile)) {
        std::fill_n(max, round_up(count, kTile), -kInfinity);
        std::fill_n(sum, round_up(count, kTile), 0.0f);
    }

  private:
    Scratch<float> memory_;

  public:
    float *const max, *const sum;
};

// Raises a maximum to at least `least` and returns its sum relative to the new one.
MMK_INLINE Vec rescale(float* max_at, const float* sum_at, Vec least) {
    const Vec old = load(max_at), now = max(least, old);
    store(max_at, now);
    return load(sum_at) * exp(old - now);
}

// One tile of products enters the sums of its rows and columns. Returns the sum of the products.
double accumulate(const float* p, int64_t rows, int64_t columns, Vec scale, float* row_max, float* row_sum,
                  float* column_max, float* column_sum) {
    float highest[kTile];  // of each row of the tile
    Vec top[kTile / kLanes], bottom[kTile / kLanes];
    std::fill_n(highest, kTile, -kInfinity);
    std::fill_n(top, kTile / kLanes, splat(-kInfinity));
    double total = 0;
    for (int64_t r = 0; r < rows; r++) {
        Vec most = splat(-kInfinity), products{};
        for_vectors(columns, [&](int64_t c, int64_t left) {
            const Vec product = load(p + r * kTile + c), x = keep(product * scale, left, splat(-kInfinity));
            products += product;
            most = max(x, most);
            top[c / kLanes] = max(x, top[c / kLanes]);
        });
        highest[r] = max(most);
        total += static_cast<double>(sum(products));
    }
    for_vectors(rows,
                [&](int64_t r, int64_t) { store(row_sum + r, rescale(row_max + r, row_sum + r, load(highest + r))); });
    for_vectors(columns, [&](int64_t c, int64_t) {
        bottom[c / kLanes] = rescale(column_max + c, column_sum + c, top[c / kLanes]);
        top[c / kLanes] = load(column_max + c);
    });
    for (int64_t r = 0; r < rows; r++) {
        const Vec high = splat(row_max[r]);
        Vec row{};
        for_vectors(columns, [&](int64_t c, int64_t left) {
            const Vec product = load(p + r * kTile + c);
            row += keep(exp(product * scale - high), left, Vec{});
            bottom[c / kLanes] += exp(product * scale - top[c / kLanes]);
        });
        row_sum[r] += sum(row);
    }
    for_vectors(columns, [&](int64_t c, int64_t) { store(column_sum + c, bottom[c / kLanes]); });
    return total;
}

// What the first sweep finds. A band of rows has its own sums of the columns, merged in the order of the bands.
struct Softmax {
    explicit Softmax(const Tiling& tiling) : rows(tiling.rows), columns(tiling.rows), diagonal(tiling.padded()) {}

    LogSumExp rows, columns;
    Scratch<float> diagonal;  // of p, from the very tiles that enter the sums
    double products = 0;      // sum of p
};

template <class T>
void first_sweep(const Pairs<T>& pairs, const Store& stored, float scale, int threads, Softmax& softmax) {
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
                total +=
                    accumulate(p, tiling.count(a), tiling.count(b), splat(scale), softmax.rows.max + i,
                               softmax.rows.sum + i, columns.max + band * width + j, columns.sum + band * width + j);
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
            const Vec before = rescale(softmax.columns.max + j, softmax.columns.sum + j, high);
            const Vec more = load(columns.sum + band * width + j) * exp(high - load(softmax.columns.max + j));
            store(softmax.columns.sum + j, before + more);
        });
    }
}

// sum_i log sum_j exp(S_ij) - S_ii, over rows or over columns.
double cross_entropy(const LogSumExp& x, const float* diagonal, int64_t count, Vec scale) {
    double total = 0;
    for_vectors(count, [&](int64_t i, int64_t left) {
        float sums[kLanes], targets[kLanes];
        store(sums, load(x.sum + i));
        store(targets,
              load_first(diagonal + i, static_cast<int>(std::min<int64_t>(left, kLanes))) * scale - load(x.max + i));
        for (int64_t l = 0; l < std::min<int64_t>(left, kLanes); l++) {
            total += std::log(static_cast<double>(sums[l])) - static_cast<double>(targets[l]);
        }
    });
    return total;
}

// ---- the sweep that makes dS

struct Term {
    Vec loss, d_logit;
};

// dS of CLIP, once the first sweep is done.
struct ClipTerms {
    const float *row_max, *row_factor, *column_max, *column_factor;  // factor: 1 / 2 sum
    Vec scale, hit, miss;                                            // hit, miss: Y on the diagonal, and off it

    MMK_INLINE Term operator()(int64_t i, int64_t j, Vec product, IVec on_diagonal) const {
        const Vec row = exp(product * scale - splat(row_max[i])) * splat(row_factor[i]);
        const Vec column = exp(product * scale - load(column_max + j)) * load(column_factor + j);
        return {Vec{}, row + column - select(on_diagonal, hit, miss)};
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
    static constexpr bool kInPlace = true;
    float *g, *scratch;  // scratch: unused

    void put(int64_t r, int64_t c, const Vec (&rows)[1]) const { store(g + r * kTile + c, rows[0]); }
    const uint32_t* by_rows() const { return reinterpret_cast<const uint32_t*>(g); }
    const uint32_t* by_columns() const { return by_rows(); }
    void finish(int64_t, int64_t) const {}
};

#if defined(__AVX512BF16__)
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

// Row i of a gradient: adds the diagonal of g times the other features, and rounds to the result's type.
template <class T>
void finish_row(const Pairs<T>& pairs, const float* sum, int64_t i, float diagonal, const Rows<T>& other,
                const Matrix& result) {
    T* row = static_cast<T*>(result.data) + i * result.row_stride;
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
    const float scale = static_cast<float>(call.scale);
    Softmax softmax(pairs.tiling);
    first_sweep(pairs, stored, scale, threads, softmax);

    ContrastiveResult result{};
    result.loss = (cross_entropy(softmax.rows, softmax.diagonal.get(), count, splat(scale)) +
                   cross_entropy(softmax.columns, softmax.diagonal.get(), count, splat(scale))) /
                  (2 * n);
    double diagonal = 0;
    for (int64_t i = 0; i < count; i++) diagonal += static_cast<double>(softmax.diagonal.get()[i]);
    result.loss += smoothing * call.scale * (diagonal - softmax.products / n) / n;
    if (!call.with_grads) return result;

    for_vectors(count, [&](int64_t i, int64_t) {
        store(softmax.rows.sum + i, splat(0.5f) / load(softmax.rows.sum + i));
        store(softmax.columns.sum + i, splat(0.5f) / load(softmax.columns.sum + i));
    });
    const ClipTerms terms{softmax.rows.max,
                          softmax.rows.sum,
                          softmax.columns.max,
                          softmax.columns.sum,
                          splat(scale),
                          splat(static_cast<float>(1 - smoothing + smoothing / n)),
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
