// What the programs have in common that run the cases of one file through a kernel of span attention, each under three
// orders of threads, which have to give the same bits, and write the results of all to another.
// span_attention_cases.py knows both files.
#pragma once
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/span_attention/call.h"
#include "emulator/emulator.h"

namespace mmk::cuda {

struct Sizes {
    int64_t batch, queries, keys, heads, key_heads, head_size, value_size, runs, spans_by_batch, bfloat16;
    double scale, softcap;
};
struct Place {  // of a tensor: `offset` numbers after an address that is a multiple of 16
    int64_t extent, offset, batch, row, head;
};

inline const char* case_name = "";
inline int failures = 0;

inline void fail(const std::string& why) {
    failures++;
    printf("FAILED %s: %s\n", case_name, why.c_str());
}

template <class T>
std::vector<T> read(FILE* file, int64_t count) {
    std::vector<T> numbers(static_cast<size_t>(count));
    if (fread(numbers.data(), sizeof(T), numbers.size(), file) != numbers.size()) {
        printf("FAILED: the file of cases ends early\n");
        exit(1);
    }
    return numbers;
}

template <class T>
void write(FILE* file, const std::vector<T>& numbers, int64_t first = 0) {
    if (!numbers.empty()) fwrite(numbers.data() + first, sizeof(T), numbers.size() - static_cast<size_t>(first), file);
}

template <class T>
void watch(const std::vector<T>& numbers, bool initialised) {
    emulator::watch(numbers.data(), numbers.size() * sizeof(T), initialised);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
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

// What a call reads besides tensors of heads.
struct SpansOfCase {
    SpansOfCase(FILE* file, const Sizes& sizes) {
        const int64_t slices = (sizes.spans_by_batch ? sizes.batch : 1) * sizes.runs;
        lo = read<int32_t>(file, slices * sizes.queries);
        hi = read<int32_t>(file, slices * sizes.queries);
        hulls = read<int32_t>(file, slices * ((sizes.queries + kHullRows - 1) / kHullRows) * 4);
    }
    void watch() const {
        for (const auto* numbers : {&lo, &hi, &hulls}) cuda::watch(*numbers, true);
    }
    std::vector<int32_t> lo, hi, hulls;
};

inline SpanAttention call_of(const Sizes& sizes, Storage& q, Storage& k, Storage& v, Storage& out,
                             const SpansOfCase& spans, std::vector<float>& lse) {
    const auto small = [](int64_t size) { return static_cast<int>(size); };
    return {q.heads(),
            k.heads(),
            v.heads(),
            out.heads(),
            spans.lo.data(),
            spans.hi.data(),
            spans.hulls.data(),
            lse.data(),
            small(sizes.batch),
            small(sizes.queries),
            small(sizes.keys),
            small(sizes.heads),
            small(sizes.key_heads),
            small(sizes.head_size),
            small(sizes.value_size),
            small(sizes.runs),
            sizes.spans_by_batch != 0,
            sizes.bfloat16 != 0,
            static_cast<float>(sizes.scale),
            static_cast<float>(sizes.softcap)};
}

// Calls launch() once for each order of threads, and forgets what was watched for it.
template <class F>
void in_three_orders(const F& launch) {
    for (const auto order : {emulator::Order::kLowestFirst, emulator::Order::kHighestFirst, emulator::Order::kRandom}) {
        emulator::options() = {order, 1};
        launch();
        emulator::forget_watched();
    }
}

// What a launch has to say, of which nothing is right.
template <class F>
void complain_of(const F& launch) {
    try {
        if (const Error error = launch()) fail(error.message());
    } catch (const emulator::Error& error) {
        fail(error.what());
    }
}

// The body of main; its arguments are a kernel ("sm_80", "sm_90a") and the two files.
template <class Header>
int run_all(char** arguments, void (*run_case)(const std::string& kernel, FILE* from, FILE* to, const Header& header)) {
    const std::string kernel = arguments[1];
    FILE *const from = fopen(arguments[2], "rb"), *const to = fopen(arguments[3], "wb");
    emulator::counters() = {};
    Header header;
    std::string name;
    for (int number = 0; fread(&header, sizeof header, 1, from) == 1; number++) {
        name = "case " + std::to_string(number);
        case_name = name.c_str();
        run_case(kernel, from, to, header);
    }
    fclose(to);
    if (emulator::counters().bank_conflicts != 0) fail("has bank conflicts");
    if (failures == 0) printf("right\n");
    return failures != 0;
}

}  // namespace mmk::cuda
