// Rotary position embedding. A head is pairs (a, b), and so are the tables, c of cosines and s of sines:
//
//     out_a = a c_a - b s_a,  out_b = b c_b + a s_b         (out = x c + rotate_half(x) s)
//
// and by the transpose, which takes the gradient of out to that of x, the same with -s_b for s_a and -s_a for s_b.
// The a of a head are its first half and the b the other, or, interleaved, its even numbers and its odd ones.
//
// Every number is read once, turned in float32 and written once, rounded: the time is that of the memory. Eager code
// makes six tensors of the size of x on the way, in float32 where x is of half type.
#include "cpu/product/gemm.h"
#include "cpu/product/tasks.h"
#include "cpu/rotary_embed/call.h"

namespace mmk::MMK_ISA {
namespace {

constexpr int64_t kTokens = 16;  // a task

// Which pairs and which way: known to the compiler, so that no vector asks.
template <class T, bool kInterleaved, bool kTransposed>
class Rotation {
  public:
    explicit Rotation(const RotaryEmbed& call) : call_(call), half_(call.x.dim / 2) {}

    void run() const {
        const Heads& x = call_.x;
        const int64_t groups = (x.tokens + kTokens - 1) / kTokens;
        const double flops = 3.0 * x.batch * x.tokens * x.heads * x.dim;
        for_each(x.batch * groups, useful_threads(flops), [&](int64_t task, int64_t) {
            const int64_t row = task / groups, first = task % groups * kTokens;
            for (int64_t token = first; token < std::min(first + kTokens, x.tokens); token++) turn(row, token);
        });
    }

  private:
    void turn(int64_t row, int64_t token) const {
        const Heads &x = call_.x, &out = call_.out;
        const int64_t at = row * call_.table_stride + token * x.dim;
        const T* from = static_cast<const T*>(x.data) + row * x.batch_stride + token * x.token_stride;
        T* to = static_cast<T*>(out.data) + row * out.batch_stride + token * out.token_stride;
        for (int64_t h = 0; h < x.heads; h++) head(from + h * x.head_stride, to + h * out.head_stride, at);
    }

    void head(const T* x, T* out, int64_t at) const {
        const int64_t count = kInterleaved ? call_.x.dim : half_;
        int64_t d = 0;
        for (; d + kLanes <= count; d += kLanes) lanes(x + d, out + d, at + d, kLanes);
        if (d < count) lanes(x + d, out + d, at + d, static_cast<int>(count - d));
    }

    // The first `count` numbers of x, or of either half of it; `at` is their place in the tables.
    MMK_INLINE void lanes(const T* x, T* out, int64_t at, int count) const {
        const auto read = [count](const auto* p)
                              MMK_INLINE_LAMBDA { return count == kLanes ? load(p) : load_first(p, count); };
        const auto write = [count](T* p, Vec v)
                               MMK_INLINE_LAMBDA { count == kLanes ? store(p, v) : store_first(p, v, count); };
        const float *cos = call_.cos + at, *sin = call_.sin + at;
        if constexpr (kInterleaved) {
            const Vec v = read(x), s = read(sin), turned = kTransposed ? -swap_neighbours(s) : s;
            write(out, v * read(cos) + swap_neighbours(v) * select((lane_index() & 1) == 1, turned, -turned));
        } else {
            const Vec a = read(x), b = read(x + half_);
            const Vec sin_a = kTransposed ? -read(sin + half_) : read(sin);
            const Vec sin_b = kTransposed ? -read(sin) : read(sin + half_);
            write(out, a * read(cos) - b * sin_a);
            write(out + half_, b * read(cos + half_) + a * sin_b);
        }
    }

    const RotaryEmbed& call_;
    const int64_t half_;
};

}  // namespace

void rotary_embed(const RotaryEmbed& call) {
    with_element_type(call.x.dtype, [&](auto type) {
        using T = decltype(type);
        if (call.interleaved) {
            call.transposed ? Rotation<T, true, true>(call).run() : Rotation<T, true, false>(call).run();
        } else {
            call.transposed ? Rotation<T, false, true>(call).run() : Rotation<T, false, false>(call).run();
        }
    });
}

}  // namespace mmk::MMK_ISA
