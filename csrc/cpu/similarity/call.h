// The largest inner product of each row with the columns of each segment, and the sums that derivatives are made of.
#pragma once
#include <cstdint>

#include "cpu/run/isa.h"
#include "cpu/run/tensor.h"

namespace mmk {

struct RowMaxima {
    Matrix rows, columns;   // (R, D), (C, D), one dtype, any strides
    const float* bias;      // (C), added to a column's products; null: none
    const int32_t* starts;  // (S + 1), where segments of columns begin: made to rise and to lie within [0, C]
    int64_t segments;
    float* maxima;     // (R, S), -inf of an empty segment
    int32_t* indices;  // (R, S), the first column of such a product, NaN being the largest; -1 of an empty segment
};

// Of R x S weights w and indices i; an index outside of its tensor has no part in it.
struct WeightedRows {
    const float* weights;  // (R, S), contiguous, as the next
    const int32_t* indices;
    int64_t rows, segments;  // R, S
    Matrix from;             // gather: (C, D); scatter: (R, D); any strides
    float* sums;             // gather: (R, D); scatter: (C, D); contiguous
    int64_t targets;         // scatter: C
};

#define MMK_DECLARE(level, isa, ...)               \
    namespace isa {                                \
    void row_maxima(const RowMaxima& call);        \
    void gather_columns(const WeightedRows& call); \
    void scatter_rows(const WeightedRows& call);   \
    }
MMK_FOR_EACH_ISA(MMK_DECLARE)
#undef MMK_DECLARE

}  // namespace mmk
