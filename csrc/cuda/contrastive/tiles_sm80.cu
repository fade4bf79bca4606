// The tiles of the contrastive losses (passes.cu) for sm_80 and later.
//
// A block of four warps makes a tile of 128 x 128 logits, a warp a quarter of it, from slices of 32 numbers of 128 rows
// of either matrix, of which three are in shared memory: two under way while one is multiplied. The accumulators of a
// warp are 128 registers a thread. What follows the products is done in registers as well: maxima and sums over a
// warp's 64 rows and 64 columns by shuffles, the two halves of a row or of a column merged by way of shared memory.
//
// Two blocks share a multiprocessor (96 KiB of shared memory, at most 255 registers a thread), and one takes its
// exponentials while the other multiplies: a tile has 16384 D multiplications, 1024 a cycle on an A100, and 32768
// exponentials, 16 a cycle, a sixth of the products' time at D = 768. Of the products' time, fragments keep shared
// memory busy for half: 16 ldmatrix, 8 KiB, a warp and 64 products.
//
// Where ids say what belongs together, or what counts nowhere, a tile's are in shared memory, and compared for each
// logit; a row's or a column's positives are summed as its others are, and have weights of their own in pass 2.
//
// Memory moved: (rows + columns) D numbers a tile, out of the L2 cache for the most part (grouped_tile); the results by
// rows of 128 bytes.
#include "cuda/contrastive/device.h"

namespace mmk::cuda {
namespace {

constexpr int kTile = 128, kHalf = 64, kDepth = 32, kStages = 3, kThreads = 128, kGroup = 16;
constexpr int kOperand = kTile * kDepth;  // numbers of one matrix in a stage
constexpr size_t kSharedBytes = sizeof(uint16_t) * kStages * 2 * kOperand;

// ---- memory. A row of a slice is four chunks of 8 numbers; chunk c of row r lies where c ^ (r / 2 % 4) would, so that
// the same chunk of eight rows falls into different banks.

// What a thread copies of each slice of one matrix: one chunk of every 32nd row.
template <class T>
struct Source {
    static constexpr int kChunks = kDepth / 8, kRows = kThreads / kChunks;
    const T* first;  // of a tile that ends early it may lie beyond the matrix, and is not read
    int64_t stride;
    int present, left;  // rows from the thread's first one on, and numbers from its chunk on
    bool aligned;       // every eighth number of every row lies at 16 bytes
    int to;

    MMK_DEVICE Source(const Features& matrix, int count, int row0, const Pairs& pairs) : stride(matrix.stride) {
        const int row = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
        aligned = reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && (stride | pairs.width) % 8 == 0;
        present = count - row0 - row;
        left = pairs.width - chunk * 8;
        first = static_cast<const T*>(matrix.data) + (row0 + row) * stride + chunk * 8;
        to = row * kDepth + (chunk ^ row / 2 % 4) * 8;
    }

    MMK_DEVICE void load(T* slice, int k0) const {
        if (aligned) {
#pragma unroll
            for (int i = 0; i < kTile; i += kRows) {
                cp_async<16>(slice + to + i * kDepth, first + i * stride + k0, i < present && k0 < left);
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < kTile; i += kRows) {
#pragma unroll 1
                for (int j = 0; j < 8; j++) {
                    const bool inside = i < present && k0 + j < left;
                    slice[to + i * kDepth + j] = inside ? first[i * stride + k0 + j] : T(0.0f);
                }
            }
        }
    }
};

// ---- products

// Where a thread's numbers are in the tile. Rows and columns that go by the names row and column from here on count
// from its first one: element e of (m, n) is row 16 m + 8 (e / 2), column 8 n + e % 2, which the compiler knows.
struct Place {
    int warp, lane, row, column;

    MMK_DEVICE Place() : warp(static_cast<int>(threadIdx.x) / kWarp), lane(static_cast<int>(threadIdx.x) % kWarp) {
        row = warp / 2 * kHalf + lane / 4;
        column = warp % 2 * kHalf + lane % 4 * 2;
    }
};

template <class T>
struct Products {
    float s[4][8][4] = {};

