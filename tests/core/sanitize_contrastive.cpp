// The contrastive kernels of one instruction-set level under sanitizers: address and undefined behaviour, on memory
// that ends where the tensors end, and threads, since tasks follow each other without a barrier. Besides, the loss and
// its gradients must be those of the formula, and the same to the bit on one thread and on three.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "bounded_memory.h"
#include "cpu/contrastive/losses.cpp"
#include "openmp_on_threads.h"
#include "served.h"

using namespace mmk;
using namespace mmk::MMK_ISA;

// A tensor in memory of its own, not an element more than its strides reach.
struct Tensor {
    enum Layout { kRows, kColumns, kPaddedRows };

    Tensor(DType dtype, int64_t rows, int64_t columns, Layout layout)
        : matrix{nullptr,
                 dtype,
                 rows,
                 columns,
                 layout == kColumns ? 1 : columns + (layout == kPaddedRows ? 3 : 0),
                 layout == kColumns ? rows : 1},
          bytes_(static_cast<size_t>(index(rows - 1, columns - 1) + 1) * (dtype == DType::kFloat32 ? 4 : 2)) {
        matrix.data = take_bounded(bytes_);
        memset(matrix.data, 0xff, bytes_);  // NaN
    }
    ~Tensor() { drop_bounded(matrix.data, bytes_); }
    Tensor(const Tensor&) = delete;

    void fill() {
        for (int64_t i = 0; i < matrix.rows; i++) {
            for (int64_t d = 0; d < matrix.columns; d++) set(i, d, static_cast<float>(rand() % 255 - 127) / 128);
        }
    }
    void set(int64_t i, int64_t d, float x) {
        if (matrix.dtype == DType::kFloat32) at<float>(i, d) = x;
        if (matrix.dtype == DType::kBFloat16) at<BFloat16>(i, d) = from_float<BFloat16>(x);
        if (matrix.dtype == DType::kFloat16) at<Float16>(i, d) = from_float<Float16>(x);
    }
    double get(int64_t i, int64_t d) const {
        if (matrix.dtype == DType::kFloat32) return at<float>(i, d);
        return matrix.dtype == DType::kBFloat16 ? to_float(at<BFloat16>(i, d)) : to_float(at<Float16>(i, d));
    }
    bool same(const Tensor& other) const { return memcmp(matrix.data, other.matrix.data, bytes_) == 0; }

    Matrix matrix;

  private:
    int64_t index(int64_t i, int64_t d) const { return i * matrix.row_stride + d * matrix.column_stride; }
    template <class T>
    T& at(int64_t i, int64_t d) const {
        return static_cast<T*>(matrix.data)[index(i, d)];
    }

    size_t bytes_;
};

// Which images and texts belong together, in memory that ends where the ids end.
struct Ids {
    Ids(Same same, int64_t images, int64_t texts) : same(same), image(fill(images)), text(fill(texts)) {
        for (const int32_t id : image) image_counts.push_back(number(text, id));
        for (const int32_t id : text) text_counts.push_back(number(image, id));
    }
    static std::vector<int32_t> fill(int64_t count) {
        std::vector<int32_t> ids(count);
        for (int32_t& id : ids) id = rand() % (count / 2 + 1);
        ids.shrink_to_fit();
        return ids;
    }
    static int32_t number(const std::vector<int32_t>& ids, int32_t id) {
        return static_cast<int32_t>(std::count(ids.begin(), ids.end(), id));
    }
    Pairing pairing(int64_t offset, int64_t first, int64_t last) const {
        if (same == Same::kNothing) return {offset, first, last, same, nullptr, nullptr, nullptr, nullptr};
        const bool counted = same == Same::kPositive;
        return {offset,
                first,
                last,
                same,
                image.data(),
                text.data(),
                counted ? image_counts.data() : nullptr,
                counted ? text_counts.data() : nullptr};
    }

    Same same;
    std::vector<int32_t> image, text, image_counts, text_counts;
};

struct Truth {
    double loss = 0;
    std::vector<double> d_image, d_text;
};

// 1: belongs together, 0: does not, -1: is ignored.
static int match(const Pairing& pairs, int64_t i, int64_t j) {
    const bool own = i >= pairs.first && i < pairs.last && j == i + pairs.offset;
    if (pairs.same == Same::kNothing) return own;
    const bool same = pairs.image_ids[i] == pairs.text_ids[j];
    return pairs.same == Same::kPositive ? same : own ? 1 : same ? -1 : 0;
}

// One direction of CLIP: adds its loss, and its part of dS.
template <class At>
static void cross_entropy(int64_t n, int64_t m, const std::vector<double>& s, const Pairing& pairs, double share,
                          const At& at, bool rows, double& loss, std::vector<double>& g) {
    for (int64_t i = 0; i < n; i++) {
        double sum = 0, mean = 0, number = 0;
        const auto kind = [&](int64_t j) { return rows ? match(pairs, i, j) : match(pairs, j, i); };
        for (int64_t j = 0; j < m; j++) {
            if (kind(j) >= 0) sum += std::exp(s[at(i, j)]);
            if (kind(j) == 1) mean += s[at(i, j)], number++;
        }
        if (number == 0) continue;
        loss += share * (std::log(sum) - mean / number);
        for (int64_t j = 0; j < m; j++)
            if (kind(j) >= 0) g[at(i, j)] += share * (std::exp(s[at(i, j)]) / sum - (kind(j) == 1) / number);
    }
}

