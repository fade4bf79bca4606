// Rows of tensors as the backward of span attention packs them, and where they lie.
#pragma once
#include <type_traits>

#include "cpu/product/matmul.h"
#include "cpu/span_attention/call.h"
#include "cpu/span_attention/head_rows.h"

namespace mmk::MMK_ISA::attention_backward {

// Deals out parts of one piece of memory, each on a cache line. From nothing it only counts.
class Arena {
  public:
    explicit Arena(uint32_t* memory) : memory_(memory) {}
    template <class T = float>
    T* take(int64_t count) {
        uint32_t* part = memory_ == nullptr ? nullptr : memory_ + used_;
        used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64) / 4;
        return reinterpret_cast<T*>(part);
    }
    int64_t used() const { return used_; }

  private:
    uint32_t* memory_;
    int64_t used_ = 0;
};

template <class T>
static MMK_INLINE void store_up_to(T* p, Vec v, int64_t count) {
    if (count >= kLanes) {
        store(p, v);
    } else {
        store_first(p, v, static_cast<int>(count));
    }
}

// One head of a gradient, in one row of the batch. What fills whole lines of a large gradient is not written through
// the caches, which its lines would be read into first, and where rows a round number of bytes apart share few sets.
template <class T>
struct GradientRows : HeadRows<T> {
    using HeadRows<T>::data, HeadRows<T>::stride, HeadRows<T>::dim;
    bool streams;

    GradientRows(const Heads& x, int64_t batch_row, int64_t head)
        : HeadRows<T>(x, batch_row, head),
          streams(kWholeLines && dim % kLanes == 0 && stride % kLanes == 0 &&
                  x.batch * x.tokens * x.heads * x.dim * int64_t{sizeof(T)} >= kStreamedBytes &&
                  reinterpret_cast<uintptr_t>(data) % kLine == 0) {}

    // Columns from d on, as many as there are.
    MMK_INLINE void put(int64_t token, int64_t d, Vec x) const {
        T* to = this->row(token) + d;
        if (kWholeLines && streams) return stream(to, x);
        store_up_to(to, x, dim - d);
    }

  private:
    static constexpr int64_t kLine = 64, kStreamedBytes = 8 << 20;
    static constexpr bool kWholeLines = sizeof(T) * kLanes == kLine;  // of a vector
};

// Pairs of elements of two rows, the lower half from the first.
static MMK_INLINE UVec pair(HalfLanes low, HalfLanes high) {
    return __builtin_convertvector(low, UVec) | __builtin_convertvector(high, UVec) << 16;
}

// Rows of a tensor as units along the columns, and as units along the rows: in float32 the same memory, while pairs
// have a second one, in which kByColumns, as AMX takes a broadcast operand, lets the units of a column lie side by
// side. Zero past the last column, to the depth of a product and to a whole vector.
template <class Operand, bool kByColumns = false>
class PackedRows {
  public:
    using Element = ElementOf<Operand>;

    PackedRows(int64_t rows, int64_t columns, Arena& memory)
        : stride(row_units(padded(columns) / Operand::kPack)),
          across_stride(Operand::kPack == 1 ? stride : row_units(kByColumns ? rows / Operand::kPack : columns)),
          columns_(columns),
          padded_(padded(columns)),
          along_(memory.take<uint32_t>(rows * stride)),
          across_(Operand::kPack == 1
                      ? along_
                      : memory.take<uint32_t>((kByColumns ? round_up(columns, kLanes) : rows / Operand::kPack) *
                                              across_stride)) {}

    // Row r; nullptr: zeros.
    template <class T>
    MMK_INLINE void put(int64_t r, const T* from) {
        Element* to = element(r, 0);
        int64_t d = 0;
        for (; from != nullptr && d + kLanes <= columns_; d += kLanes) copy(from + d, to + d);
        if (d >= padded_) return;
        T last[kLanes] = {};
        if (from != nullptr && d < columns_) memcpy(last, from + d, (columns_ - d) * sizeof(T));
        copy(last, to + d);
        for (d += kLanes; d < padded_; d += kLanes) memset(to + d, 0, kLanes * sizeof(Element));
    }
    // Rows [first, last) are put; first and last are even.
    void finish(int64_t first, int64_t last) {
        if constexpr (kByColumns) {
            for (int64_t r = first; r < last; r += 2 * kLanes) {
                for (int64_t d = 0; d < columns_; d += kLanes) finish_block(r, std::min(r + 2 * kLanes, last), d);
            }
        } else if constexpr (Operand::kPack == 2) {
            for (int64_t r = first; r < last; r += 2) {
                for (int64_t d = 0; d < columns_; d += kLanes) {
                    store_bits(across_ + r / 2 * across_stride + d, row_pairs(r, d));
                }
            }
        }
    }

    const uint32_t* along(int64_t r) const { return along_ + r * stride; }
    // As the vector operand of a sum over rows, and as its broadcast operand.
    const uint32_t* across(int64_t r, int64_t column) const {
        static_assert(!kByColumns);
        return across_ + r / Operand::kPack * across_stride + column;
    }
    Broadcast broadcast(int64_t r, int64_t column) const {
        if constexpr (kByColumns) return {across_ + column * across_stride + r / Operand::kPack, across_stride, 1};
        return {across_ + r / Operand::kPack * across_stride + column, 1, across_stride};
    }
    int64_t units() const { return depth<Operand>(columns_); }  // of a row

    const int64_t stride, across_stride;

  private:
    static int64_t padded(int64_t columns) {
        return round_up(columns, std::max<int64_t>(kLanes, kDepthStep * Operand::kPack));
    }
    Element* element(int64_t r, int64_t d) const { return reinterpret_cast<Element*>(along_ + r * stride) + d; }
    MMK_INLINE UVec row_pairs(int64_t r, int64_t d) const {
        HalfLanes low, high;
        memcpy(&low, element(r, d), sizeof low);
        memcpy(&high, element(r + 1, d), sizeof high);
        return pair(low, high);
    }
    MMK_INLINE void finish_block(int64_t first, int64_t last, int64_t d) {
        UVec block[kLanes] = {};
        for (int64_t r = first; r < last; r += 2) block[(r - first) / 2] = row_pairs(r, d);
        transpose(block);
        uint32_t* to = across_ + d * across_stride + first / 2;
        for (int i = 0; i < kLanes; i++) memcpy(to + i * across_stride, &block[i], (last - first) / 2 * sizeof *to);
    }
    template <class T>
    static MMK_INLINE void copy(const T* from, Element* to) {
        if constexpr (std::is_same_v<T, Element>) {
            memcpy(to, from, kLanes * sizeof(T));
        } else {
            store(to, load(from));
        }
    }

    int64_t columns_, padded_;
    uint32_t *along_, *across_;
};

template <class Operand>
struct QueryRows {
    QueryRows(int64_t rows, int64_t dim, int64_t value_dim, Arena& memory)
        : q(rows, dim, memory),
          d_out(rows, value_dim, memory),
          lse(memory.take<TwoFloats>(rows)),
          delta(memory.take(rows)),
          d_q_stride(round_up(dim, kLanes)),
          d_q(memory.take(rows * d_q_stride)) {}

    PackedRows<Operand, kHasAmx> q, d_out;
    TwoFloats* lse;  // in base 2
    float* delta;
    int64_t d_q_stride;
    float* d_q;  // float32, not scaled yet
    bool few;    // kFewRows at most
};

}  // namespace mmk::MMK_ISA::attention_backward
