// What the kernels of span attention have in common: rows of heads in memory and in registers, spans, scores.
#pragma once
#include <algorithm>
#include <climits>
#include <cmath>
#include <string>

#include "cuda/isa/launch.h"
#include "cuda/isa/ptx.h"
#include "cuda/span_attention/call.h"

namespace mmk::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// ---- heads

// What is wrong with the sizes of a call.
inline Error wrong_sizes(const std::string& name, const SpanAttention& call) {
    const auto is_head = [](int size) { return size >= 1 && size <= kLargestHead; };
    if (!is_head(call.head_size) || !is_head(call.value_size)) {
        return Error(name + ": it serves heads of 1 to " + std::to_string(kLargestHead) + " numbers");
    }
    if (call.key_heads < 1 || call.heads % call.key_heads != 0) {
        return Error(name + ": the heads of q have to be a multiple of those of k and v");
    }
    return {};
}

// Calls f(std::integral_constant<int, kWidth>()), of the widths that kernels are compiled for the first that holds the
// call's heads. 72 and 80 are too common to be padded to 128.
template <class F>
Error with_width(const SpanAttention& call, const F& f) {
    const int width = std::max(call.head_size, call.value_size);
    if (width <= 32) return f(std::integral_constant<int, 32>());
    if (width <= 64) return f(std::integral_constant<int, 64>());
    if (width <= 80) return f(std::integral_constant<int, 80>());
    if (width <= 96) return f(std::integral_constant<int, 96>());
    if (width <= 128) return f(std::integral_constant<int, 128>());
    if (width <= 192) return f(std::integral_constant<int, 192>());
    if (width <= 256) return f(std::integral_constant<int, 256>());
    if (width <= 384) return f(std::integral_constant<int, 384>());
    if (width <= 512) return f(std::integral_constant<int, 512>());
    return f(std::integral_constant<int, 576>());
}

// A row of a tile in shared memory: kWidth numbers, a multiple of 16; columns beyond a head's width are zero.
template <int kWidth>
struct Row {
    static constexpr int kPitch = kWidth + 8;  // eight rows of ldmatrix fall into different banks
    static constexpr int kChunks = kWidth / 8;
};

// Some rows of one head, `width` numbers each.
template <class T>
struct Matrix {
    T* data;
    int64_t stride;
    int width;
    bool aligned;  // every eighth number of every row lies at 16 bytes
};

template <class T>
MMK_DEVICE Matrix<T> matrix(const Heads& x, int width, int64_t batch, int64_t row, int64_t head) {
    const bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.batch | x.row | x.head | width) % 8 == 0;
    return {static_cast<T*>(x.data) + batch * x.batch + row * x.row + head * x.head, x.row, width, aligned};
}

// The columns of a matrix from `first` on, a multiple of 8. There may be none.
template <class T>
MMK_DEVICE Matrix<T> columns(const Matrix<T>& of, int first) {
    return {of.data + first, of.stride, of.width - first, of.aligned};
}

// Calls f(row, column) of the thread's own chunks of eight numbers in kCount rows. The widest heads need every register
// for their sums, and have none for chunks side by side.
template <int kWidth, int kCount, int kThreads, class F>
MMK_DEVICE void each_chunk(const F& f) {
    constexpr int kChunks = Row<kWidth>::kChunks;
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kWidth > 192) {
#pragma unroll 1
        for (int i = opaque(thread); i < kCount * kChunks; i += kThreads) f(i / kChunks, i % kChunks * 8);
    } else {
        for (int i = thread; i < kCount * kChunks; i += kThreads) f(i / kChunks, i % kChunks * 8);
    }
}

// The first `present` of kCount rows, zeros for the others, by all kThreads of a block.
template <int kWidth, int kCount, int kThreads, class T>
MMK_DEVICE void load_rows(T* to, const Matrix<T>& from, int64_t row0, int present) {
    const T* const rows = from.data + row0 * from.stride;
    each_chunk<kWidth, kCount, kThreads>([&](int row, int column) {
        const bool inside = row < present && column < from.width;
        const T* const numbers = inside ? rows + row * from.stride + column : rows;
        T* const target = to + row * Row<kWidth>::kPitch + column;
        if (from.aligned) {
            cp_async<16>(target, numbers, inside);
        } else {
            for (int j = 0; j < 8; j++) target[j] = inside && column + j < from.width ? numbers[j] : T(0.0f);
        }
    });
}

