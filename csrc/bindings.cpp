// The compiled core as Python sees it: pointers, sizes and strides in.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <stdexcept>
#include <type_traits>

#include "cpu/contrastive/call.h"
#include "cpu/patch_embed/call.h"
#include "cpu/probe.h"
#include "cpu/rotary_embed/call.h"
#include "cpu/run/isa.h"
#include "cpu/run/parallel.h"
#include "cpu/run/scratch.h"
#include "cpu/run/tensor.h"
#include "cpu/similarity/call.h"
#include "cpu/span_attention/call.h"

namespace py = pybind11;

namespace mmk {
namespace {

// Returns what function(...) of the level gives that serves tensors of this type.
#define MMK_CASE(level, isa, function, ...) \
    case Isa::level:                        \
        return isa::function(__VA_ARGS__);
#define MMK_RETURN(dtype, function, ...)                        \
    switch (chosen_isa(dtype)) {                                \
        MMK_FOR_EACH_ISA(MMK_CASE, function, __VA_ARGS__)       \
        default:                                                \
            throw std::logic_error("a level this build lacks"); \
    }

// Floating-point operations a second that `threads` threads reach together in a loop of multiply-adds.
double fma_peak(bool bfloat16, int threads) {
    constexpr int64_t kRounds = 1 << 18;
    struct Job {
        bool bfloat16;
        double flops;
    } job{bfloat16, 0};
    const auto task = [](void* context, int64_t i) {
        Job& job = *static_cast<Job*>(context);
        const double flops = [&]() -> double {
            MMK_RETURN(job.bfloat16 ? DType::kBFloat16 : DType::kFloat32, fma_flops, job.bfloat16, kRounds);
        }();
        if (i == 0) job.flops = flops;
    };
    const auto start = std::chrono::steady_clock::now();
    run_tasks(threads, task, &job);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return threads * job.flops / seconds.count();
}

// ---- contrastive

ContrastiveResult run_clip_loss(const ClipLoss& call) { MMK_RETURN(call.rectangle.image.dtype, clip_loss, call); }

ContrastiveResult run_siglip_loss(const SigLipLoss& call) { MMK_RETURN(call.rectangle.image.dtype, siglip_loss, call); }

void run_clip_statistics(const Rectangle& call, const Statistics& rows, const Statistics& columns) {
    MMK_RETURN(call.image.dtype, clip_statistics, call, rows, columns);
}

double run_clip_gradients(const Rectangle& call, const Weights& rows, const Weights& columns, double count,
                          const Gradients& gradients) {
    MMK_RETURN(call.image.dtype, clip_gradients, call, rows, columns, count, gradients);
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Pairing pairing(int64_t offset, int64_t first, int64_t last, Same same, uintptr_t image_ids, uintptr_t text_ids,
                uintptr_t image_counts, uintptr_t text_counts) {
    const bool has_ids = image_ids != 0 && text_ids != 0, has_counts = image_counts != 0 && text_counts != 0;
    if (has_ids != (same != Same::kNothing) || has_counts != (same == Same::kPositive))
        throw std::invalid_argument("ids and counts come with what they are for");
    return {offset,
            first,
            last,
            same,
            pointer<const int32_t>(image_ids),
            pointer<const int32_t>(text_ids),
            pointer<const int32_t>(image_counts),
            pointer<const int32_t>(text_counts)};
}

Rectangle rectangle(const Matrix& image, const Matrix& text, double scale, const Pairing& pairs) {
    const bool inside = pairs.first >= 0 && pairs.last <= image.rows && pairs.first + pairs.offset >= 0 &&
                        pairs.last + pairs.offset <= text.rows;
    if (pairs.first < pairs.last && !inside) throw std::invalid_argument("an image's own text lies outside the texts");
    return {image, text, scale, pairs};
}

Gradients gradients(const Matrix* d_image, const Matrix* d_text) {
    if (d_image == nullptr || d_text == nullptr) return {};
    return {true, *d_image, *d_text};
}

Statistics statistics(uintptr_t address, int64_t count) {
    float* const x = pointer<float>(address);
    return {x, x + count, x + 2 * count};
}

Weights weights(uintptr_t address, int64_t count) {
    const float* const x = pointer<const float>(address);
    return {x, x + count, x + 2 * count, x + 3 * count};
}

void bind_contrastive_calls(py::module_& module) {
    py::enum_<Same>(module, "Same", "What equal ids say of an image and a text.")
        .value("nothing", Same::kNothing)
        .value("positive", Same::kPositive)
        .value("ignored", Same::kIgnored);
    py::class_<Pairing>(module, "Pairing", "Which images and texts belong together: see contrastive/call.h.")
        .def(py::init(&pairing), py::kw_only(), py::arg("offset"), py::arg("first"), py::arg("last"), py::arg("same"),
             py::arg("image_ids"), py::arg("text_ids"), py::arg("image_counts"), py::arg("text_counts"));
    py::class_<Rectangle>(module, "Rectangle", "All pairs of some images and texts.")
        .def(py::init(&rectangle), py::kw_only(), py::arg("image"), py::arg("text"), py::arg("scale"),
             py::arg("pairing"));
}

void bind_contrastive(py::module_& module) {
    bind_contrastive_calls(module);
    module.def(
        "clip_loss",
        [](const Rectangle& of, double count, double row_share, double column_share, double label_smoothing,
           const Matrix* d_image, const Matrix* d_text) {
            py::gil_scoped_release release;
            const ContrastiveResult result =
                run_clip_loss({of, count, row_share, column_share, label_smoothing, gradients(d_image, d_text)});
            return std::make_pair(result.loss, result.d_scale);
        },
        py::kw_only(), py::arg("rectangle"), py::arg("count"), py::arg("row_share"), py::arg("column_share"),
        py::arg("label_smoothing"), py::arg("d_image"), py::arg("d_text"),
        "(loss, d_scale); fills d_image and d_text, unless they are None.");
    module.def(
        "siglip_loss",
        [](const Rectangle& of, double bias, double count, const Matrix* d_image, const Matrix* d_text) {
            py::gil_scoped_release release;
            const ContrastiveResult result = run_siglip_loss({of, bias, count, gradients(d_image, d_text)});
            return std::make_tuple(result.loss, result.d_scale, result.d_bias);
        },
        py::kw_only(), py::arg("rectangle"), py::arg("bias"), py::arg("count"), py::arg("d_image"), py::arg("d_text"),
        "(loss, d_scale, d_bias); fills d_image and d_text, unless they are None.");
    module.def(
        "clip_statistics",
        [](const Rectangle& of, uintptr_t rows, uintptr_t columns) {
            py::gil_scoped_release release;
            run_clip_statistics(of, statistics(rows, of.image.rows), statistics(columns, of.text.rows));
        },
        py::kw_only(), py::arg("rectangle"), py::arg("rows"), py::arg("columns"),
        "Brings the (3, N) statistics of the images and the (3, M) of the texts up to date.");
    module.def(
        "clip_gradients",
        [](const Rectangle& of, uintptr_t rows, uintptr_t columns, double count, const Matrix& d_image,
           const Matrix& d_text) {
            py::gil_scoped_release release;
            return run_clip_gradients(of, weights(rows, of.image.rows), weights(columns, of.text.rows), count,
                                      gradients(&d_image, &d_text));
        },
        py::kw_only(), py::arg("rectangle"), py::arg("rows"), py::arg("columns"), py::arg("count"), py::arg("d_image"),
        py::arg("d_text"), "d_scale by the (4, N) and (4, M) weights; fills d_image and d_text.");
}

// ---- patch_embed

using Index = std::array<int64_t, 8>;

Patches patches(uintptr_t data, DType dtype, const Index& sizes, const Index& strides) {
    Patches result{reinterpret_cast<void*>(data), dtype, {}, {}};
    std::copy(sizes.begin(), sizes.end(), result.sizes);
    std::copy(strides.begin(), strides.end(), result.strides);
    return result;
}

void run_patch_embed(const PatchEmbed& call) { MMK_RETURN(call.weight.dtype, patch_embed, call); }

void run_patch_embed_backward(const PatchEmbedBackward& call) {
    MMK_RETURN(call.weight.dtype, patch_embed_backward, call);
}

void bind_patch_embed(py::module_& module) {
    py::class_<Patches>(module, "Patches",
                        "A tensor as patches (b, gt, gy, gx) of pixels (c, t, y, x): see cpu/patch_embed/call.h.")
        .def(py::init(&patches), py::arg("data"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"));
    module.def(
        "patch_embed",
        [](const Patches& images, const Patches& weight, uintptr_t mean, uintptr_t std_dev, uintptr_t bias,
           uintptr_t positions, int64_t position_rows, uintptr_t prefix, int64_t prefix_rows, uintptr_t tokens) {
            py::gil_scoped_release release;
            run_patch_embed({images, weight, reinterpret_cast<const float*>(mean),
                             reinterpret_cast<const float*>(std_dev), reinterpret_cast<const void*>(bias),
                             reinterpret_cast<const void*>(positions), reinterpret_cast<const void*>(prefix),
                             reinterpret_cast<void*>(tokens), position_rows, prefix_rows});
        },
        py::kw_only(), py::arg("images"), py::arg("weight"), py::arg("mean"), py::arg("std"), py::arg("bias"),
        py::arg("positions"), py::arg("position_rows"), py::arg("prefix"), py::arg("prefix_rows"), py::arg("tokens"),
        "Addresses of contiguous tensors; 0 for one that is not given.");
    module.def(
        "patch_embed_backward",
        [](const Patches& grad, const Patches& images, const Patches& weight, uintptr_t mean, uintptr_t std_dev,
           const Patches* d_images, const Patches* d_weight, uintptr_t d_bias) {
            py::gil_scoped_release release;
            run_patch_embed_backward({grad, images, weight, reinterpret_cast<const float*>(mean),
                                      reinterpret_cast<const float*>(std_dev), d_images != nullptr, d_weight != nullptr,
                                      d_bias != 0, d_images == nullptr ? images : *d_images,
                                      d_weight == nullptr ? weight : *d_weight, reinterpret_cast<void*>(d_bias)});
        },
        py::kw_only(), py::arg("grad"), py::arg("images"), py::arg("weight"), py::arg("mean"), py::arg("std"),
        py::arg("d_images"), py::arg("d_weight"), py::arg("d_bias"),
        "Fills what is given of d_images, d_weight (None or Patches), d_bias.");
}

// ---- span_attention

void run_span_attention(const SpanAttention& call) { MMK_RETURN(call.q.dtype, span_attention, call); }

void run_span_attention_backward(const SpanAttentionBackward& call) {
    MMK_RETURN(call.q.dtype, span_attention_backward, call);
}

void bind_span_attention(py::module_& module) {
    py::class_<Heads>(module, "Heads",
                      "A (B, T, H, D) tensor: address, dtype, sizes, and the strides of the first three in elements.")
        .def(py::init([](uintptr_t data, DType dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t dim,
                         int64_t batch_stride, int64_t token_stride, int64_t head_stride) {
            return Heads{reinterpret_cast<void*>(data),
                         dtype,
                         batch,
                         tokens,
                         heads,
                         dim,
                         batch_stride,
                         token_stride,
                         head_stride};
        }));
    py::class_<Spans>(module, "Spans", "Row spans: addresses of lo and hi, runs, queries, stride of the batch.")
        .def(py::init([](uintptr_t lo, uintptr_t hi, int64_t runs, int64_t queries, int64_t batch_stride) {
            return Spans{reinterpret_cast<const int32_t*>(lo), reinterpret_cast<const int32_t*>(hi), runs, queries,
                         batch_stride};
        }));
    module.def(
        "span_attention",
        [](const Heads& q, const Heads& k, const Heads& v, const Heads& out, uintptr_t lse, const Spans& spans,
           double scale, double softcap) {
            py::gil_scoped_release release;
            run_span_attention({q, k, v, out, reinterpret_cast<float*>(lse), spans, scale, softcap});
        },
        py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("spans"),
        py::arg("scale"), py::arg("softcap"), "Fills out and lse.");
    module.def(
        "span_attention_backward",
        [](const Heads& d_out, const Heads& q, const Heads& k, const Heads& v, const Heads& out, uintptr_t lse,
           uintptr_t d_lse, const Spans& spans, double scale, double softcap, const Heads& d_q, const Heads& d_k,
           const Heads& d_v) {
            py::gil_scoped_release release;
            run_span_attention_backward({d_out, q, k, v, out, reinterpret_cast<const float*>(lse),
                                         reinterpret_cast<const float*>(d_lse), spans, scale, softcap, d_q, d_k, d_v});
        },
        py::kw_only(), py::arg("d_out"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
        py::arg("d_lse"), py::arg("spans"), py::arg("scale"), py::arg("softcap"), py::arg("d_q"), py::arg("d_k"),
        py::arg("d_v"), "Fills d_q, d_k, d_v.");
}

// ---- rotary_embed

void run_rotary_embed(const RotaryEmbed& call) { MMK_RETURN(call.x.dtype, rotary_embed, call); }

void bind_rotary_embed(py::module_& module) {
    module.def(
        "rotary_embed",
        [](const Heads& x, const Heads& out, uintptr_t cos, uintptr_t sin, int64_t table_stride, bool interleaved,
           bool transposed) {
            py::gil_scoped_release release;
            run_rotary_embed({x, out, reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin),
                              table_stride, interleaved, transposed});
        },
        py::kw_only(), py::arg("x"), py::arg("out"), py::arg("cos"), py::arg("sin"), py::arg("table_stride"),
        py::arg("interleaved"), py::arg("transposed"), "Fills out.");
}

// ---- similarity

void run_row_maxima(const RowMaxima& call) { MMK_RETURN(call.rows.dtype, row_maxima, call); }

void run_gather_columns(const WeightedRows& call) { MMK_RETURN(call.from.dtype, gather_columns, call); }

void run_scatter_rows(const WeightedRows& call) { MMK_RETURN(call.from.dtype, scatter_rows, call); }

template <class Run>
void bind_weighted_rows(py::module_& module, const char* name, Run run, const char* text) {
    module.def(
        name,
        [run](uintptr_t weights, uintptr_t indices, int64_t rows, int64_t segments, const Matrix& of, uintptr_t sums,
              int64_t targets) {
            py::gil_scoped_release release;
            run({pointer<const float>(weights), pointer<const int32_t>(indices), rows, segments, of,
                 pointer<float>(sums), targets});
        },
        py::kw_only(), py::arg("weights"), py::arg("indices"), py::arg("rows"), py::arg("segments"), py::arg("of"),
        py::arg("sums"), py::arg("targets"), text);
}

void bind_similarity(py::module_& module) {
    module.def(
        "row_maxima",
        [](const Matrix& rows, const Matrix& columns, uintptr_t bias, uintptr_t starts, int64_t segments,
           uintptr_t maxima, uintptr_t indices) {
            py::gil_scoped_release release;
            run_row_maxima({rows, columns, pointer<const float>(bias), pointer<const int32_t>(starts), segments,
                            pointer<float>(maxima), pointer<int32_t>(indices)});
        },
        py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("bias"), py::arg("starts"), py::arg("segments"),
        py::arg("maxima"), py::arg("indices"), "Fills maxima and indices.");
    bind_weighted_rows(module, "gather_columns", &run_gather_columns, "Fills sums, a row for each row of weights.");
    bind_weighted_rows(module, "scatter_rows", &run_scatter_rows, "Fills sums, a row for each of the targets.");
}

// That which torch's library for the CPU is linked with, wherever it came from: among all that is loaded there may be
// others, and torch may keep its own to itself. GNU's, LLVM's and Intel's export the same names on Linux.
OpenMp openmp_of_torch() {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    const auto find = [torch](auto& function, const char* name) {
        void* found = torch == nullptr ? nullptr : dlsym(torch, name);
        if (found == nullptr) found = dlsym(RTLD_DEFAULT, name);
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
        return found != nullptr;
    };
    OpenMp openmp;
    const bool all = find(openmp.parallel, "GOMP_parallel") && find(openmp.get_max_threads, "omp_get_max_threads") &&
                     find(openmp.get_num_threads, "omp_get_num_threads") &&
                     find(openmp.get_thread_num, "omp_get_thread_num");
    if (torch != nullptr) dlclose(torch);
    if (!all) throw py::import_error("mmkernels._core works on torch's OpenMP threads: import torch before it");
    return openmp;
}

}  // namespace
}  // namespace mmk

PYBIND11_MODULE(_core, module) {
    using namespace mmk;
    use_openmp(openmp_of_torch());
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
    module.def("release_kept", &release_kept, "Gives back the working memory kept from earlier calls.");
    bind_contrastive(module);
    bind_patch_embed(module);
    bind_span_attention(module);
    bind_rotary_embed(module);
    bind_similarity(module);
}
