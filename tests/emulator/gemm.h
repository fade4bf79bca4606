// Two small kernels that use most of the machine, and are as the kernels to come will be: see gemm_sm80.cu,
// gemm_sm90.cu.
#pragma once
#include "cuda/isa/launch.h"

namespace mmk::cuda {

struct Gemm {  // c (M, N) = a (M, K) b, row-major; K and N multiples of 8
    const void *a, *b;
    float* c;
    int m, n, k;
    bool bfloat16;     // else float16
    bool transpose_b;  // b is (N, K), else (K, N)
};
Error gemm_sm80(const Gemm& gemm, cudaStream_t stream);

enum class OperandA { kDescriptor, kRegisters };
Error gemm_sm90(const Gemm& gemm, OperandA operand_a, cudaStream_t stream);

}  // namespace mmk::cuda
