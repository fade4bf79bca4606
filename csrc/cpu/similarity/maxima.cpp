// The largest inner product of each row with the columns of each segment:
//
//     maxima_rs = max over c in segment s of (<a_r, b_c> + bias_c),    indices_rs = the first c where it is
//
// What is nearest among C codes is one segment, of which only one number a row is kept; the tokens of an image are one
// of many. The products are made tile by tile (cpu/contrastive/pairs.h) and looked at while they are in the caches,
// where eager code writes R x C of them, and reads them again: 2 R C D operations, and 5 for each product here.
//
// A task has a tile of rows, and meets the columns in their order. A segment keeps the largest of each lane and its
// place until it ends, so lanes are compared once a segment, and the first of equals wins: of a lane because only what
// is larger takes its place, of all because of the smallest place. No result depends on how rows are shared.
#include "cpu/contrastive/pairs.h"
#include "cpu/similarity/call.h"

namespace mmk::MMK_ISA {

namespace {

// What has been seen of a segment in each lane: the largest, and which column it was.
struct Lanes {
    Vec largest;
    IVec place;

    static Lanes none(int64_t first) { return {splat(-__builtin_inff()), IVec{} + static_cast<int32_t>(first)}; }

    // kLanes products from column `place` on, of which the first `count` are real.
    MMK_INLINE void meet(Vec product, int64_t column, int64_t count) {
        IVec takes = (product > largest) | ((product != product) & (largest == largest));
        const IVec lane = lane_index();
        if (count < kLanes) takes &= lane < static_cast<int32_t>(count);
        largest = select(takes, product, largest);
        place = takes ? lane + static_cast<int32_t>(column) : place;
    }

    void finish(float* maximum, int32_t* index) const {
        float found = largest[0];
        int32_t where = place[0];
        for (int l = 1; l < kLanes; l++) {
            const float x = largest[l];
            const bool is_nan = x != x, was_nan = found != found;
            const bool equal = x == found || (is_nan && was_nan);
            if ((x > found && !was_nan) || (is_nan && !was_nan) || (equal && place[l] < where)) {
                found = x, where = place[l];
            }
        }
        *maximum = found, *index = where;
    }
};

struct Piece {  // of a segment, in a tile of columns
    int64_t segment, first, last;
    bool begins, ends;
};

template <class T>
class Maxima {
  public:
    Maxima(const RowMaxima& call, int threads)
        : call_(call),
          threads_(threads),
          pairs_(call.rows, call.columns, false, threads),
          bias_(call.bias == nullptr ? 0 : pairs_.columns.padded() + kLanes),
          pieces_(static_cast<size_t>(pairs_.columns.tiles)) {
        if (call.bias != nullptr) {
            memcpy(bias_.get(), call.bias, static_cast<size_t>(call.columns.rows) * sizeof(float));
            for (int64_t c = call.columns.rows; c < pairs_.columns.padded() + kLanes; c++) bias_.get()[c] = 0;
        }
        cut();
    }

    void run() const {
        constexpr int64_t kProducts = kTile * kTile + kLanes;  // the last piece may read past its end
        const Scratch<float> products(threads_ * kProducts);
        const Scratch<Lanes> open(threads_ * kTile);
        for_each(pairs_.rows.tiles, threads_, [&](int64_t a, int64_t worker) {
            float* p = products.get() + worker * kProducts;
            for (int64_t b = 0; b < pairs_.columns.tiles; b++) {
                if (pieces_[static_cast<size_t>(b)].empty()) continue;
                pairs_.products(a, b, p);
                for (int64_t r = 0; r < pairs_.rows.count(a); r++) {
                    look(pairs_.rows.first(a) + r, b, p + r * kTile, open.get() + worker * kTile + r);
                }
            }
        });
    }

  private:
    // Segments, which rise from here on, into pieces.
    void cut() {
        const int64_t columns = call_.columns.rows, side = pairs_.columns.side;
        int64_t begin = std::clamp<int64_t>(call_.starts[0], 0, columns);
        for (int64_t s = 0; s < call_.segments; s++) {
            const int64_t end = std::clamp<int64_t>(call_.starts[s + 1], begin, columns);
            for (int64_t at = begin; at < end;) {
                const int64_t tile = at / side, last = std::min(end, (tile + 1) * side);
                pieces_[static_cast<size_t>(tile)].push_back({s, at, last, at == begin, last == end});
                at = last;
            }
            begin = end;
        }
    }

    // Row `row` of the products with tile b.
    MMK_INLINE void look(int64_t row, int64_t b, const float* p, Lanes* open) const {
        const int64_t first = pairs_.columns.first(b);
        for (const Piece& piece : pieces_[static_cast<size_t>(b)]) {
            Lanes lanes = piece.begins ? Lanes::none(piece.first) : *open;
            for (int64_t c = piece.first; c < piece.last; c += kLanes) {
                Vec product = load(p + (c - first));
                if (call_.bias != nullptr) product += load(bias_.get() + c);
                lanes.meet(product, c, piece.last - c);
            }
            if (piece.ends) {
                const int64_t at = row * call_.segments + piece.segment;
                lanes.finish(call_.maxima + at, call_.indices + at);
            } else {
                *open = lanes;
            }
        }
    }

    const RowMaxima& call_;
    const int threads_;
    const Pairs<T> pairs_;
    const Scratch<float> bias_;
    std::vector<std::vector<Piece>> pieces_;  // by tile of columns
};

}  // namespace

void row_maxima(const RowMaxima& call) {
    const int64_t count = call.rows.rows * call.segments;
    std::fill(call.maxima, call.maxima + count, -__builtin_inff());
    std::fill(call.indices, call.indices + count, -1);
    if (count == 0 || call.columns.rows == 0) return;
    const double products = static_cast<double>(call.rows.rows) * static_cast<double>(call.columns.rows);
    const int threads = useful_threads(2 * products * static_cast<double>(call.rows.columns));
    with_element_type(call.rows.dtype, [&](auto type) { Maxima<decltype(type)>(call, threads).run(); });
}

}  // namespace mmk::MMK_ISA
