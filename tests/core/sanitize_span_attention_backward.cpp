// Span attention's backward of one instruction-set level under sanitizers: address and undefined behaviour, on memory
// that ends where the tensors end, and threads. Besides, the gradients must be those of the formula, the same to the
// bit on one thread and on three, and the same to the bit whatever a foreign document holds. NaN stands in all that
// must not count: in queries that see nothing, in their results and the gradients of these, and in keys that no query
// sees. Every second layout has a gradient of the log-sum-exp too.
#include <numeric>

#include "cpu/span_attention/backward.cpp"
#include "span_attention_cases.h"

struct Formula {  // [batch][token][head][dim]
    std::vector<double> out, d_q, d_k, d_v;
    std::vector<float> lse;  // as the kernels take it: [batch][head][query]
};

static std::vector<double> values(const Tensor& x) {
    std::vector<double> found;
    const Heads& of = x.heads;
    for (int64_t b = 0; b < of.batch; b++) {
        for (int64_t t = 0; t < of.tokens; t++) {
            for (int64_t h = 0; h < of.heads; h++) {
                for (int64_t d = 0; d < of.dim; d++) found.push_back(x.get(b, t, h, d));
            }
        }
    }
    return found;
}

static double dot(const double* a, const double* b, int64_t count) {
    double sum = 0;
    for (int64_t d = 0; d < count; d++) sum += a[d] * b[d];
    return sum;
}

static void add(double* to, double factor, const double* x, int64_t count) {
    for (int64_t d = 0; d < count; d++) to[d] += factor * x[d];
}

// One query of one head: its keys' scores, then all that follows from them.
static void differentiate(const Case& c, const std::vector<double> (&inputs)[4], const float* d_lse, int64_t b,
                          int64_t i, int64_t h, Formula& found) {
    const auto& [q, k, v, d_out] = inputs;
    const int64_t heads = c.heads * c.group, row = (b * c.queries + i) * heads + h;
    const double *q_row = q.data() + row * c.dim, *d_out_row = d_out.data() + row * c.out_dim;
    double* out = found.out.data() + row * c.out_dim;
    std::vector<int64_t> keys;
    std::vector<double> weights, slopes;
    double total = 0, delta = 0;
    for (int64_t j = 0; j < c.keys; j++) {
        if (!sees(c, b, i, j)) continue;
        const int64_t key = (b * c.keys + j) * c.heads + h / c.group;
        double score = c.scale * dot(q_row, k.data() + key * c.dim, c.dim), slope = 1;
        if (c.softcap != 0) {
            const double x = std::tanh(score / c.softcap);
            score = c.softcap * x, slope = 1 - x * x;
        }
        keys.push_back(key), weights.push_back(std::exp(score)), slopes.push_back(slope);
        total += weights.back();
    }
    found.lse[(b * heads + h) * c.queries + i] = static_cast<float>(std::log(total));
    for (size_t n = 0; n < keys.size(); n++) {
        weights[n] /= total;
        add(out, weights[n], v.data() + keys[n] * c.out_dim, c.out_dim);
    }
    for (int64_t d = 0; d < c.out_dim && !keys.empty(); d++) delta += out[d] * d_out_row[d];
    if (d_lse != nullptr) delta -= d_lse[(b * heads + h) * c.queries + i];
    for (size_t n = 0; n < keys.size(); n++) {
        const double d_weight = dot(d_out_row, v.data() + keys[n] * c.out_dim, c.out_dim);
        const double d_score = c.scale * weights[n] * (d_weight - delta) * slopes[n];
        add(found.d_v.data() + keys[n] * c.out_dim, weights[n], d_out_row, c.out_dim);
        add(found.d_k.data() + keys[n] * c.dim, d_score, q_row, c.dim);
        add(found.d_q.data() + row * c.dim, d_score, k.data() + keys[n] * c.dim, c.dim);
    }
}