    // Of the rows of image from row0 and of text from column0 on. Leaves shared memory free for everyone.
    MMK_DEVICE void compute(const Pairs& pairs, int row0, int column0, T* shared, const Place& place) {
        const Source<T> image(pairs.image, pairs.images, row0, pairs), text(pairs.text, pairs.texts, column0, pairs);
        const int steps = (pairs.width + kDepth - 1) / kDepth;
        const auto load = [&](int step) {
            T* const stage = shared + step % kStages * (2 * kOperand);
            if (step < steps) image.load(stage, step * kDepth);
            if (step < steps) text.load(stage + kOperand, step * kDepth);
            cp_async_commit();
        };
#pragma unroll
        for (int step = 0; step < kStages - 1; step++) load(step);
        for (int step = 0; step < steps; step++) {
            cp_async_wait<kStages - 2>();
            __syncthreads();  // this step's slices are here, and nobody needs the last one's
            load(step + kStages - 1);
            const T* const stage = shared + step % kStages * (2 * kOperand);
            multiply(stage, stage + kOperand, place);
        }
        cp_async_wait<0>();
        __syncthreads();
    }

    MMK_DEVICE void multiply(const T* image, const T* text, const Place& place) {
        const int lane = place.lane, swizzle = lane % 8 / 2;
        const T* const a_row = image + (place.warp / 2 * kHalf + lane % 16) * kDepth;
        const T* const b_row = text + (place.warp % 2 * kHalf + lane / 16 * 8 + lane % 8) * kDepth;
        uint32_t a[2][4][4], b[2][4][4];
        const auto fetch = [&](int k) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                ldmatrix_x4(a[k][i], a_row + i * 16 * kDepth + ((2 * k + lane / 16) ^ swizzle) * 8);
                ldmatrix_x4(b[k][i], b_row + i * 16 * kDepth + ((2 * k + lane / 8 % 2) ^ swizzle) * 8);
            }
        };
        fetch(0);
#pragma unroll
        for (int k = 0; k < kDepth / 16; k++) {
            if (k + 1 < kDepth / 16) fetch(k + 1);  // under way while these are multiplied
#pragma unroll
            for (int m = 0; m < 4; m++) {
#pragma unroll
                for (int n = 0; n < 8; n++) mma<T>(s[m][n], a[k][m], b[k][n / 2] + n % 2 * 2);
            }
        }
    }

    // Calls f(s, row, column) of each number.
    template <class F>
    MMK_DEVICE void each(const F& f) {
#pragma unroll
        for (int n = 0; n < 8; n++) {
#pragma unroll
            for (int m = 0; m < 4; m++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    f(s[m][n][e], 16 * m + 8 * (e / 2), 8 * n + e % 2);
                }
            }
        }
    }
};

// ---- the tile of a block

struct Tile {
    Place place;
    int tiles_m, tiles_n, row_tile, column_tile;
    int i0, j0, rows, columns;  // of S: the first, and how many there are
    int shift;                  // own pairs: row - column = shift, counted within the tile
    bool crosses;

    MMK_DEVICE Tile(const Pairs& pairs, int row0, int row_count) {
        tiles_m = (row_count + kTile - 1) / kTile;
        tiles_n = (pairs.texts + kTile - 1) / kTile;
        const TileAt at = grouped_tile<kGroup>(static_cast<int>(blockIdx.x), tiles_m, tiles_n);
        row_tile = at.row;
        column_tile = at.column;
        i0 = row0 + row_tile * kTile;
        j0 = column_tile * kTile;
        rows = min(row0 + row_count - i0, kTile);
        columns = min(pairs.texts - j0, kTile);
        shift = j0 - i0 - pairs.offset;
        crosses = crosses_own_pairs(pairs, i0, kTile, j0, kTile);
    }
    MMK_DEVICE bool inside(int row, int column) const {
        return row < rows - place.row && column < columns - place.column;
    }
    MMK_DEVICE bool positive(int row, int column) const { return row - column == shift + place.column - place.row; }
    MMK_DEVICE bool whole() const { return rows == kTile && columns == kTile; }
};

// ---- ids

// Of the tile's rows and columns, in shared memory: a thread has too many of them for its registers. kAlone: of those
// that have one positive.
template <bool kAlone>
struct Ids {
    int image[kTile], text[kTile];

    // By all threads, a row and a column each; a barrier has to follow.
    MMK_DEVICE void load(const Pairs& pairs, const Tile& tile) {
        static_assert(kThreads == kTile);
        const int x = static_cast<int>(threadIdx.x);
        image[x] = image_id<kAlone>(pairs, tile.i0 + x, tile.i0 + tile.rows);
        text[x] = text_id<kAlone>(pairs, tile.j0 + x, tile.j0 + tile.columns);
    }
};

