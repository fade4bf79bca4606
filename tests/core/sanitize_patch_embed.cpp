// The patch embedding kernels of one instruction-set level under the address and undefined-behaviour sanitizers: every
// tensor ends with its last element, so that a read or a write past it is reported. The result is
// compared with the definition as well, so that a kernel that skips its work does not pass.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "bounded_memory.h"
#include "cpu/patch_embed/backward.cpp"
#include "cpu/patch_embed/forward.cpp"
#include "openmp_on_threads.h"
#include "served.h"

using namespace mmk;
using namespace mmk::MMK_ISA;

namespace {

struct Shape {
    int64_t batch, grid_y, grid_x, channels, frames, height, width, features, prefix;
    bool channels_last, edge;  // edge: pixels left over behind the last patch
};

size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kUInt8 ? 1 : 2; }

// Exactly as many bytes as the elements take; values are small multiples of 1/4, or bytes.
struct Tensor {
    DType dtype;
    int64_t count;
    void* data;
    Tensor(DType dtype, int64_t count) : dtype(dtype), count(count), data(take_bounded(count * size_of(dtype), 64)) {
        for (int64_t i = 0; i < count; i++) set(i, static_cast<float>((i * 7 + i / 5) % 9 - 4) / 4);
    }
    ~Tensor() { drop_bounded(data, count * size_of(dtype)); }
    Tensor(const Tensor&) = delete;
    void set(int64_t i, float x) {
        if (dtype == DType::kFloat32) static_cast<float*>(data)[i] = x;
        if (dtype == DType::kBFloat16) static_cast<BFloat16*>(data)[i] = from_float<BFloat16>(x);
        if (dtype == DType::kFloat16) static_cast<Float16*>(data)[i] = from_float<Float16>(x);
        if (dtype == DType::kUInt8) static_cast<uint8_t*>(data)[i] = static_cast<uint8_t>(128 + 8 * x);
    }
    double get(int64_t i) const {
        if (dtype == DType::kFloat32) return static_cast<float*>(data)[i];
        if (dtype == DType::kBFloat16) return to_float(static_cast<BFloat16*>(data)[i]);
        if (dtype == DType::kFloat16) return to_float(static_cast<Float16*>(data)[i]);
        return static_cast<uint8_t*>(data)[i];
    }
};

int64_t offset(const Patches& p, int64_t row, int64_t pixel) {
    int64_t at = 0;
    for (int i = 7; i >= 4; pixel /= p.sizes[i], i--) at += pixel % p.sizes[i] * p.strides[i];
    for (int i = 3; i >= 0; row /= p.sizes[i], i--) at += row % p.sizes[i] * p.strides[i];
    return at;
}

void expect(double value, double truth, double size, DType dtype, const char* what) {
    const double eps = dtype == DType::kFloat32 ? 1e-5 : dtype == DType::kBFloat16 ? 2e-2 : 3e-3;
    if (std::fabs(value - truth) <= eps * (1 + size)) return;
    std::printf("%s is %g, should be %g\n", what, value, truth);
    std::exit(1);
}

