// Where the tokens of one head lie.
#pragma once
#include <cstdint>

#include "cpu/run/tensor.h"

namespace mmk::MMK_ISA {

template <class T>
struct HeadRows {  // of one row of the batch; T is const where they are only read
    T* data;
    int64_t stride, dim;

    HeadRows(const Heads& x, int64_t batch_row, int64_t head)
        : data(static_cast<T*>(x.data) + batch_row * x.batch_stride + head * x.head_stride),
          stride(x.token_stride),
          dim(x.dim) {}
    T* row(int64_t token) const { return data + token * stride; }
};

}  // namespace mmk::MMK_ISA
