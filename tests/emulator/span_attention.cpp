// Runs the cases of one file through the forward kernel for "sm_80" or "sm_90a" and writes out and lse of all to
// another.
#include "span_attention_case.h"

using namespace mmk;
using namespace mmk::cuda;

struct Header {
    Sizes sizes;
    Place q, k, v, out;
};

// The two warpgroups of the kernel for Hopper issue their products in turns: group 1, as often group 2, and so on.
static bool take_turns(const std::vector<int>& commits) {
    int first = 0, second = 0;  // commits of the last turn of each
    for (size_t i = 0; i < commits.size(); i++) {
        if (commits[i] == 1 && second > 0) {
            if (first != second) return false;
            first = second = 0;
        }
        (commits[i] == 1 ? first : second)++;
        if (first > 2 || second > first) return false;
    }
    return first == second;
}

static Error forward(bool hopper, const SpanAttention& call) {
    if (!hopper) return span_attention_forward(call, nullptr);
    emulator::counters().wgmma_commits.clear();
    if (Error error = span_attention_forward_sm90(call, nullptr)) return error;
    if (!take_turns(emulator::counters().wgmma_commits)) return Error("its warpgroups do not take turns");
    return {};
}

static void run_case(const std::string& kernel, FILE* from, FILE* to, const Header& h) {
    Storage q(from, h.q), k(from, h.k), v(from, h.v);
    const SpansOfCase spans(from, h.sizes);
    std::vector<uint16_t> first_out;
    std::vector<float> first_lse;
    bool first = true;
    in_three_orders([&] {
        Storage out(h.out);
        std::vector<float> lse(static_cast<size_t>(h.sizes.batch * h.sizes.heads * h.sizes.queries), -1.0f);
        const SpanAttention call = call_of(h.sizes, q, k, v, out, spans, lse);
        for (const Storage* storage : {&q, &k, &v}) storage->watch(true);
        spans.watch();
        out.watch(false);
        watch(lse, false);
        complain_of([&] { return forward(kernel == "sm_90a", call); });
        if (first) first_out = out.numbers, first_lse = lse;
        if (!same_bits(first_out, out.numbers) || !same_bits(first_lse, lse)) fail("depends on the order of threads");
        first = false;
    });
    write(to, first_out, h.out.offset);
    write(to, first_lse);
}

int main(int, char** arguments) { return run_all<Header>(arguments, run_case); }
