// The contrastive kernels of one instruction-set level under sanitizers: address and undefined behaviour, on memory
// that ends where the tensors end, and threads, since tasks follow each other without a barrier. Besides, the loss and
// its gradients must be those of the formula, and the same to the bit on one thread and on three.
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

struct Truth {
    double loss = 0;
    std::vector<double> d_image;
};

static Truth truth(const Tensor& image, const Tensor& text, double scale, double bias, bool clip) {
    const int64_t n = image.matrix.rows, dim = image.matrix.columns;
    std::vector<double> s(n * n), row(n), column(n);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) {
            double p = 0;
            for (int64_t d = 0; d < dim; d++) p += image.get(i, d) * text.get(j, d);
            s[i * n + j] = scale * p + (clip ? 0 : bias);
            row[i] += std::exp(s[i * n + j]);
            column[j] += std::exp(s[i * n + j]);
        }
    }
    Truth result;
    result.d_image.resize(n * dim);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) {
            const double x = s[i * n + j], z = i == j ? 1 : -1;
            double g;
            if (clip) {
                g = (std::exp(x) / row[i] + std::exp(x) / column[j]) / 2 - (i == j);
                if (i == j) result.loss += ((std::log(row[i]) + std::log(column[i])) / 2 - x) / n;
            } else {
                g = -z / (1 + std::exp(z * x));
                result.loss += std::log1p(std::exp(-z * x)) / n;
            }
            for (int64_t d = 0; d < dim; d++) result.d_image[i * dim + d] += scale / n * g * text.get(j, d);
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

static void run(bool clip, DType dtype, int64_t n, int64_t dim, Tensor::Layout layout) {
    char name[100];
    snprintf(name, sizeof name, "%s dtype %d, %ldx%ld, layout %d", clip ? "clip" : "siglip", static_cast<int>(dtype),
             static_cast<long>(n), static_cast<long>(dim), layout);
    const auto kernel = clip ? clip_loss : siglip_loss;
    Tensor image(dtype, n, dim, layout), text(dtype, n, dim, Tensor::kRows);
    image.fill();
    text.fill();
    const auto gradient = [&] { return Tensor(DType::kFloat32, n, dim, Tensor::kRows); };
    Tensor d_image = gradient(), d_text = gradient(), again_image = gradient(), again_text = gradient();
    Contrastive call{image.matrix, text.matrix, 0.7, -1.5, 0, true, d_image.matrix, d_text.matrix};
    threads = 1;
    const ContrastiveResult result = kernel(call);
    threads = 3;
    call.d_image = again_image.matrix;
    call.d_text = again_text.matrix;
    const ContrastiveResult again = kernel(call);
    call.with_grads = false;
    const ContrastiveResult loss_only = kernel(call);
    const bool steady = result.loss == again.loss && result.d_scale == again.d_scale && loss_only.loss == result.loss &&
                        d_image.same(again_image) && d_text.same(again_text);
    check(name, steady, true, 0);

    const Truth expected = truth(image, text, call.scale, call.bias, clip);
    const Truth exchanged = truth(text, image, call.scale, call.bias, clip);  // the losses are symmetric
    const double rounding = dtype == DType::kFloat32 ? 1e-4 : 2e-2;
    check(name, result.loss, expected.loss, 1e-4 * (1 + std::abs(expected.loss)));
    for (int64_t i = 0; i < n; i++) {
        for (int64_t d = 0; d < dim; d++) {
            check(name, d_image.get(i, d), expected.d_image[i * dim + d], rounding);
            check(name, d_text.get(i, d), exchanged.d_image[i * dim + d], rounding);
        }
    }
}

int main() {
    const int64_t shapes[][2] = {{1, 1}, {2, 3}, {17, 33}, {47, 50}, {49, 97}, {97, 16}, {193, 5}, {389, 21}, {577, 1}};
    for (const DType dtype : served()) {
        for (const auto& shape : shapes) {
            for (const Tensor::Layout layout : {Tensor::kRows, Tensor::kColumns, Tensor::kPaddedRows}) {
                if (layout != Tensor::kRows && shape[0] > 100) continue;
                for (const bool clip : {true, false}) run(clip, dtype, shape[0], shape[1], layout);
            }
        }
    }
    run(true, served()[0], 2309, 3, Tensor::kRows);  // 17 tiles: bands of two, the last one of one
    if (failures == 0) printf("right\n");
    return failures != 0;
}
