// The compiled core as Python sees it: pointers, sizes and strides in. The only file that knows Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <stdexcept>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/probe.h"
#include "cpu/tensor.h"

namespace py = pybind11;

namespace mmk {
namespace {

// Calls mmk::<level>::function(...) of the chosen level and returns what it returns.
#define MMK_CASE(level, isa, function, ...) \
    case Isa::level:                        \
        return isa::function(__VA_ARGS__);

// Floating-point operations a second that `threads` threads reach together in a loop of multiply-adds.
double fma_peak(bool bfloat16, int threads) {
    constexpr int64_t kRounds = 1 << 18;
    struct Job {
        bool bfloat16;
        double flops;
    } job{bfloat16, 0};
    const auto task = [](void* context, int64_t i) {
        Job& job = *static_cast<Job*>(context);
        const double flops = [&] {
            switch (chosen_isa()) {
#define MMK_FMA(level, isa) MMK_CASE(level, isa, fma_flops, job.bfloat16, kRounds)
                MMK_FOR_EACH_ISA(MMK_FMA)
#undef MMK_FMA
                default:
                    throw std::logic_error("a level this build does not hold");
            }
        }();
        if (i == 0) job.flops = flops;
    };
    const auto start = std::chrono::steady_clock::now();
    run_tasks(threads, task, &job);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return threads * job.flops / seconds.count();
}

}  // namespace
}  // namespace mmk

PYBIND11_MODULE(_core, module) {
    using namespace mmk;
    if (!openmp_present()) {
        throw py::import_error("mmkernels._core works on torch's OpenMP threads: import torch before it");
    }
    module.doc() = "mmkernels' compiled CPU kernels";

    py::enum_<DType>(module, "DType")
        .value("float32", DType::kFloat32)
        .value("bfloat16", DType::kBFloat16)
        .value("float16", DType::kFloat16)
        .value("uint8", DType::kUInt8);

    py::class_<Matrix>(module, "Matrix", "A 2-D tensor: address, dtype, sizes, strides in elements.")
        .def(py::init(
            [](uintptr_t data, DType dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
                return Matrix{reinterpret_cast<void*>(data), dtype, rows, columns, row_stride, column_stride};
            }));

    module.def("isa", [] { return name(chosen_isa()); }, "The instruction-set level the next call runs at.");
    module.def(
        "isa_levels",
        [] {
            std::vector<std::string> levels;
            for (Isa isa : usable_isas()) levels.emplace_back(name(isa));
            return levels;
        },
        "The levels this build holds and this processor runs, plainest first.");
    module.def(
        "fma_peak",
        [](const std::string& kind, int threads) {
            py::gil_scoped_release release;
            return fma_peak(kind == "bfloat16", threads);
        },
        py::arg("kind"), py::arg("threads"), "FLOP/s of a multiply-add loop in 'float32' or 'bfloat16'.");
}
