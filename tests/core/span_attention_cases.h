// Span attention's tensors and cases for the programs that run it under sanitizers.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "bounded_memory.h"
#include "cpu/simd.h"
#include "cpu/span_attention/call.h"
#include "openmp_on_threads.h"
#include "served.h"

using namespace mmk;
using namespace mmk::MMK_ISA;

// How (batch, tokens, heads, dim) lie in memory.
enum Layout { kTokens, kHeadsFirst, kFused, kBackwards, kLayouts };

// A tensor in memory of its own, not an element more than its strides reach.
struct Tensor {
    Tensor(DType dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t dim, Layout layout)
        : heads{nullptr, dtype, batch, tokens, heads, dim, 0, 0, 0} {
        int64_t first = 0;
        if (layout == kHeadsFirst) {
            this->heads.token_stride = dim, this->heads.head_stride = dim * tokens;
            this->heads.batch_stride = dim * tokens * heads;
        } else {  // a part of longer rows, of an odd length
            const int64_t row = heads * dim + (layout == kFused ? 2 * heads * dim + 1 : 0);
            this->heads.head_stride = dim, this->heads.token_stride = row, this->heads.batch_stride = row * tokens;
        }
        if (layout == kBackwards) {
            first = (tokens - 1) * this->heads.token_stride;
            this->heads.token_stride *= -1;
        }
        const int64_t size = first + std::max<int64_t>(0, (tokens - 1) * this->heads.token_stride) +
                             (heads - 1) * this->heads.head_stride + (batch - 1) * this->heads.batch_stride + dim;
        bytes_ = tokens == 0 ? 1 : static_cast<size_t>(size) * (dtype == DType::kFloat32 ? 4 : 2);
        memory_ = take_bounded(bytes_);
        memset(memory_, 0xff, bytes_);  // NaN
        this->heads.data = static_cast<char*>(memory_) + first * (dtype == DType::kFloat32 ? 4 : 2);
    }
    ~Tensor() { drop_bounded(memory_, bytes_); }
    Tensor(const Tensor&) = delete;

    void fill_token(int64_t b, int64_t t, const std::function<float()>& draw) {
        for (int64_t h = 0; h < heads.heads; h++) {
            for (int64_t d = 0; d < heads.dim; d++) set(index(b, t, h, d), draw());
        }
    }
    double get(int64_t b, int64_t t, int64_t h, int64_t d) const {
        const int64_t i = index(b, t, h, d);
        if (heads.dtype == DType::kFloat32) return static_cast<float*>(heads.data)[i];
        if (heads.dtype == DType::kBFloat16) return to_float(static_cast<BFloat16*>(heads.data)[i]);
        return to_float(static_cast<Float16*>(heads.data)[i]);
    }
    bool same(const Tensor& other) const { return memcmp(memory_, other.memory_, bytes_) == 0; }

    Heads heads;

  private:
    int64_t index(int64_t b, int64_t t, int64_t h, int64_t d) const {
        return b * heads.batch_stride + t * heads.token_stride + h * heads.head_stride + d;
    }
    void set(int64_t i, float x) {
        if (heads.dtype == DType::kFloat32) static_cast<float*>(heads.data)[i] = x;
        if (heads.dtype == DType::kBFloat16) static_cast<BFloat16*>(heads.data)[i] = from_float<BFloat16>(x);
        if (heads.dtype == DType::kFloat16) static_cast<Float16*>(heads.data)[i] = from_float<Float16>(x);
    }

    void* memory_;
    size_t bytes_;
};

// Memory of its own, too.
template <class T>
struct Array {
    explicit Array(int64_t count)
        : count(static_cast<size_t>(count)), data(static_cast<T*>(take_bounded(this->count * sizeof(T)))) {
        memset(static_cast<void*>(data), 0xff, this->count * sizeof(T));
    }
    ~Array() { drop_bounded(data, count * sizeof(T)); }
    Array(const Array&) = delete;

    const size_t count;
    T* const data;
};

struct Run {
    int32_t lo, hi;
};

struct Case {
    const char* name;
    int64_t batch, queries, keys, heads, group, dim, out_dim;  // `heads` of keys
    int64_t runs;
    std::function<Run(int64_t row, int64_t run, int64_t query)> span;
    double scale = 0.3, softcap = 0;
    bool shared_spans = false;
};

static int failures = 0;

static void complain(const Case& c, DType dtype, Layout layout, const char* what, double found, double expected) {
    if (failures++ > 20) return;
    printf("FAILED %s, dtype %d, layout %d: %s is %g instead of %g\n", c.name, static_cast<int>(dtype), layout, what,
           found, expected);
}

