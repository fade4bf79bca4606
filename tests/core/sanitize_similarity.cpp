// The largest products of one instruction-set level, and the sums of rows, in memory that ends with the tensors:
// numbers of rows and columns that end inside a vector, a tile, or a block of tiles; spread rows and columns; segments
// that are empty, long, or of one column, and places and indices that are none. The results are compared with the
// definition, so that a kernel that skips its work does not pass.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "bounded_memory.h"
#include "cpu/similarity/maxima.cpp"
#include "cpu/similarity/sums.cpp"
#include "openmp_on_threads.h"
#include "served.h"

using namespace mmk;
using namespace mmk::MMK_ISA;

namespace {

template <class T>
struct Bounded {
    explicit Bounded(int64_t count) : count(count), data(static_cast<T*>(take_bounded(count * sizeof(T)))) {}
    ~Bounded() { drop_bounded(data, count * sizeof(T)); }
    Bounded(const Bounded&) = delete;
    int64_t count;
    T* data;
};

// Quarters of small numbers: products and their sums are exact.
float value(int64_t i) { return static_cast<float>((i * 7 + i / 5) % 9 - 4) / 4; }

[[noreturn]] void wrong(const char* what, int64_t at, double found, double truth) {
    std::printf("%s %lld is %g, not %g\n", what, static_cast<long long>(at), found, truth);
    std::exit(1);
}

// A (rows, columns) tensor of numbers, its rows or its columns far apart.
template <class T>
struct Table {
    Table(DType dtype, int64_t rows, int64_t columns, bool transposed, int64_t seed)
        : memory(transposed ? columns * rows : (rows - 1) * (columns + 3) + columns),
          matrix{memory.data, dtype, rows, columns, transposed ? 1 : columns + 3, transposed ? rows : 1} {
        for (int64_t i = 0; i < memory.count; i++) memory.data[i] = from_float<T>(value(i + seed));
    }
    double at(int64_t i, int64_t d) const {
        return to_float(memory.data[i * matrix.row_stride + d * matrix.column_stride]);
    }
    Bounded<T> memory;
    Matrix matrix;
};

template <class T>
void check_maxima(DType dtype, int64_t rows, int64_t columns, int64_t dim, const std::vector<int32_t>& places,
                  bool transposed) {
    const Table<T> a(dtype, rows, dim, transposed, 0), b(dtype, columns, dim, transposed, 5);
    const auto segments = static_cast<int64_t>(places.size()) - 1;
    Bounded<float> bias(columns), maxima(rows * segments);
    Bounded<int32_t> starts(segments + 1), indices(rows * segments);
    std::copy(places.begin(), places.end(), starts.data);
    for (int64_t c = 0; c < columns; c++) bias.data[c] = value(11 * c);
    row_maxima(
        {a.matrix, b.matrix, transposed ? nullptr : bias.data, starts.data, segments, maxima.data, indices.data});
    for (int64_t r = 0; r < rows; r++) {
        int64_t begin = std::clamp<int64_t>(places[0], 0, columns);
        for (int64_t s = 0; s < segments; s++) {
            const int64_t end = std::clamp<int64_t>(places[s + 1], begin, columns), at = r * segments + s;
            double truth = -INFINITY;
            int32_t place = -1;
            for (int64_t c = begin; c < end; c++) {
                double product = transposed ? 0 : bias.data[c];
                for (int64_t d = 0; d < dim; d++) product += a.at(r, d) * b.at(c, d);
                if (product > truth) truth = product, place = static_cast<int32_t>(c);
            }
            if (maxima.data[at] != truth) wrong("maximum", at, maxima.data[at], truth);
            if (indices.data[at] != place) wrong("index", at, indices.data[at], place);
            begin = end;
        }
    }
}

template <class T>
void check_sums(DType dtype, int64_t rows, int64_t segments, int64_t columns, int64_t dim, bool transposed) {
    const Table<T> a(dtype, rows, dim, transposed, 0), b(dtype, columns, dim, transposed, 5);
    Bounded<float> weights(rows * segments), gathered(rows * dim), scattered(columns * dim);
    Bounded<int32_t> indices(rows * segments);
    for (int64_t i = 0; i < weights.count; i++) {
        weights.data[i] = value(3 * i);
        indices.data[i] = static_cast<int32_t>(i * 13 % (columns + 4) - 2);  // some are none
    }
    gather_columns({weights.data, indices.data, rows, segments, b.matrix, gathered.data, rows});
    scatter_rows({weights.data, indices.data, rows, segments, a.matrix, scattered.data, columns});
    std::vector<double> to_rows(rows * dim), to_columns(columns * dim);
    for (int64_t i = 0; i < weights.count; i++) {
        const int64_t r = i / segments, c = indices.data[i];
        if (c < 0 || c >= columns) continue;
        for (int64_t d = 0; d < dim; d++) {
            to_rows[r * dim + d] += weights.data[i] * b.at(c, d);
            to_columns[c * dim + d] += weights.data[i] * a.at(r, d);
        }
    }
    for (int64_t i = 0; i < gathered.count; i++) {
        if (gathered.data[i] != to_rows[i]) wrong("gathered", i, gathered.data[i], to_rows[i]);
    }
    for (int64_t i = 0; i < scattered.count; i++) {
        if (scattered.data[i] != to_columns[i]) wrong("scattered", i, scattered.data[i], to_columns[i]);
    }
}

template <class T>
void check(DType dtype) {
    for (const bool transposed : {false, true}) {
        check_maxima<T>(dtype, 1, 1, 1, {0, 1}, transposed);
        check_maxima<T>(dtype, 3, 7, 2, {0, 7}, transposed);
        check_maxima<T>(dtype, 37, 131, 9, {0, 3, 3, 4, 60, 131}, transposed);
        check_maxima<T>(dtype, 20, 70, 17, {-9, 5, 2, 1000, 8}, transposed);
        check_maxima<T>(dtype, 150, 600, 5, {0, 600}, transposed);
        check_maxima<T>(dtype, 5, 1300, 3, {40, 800, 1290}, transposed);
        check_sums<T>(dtype, 1, 1, 1, 1, transposed);
        check_sums<T>(dtype, 37, 3, 20, 9, transposed);
        check_sums<T>(dtype, 50, 1, 90, 70, transposed);
    }
}

}  // namespace

int main() {
    threads = 3;
    for (DType dtype : served()) {
        with_element_type(dtype, [&](auto type) { check<decltype(type)>(dtype); });
    }
    std::printf("right\n");
}
