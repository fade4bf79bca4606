// What the kernels know of a tensor: where it lies, what it holds, how it is laid out. Plain data, alike for every
// instruction set.
#pragma once
#include <cstdint>

namespace mmk {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kUInt8 };

struct Matrix {  // (rows, columns), strides in elements
    void* data;
    DType dtype;
    int64_t rows, columns;
    int64_t row_stride, column_stride;
};

struct Heads {  // (batch, tokens, heads, dim); strides in elements, that of dim is 1
    void* data;
    DType dtype;
    int64_t batch, tokens, heads, dim;
    int64_t batch_stride, token_stride, head_stride;
};

}  // namespace mmk
