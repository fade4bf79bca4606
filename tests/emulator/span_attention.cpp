// Runs the cases of one file through the forward kernel for "sm_80" or "sm_90a", each under three orders of threads,
// which have to give the same bits, and writes out and lse of all to another. test_span_attention.py knows both files.
#include "cuda/span_attention.h"

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "emulator/emulator.h"

using namespace mmk;
using namespace mmk::cuda;

struct Place {  // of a tensor: `offset` numbers after an address that is a multiple of 16
    int64_t extent, offset, batch, row, head;
};
struct Header {
    int64_t batch, queries, keys, heads, key_heads, head_size, value_size, runs, spans_by_batch, bfloat16;
    Place q, k, v, out;
    double scale, softcap;
};

static const char* case_name = "";
static int failures = 0;

static void fail(const std::string& why) {
    failures++;
    printf("FAILED %s: %s\n", case_name, why.c_str());
}

template <class T>
static std::vector<T> read(FILE* file, int64_t count) {
    std::vector<T> numbers(static_cast<size_t>(count));
    if (fread(numbers.data(), sizeof(T), numbers.size(), file) != numbers.size()) {
        printf("FAILED: the file of cases ends early\n");
        exit(1);
    }
    return numbers;
}

// Exactly as large as its tensor, so that the sanitizers see what lies beyond.
struct Storage {
    Storage(FILE* file, const Place& place) : place(place), numbers(static_cast<size_t>(place.offset), 0) {
        const auto read_numbers = read<uint16_t>(file, place.extent);
        numbers.insert(numbers.end(), read_numbers.begin(), read_numbers.end());
        numbers.shrink_to_fit();
    }
    explicit Storage(const Place& place)
        : place(place), numbers(static_cast<size_t>(place.offset + place.extent), ~0) {}

    Heads heads() { return {numbers.data() + place.offset, place.batch, place.row, place.head}; }
    void watch(bool initialised) const {
        emulator::watch(numbers.data() + place.offset, static_cast<size_t>(place.extent) * 2, initialised);
    }

    Place place;
    std::vector<uint16_t> numbers;
};

template <class T>
static void watch(const std::vector<T>& numbers, bool initialised) {
    emulator::watch(numbers.data(), numbers.size() * sizeof(T), initialised);
}

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

static void run_case(bool hopper, FILE* from, FILE* to, const Header& h) {
    Storage q(from, h.q), k(from, h.k), v(from, h.v);
    const int64_t slices = (h.spans_by_batch ? h.batch : 1) * h.runs,
                  hulls_each = (h.queries + kHullRows - 1) / kHullRows;
    const auto lo = read<int32_t>(from, slices * h.queries), hi = read<int32_t>(from, slices * h.queries);
    const auto hulls = read<int32_t>(from, slices * hulls_each * 4);

    std::vector<uint16_t> first_out;
    std::vector<float> first_lse;
    for (const auto order : {emulator::Order::kLowestFirst, emulator::Order::kHighestFirst, emulator::Order::kRandom}) {
        emulator::options() = {order, 1};
        Storage out(h.out);
        std::vector<float> lse(static_cast<size_t>(h.batch * h.heads * h.queries), -1.0f);
        const auto small = [](int64_t size) { return static_cast<int>(size); };
        const SpanAttention call{q.heads(),
                                 k.heads(),
                                 v.heads(),
                                 out.heads(),
                                 lo.data(),
                                 hi.data(),
                                 hulls.data(),
                                 lse.data(),
                                 small(h.batch),
                                 small(h.queries),
                                 small(h.keys),
                                 small(h.heads),
                                 small(h.key_heads),
                                 small(h.head_size),
                                 small(h.value_size),
                                 small(h.runs),
                                 h.spans_by_batch != 0,
                                 h.bfloat16 != 0,
                                 static_cast<float>(h.scale),
                                 static_cast<float>(h.softcap)};
        for (const Storage* storage : {&q, &k, &v}) storage->watch(true);
        for (const auto* spans : {&lo, &hi, &hulls}) watch(*spans, true);
        out.watch(false);
        watch(lse, false);
        try {
            if (const Error error = forward(hopper, call)) fail(error.message());
        } catch (const emulator::Error& error) {
            fail(error.what());
        }
        emulator::forget_watched();
        if (first_out.empty()) first_out = out.numbers;
        if (first_lse.empty()) first_lse = lse;
        if (first_out != out.numbers || memcmp(first_lse.data(), lse.data(), lse.size() * sizeof(float)) != 0) {
            fail("depends on the order of threads");
        }
    }
    fwrite(first_out.data() + (first_out.empty() ? 0 : h.out.offset), 2, static_cast<size_t>(h.out.extent), to);
    fwrite(first_lse.data(), sizeof(float), first_lse.size(), to);
}

int main(int, char** arguments) {
    const bool hopper = arguments[1] == std::string("sm_90a");
    FILE *const from = fopen(arguments[2], "rb"), *const to = fopen(arguments[3], "wb");
    emulator::counters() = {};
    Header header;
    std::string name;
    for (int number = 0; fread(&header, sizeof header, 1, from) == 1; number++) {
        name = "case " + std::to_string(number);
        case_name = name.c_str();
        run_case(hopper, from, to, header);
    }
    fclose(to);
    if (emulator::counters().bank_conflicts != 0) fail("has bank conflicts");
    if (failures == 0) printf("right\n");
    return failures != 0;
}