// ---- pass 1 of CLIP

// The (maximum, sum) of eight of a thread's numbers x(0), x(1) ..., and of those of the lanes that differ from its own
// in these bits.
template <int kCount, int kFirstBit, int kEndBit, class F>
MMK_DEVICE Statistic statistic(const Logits& logits, const F& x) {
    Statistic of{kLowest, 0.0f};
#pragma unroll
    for (int i = 0; i < kCount; i++) of.maximum = fmaxf(of.maximum, x(i));
#pragma unroll
    for (int bit = kFirstBit; bit < kEndBit; bit *= 2) {
        of.maximum = fmaxf(of.maximum, __shfl_xor_sync(kAllLanes, of.maximum, bit));
    }
#pragma unroll
    for (int i = 0; i < kCount; i++) of.sum += logits.exp(x(i), of.maximum);
#pragma unroll
    for (int bit = kFirstBit; bit < kEndBit; bit *= 2) of.sum += __shfl_xor_sync(kAllLanes, of.sum, bit);
    return of;
}

// The sum of so many of a thread's numbers, and of those of the lanes that differ from its own in these bits.
template <int kCount, int kFirstBit, int kEndBit, class F>
MMK_DEVICE float sum_of(const F& x) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; i++) sum += x(i);
#pragma unroll
    for (int bit = kFirstBit; bit < kEndBit; bit *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
    return sum;
}

// What the halves of rows and of columns come to, in shared memory; with ids, too.
struct Found {
    Statistic rows[2 * kTile], columns[2 * kTile];
};
struct FoundByIds : Found {
    float row_positives[2 * kTile], column_positives[2 * kTile];
    Ids<false> ids;
    Ids<true> alone;
};
static_assert(sizeof(FoundByIds) <= kSharedBytes);

template <class T, Same kSame>
__global__ __launch_bounds__(kThreads, 2) void clip_statistics_kernel(const StatisticsTiles p) {
    MMK_DYNAMIC_SHARED(shared);
    const Tile tile(p.pairs, p.row0, p.row_count);
    const Place& place = tile.place;
    Products<T> products;
    products.compute(p.pairs, tile.i0, tile.j0, reinterpret_cast<T*>(shared), place);

    FoundByIds& found = *reinterpret_cast<FoundByIds*>(shared);
    if constexpr (kSame != Same::kNothing) {
        found.ids.load(p.pairs, tile);
        if constexpr (kSame == Same::kPositive) found.alone.load(p.pairs, tile);
        __syncthreads();
    }
    const Logits logits(*p.pairs.scale);
    products.each([&](float& s, int, int) { s *= logits.sign; });
    if (kSame != Same::kPositive && tile.crosses) {
        products.each([&](float& s, int row, int column) {
            if (!tile.positive(row, column) || !tile.inside(row, column)) return;
            p.row_own[tile.i0 + place.row + row] = s;
            p.column_own[tile.j0 + place.column + column] = s;
            s = kLowest;
        });
    }
    if (!tile.whole()) {
        products.each([&](float& s, int row, int column) {
            if (!tile.inside(row, column)) s = kLowest;
        });
    }
    if constexpr (kSame == Same::kIgnored) {
        products.each([&](float& s, int row, int column) {
            if (found.ids.image[place.row + row] == found.ids.text[place.column + column]) s = kLowest;
        });
    }

    auto& s = products.s;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int m = i / 2, e = i % 2 * 2, row = 8 * i, to = place.warp % 2 * kTile + place.row + row;
        const auto id = [&](int j) { return found.ids.text[place.column + 8 * (j / 2) + j % 2]; };
        const Statistic of = statistic<16, 1, 4>(logits, [&](int j) {
            const float x = s[m][j / 2][e + j % 2];
            return kSame == Same::kPositive && id(j) == found.alone.image[place.row + row] ? kLowest : x;
        });
        if (place.lane % 4 == 0) found.rows[to] = of;
        if constexpr (kSame == Same::kPositive) {
            const float sum = sum_of<16, 1, 4>(
                [&](int j) { return id(j) == found.ids.image[place.row + row] ? s[m][j / 2][e + j % 2] : 0.0f; });
            if (place.lane % 4 == 0) found.row_positives[to] = sum;
        }
    }
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const int n = j / 2, e = j % 2, column = 8 * n + e, to = place.warp / 2 * kTile + place.column + column;
        const auto id = [&](int i) { return found.ids.image[place.row + 8 * i]; };
        const Statistic of = statistic<8, 4, 32>(logits, [&](int i) {
            const float x = s[i / 2][n][e + i % 2 * 2];
            return kSame == Same::kPositive && id(i) == found.alone.text[place.column + column] ? kLowest : x;
        });
        if (place.lane < 4) found.columns[to] = of;
        if constexpr (kSame == Same::kPositive) {
            const float sum = sum_of<8, 4, 32>([&](int i) {
                return id(i) == found.ids.text[place.column + column] ? s[i / 2][n][e + i % 2 * 2] : 0.0f;
            });
            if (place.lane < 4) found.column_positives[to] = sum;
        }
    }
    __syncthreads();

    const int x = static_cast<int>(threadIdx.x);
    const auto store = [&](float* parts, int64_t plane, const Statistic* halves, const float* positives) {
        const Statistic of = merged(halves[x], halves[kTile + x], logits);
        parts[0] = of.maximum;
        parts[plane] = of.sum;
        if constexpr (kSame == Same::kPositive) parts[2 * plane] = positives[x] + positives[kTile + x];
    };
    const int64_t row = static_cast<int64_t>(tile.column_tile) * p.row_count + tile.row_tile * kTile + x;
    const int64_t column = static_cast<int64_t>(tile.row_tile) * p.pairs.texts + tile.j0 + x;
    if (x < tile.rows) {
        store(p.row_parts + row, static_cast<int64_t>(tile.tiles_n) * p.row_count, found.rows, found.row_positives);
    }
    if (x < tile.columns) {
        store(p.column_parts + column, static_cast<int64_t>(tile.tiles_m) * p.pairs.texts, found.columns,
              found.column_positives);
    }
}