// kColumns of sixteen rows of a warp, times a factor each, by way of as many of shared memory that are the warp's own.
// In the registers of lane 4 g + t, element e of tile n is row g + 8 (e / 2), column 8 n + 2 t + e % 2.
template <int kWidth, int kColumns, class T>
MMK_DEVICE void store_rows(T* through, const float (&rows)[kColumns / 8][4], const float (&factors)[2],
                           const Matrix<T>& to, int present, int lane) {
    constexpr int kPitch = Row<kWidth>::kPitch, kChunks = kColumns / 8;
    __syncwarp();  // other lanes may have read what lay here as operands
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int n = 0; n < kColumns / 8; n++) {
            const uint32_t both = pack2<T>(rows[n][2 * i] * factors[i], rows[n][2 * i + 1] * factors[i]);
            memcpy(through + (lane / 4 + 8 * i) * kPitch + n * 8 + lane % 4 * 2, &both, sizeof both);
        }
    }
    __syncwarp();
    for (int i = lane; i < 16 * kChunks; i += kWarp) {
        const int row = i / kChunks, column = i % kChunks * 8;
        if (row >= present || column >= to.width) continue;
        const T* const from = through + row * kPitch + column;
        T* const target = to.data + row * to.stride + column;
        if (to.aligned) {
            *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(from);
        } else {
            for (int j = 0; j < 8 && column + j < to.width; j++) target[j] = from[j];
        }
    }
}

// Both halves, or zero for one that is NaN or infinite.
template <class T>
MMK_DEVICE uint32_t finite(uint32_t numbers) {
    constexpr uint32_t kExponent = std::is_same_v<T, BFloat16> ? 0x7F80 : 0x7C00;
    if ((numbers & kExponent) == kExponent) numbers &= 0xFFFF0000;
    if ((numbers & kExponent << 16) == kExponent << 16) numbers &= 0x0000FFFF;
    return numbers;
}

// Makes the thread's own share of a tile that load_rows has loaded finite, and counts in non_finite[row] where it was
// not.
template <int kWidth, int kCount, int kThreads, class T>
MMK_DEVICE void make_finite(T* tile, int* non_finite) {
    each_chunk<kWidth, kCount, kThreads>([&](int row, int column) {
        uint4* const chunk = reinterpret_cast<uint4*>(tile + row * Row<kWidth>::kPitch + column);
        const uint4 was = *chunk;
        const uint4 is = {finite<T>(was.x), finite<T>(was.y), finite<T>(was.z), finite<T>(was.w)};
        if (is.x == was.x && is.y == was.y && is.z == was.z && is.w == was.w) return;
        *chunk = is;
        atomicAdd(&non_finite[row], 1);
    });
}

// ---- operands of mma (16, 16) (16, 8), from sixteen rows of a tile

// The rows as they are, on the left: columns [column, column + 16).
template <int kWidth, class T>
MMK_DEVICE void left_operand(uint32_t (&a)[4], const T* rows, int column, int lane) {
    ldmatrix_x4(a, rows + lane % 16 * Row<kWidth>::kPitch + column + lane / 16 * 8);
}

// Numbers of two neighbouring tiles of results on the left, rounded to T.
template <class T>
MMK_DEVICE void left_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack2<T>(left[0], left[1]);
    a[1] = pack2<T>(left[2], left[3]);
    a[2] = pack2<T>(right[0], right[1]);
    a[3] = pack2<T>(right[2], right[3]);
}

// The rows transposed, on the right: b for the first eight, b + 2 for the others.
template <int kWidth, class T>
MMK_DEVICE void transposed_operand(uint32_t (&b)[4], const T* rows, int column, int lane) {
    ldmatrix_x4(b, rows + (lane / 16 * 8 + lane % 8) * Row<kWidth>::kPitch + column + lane / 8 % 2 * 8);
}

// The rows as they are, on the right: b for columns [column, column + 8), b + 2 for the eight after them.
template <int kWidth, class T>
MMK_DEVICE void right_operand(uint32_t (&b)[4], const T* rows, int column, int lane) {
    ldmatrix_x4_trans(b, rows + lane % 16 * Row<kWidth>::kPitch + column + lane / 16 * 8);
}

// ---- spans