static Formula formula(const Case& c, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& d_out,
                       const float* d_lse) {
    const std::vector<double> inputs[] = {values(q), values(k), values(v), values(d_out)};
    Formula found;
    found.d_q.resize(inputs[0].size()), found.d_k.resize(inputs[1].size()), found.d_v.resize(inputs[2].size());
    found.out.resize(inputs[3].size());
    found.lse.resize(c.batch * c.heads * c.group * c.queries);
    for (int64_t b = 0; b < c.batch; b++) {
        for (int64_t i = 0; i < c.queries; i++) {
            for (int64_t h = 0; h < c.heads * c.group; h++) differentiate(c, inputs, d_lse, b, i, h, found);
        }
    }
    return found;
}

static void check(const Case& c, DType dtype, Layout layout, const char* name, const Tensor& found,
                  const std::vector<double>& expected) {
    double size = 0;
    for (const double x : expected) size = std::max(size, std::abs(x));
    const double tolerance = (dtype == DType::kFloat32 ? 2e-5 : 3e-2) * std::max(size, 0.1);
    const std::vector<double> gradient = values(found);
    for (size_t i = 0; i < expected.size(); i++) {
        if (!(std::abs(gradient[i] - expected[i]) <= tolerance)) {
            complain(c, dtype, layout, name, gradient[i], expected[i]);
        }
    }
}

struct Gradients {
    Gradients(const Case& c, DType dtype)
        : q(dtype, c.batch, c.queries, c.heads * c.group, c.dim, kTokens),
          k(dtype, c.batch, c.keys, c.heads, c.dim, kTokens),
          v(dtype, c.batch, c.keys, c.heads, c.out_dim, kTokens) {}
    bool same(const Gradients& other) const { return q.same(other.q) && k.same(other.k) && v.same(other.v); }

    Tensor q, k, v;
};

// A case's tensors in one layout, filled; d_out and out lie in the next two.
struct Problem {
    Problem(const Case& c, DType dtype, Layout layout, bool with_d_lse)
        : q(dtype, c.batch, c.queries, c.heads * c.group, c.dim, layout),
          k(dtype, c.batch, c.keys, c.heads, c.dim, layout),
          v(dtype, c.batch, c.keys, c.heads, c.out_dim, layout),
          d_out(dtype, c.batch, c.queries, c.heads * c.group, c.out_dim, static_cast<Layout>((layout + 1) % kLayouts)),
          out(dtype, c.batch, c.queries, c.heads * c.group, c.out_dim, static_cast<Layout>((layout + 2) % kLayouts)),
          lo((c.shared_spans ? 1 : c.batch) * c.runs * c.queries),
          hi((c.shared_spans ? 1 : c.batch) * c.runs * c.queries),
          lse(c.batch * c.heads * c.group * c.queries),
          d_lse(c.batch * c.heads * c.group * c.queries),
          case_(c),
          with_d_lse_(with_d_lse) {
        for (size_t at = 0; at < lo.count; at++) {
            const auto number = static_cast<int64_t>(at), table = c.runs * c.queries;
            const Run span = c.span(number / table, number % table / c.queries, number % c.queries);
            lo.data[at] = span.lo, hi.data[at] = span.hi;
        }
        for (int64_t b = 0; b < c.batch; b++) fill(b);
        expected = formula(c, q, k, v, d_out, given_d_lse());
        std::copy(expected.lse.begin(), expected.lse.end(), lse.data);
        const double* next = expected.out.data();
        for (int64_t b = 0; b < c.batch; b++) {
            for (int64_t i = 0; i < c.queries; i++) {
                const bool counts = sees_any(b, i);
                out.fill_token(b, i, [&] { return counts ? static_cast<float>(*next++) : (next++, not_a_number()); });
            }
        }
    }

    void differentiate(int count, const Gradients& gradients) const {
        threads = count;
        const int64_t stride = case_.shared_spans ? 0 : case_.runs * case_.queries;
        span_attention_backward({d_out.heads,
                                 q.heads,
                                 k.heads,
                                 v.heads,
                                 out.heads,
                                 lse.data,
                                 given_d_lse(),
                                 {lo.data, hi.data, case_.runs, case_.queries, stride},
                                 case_.scale,
                                 case_.softcap,
                                 gradients.q.heads,
                                 gradients.k.heads,
                                 gradients.v.heads});
    }