// ---- the passes that write ds

struct Pair {
    float product;
    bool counted, positive;  // counted: in any sum
};

// A loss has the sums that a tile leaves; turn_to(n) readies it for the thread's two columns of n; slope(pair, i, j) is
// N dS of a pair in the thread's row i and column j of these, and counts it in the sums.
template <Same kSame>
struct Clip {
    static constexpr bool kPositives = kSame == Same::kPositive;
    static constexpr int kSums = 1;
    float sums[kSums] = {};

    MMK_DEVICE Clip(const GradientTiles& p, const Tile& tile) : p_(p), tile_(tile), logits_(*p.pairs.scale) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            row_[i] = weight(p.rows, p.pairs.images, tile.i0, tile.place.row + 8 * i, tile.rows);
#pragma unroll
        for (int i = 0; i < 8 && kPositives; i++)
            row_positive_[i] = PositiveWeight::at(p.rows, tile.i0 + tile.place.row + 8 * i, p.pairs.images);
    }
    MMK_DEVICE void turn_to(int n) {
        const int column = tile_.place.column + 8 * n;
#pragma unroll
        for (int j = 0; j < 2; j++)
            column_[j] = weight(p_.columns, p_.pairs.texts, tile_.j0, column + j, tile_.columns);
#pragma unroll
        for (int j = 0; j < 2 && kPositives; j++)
            column_positive_[j] = PositiveWeight::at(p_.columns, tile_.j0 + column + j, p_.pairs.texts);
    }
    MMK_DEVICE float slope(const Pair& pair, int i, int j) {
        const float q = pair.product * logits_.sign;
        float d;
        if constexpr (kPositives) {
            d = slope(q, pair.positive, row_[i], row_positive_[i]);
            d += slope(q, pair.positive, column_[j], column_positive_[j]);
        } else {
            d = logits_.exp(q, column_[j].maximum) * column_[j].weight;
            d = logits_.exp(q, row_[i].maximum) * row_[i].weight + d;
            if (pair.positive && pair.counted) d = p_.own[tile_.i0 + tile_.place.row + 8 * i];
        }
        sums[0] += pair.counted ? d * pair.product : 0.0f;
        return d;
    }

  private:
    struct Weight {
        float maximum, weight;
    };
    MMK_DEVICE Weight weight(const float* weights, int all, int first, int at, int count) const {
        if (at >= count) return {0.0f, 0.0f};
        return {weights[first + at], weights[int64_t{all} + first + at]};
    }
    MMK_DEVICE float slope(float q, bool positive, const Weight& others, const PositiveWeight& positives) const {
        const float e = logits_.exp_up_to_1(q, others.maximum);
        return positive ? e * positives.weight - positives.target : e * others.weight;
    }

    const GradientTiles& p_;
    const Tile& tile_;
    Logits logits_;
    Weight row_[8], column_[2];
    PositiveWeight row_positive_[8], column_positive_[2];
};