void check(const Shape& s, DType image_dtype, DType dtype) {
    const int64_t rows_y = s.grid_y * s.height + s.edge, columns = s.grid_x * s.width + s.edge;
    const int64_t frame = rows_y * columns, c = s.channels, plane = s.frames * frame;
    const int64_t pixels = c * s.frames * s.height * s.width, patches = s.grid_y * s.grid_x, rows = s.batch * patches;
    const int64_t sx = s.channels_last ? c : 1, sc = s.channels_last ? 1 : plane;
    Tensor images(image_dtype, s.batch * c * plane), weight(dtype, s.features * pixels), bias(dtype, s.features);
    Tensor positions(dtype, patches * s.features), prefix(dtype, s.prefix * s.features);
    Tensor tokens(dtype, s.batch * (s.prefix + patches) * s.features);
    std::vector<float> mean(c, 0.5f), std_dev(c, 0.25f);
    const bool bytes = image_dtype == DType::kUInt8;
    const Patches x{images.data,
                    image_dtype,
                    {s.batch, 1, s.grid_y, s.grid_x, c, s.frames, s.height, s.width},
                    {c * plane, 0, s.height * columns * sx, s.width * sx, sc, frame * sx, columns * sx, sx}};
    const Patches w{weight.data,
                    dtype,
                    {1, 1, 1, s.features, c, s.frames, s.height, s.width},
                    {0, 0, 0, pixels, pixels / c, s.height * s.width, s.width, 1}};
    patch_embed({x, w, bytes ? mean.data() : nullptr, bytes ? std_dev.data() : nullptr, bias.data, positions.data,
                 prefix.data, tokens.data, patches, s.prefix});

    const auto pixel = [&](int64_t m, int64_t k) {
        const double value = images.get(offset(x, m, k));
        return bytes ? (value / 255 - 0.5) / 0.25 : value;
    };
    const int64_t row_step = 1 + rows / 7, feature_step = 1 + s.features / 5;
    for (int64_t m = 0; m < rows; m += row_step) {
        for (int64_t e = s.features - 1; e >= 0; e -= feature_step) {
            double sum = bias.get(e) + positions.get(m % patches * s.features + e), size = std::fabs(sum);
            for (int64_t k = 0; k < pixels; k++) {
                sum += pixel(m, k) * weight.get(e * pixels + k);
                size += std::fabs(pixel(m, k) * weight.get(e * pixels + k));
            }
            const int64_t token = m / patches * (s.prefix + patches) + s.prefix + m % patches;
            expect(tokens.get(token * s.features + e), sum, size, dtype, "a token");
        }
    }

    // The gradient is a slice of the tokens', the prefix left out.
    Tensor d_images(bytes ? DType::kFloat32 : image_dtype, images.count), d_weight(dtype, weight.count);
    Tensor d_bias(dtype, s.features), grad(dtype, tokens.count);
    Patches dx = x, dw = w;
    dx.data = d_images.data, dx.dtype = d_images.dtype, dw.data = d_weight.data;
    const Patches g{static_cast<char*>(grad.data) + s.prefix * s.features * size_of(dtype),
                    dtype,
                    {s.batch, 1, 1, patches, 1, 1, 1, s.features},
                    {(s.prefix + patches) * s.features, 0, 0, s.features, 0, 0, 0, 1}};
    patch_embed_backward({g, x, w, bytes ? mean.data() : nullptr, bytes ? std_dev.data() : nullptr, true, true, true,
                          dx, dw, d_bias.data});
    const auto upstream = [&](int64_t m, int64_t e) { return grad.get(s.prefix * s.features + offset(g, m, e)); };
    for (int64_t e = s.features - 1; e >= 0; e -= feature_step) {
        double sum = 0, size = 0;
        for (int64_t m = 0; m < rows; m++) sum += upstream(m, e), size += std::fabs(upstream(m, e));
        expect(d_bias.get(e), sum, size, dtype, "the bias' gradient");
        for (int64_t k = pixels - 1; k >= 0; k -= 1 + pixels / 6) {
            double total = 0, extent = 0;
            for (int64_t m = 0; m < rows; m++) {
                total += upstream(m, e) * pixel(m, k), extent += std::fabs(upstream(m, e) * pixel(m, k));
            }
            expect(d_weight.get(e * pixels + k), total, extent, dtype, "the weight's gradient");
        }
    }
    for (int64_t m = 0; m < rows; m += row_step) {
        for (int64_t k = pixels - 1; k >= 0; k -= 1 + pixels / 9) {
            double sum = 0, size = 0;
            for (int64_t e = 0; e < s.features; e++) {
                sum += upstream(m, e) * weight.get(e * pixels + k);
                size += std::fabs(upstream(m, e) * weight.get(e * pixels + k));
            }
            const DType coarser = dtype == DType::kFloat32 ? d_images.dtype : dtype;
            expect(d_images.get(offset(dx, m, k)), sum, size, coarser, "the images' gradient");
        }
    }
}

}  // namespace

int main() {
    threads = 3;
    // Tails of every kind: rows, features and pixels that are multiples of nothing; runs shorter and longer than a
    // vector, or one short of it where the tensor ends; more than kFewGathered rows; more than kDepth units; a result
    // that is streamed.
    const Shape shapes[] = {
        {1, 1, 1, 1, 1, 1, 1, 1, 0, false, false},      {1, 2, 3, 2, 1, 15, 15, 20, 0, false, false},
        {2, 2, 3, 3, 1, 7, 7, 37, 1, false, true},      {2, 2, 3, 3, 1, 7, 7, 37, 1, true, true},
        {3, 1, 5, 3, 1, 14, 14, 50, 0, false, false},   {3, 1, 5, 3, 1, 14, 14, 50, 2, true, false},
        {1, 3, 2, 4, 1, 16, 16, 65, 0, false, true},    {1, 2, 2, 3, 2, 5, 6, 33, 3, false, false},
        {1, 1, 3, 3, 1, 32, 32, 19, 0, false, false},   {13, 9, 10, 1, 1, 3, 3, 17, 1, false, false},
        {16, 33, 33, 1, 1, 1, 2, 128, 0, false, false},
    };
    for (const Shape& shape : shapes) {
        for (DType dtype : served()) {
            check(shape, dtype, dtype);
            check(shape, DType::kUInt8, dtype);
        }
        check(shape, DType::kFloat32, DType::kBFloat16);
        if (!kHasAmx) check(shape, DType::kFloat16, DType::kFloat32);
    }
    std::printf("right\n");
}