    Tensor q, k, v, d_out, out;
    Array<int32_t> lo, hi;
    Array<float> lse, d_lse;
    Formula expected;

  private:
    const float* given_d_lse() const { return with_d_lse_ ? d_lse.data : nullptr; }
    bool sees_any(int64_t b, int64_t i) const {
        for (int64_t j = 0; j < case_.keys; j++) {
            if (sees(case_, b, i, j)) return true;
        }
        return false;
    }
    void fill(int64_t b) {
        for (int64_t i = 0; i < case_.queries; i++) {
            const bool counts = sees_any(b, i);
            if (counts) q.fill_token(b, i, draw), d_out.fill_token(b, i, draw);
            for (int64_t h = 0; h < q.heads.heads; h++) {
                d_lse.data[(b * q.heads.heads + h) * case_.queries + i] = counts ? draw() : not_a_number();
            }
        }
        for (int64_t j = 0; j < case_.keys; j++) {
            bool seen = false;
            for (int64_t i = 0; i < case_.queries && !seen; i++) seen = sees(case_, b, i, j);
            if (seen) k.fill_token(b, j, draw), v.fill_token(b, j, draw);
        }
    }

    const Case& case_;
    const bool with_d_lse_;
};

static void run(const Case& c, DType dtype, Layout layout) {
    const Problem problem(c, dtype, layout, layout % 2 == 1);
    const Gradients first(c, dtype), again(c, dtype);
    problem.differentiate(1, first);
    problem.differentiate(3, again);
    if (!first.same(again)) complain(c, dtype, layout, "steadiness", 0, 1);
    check(c, dtype, layout, "d_q", first.q, problem.expected.d_q);
    check(c, dtype, layout, "d_k", first.k, problem.expected.d_k);
    check(c, dtype, layout, "d_v", first.v, problem.expected.d_v);
}

// NaN and infinity in all that belongs to one document change no bit of the others' gradients.
static void isolate(DType dtype, const std::vector<int32_t>& lengths) {
    const int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), 0);
    const int64_t first = lengths[0] + lengths[1], last = first + lengths[2];  // the third document
    const Case c{"isolation", 1, tokens, tokens, 1, 1, 24, 24, 1, documents(lengths, true)};
    Problem problem(c, dtype, kTokens, true);
    const Gradients clean(c, dtype), found(c, dtype);
    problem.differentiate(1, clean);
    for (int64_t i = first; i < last; i++) {
        const auto bad = [=] { return i % 2 ? not_a_number() : std::numeric_limits<float>::infinity(); };
        for (Tensor* x : {&problem.q, &problem.k, &problem.v, &problem.d_out, &problem.out}) x->fill_token(0, i, bad);
        problem.lse.data[i] = problem.d_lse.data[i] = bad();
    }
    problem.differentiate(1, found);
    for (int64_t i = 0; i < tokens; i++) {
        if (first <= i && i < last) continue;
        bool same = true;
        for (int64_t d = 0; d < 24; d++) {
            same &= found.q.get(0, i, 0, d) == clean.q.get(0, i, 0, d);
            same &= found.k.get(0, i, 0, d) == clean.k.get(0, i, 0, d);
            same &= found.v.get(0, i, 0, d) == clean.v.get(0, i, 0, d);
        }
        if (!same) complain(c, dtype, kTokens, "isolation of token", static_cast<double>(i), 1);
    }
}

int main() {
    int layout = 0;
    for (const DType dtype : served()) {
        for (const Case& c : cases()) run(c, dtype, static_cast<Layout>(layout++ % kLayouts));
        isolate(dtype, {37, 3, 60, 60});
        isolate(dtype, {4, 8, 5, 3});
    }
    if (failures == 0) printf("right\n");
    return failures != 0;
}