struct SigLip {
    static constexpr int kSums = 3;
    float sums[kSums] = {};

    MMK_DEVICE SigLip(const GradientTiles& p, const Tile&) : scale_(*p.pairs.scale), bias_(*p.pairs.bias) {}
    MMK_DEVICE void turn_to(int) {}
    MMK_DEVICE float slope(const Pair& pair, int, int) {
        const float logit = pair.product * scale_ + bias_;
        const Sigmoid of(pair.positive ? -logit : logit);
        const float d = pair.positive ? -of.slope : of.slope;
        sums[0] += pair.counted ? of.loss : 0.0f;
        sums[1] += pair.counted ? d * pair.product : 0.0f;
        sums[2] += pair.counted ? d : 0.0f;
        return d;
    }

  private:
    float scale_, bias_;
};

// A warp's quarter of N dS, rounded, on its way through shared memory.
template <class T>
struct Slopes {
    static constexpr int kPitch = kHalf + 8;  // the words of eight rows fall into different banks
    static constexpr size_t kBytes = sizeof(T) * kThreads / kWarp * kHalf * kPitch;
    T *quarter, *first;  // of it, the thread's first number

    MMK_DEVICE Slopes(unsigned char* shared, const Place& place)
        : quarter(reinterpret_cast<T*>(shared) + place.warp * kHalf * kPitch),
          first(quarter + place.lane / 4 * kPitch + place.lane % 4 * 2) {}

    MMK_DEVICE void put(int row, int column, const float (&slope)[2]) {
        const uint32_t both = pack2<T>(slope[0] * kGradientScale, slope[1] * kGradientScale);
        memcpy(first + row * kPitch + column, &both, sizeof both);
    }

    // Chunks of 8 columns of which the first is one.
    MMK_DEVICE void store(const GradientTiles& p, const Tile& tile) const {
        __syncwarp();
        constexpr int kChunks = kHalf / 8;
        const int row0 = tile.place.warp / 2 * kHalf, column0 = tile.place.warp % 2 * kHalf;
        T* const ds = static_cast<T*>(p.ds) + tile.j0 + column0;
#pragma unroll 4
        for (int i = tile.place.lane; i < kHalf * kChunks; i += kWarp) {
            const int row = i / kChunks, column = i % kChunks * 8;
            if (row0 + row >= tile.rows || column0 + column >= tile.columns) continue;
            uint4* const to = reinterpret_cast<uint4*>(ds + (tile.i0 - p.row0 + row0 + row) * p.ds_stride + column);
            *to = *reinterpret_cast<const uint4*>(quarter + row * kPitch + column);
        }
    }
};

// The block's sums of x[0], x[1] ... in fixed order, `shared` being of a number for each and each warp.
template <int kSums>
MMK_DEVICE void store_sums(const float (&x)[kSums], int used, const GradientTiles& p, const Tile& tile, float* shared) {
    constexpr int kWarps = kThreads / kWarp;
    static_assert(kWarps == 4);
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int k = 0; k < kSums; k++) {
        float sum = x[k];
#pragma unroll
        for (int bit = 1; bit < kWarp; bit *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
        if (thread % kWarp == 0) shared[k * kWarps + thread / kWarp] = sum;
    }
    __syncthreads();
    if (thread >= used) return;
    const float* const of = shared + thread * kWarps;
    const int64_t number = static_cast<int64_t>(tile.row_tile) * tile.tiles_n + tile.column_tile;
    p.sums[static_cast<int64_t>(thread) * tile.tiles_m * tile.tiles_n + number] = (of[0] + of[1]) + (of[2] + of[3]);
}