static Truth truth(const Rectangle& call, const Tensor& image, const Tensor& text, double bias, double count,
                   double row_share, double column_share, bool clip) {
    const int64_t n = image.matrix.rows, m = text.matrix.rows, dim = image.matrix.columns;
    std::vector<double> s(n * m), g(n * m);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < m; j++) {
            double p = 0;
            for (int64_t d = 0; d < dim; d++) p += image.get(i, d) * text.get(j, d);
            s[i * m + j] = call.scale * p + (clip ? 0 : bias);
        }
    }
    Truth result;
    if (clip) {
        const auto by_row = [=](int64_t i, int64_t j) { return i * m + j; };
        const auto by_column = [=](int64_t j, int64_t i) { return i * m + j; };
        cross_entropy(n, m, s, call.pairing, row_share / count, by_row, true, result.loss, g);
        cross_entropy(m, n, s, call.pairing, column_share / count, by_column, false, result.loss, g);
    }
    result.d_image.resize(n * dim);
    result.d_text.resize(m * dim);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < m; j++) {
            const int kind = match(call.pairing, i, j);
            const double z = kind == 1 ? 1 : -1, x = s[i * m + j];
            if (!clip && kind >= 0) {
                g[i * m + j] = -z / (1 + std::exp(z * x)) / count;
                result.loss += std::log1p(std::exp(-z * x)) / count;
            }
            for (int64_t d = 0; d < dim; d++) {
                result.d_image[i * dim + d] += call.scale * g[i * m + j] * text.get(j, d);
                result.d_text[j * dim + d] += call.scale * g[i * m + j] * image.get(i, d);
            }
        }
    }
    return result;
}

static int failures = 0;

static void check(const char* what, double found, double expected, double tolerance) {
    if (std::abs(found - expected) <= tolerance) return;  // false for NaN
    failures++;
    printf("FAILED %s: %g instead of %g\n", what, found, expected);
}

struct Shape {
    int64_t images, texts, dim;
    int64_t offset, first, last;
};

static void run(bool clip, DType dtype, const Shape& shape, Same same, Tensor::Layout layout) {
    const int64_t n = shape.images, m = shape.texts, dim = shape.dim;
    char name[120];
    snprintf(name, sizeof name, "%s dtype %d, %ldx%ldx%ld, ids %d, layout %d", clip ? "clip" : "siglip",
             static_cast<int>(dtype), static_cast<long>(n), static_cast<long>(m), static_cast<long>(dim),
             static_cast<int>(same), layout);
    Tensor image(dtype, n, dim, layout), text(dtype, m, dim, Tensor::kRows);
    image.fill();
    text.fill();
    const Ids ids(same, n, m);
    const Rectangle rectangle{image.matrix, text.matrix, 0.7, ids.pairing(shape.offset, shape.first, shape.last)};
    const double count = 3, row_share = 0.5, column_share = 0.25, bias = -1.5;
    const auto gradient = [&](int64_t rows) { return Tensor(DType::kFloat32, rows, dim, Tensor::kRows); };
    Tensor d_image = gradient(n), d_text = gradient(m), again_image = gradient(n), again_text = gradient(m);
    const auto call = [&](const Gradients& to) {
        if (clip) return clip_loss(ClipLoss{rectangle, count, row_share, column_share, 0, to});
        return siglip_loss(SigLipLoss{rectangle, bias, count, to});
    };
    threads = 1;
    const ContrastiveResult result = call({true, d_image.matrix, d_text.matrix});
    threads = 3;
    const ContrastiveResult again = call({true, again_image.matrix, again_text.matrix}), loss_only = call({});
    const bool steady = result.loss == again.loss && result.d_scale == again.d_scale && loss_only.loss == result.loss &&
                        d_image.same(again_image) && d_text.same(again_text);
    check(name, steady, true, 0);

    const Truth expected = truth(rectangle, image, text, bias, count, row_share, column_share, clip);
    const double rounding = (dtype == DType::kFloat32 ? 1e-4 : 2e-2) * static_cast<double>(std::max(n, m)) / count;
    check(name, result.loss, expected.loss, 1e-4 * (1 + std::abs(expected.loss)));
    for (int64_t d = 0; d < dim; d++) {
        for (int64_t i = 0; i < n; i++) check(name, d_image.get(i, d), expected.d_image[i * dim + d], rounding);
        for (int64_t j = 0; j < m; j++) check(name, d_text.get(j, d), expected.d_text[j * dim + d], rounding);
    }
}

int main() {
    const int64_t squares[][2] = {{1, 1},   {2, 3},   {17, 33},  {47, 50}, {49, 97},
                                  {97, 16}, {193, 5}, {389, 21}, {577, 1}};
    const Shape shapes[] = {{1, 60, 7, 0, 0, 1},        {60, 1, 7, 0, 0, 1},    {30, 200, 5, 150, 3, 29},
                            {210, 50, 3, -90, 90, 120}, {400, 97, 9, 0, 0, 97}, {50, 390, 17, 0, 0, 0}};
    for (const DType dtype : served()) {
        for (const bool clip : {true, false}) {
            for (const auto& square : squares) {
                for (const Tensor::Layout layout : {Tensor::kRows, Tensor::kColumns, Tensor::kPaddedRows}) {
                    if (layout != Tensor::kRows && square[0] > 100) continue;
                    run(clip, dtype, {square[0], square[0], square[1], 0, 0, square[0]}, Same::kNothing, layout);
                }
            }
            for (const Shape& shape : shapes) {
                for (const Same same : {Same::kNothing, Same::kPositive, Same::kIgnored})
                    run(clip, dtype, shape, same, Tensor::kRows);
            }
        }
    }
    run(true, served()[0], {2309, 2309, 3, 0, 0, 2309}, Same::kNothing,
        Tensor::kRows);  // bands of two tiles, the last of one
    run(true, served()[0], {2309, 300, 3, 0, 0, 300}, Same::kNothing, Tensor::kRows);
    if (failures == 0) printf("right\n");
    return failures != 0;
}