static float draw() { return static_cast<float>(rand() % 255 - 127) / 128; }
static float not_a_number() { return std::numeric_limits<float>::quiet_NaN(); }

// What the spans mean.
static bool sees(const Case& c, int64_t b, int64_t i, int64_t j) {
    for (int64_t r = 0; r < c.runs; r++) {
        const Run run = c.span(c.shared_spans ? 0 : b, r, i);
        if (run.lo <= j && j < run.hi) return true;
    }
    return false;
}

// ---- spans

static Run nothing(int64_t i) { return {static_cast<int32_t>(i), static_cast<int32_t>(i)}; }

// Documents of these lengths, as queries and as keys; past the last of them a query sees nothing.
static std::function<Run(int64_t, int64_t, int64_t)> documents(std::vector<int32_t> lengths, bool causal) {
    return [=](int64_t, int64_t, int64_t i) {
        int32_t first = 0;
        for (const int32_t length : lengths) {
            if (i < first + length) return Run{first, causal ? static_cast<int32_t>(i) + 1 : first + length};
            first += length;
        }
        return nothing(i);
    };
}

static Run all(int64_t, int64_t, int64_t) { return {0, INT32_MAX}; }

// Anything at all: far below the keys, far beyond them, the wrong way round.
static Run wild(int64_t b, int64_t r, int64_t i) {
    constexpr int32_t kEnds[] = {INT32_MIN, -1, 0, 1, 7, 8, 9, 40, 63, 64, 65, 1 << 20, INT32_MAX - 1, INT32_MAX};
    const int64_t at = b * 131 + r * 17 + i;
    return {kEnds[at * 5 % 14], kEnds[at / 3 % 14]};
}

// Three runs a query, apart, ascending, with gaps that nobody sees; the middle one empty for some.
static Run striped(int64_t b, int64_t r, int64_t i) {
    const auto first = static_cast<int32_t>(r * 60 + b), from = static_cast<int32_t>(i % 5);
    return r == 1 && i % 3 == 0 ? Run{first, first} : Run{first + from, first + 20 + static_cast<int32_t>(i % 11)};
}

// Every twenty queries see keys elsewhere, back and forth.
static Run far_apart(int64_t, int64_t, int64_t i) {
    const auto first = static_cast<int32_t>(i / 20 * 37 % 150);
    return {first, first + 13};
}

static Run window(int64_t, int64_t, int64_t i) {
    const auto at = static_cast<int32_t>(i);
    return {at - 30, at + 1};
}

// The newest `queries` tokens of caches filled differently; every fifth row is idle.
static std::function<Run(int64_t, int64_t, int64_t)> newest(int64_t queries, std::vector<int32_t> filled) {
    return [=](int64_t b, int64_t, int64_t i) {
        if (i % 5 == 3) return nothing(i);
        return Run{i == 1 ? 5 : INT32_MIN, filled[b % filled.size()] - static_cast<int32_t>(queries - 1 - i)};
    };
}

// Few rows of a segment, which keys are shared out for, and many in between.
static std::vector<Case> decoding() {
    const auto prefill = [](int64_t, int64_t, int64_t i) {
        return i < 40 ? Run{0, static_cast<int32_t>(i) + 1} : Run{static_cast<int32_t>(i * 20), INT32_MAX};
    };
    std::vector<Case> found{
        {"a row of each cache", 5, 1, 1100, 2, 1, 33, 40, 1, newest(1, {1100, 0, 1, 513, 1024})},
        {"rows that share keys", 2, 3, 601, 2, 5, 40, 24, 1, newest(3, {600, 129})},
        {"sixteen rows", 1, 16, 515, 1, 1, 17, 17, 1, newest(16, {515})},
        {"one key head of many", 1, 1, 2111, 1, 51, 9, 24, 1, all},
        {"wild spans of few", 2, 9, 166, 2, 1, 16, 9, 1, wild},
        {"one span for all", 3, 2, 140, 3, 2, 8, 8, 1, all, 0.3, 0, true},
        {"beside a prefill", 1, 47, 1001, 2, 1, 12, 12, 1, prefill},
        {"wide heads of few", 1, 1, 140, 1, 3, 576, 512, 1, all, 0.05},
        {"softcap of few", 1, 2, 175, 1, 1, 9, 9, 1, all, 4, 2.5},
        {"negative scale of few", 1, 2, 157, 1, 1, 9, 9, 1, all, -0.7},
    };
    for (const int64_t size : {1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 129, 256})
        found.push_back({"tails of few", 1, 1, size + 129, 2, size % 4 + 1, size, size, 1, all, 0.1});
    return found;
}

