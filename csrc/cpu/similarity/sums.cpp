// Rows added up where indices say, with weights: what the derivatives of the largest products are made of.
//
//     gather   y_r = sum_s w_rs b_i(r,s)              scatter   y_c = sum over r, s with i(r,s) = c of w_rs a_r
//
// 2 R S D operations, and as many numbers read: the time is that of the caches. Gathering, a task has kRows rows and
// meets one segment after the other, whose columns stay near it. Scattering, a task has kWidth numbers of all sums,
// which stay in the L2 cache up to 16k columns, and meets the weights in their order: every number is one chain of
// additions in the order of r and s, whoever adds them.
#include "cpu/product/gemm.h"
#include "cpu/product/tasks.h"
#include "cpu/similarity/call.h"

namespace mmk::MMK_ISA {

namespace {

constexpr int64_t kRows = 16, kWidth = 32;

// y[0, n) += w x[0, n), x's elements `stride` apart.
template <class T>
MMK_INLINE void add(float* y, float w, const T* x, int64_t stride, int64_t n) {
    if (stride != 1) {
        for (int64_t d = 0; d < n; d++) y[d] += w * to_float(x[d * stride]);
        return;
    }
    const Vec weight = splat(w);
    int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) store(y + d, load(y + d) + weight * load(x + d));
    if (d < n) {
        const int left = static_cast<int>(n - d);
        store_first(y + d, load_first(y + d, left) + weight * load_first(x + d, left), left);
    }
}

int threads_for(const WeightedRows& call) {
    return useful_threads(2.0 * static_cast<double>(call.rows) * static_cast<double>(call.segments) *
                          static_cast<double>(call.from.columns));
}

template <class T>
void gather(const WeightedRows& call) {
    const auto* columns = static_cast<const T*>(call.from.data);
    const int64_t dim = call.from.columns;
    for_each((call.rows + kRows - 1) / kRows, threads_for(call), [&](int64_t task, int64_t) {
        const int64_t first = task * kRows, last = std::min(first + kRows, call.rows);
        std::fill(call.sums + first * dim, call.sums + last * dim, 0.0f);
        for (int64_t s = 0; s < call.segments; s++) {
            for (int64_t r = first; r < last; r++) {
                const int64_t index = call.indices[r * call.segments + s];
                if (index < 0 || index >= call.from.rows) continue;
                add(call.sums + r * dim, call.weights[r * call.segments + s], columns + index * call.from.row_stride,
                    call.from.column_stride, dim);
            }
        }
    });
}

template <class T>
void scatter(const WeightedRows& call) {
    const auto* rows = static_cast<const T*>(call.from.data);
    const int64_t dim = call.from.columns;
    for_each((dim + kWidth - 1) / kWidth, threads_for(call), [&](int64_t task, int64_t) {
        const int64_t first = task * kWidth, width = std::min(kWidth, dim - first);
        for (int64_t c = 0; c < call.targets; c++) std::fill_n(call.sums + c * dim + first, width, 0.0f);
        for (int64_t r = 0; r < call.rows; r++) {
            const T* row = rows + r * call.from.row_stride + first * call.from.column_stride;
            for (int64_t s = 0; s < call.segments; s++) {
                const int64_t index = call.indices[r * call.segments + s];
                if (index < 0 || index >= call.targets) continue;
                add(call.sums + index * dim + first, call.weights[r * call.segments + s], row, call.from.column_stride,
                    width);
            }
        }
    });
}

}  // namespace

void gather_columns(const WeightedRows& call) {
    with_element_type(call.from.dtype, [&](auto type) { gather<decltype(type)>(call); });
}

void scatter_rows(const WeightedRows& call) {
    with_element_type(call.from.dtype, [&](auto type) { scatter<decltype(type)>(call); });
}

}  // namespace mmk::MMK_ISA
