// The element types that the kernels of this level serve.
#pragma once
#include <vector>

#include "cpu/product/gemm.h"
#include "cpu/run/isa.h"

static std::vector<mmk::DType> served() {
    using mmk::DType;
    mmk::usable_isas();  // asks the system for AMX's tiles
    if (mmk::MMK_ISA::kHasAmx) return {DType::kBFloat16};
    return {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
}