// Keys that any of some queries sees lie in [first, end); those in [common_first, common_end) every one sees.
struct Hull {
    int first, end, common_first, common_end;
};

// Of kRows queries from `row0` on, both multiples of kHullRows; `slice` is a run of a row of the batch.
template <int kRows>
MMK_DEVICE Hull hull_of(const SpanAttention& p, int64_t slice, int row0) {
    static_assert(kRows % kHullRows == 0);
    const int count = (p.queries + kHullRows - 1) / kHullRows;
    Hull all{p.keys, 0, 0, p.keys};
#pragma unroll
    for (int i = 0; i < kRows / kHullRows; i++) {
        const int entry = row0 / kHullRows + i;
        if (entry >= count) break;
        const int32_t* const hull = p.hulls + (slice * count + entry) * 4;
        all.first = min(all.first, max(hull[0], 0));
        all.end = max(all.end, min(hull[1], p.keys));
        all.common_first = max(all.common_first, hull[2]);
        all.common_end = min(all.common_end, hull[3]);
    }
    return all;
}

MMK_DEVICE int64_t first_slice(const SpanAttention& p, int batch) {
    return static_cast<int64_t>(p.spans_by_batch ? batch : 0) * p.runs;
}

// The spans of the two queries a thread holds numbers of: row0 and row0 + 8.
struct Spans {
    int lo[2], hi[2];

    Spans() = default;
    MMK_DEVICE Spans(const SpanAttention& p, int64_t slice, int row0) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = row0 + 8 * i;
            const bool inside = row < p.queries;
            lo[i] = inside ? p.lo[slice * p.queries + row] : 0;
            hi[i] = inside ? min(p.hi[slice * p.queries + row], p.keys) : 0;
        }
    }
    MMK_DEVICE bool see(int i, int key) const {  // i may be known only at run time: no array is indexed by it
        return (i == 0 ? lo[0] : lo[1]) <= key && key < (i == 0 ? hi[0] : hi[1]);
    }
};

// Of a step whose first of kKeys keys is key0, the scores of keys that are not seen become -inf, whatever they were:
// only where the step reaches beyond what all queries see is there anything to ask. Ends may be any numbers, and no key
// is below 0. `scores` has each(lane, f), which calls f(score, i, column).
template <int kKeys, class Scores>
MMK_DEVICE void mask(Scores& scores, const Spans& spans, const Hull& hull, int key0, int lane) {
    const int first = key0 + lane % 4 * 2;
    if (key0 + kKeys > hull.common_end) {
        const int end[2] = {max(spans.hi[0], 0) - first, max(spans.hi[1], 0) - first};
        scores.each(0, [&](float& s, int i, int column) { s = column < end[i] ? s : -INFINITY; });
    }
    if (key0 < hull.common_first) {
        const int begin[2] = {max(spans.lo[0], 0) - first, max(spans.lo[1], 0) - first};
        scores.each(0, [&](float& s, int i, int column) { s = column >= begin[i] ? s : -INFINITY; });
    }
}

// ---- the backward's workspace

struct Workspace {
    RowTerms* terms;
    KeyBlock* table;
};

MMK_DEVICE Workspace workspace_of(const SpanAttentionBackward& call) {
    RowTerms* const terms = static_cast<RowTerms*>(call.workspace);
    const SpanAttention& p = call.forward;
    return {terms, reinterpret_cast<KeyBlock*>(terms + static_cast<int64_t>(p.batch) * p.heads * p.queries)};
}

// ---- scores

// Scores are multiplied by `before`, bounded by tanh if there is a cap, and multiplied by `after` > 0, which leaves
// them in units of log 2: the largest of a row can be sought before that. `plain`: multiply by `after`, nothing else.
struct Factors {
    float before, after;
    bool plain, capped;

    MMK_DEVICE explicit Factors(const SpanAttention& p) : plain(p.softcap == 0 && p.scale > 0), capped(p.softcap > 0) {
        before = capped ? p.scale / p.softcap : p.scale;
        after = (capped ? p.softcap : plain ? p.scale : 1.0f) * kLog2E;
    }
    MMK_DEVICE float apply(float score) const { return capped ? cap(score) : score * before; }
    MMK_DEVICE float cap(float score) const {  // tanh
        return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(score * before * (2 * kLog2E)));
    }
};

}  // namespace mmk::cuda
