// Rotary embedding of one instruction-set level in memory that ends with the tensors: heads whose halves are a multiple
// of the lanes, or not, or shorter; pairs of neighbours, too; spread rows; one table for a batch or several; either
// direction. The result is compared with the definition as well, so that a kernel that skips its work does not pass.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "bounded_memory.h"
#include "cpu/rotary_embed/rotary_embed.cpp"
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

float value(int64_t i) { return static_cast<float>((i * 7 + i / 5) % 9 - 4) / 4; }

template <class T>
void check(DType dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t dim, bool shared, bool interleaved,
           bool transposed) {
    // Rows one head further apart than they are wide, the last of them as wide as its heads.
    const int64_t row = (heads + 1) * dim, rows = batch * tokens, half = dim / 2;
    Bounded<T> x((rows - 1) * row + heads * dim), out(rows * heads * dim);
    Bounded<float> cos((shared ? 1 : batch) * tokens * dim), sin(cos.count);
    for (int64_t i = 0; i < x.count; i++) x.data[i] = from_float<T>(value(i));
    for (int64_t i = 0; i < cos.count; i++) cos.data[i] = value(3 * i), sin.data[i] = value(4 * i + 2);
    const Heads from{x.data, dtype, batch, tokens, heads, dim, tokens * row, row, dim};
    const Heads to{out.data, dtype, batch, tokens, heads, dim, tokens * heads * dim, heads * dim, dim};
    rotary_embed({from, to, cos.data, sin.data, shared ? 0 : tokens * dim, interleaved, transposed});
    for (int64_t i = 0; i < out.count; i++) {
        const int64_t d = i % dim, other = interleaved ? d ^ 1 : (d + half) % dim, h = i / dim % heads,
                      r = i / dim / heads;
        const int64_t table = (shared ? r % tokens : r) * dim;
        const float* head = cos.data + table;
        const double own = to_float(x.data[r * row + h * dim + d]), far = to_float(x.data[r * row + h * dim + other]);
        const double turned = far * sin.data[table + (transposed ? other : d)];
        const bool is_first = interleaved ? d % 2 == 0 : d < half;
        const double truth = own * head[d] + (is_first == transposed ? turned : -turned);
        const double eps = dtype == DType::kFloat32 ? 1e-6 : dtype == DType::kBFloat16 ? 8e-3 : 1e-3;
        if (!(std::fabs(to_float(out.data[i]) - truth) <= eps * 2)) {
            std::printf("element %lld of %lld heads of %lld is %g, not %g\n", static_cast<long long>(i),
                        static_cast<long long>(heads), static_cast<long long>(dim), to_float(out.data[i]), truth);
            std::exit(1);
        }
    }
}

}  // namespace

int main() {
    threads = 3;
    for (DType dtype : served()) {
        for (int64_t dim : {2, 6, 16, 36, 64, 80, 130}) {
            for (int way = 0; way < 4; way++) {
                const bool interleaved = way & 1, transposed = way & 2;
                with_element_type(dtype, [&](auto type) {
                    using T = decltype(type);
                    check<T>(dtype, 1, 1, 1, dim, true, interleaved, transposed);
                    check<T>(dtype, 2, 37, 3, dim, true, interleaved, transposed);
                    check<T>(dtype, 3, 16, 2, dim, false, interleaved, transposed);
                });
            }
        }
        with_element_type(dtype, [&](auto type) { check<decltype(type)>(dtype, 1, 1100, 4, 80, true, false, false); });
    }
    std::printf("right\n");
}
