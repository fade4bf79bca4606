// Rotary position embedding. A head is two halves, a and b, and so are the tables, c of cosines and s of sines:
//
//     out_a = a c_a - b s_a,  out_b = b c_b + a s_b         (out = x c + rotate_half(x) s)
//
// and by the transpose, which takes the gradient of out to that of x, the same with -s_b for s_a and -s_a for s_b.
//
// Every number is read once, turned in float32 and written once, rounded: the time is that of the memory. Eager code
// makes six tensors of the size of x on the way, in float32 where x is of half type.
#include "rotary_embed.h"

#include "gemm.h"
#include "tasks.h"

namespace mmk::MMK_ISA {
namespace {

constexpr int64_t kTokens = 16;  // a task

struct Tables {
    const float *cos, *sin_a, *sin_b;
    float sign;  // of both sines
};

template <class T>
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
        const float* sin = call_.sin + at;
        const Tables tables = call_.transposed ? Tables{call_.cos + at, sin + half_, sin, -1}
                                               : Tables{call_.cos + at, sin, sin + half_, 1};
        const T* from = static_cast<const T*>(x.data) + row * x.batch_stride + token * x.token_stride;
        T* to = static_cast<T*>(out.data) + row * out.batch_stride + token * out.token_stride;
        for (int64_t h = 0; h < x.heads; h++) head(from + h * x.head_stride, to + h * out.head_stride, tables);
    }

    void head(const T* x, T* out, const Tables& tables) const {
        int64_t d = 0;
        for (; d + kLanes <= half_; d += kLanes) lanes(x + d, out + d, tables, d, kLanes);
        if (d < half_) lanes(x + d, out + d, tables, d, static_cast<int>(half_ - d));
    }

    // `count` numbers of either half, of which x and out point to the first.
    MMK_INLINE void lanes(const T* x, T* out, const Tables& tables, int64_t d, int count) const {
        const auto read = [count](const auto* p)
                              MMK_INLINE_LAMBDA { return count == kLanes ? load(p) : load_first(p, count); };
        const auto write = [count](T* p, Vec v)
                               MMK_INLINE_LAMBDA { count == kLanes ? store(p, v) : store_first(p, v, count); };
        const Vec a = read(x), b = read(x + half_), sign = splat(tables.sign);
        const Vec cos_a = read(tables.cos + d), cos_b = read(tables.cos + half_ + d);
        const Vec sin_a = sign * read(tables.sin_a + d), sin_b = sign * read(tables.sin_b + d);
        write(out, a * cos_a - b * sin_a);
        write(out + half_, b * cos_b + a * sin_b);
    }

    const RotaryEmbed& call_;
    const int64_t half_;
};

}  // namespace

void rotary_embed(const RotaryEmbed& call) {
    with_element_type(call.x.dtype, [&](auto type) { Rotation<decltype(type)>(call).run(); });
}

}  // namespace mmk::MMK_ISA