// Segments of few keys, all of them one block.
static std::vector<Case> short_segments() {
    std::vector<Case> found{
        {"a query each of a few keys", 1, 130, 130, 1, 1, 5, 3, 1, documents(std::vector<int32_t>(130, 1), false)},
        {"windows that share keys", 2, 98, 98, 2, 3, 33, 40, 1, documents({49, 49}, false), 0.3, 0, true},
        {"few rows of a block", 1, 23, 23, 2, 1, 17, 24, 1, documents({8, 6, 9}, true)},
        {"one query of a group", 2, 1, 127, 1, 9, 33, 9, 1, all},
        {"all keys of a block", 1, 70, 128, 2, 1, 80, 72, 1, all},
        {"causal windows", 1, 192, 192, 1, 1, 64, 96, 1, documents({64, 127}, true)},
        {"wide heads of a block", 1, 19, 19, 1, 1, 512, 513, 1, documents({9, 10}, true), 0.05},
        {"wild spans of a block", 2, 147, 66, 1, 2, 16, 9, 1, wild},
        {"softcap of a block", 1, 60, 75, 1, 1, 9, 9, 1, all, 4, 2.5},
        {"negative scale of a block", 1, 49, 57, 1, 1, 9, 9, 1, all, -0.7},
    };
    for (const int64_t size : {8, 9, 15, 16, 17, 31, 32, 47, 48, 49, 97})
        found.push_back({"tails of a block", 1, size, size, 1, 1, size, size, 1, all});
    return found;
}

static std::vector<Case> cases() {
    const auto mixed = documents({5, 0, 33, 130, 1, 64, 7, 16, 49}, true);
    std::vector<Case> found{
        {"one pair", 1, 1, 1, 1, 1, 1, 1, 1, all},
        {"few pairs", 2, 24, 24, 2, 1, 20, 33, 1, documents({1, 8, 5, 7, 3}, true)},
        {"few pairs of a group", 1, 12, 12, 1, 2, 16, 9, 1, documents({1, 4, 3, 4}, true)},
        {"few pairs, softcap", 1, 6, 7, 1, 1, 9, 9, 1, all, 4, 2.5},
        {"few pairs of runs", 1, 8, 8, 1, 1, 9, 17, 3, striped},
        {"no keys", 2, 3, 0, 1, 2, 8, 5, 1, all},
        {"one query", 1, 1, 301, 2, 3, 33, 40, 1, all},
        {"causal documents", 1, 320, 311, 2, 1, 40, 24, 1, mixed},
        {"causal documents of groups", 1, 311, 305, 1, 3, 17, 17, 1, mixed},
        {"windows", 1, 150, 150, 2, 1, 80, 80, 1, documents({49, 49, 49}, false)},
        {"wild spans", 2, 147, 166, 1, 2, 16, 9, 1, wild},
        {"wild runs", 1, 90, 66, 1, 1, 15, 33, 3,
         [](int64_t, int64_t r, int64_t i) {
             return r == 0 ? Run{INT32_MIN, 3} : r == 1 ? Run{3, static_cast<int32_t>(i % 5 * 8)} : Run{50, INT32_MAX};
         }},
        {"runs with gaps", 2, 97, 190, 1, 2, 31, 64, 3, striped, 0.3, 0, true},
        {"runs of each row", 2, 50, 190, 1, 1, 8, 8, 3, striped},
        {"far apart", 1, 200, 170, 1, 1, 72, 72, 1, far_apart},
        {"sliding window", 1, 400, 400, 1, 1, 12, 12, 1, window},
        {"nobody sees anything", 2, 50, 60, 1, 1, 8, 8, 1, [](int64_t, int64_t, int64_t i) { return nothing(i); }},
        {"softcap", 1, 60, 175, 1, 1, 9, 9, 1, all, 4, 2.5},
        {"negative scale", 1, 49, 157, 1, 1, 9, 9, 1, all, -0.7},
        {"several panels of keys", 1, 100, 4500, 1, 1, 5, 3, 1,
         [](int64_t, int64_t, int64_t i) { return Run{static_cast<int32_t>(i * 20), static_cast<int32_t>(4000 + i)}; }},
        {"several parts", 1, 1700, 100, 1, 1, 4, 4, 1, all},
        {"wide heads", 1, 17, 131, 1, 1, 515, 290, 1, all, 0.05},
    };
    for (const int64_t size : {15, 16, 17, 47, 48, 49, 97})
        found.push_back({"tails", 1, size, size + 129, 1, 1, size, size, 1, all});
    for (const Case& c : short_segments()) found.push_back(c);
    for (const Case& c : decoding()) found.push_back(c);
    return found;
}
