// Runs the cases of one file through the backward kernels for "sm_80" or "sm_90a" and writes d_q, d_k and d_v of all to
// another. A gradient of lse that is all zeros is not given.
#include <algorithm>

#include "span_attention_case.h"

using namespace mmk;
using namespace mmk::cuda;

struct Header {
    Sizes sizes;
    Place q, k, v, out, d_out, d_q, d_k, d_v;
};

static Error backward(const std::string& kernel, const SpanAttentionBackward& call) {
    if (kernel == "sm_90a") return span_attention_backward_sm90(call, nullptr);
    return span_attention_backward(call, nullptr);
}

static void run_case(const std::string& kernel, FILE* from, FILE* to, const Header& h) {
    Storage q(from, h.q), k(from, h.k), v(from, h.v), out(from, h.out), d_out(from, h.d_out);
    auto lse = read<float>(from, h.sizes.batch * h.sizes.heads * h.sizes.queries);
    const auto d_lse = read<float>(from, static_cast<int64_t>(lse.size()));
    const bool given = std::any_of(d_lse.begin(), d_lse.end(), [](float x) { return x != 0; });
    const SpansOfCase spans(from, h.sizes);
    std::vector<uint16_t> expected[3];
    bool first = true;
    in_three_orders([&] {
        Storage d_q(h.d_q), d_k(h.d_k), d_v(h.d_v);
        SpanAttentionBackward call{call_of(h.sizes, q, k, v, out, spans, lse),
                                   d_out.heads(),
                                   d_q.heads(),
                                   d_k.heads(),
                                   d_v.heads(),
                                   given ? d_lse.data() : nullptr,
                                   nullptr};
        std::vector<uint8_t> workspace(span_attention_backward_bytes(call.forward), 0xFF);
        call.workspace = workspace.data();
        for (const Storage* storage : {&q, &k, &v, &out, &d_out}) storage->watch(true);
        spans.watch();
        watch(lse, true);
        if (given) watch(d_lse, true);
        for (const Storage* storage : {&d_q, &d_k, &d_v}) storage->watch(false);
        watch(workspace, false);
        complain_of([&] { return backward(kernel, call); });
        const Storage* gradients[] = {&d_q, &d_k, &d_v};
        for (int i = 0; i < 3; i++) {
            if (first) expected[i] = gradients[i]->numbers;
            if (!same_bits(expected[i], gradients[i]->numbers)) fail("depends on the order of threads");
        }
        first = false;
    });
    const Place* places[] = {&h.d_q, &h.d_k, &h.d_v};
    for (int i = 0; i < 3; i++) write(to, expected[i], places[i]->offset);
}

int main(int, char** arguments) { return run_all<Header>(arguments, run_case); }
