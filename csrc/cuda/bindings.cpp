// The CUDA kernels as Python sees them: addresses, sizes, strides and a stream in, an error as an exception. Linked
// with what nvcc makes of the kernels this is mmkernels._cuda; linked with the emulator (MMK_EMULATED), the same module
// for tensors on the CPU, of which the tests make three builds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "span_attention.h"

#ifdef MMK_EMULATED
#include "touched.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace mmk::cuda {
namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Runs the launcher on the stream; its error becomes a RuntimeError.
template <class Call>
void run(Error (*launcher)(const Call&, cudaStream_t), const Call& call, uintptr_t stream) {
#ifdef MMK_EMULATED
    static uint64_t calls = 0;  // every call in another order of threads: what depends on it differs the next time
    emulator::options() = {emulator::Order::kRandom, ++calls};
    touched(call).watch();
    const struct Forget {
        ~Forget() { emulator::forget_watched(); }
    } forget;
    const Error error = launcher(call, pointer<CUstream_st>(stream));
#else
    const Error error = [&] {
        py::gil_scoped_release release;  // a launch waits while the stream is full
        return launcher(call, pointer<CUstream_st>(stream));
    }();
#endif
    if (error) throw std::runtime_error(error.message());
}

// ---- span_attention

void bind_span_attention(py::module_& module) {
    py::class_<Heads>(module, "Heads",
                      "A (B, T, H, D) tensor: address, and the strides of the first three in elements.")
        .def(py::init([](uintptr_t data, int64_t batch, int64_t row, int64_t head) {
            return Heads{pointer<void>(data), batch, row, head};
        }));
    py::class_<SpanAttention>(module, "SpanAttention", "A call: see span_attention.h.")
        .def(py::init([](const Heads& q, const Heads& k, const Heads& v, const Heads& out, uintptr_t lo, uintptr_t hi,
                         uintptr_t hulls, uintptr_t lse, int batch, int queries, int keys, int heads, int key_heads,
                         int head_size, int value_size, int runs, bool spans_by_batch, bool bfloat16, float scale,
                         float softcap) {
                 return SpanAttention{q,
                                      k,
                                      v,
                                      out,
                                      pointer<const int32_t>(lo),
                                      pointer<const int32_t>(hi),
                                      pointer<const int32_t>(hulls),
                                      pointer<float>(lse),
                                      batch,
                                      queries,
                                      keys,
                                      heads,
                                      key_heads,
                                      head_size,
                                      value_size,
                                      runs,
                                      spans_by_batch,
                                      bfloat16,
                                      scale,
                                      softcap};
             }),
             py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lo"), py::arg("hi"),
             py::arg("hulls"), py::arg("lse"), py::arg("batch"), py::arg("queries"), py::arg("keys"), py::arg("heads"),
             py::arg("key_heads"), py::arg("head_size"), py::arg("value_size"), py::arg("runs"),
             py::arg("spans_by_batch"), py::arg("bfloat16"), py::arg("scale"), py::arg("softcap"));
    module.def(
        "span_attention_forward",
        [](const SpanAttention& call, uintptr_t stream) { run(span_attention_forward, call, stream); }, py::arg("call"),
        py::arg("stream"), "Fills out and lse.");
}

// ---- what was built, and what the machine has

std::vector<std::string> architectures() {
    std::vector<std::string> names;
    std::string name;
    for (const char* c = MMK_CUDA_ARCHITECTURES;; c++) {
        if (*c != 0 && *c != ' ') {
            name += *c;
        } else if (!name.empty()) {
            names.push_back(name);
            name.clear();
        }
        if (*c == 0) return names;
    }
}

// 13000 for 13.0; the driver's is 0 where there is none.
std::pair<int, int> versions() {
    int driver = 0, runtime = 0;
#ifndef MMK_EMULATED
    if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
    if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = 0;
#endif
    return {driver, runtime};
}

}  // namespace
}  // namespace mmk::cuda

PYBIND11_MODULE(_cuda, module) {
    using namespace mmk::cuda;
    module.doc() = "mmkernels' CUDA kernels";
#ifdef MMK_EMULATED
    module.attr("emulated") = true;
#else
    module.attr("emulated") = false;
#endif
    module.attr("architectures") = py::tuple(py::cast(architectures()));  // "80": code; "120+ptx": PTX too
    module.def("versions", &versions, "(CUDA the driver supports, 0 without one, CUDA the kernels were built with).");
    bind_span_attention(module);
}
