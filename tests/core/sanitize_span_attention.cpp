// Span attention's forward of one instruction-set level under sanitizers: address and undefined behaviour, on memory
// that ends where the tensors end, and threads. Besides, the result must be that of the formula, the same to the bit on
// one thread and on three, and the same to the bit whatever keys hold that a query does not see.
#include "cpu/span_attention/decode.cpp"
#include "cpu/span_attention/forward.cpp"
#include "cpu/span_attention/short.cpp"
#include "span_attention_cases.h"

static void check_row(const Case& c, DType dtype, Layout layout, const SpanAttention& call, const Tensor* tensors[4],
                      int64_t b, int64_t i, int64_t h) {
    const Tensor &q = *tensors[0], &k = *tensors[1], &v = *tensors[2], &out = *tensors[3];
    std::vector<double> expected(c.out_dim);
    double sum = 0;
    for (int64_t j = 0; j < c.keys; j++) {
        if (!sees(c, b, i, j)) continue;
        double score = 0;
        for (int64_t d = 0; d < c.dim; d++) score += q.get(b, i, h, d) * k.get(b, j, h / c.group, d);
        score *= c.scale;
        if (c.softcap != 0) score = c.softcap * std::tanh(score / c.softcap);
        sum += std::exp(score);
        for (int64_t d = 0; d < c.out_dim; d++) expected[d] += std::exp(score) * v.get(b, j, h / c.group, d);
    }
    const double tolerance = dtype == DType::kFloat32 ? 2e-5 : 2e-2;
    const double lse = call.lse[(b * c.heads * c.group + h) * c.queries + i], truth = std::log(sum);
    if (sum == 0 ? lse != truth : !(std::abs(lse - truth) < tolerance)) complain(c, dtype, layout, "lse", lse, truth);
    for (int64_t d = 0; d < c.out_dim; d++) {
        const double found = out.get(b, i, h, d), of = sum == 0 ? 0 : expected[d] / sum;
        if (!(std::abs(found - of) < tolerance)) complain(c, dtype, layout, "out", found, of);
    }
}

static void run(const Case& c, DType dtype, Layout layout) {
    const int64_t heads = c.heads * c.group, rows = c.shared_spans ? 1 : c.batch;
    Tensor q(dtype, c.batch, c.queries, heads, c.dim, layout), k(dtype, c.batch, c.keys, c.heads, c.dim, layout);
    Tensor v(dtype, c.batch, c.keys, c.heads, c.out_dim, layout);
    Array<int32_t> lo(rows * c.runs * c.queries), hi(rows * c.runs * c.queries);
    for (int64_t b = 0; b < rows; b++) {
        for (int64_t at = 0; at < c.runs * c.queries; at++) {
            const Run span = c.span(b, at / c.queries, at % c.queries);
            lo.data[b * c.runs * c.queries + at] = span.lo, hi.data[b * c.runs * c.queries + at] = span.hi;
        }
    }
    for (int64_t b = 0; b < c.batch; b++) {
        for (int64_t i = 0; i < c.queries; i++) q.fill_token(b, i, draw);
        for (int64_t j = 0; j < c.keys; j++) {  // what nobody sees stays NaN
            bool seen = false;
            for (int64_t i = 0; i < c.queries && !seen; i++) seen = sees(c, b, i, j);
            if (seen) k.fill_token(b, j, draw), v.fill_token(b, j, draw);
        }
    }
    const int64_t stride = c.shared_spans ? 0 : c.runs * c.queries;
    const auto attend = [&](int count, const Tensor& out, float* lse) {
        threads = count;
        const SpanAttention call{q.heads,   k.heads,  v.heads,
                                 out.heads, lse,      {lo.data, hi.data, c.runs, c.queries, stride},
                                 c.scale,   c.softcap};
        span_attention(call);
        return call;
    };
    Tensor out(dtype, c.batch, c.queries, heads, c.out_dim, kTokens);
    Tensor again(dtype, c.batch, c.queries, heads, c.out_dim, kTokens);
    Array<float> lse(c.batch * heads * c.queries), lse_again(c.batch * heads * c.queries);
    const SpanAttention call = attend(1, out, lse.data);
    attend(3, again, lse_again.data);
    const bool steady = out.same(again) && memcmp(lse.data, lse_again.data, lse.count * sizeof(float)) == 0;
    if (!steady) complain(c, dtype, layout, "steadiness", 0, 1);
    const Tensor* tensors[] = {&q, &k, &v, &out};
    const int64_t step = std::max<int64_t>(1, c.queries / 61);
    for (int64_t b = 0; b < c.batch; b++) {
        for (int64_t h = 0; h < heads; h++) {
            for (int64_t i = 0; i < c.queries; i += step) check_row(c, dtype, layout, call, tensors, b, i, h);
        }
    }
}

// NaN and infinity in one document of keys change no bit for the queries of the others.
static void isolate(DType dtype) {
    const int64_t tokens = 160;
    const auto spans = documents({37, 3, 60, 60}, true);
    const Case c{"isolation", 1, tokens, tokens, 1, 1, 24, 24, 1, spans};
    Array<int32_t> lo(tokens), hi(tokens);
    for (int64_t i = 0; i < tokens; i++) lo.data[i] = spans(0, 0, i).lo, hi.data[i] = spans(0, 0, i).hi;
    Tensor q(dtype, 1, tokens, 1, 24, kTokens), k(dtype, 1, tokens, 1, 24, kTokens),
        v(dtype, 1, tokens, 1, 24, kTokens);
    for (int64_t i = 0; i < tokens; i++) q.fill_token(0, i, draw), k.fill_token(0, i, draw), v.fill_token(0, i, draw);
    Tensor clean(dtype, 1, tokens, 1, 24, kTokens), out(dtype, 1, tokens, 1, 24, kTokens);
    Array<float> clean_lse(tokens), lse(tokens);
    SpanAttention call{q.heads, k.heads, v.heads, clean.heads, clean_lse.data, {lo.data, hi.data, 1, tokens, tokens},
                       0.3,     0};
    span_attention(call);
    for (int64_t i = 40; i < 100; i++) {  // the third document
        k.fill_token(0, i, not_a_number), v.fill_token(0, i, i % 2 ? not_a_number : [] { return INFINITY; });
    }
    call.out = out.heads, call.lse = lse.data;
    span_attention(call);
    for (int64_t i = 0; i < tokens; i++) {
        if (i >= 40 && i < 100) continue;
        bool same = lse.data[i] == clean_lse.data[i];
        for (int64_t d = 0; d < 24; d++) same &= out.get(0, i, 0, d) == clean.get(0, i, 0, d);
        if (!same) complain(c, dtype, kTokens, "isolation of query", static_cast<double>(i), 1);
    }
}

int main() {
    int layout = 0;
    for (const DType dtype : served()) {
        for (const Case& c : cases()) {  // each in two layouts, other ones for the next dtype
            for (int i = 0; i < 2; i++) run(c, dtype, static_cast<Layout>(layout++ % kLayouts));
        }
        layout++;
        isolate(dtype);
    }
    if (failures == 0) printf("right\n");
    return failures != 0;
}