// kPlain: every pair is there and none belongs together by its place, as in nearly every tile.
template <bool kPlain, Same kSame, class T, class Loss>
MMK_DEVICE void put_slopes(const Products<T>& products, const Tile& tile, const Ids<false>& ids, Loss& loss,
                           Slopes<T>& slopes) {
    // A loop that may end early is one that ptxas does not mix all turns of, and spill; by a shuffle, or it would know.
    const int columns = __shfl_sync(kAllLanes, tile.columns - tile.place.warp % 2 * kHalf, 0);
#pragma unroll
    for (int n = 0; n < 8; n++) {
        if (8 * n >= columns) break;
        loss.turn_to(n);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int row = 8 * i, column = 8 * n;
            float slope[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const bool inside = kPlain || tile.inside(row, column + j);
                const bool own = !kPlain && tile.positive(row, column + j);
                const bool same = kSame != Same::kNothing &&
                                  ids.image[tile.place.row + row] == ids.text[tile.place.column + column + j];
                const bool counted = inside && (kSame != Same::kIgnored || own || !same);
                const Pair pair{products.s[i / 2][n][i % 2 * 2 + j], counted, kSame == Same::kPositive ? same : own};
                const float d = loss.slope(pair, i, j);
                slope[j] = counted ? d : 0.0f;
            }
            slopes.put(row, column, slope);
        }
    }
}

template <class T, Same kSame, class Loss>
__global__ __launch_bounds__(kThreads, 2) void gradient_kernel(const GradientTiles p) {
    MMK_DYNAMIC_SHARED(shared);
    constexpr size_t kSumsBytes = sizeof(float) * Loss::kSums * kThreads / kWarp;
    static_assert(Slopes<T>::kBytes + kSumsBytes + sizeof(Ids<false>) <= kSharedBytes);
    const Tile tile(p.pairs, p.row0, p.row_count);
    Products<T> products;
    products.compute(p.pairs, tile.i0, tile.j0, reinterpret_cast<T*>(shared), tile.place);

    Ids<false>& ids = *reinterpret_cast<Ids<false>*>(shared + Slopes<T>::kBytes + kSumsBytes);
    if constexpr (kSame != Same::kNothing) {
        ids.load(p.pairs, tile);
        __syncthreads();
    }
    Loss loss(p, tile);
    Slopes<T> slopes(shared, tile.place);
    if (tile.whole() && !tile.crosses) {
        put_slopes<true, kSame>(products, tile, ids, loss, slopes);
    } else {
        put_slopes<false, kSame>(products, tile, ids, loss, slopes);
    }
    if (p.ds != nullptr) slopes.store(p, tile);
    store_sums(loss.sums, p.ds != nullptr ? Loss::kSums : 1, p, tile,
               reinterpret_cast<float*>(shared + Slopes<T>::kBytes));
}

// ---- launches

template <class Tiles>
Error launch_tiles(const char* name, void (*bfloat16)(Tiles), void (*float16)(Tiles), const Tiles& call,
                   cudaStream_t stream) {
    const int64_t tiles =
        (int64_t{call.row_count} + kTile - 1) / kTile * ((int64_t{call.pairs.texts} + kTile - 1) / kTile);
    const Launch at{name, static_cast<unsigned>(tiles), kThreads, kSharedBytes, stream};
    return launch(at, call.pairs.bfloat16 ? bfloat16 : float16, call);
}

Error statistics(const StatisticsTiles& call, cudaStream_t stream) {
    return run_by_same(call.pairs.same, [&](auto same) {
        return launch_tiles<StatisticsTiles>("clip_statistics", clip_statistics_kernel<BFloat16, same()>,
                                             clip_statistics_kernel<Float16, same()>, call, stream);
    });
}
Error clip(const GradientTiles& call, cudaStream_t stream) {
    return run_by_same(call.pairs.same, [&](auto same) {
        return launch_tiles<GradientTiles>("clip_gradient", gradient_kernel<BFloat16, same(), Clip<same()>>,
                                           gradient_kernel<Float16, same(), Clip<same()>>, call, stream);
    });
}
Error siglip_tiles(const GradientTiles& call, cudaStream_t stream) {
    return run_by_same(call.pairs.same, [&](auto same) {
        return launch_tiles<GradientTiles>("siglip", gradient_kernel<BFloat16, same(), SigLip>,
                                           gradient_kernel<Float16, same(), SigLip>, call, stream);
    });
}

}  // namespace

Error clip_statistics(const ClipStatistics& call, cudaStream_t stream) {
    return clip_statistics_by({kTile, kTile, statistics}, call, stream);
}
Error clip_gradient(const ClipGradient& call, cudaStream_t stream) {
    return clip_gradient_by({kTile, kTile, clip}, call, stream);
}
Error siglip(const LogitRows& call, cudaStream_t stream) {
    return siglip_by({kTile, kTile, siglip_tiles}, call, stream);
}

}  // namespace mmk::cuda
