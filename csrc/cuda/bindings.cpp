// The CUDA kernels as Python sees them: addresses, sizes, strides and a stream in, an error as an exception. Linked
// with what nvcc makes of the kernels this is mmkernels._cuda; linked with the emulator (MMK_EMULATED), the same module
// for tensors on the CPU, of which the tests make three builds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/contrastive/call.h"
#include "cuda/patch_embed/call.h"
#include "cuda/span_attention/call.h"

#ifdef MMK_EMULATED
#include "emulator/touched.h"
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

template <class Call>
using Launcher = Error (*)(const Call&, cudaStream_t);

template <class Call>
void def_launcher(py::module_& module, const std::string& name, Launcher<Call> launcher, const char* text) {
    module.def(
        name.c_str(), [launcher](const Call& call, uintptr_t stream) { run(launcher, call, stream); }, py::arg("call"),
        py::arg("stream"), text);
}

// The same on Hopper, and of which calls: what mmkernels/ops/_cuda_tensors.py chooses by.
template <class Call, class Serves>
void def_sm90(py::module_& module, const std::string& name, Launcher<Call> launcher, Serves serves) {
    def_launcher(module, name + "_sm90", launcher, "The same on Hopper, of what it serves.");
    module.def((name + "_sm90_serves").c_str(), [serves](const Call& call) { return serves(call); }, py::arg("call"));
}

// ---- span_attention

void bind_span_attention(py::module_& module) {
    py::class_<Heads>(module, "Heads",
                      "A (B, T, H, D) tensor: address, and the strides of the first three in elements.")
        .def(py::init([](uintptr_t data, int64_t batch, int64_t row, int64_t head) {
            return Heads{pointer<void>(data), batch, row, head};
        }));
    py::class_<SpanAttention>(module, "SpanAttention", "A call: see span_attention/call.h.")
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
    def_launcher(module, "span_attention_forward", span_attention_forward, "Fills out and lse.");
    def_sm90(module, "span_attention_forward", span_attention_forward_sm90, span_attention_forward_sm90_serves);
    py::class_<SpanAttentionBackward>(module, "SpanAttentionBackward", "A call: see span_attention/call.h.")
        .def(py::init([](const SpanAttention& forward, const Heads& d_out, const Heads& d_q, const Heads& d_k,
                         const Heads& d_v, uintptr_t d_lse, uintptr_t workspace) {
                 return SpanAttentionBackward{
                     forward, d_out, d_q, d_k, d_v, pointer<const float>(d_lse), pointer<void>(workspace)};
             }),
             py::kw_only(), py::arg("forward"), py::arg("d_out"), py::arg("d_q"), py::arg("d_k"), py::arg("d_v"),
             py::arg("d_lse"), py::arg("workspace"));
    module.def("span_attention_backward_bytes", &span_attention_backward_bytes, "Of the workspace.");
    def_launcher(module, "span_attention_backward", span_attention_backward, "Fills d_q, d_k and d_v.");
    def_sm90(module, "span_attention_backward", span_attention_backward_sm90, span_attention_backward_sm90_serves);
}

// ---- contrastive losses

void bind_contrastive_calls(py::module_& module) {
    py::enum_<Same>(module, "Same")
        .value("nothing", Same::kNothing)
        .value("positive", Same::kPositive)
        .value("ignored", Same::kIgnored);
    py::class_<Pairs>(module, "Pairs", "Features, by address and row stride in elements, and their parameters.")
        .def(py::init([](uintptr_t image, int64_t image_stride, uintptr_t text, int64_t text_stride, uintptr_t scale,
                         uintptr_t bias, int images, int texts, int width, bool bfloat16, int offset, int first,
                         int last, Same same, uintptr_t image_ids, uintptr_t text_ids, uintptr_t image_counts,
                         uintptr_t text_counts) {
                 return Pairs{{pointer<const void>(image), image_stride},
                              {pointer<const void>(text), text_stride},
                              pointer<const float>(scale),
                              pointer<const float>(bias),
                              images,
                              texts,
                              width,
                              bfloat16,
                              offset,
                              first,
                              last,
                              same,
                              pointer<const int32_t>(image_ids),
                              pointer<const int32_t>(text_ids),
                              pointer<const int32_t>(image_counts),
                              pointer<const int32_t>(text_counts)};
             }),
             py::kw_only(), py::arg("image"), py::arg("image_stride"), py::arg("text"), py::arg("text_stride"),
             py::arg("scale"), py::arg("bias"), py::arg("images"), py::arg("texts"), py::arg("width"),
             py::arg("bfloat16"), py::arg("offset"), py::arg("first"), py::arg("last"), py::arg("same"),
             py::arg("image_ids"), py::arg("text_ids"), py::arg("image_counts"), py::arg("text_counts"));
    py::class_<ClipStatistics>(module, "ClipStatistics", "A call: see contrastive/call.h.")
        .def(py::init([](const Pairs& pairs, uintptr_t rows, uintptr_t columns, bool add, uintptr_t workspace,
                         size_t workspace_bytes) {
                 return ClipStatistics{pairs, pointer<float>(rows),     pointer<float>(columns),
                                       add,   pointer<void>(workspace), workspace_bytes};
             }),
             py::kw_only(), py::arg("pairs"), py::arg("rows"), py::arg("columns"), py::arg("add"), py::arg("workspace"),
             py::arg("workspace_bytes"));
    py::class_<ClipWeights>(module, "ClipWeights", "A call: see contrastive/call.h.")
        .def(py::init([](const Pairs& pairs, float label_smoothing, float row_share, float column_share, double count,
                         uintptr_t shares, uintptr_t products, uintptr_t rows, uintptr_t columns, uintptr_t own,
                         uintptr_t loss) {
                 return ClipWeights{pairs,
                                    label_smoothing,
                                    row_share,
                                    column_share,
                                    count,
                                    pointer<const double>(shares),
                                    pointer<const double>(products),
                                    pointer<float>(rows),
                                    pointer<float>(columns),
                                    pointer<float>(own),
                                    pointer<float>(loss)};
             }),
             py::kw_only(), py::arg("pairs"), py::arg("label_smoothing"), py::arg("row_share"), py::arg("column_share"),
             py::arg("count"), py::arg("shares"), py::arg("products"), py::arg("rows"), py::arg("columns"),
             py::arg("own"), py::arg("loss"));
    py::class_<LogitRows>(module, "LogitRows", "Rows of the logits: see contrastive/call.h.")
        .def(py::init([](const Pairs& pairs, int row0, int row_count, uintptr_t ds, int64_t ds_stride, double count,
                         uintptr_t totals, uintptr_t means, uintptr_t workspace, size_t workspace_bytes) {
                 return LogitRows{pairs,
                                  row0,
                                  row_count,
                                  pointer<void>(ds),
                                  ds_stride,
                                  count,
                                  pointer<double>(totals),
                                  pointer<float>(means),
                                  pointer<void>(workspace),
                                  workspace_bytes};
             }),
             py::kw_only(), py::arg("pairs"), py::arg("row0"), py::arg("row_count"), py::arg("ds"),
             py::arg("ds_stride"), py::arg("count"), py::arg("totals"), py::arg("means"), py::arg("workspace"),
             py::arg("workspace_bytes"));
    py::class_<ClipGradient>(module, "ClipGradient", "A call: see contrastive/call.h.")
        .def(py::init([](const LogitRows& to, uintptr_t rows, uintptr_t columns, uintptr_t own) {
                 return ClipGradient{to, pointer<const float>(rows), pointer<const float>(columns),
                                     pointer<const float>(own)};
             }),
             py::kw_only(), py::arg("to"), py::arg("rows"), py::arg("columns"), py::arg("own"));
}

void bind_contrastive(py::module_& module) {
    bind_contrastive_calls(module);
    module.def("clip_statistics_workspace", &clip_statistics_workspace, py::arg("pairs"), "Bytes.");
    module.def("gradient_workspace", &gradient_workspace, py::arg("texts"), py::arg("row_count"), "Bytes.");
    def_launcher(module, "clip_statistics", clip_statistics, "Fills rows and columns, or adds to them.");
    def_launcher(module, "clip_weights", clip_weights, "Turns rows and columns into weights; fills own and loss.");
    def_launcher(module, "clip_gradient", clip_gradient, "Fills ds and means.");
    def_launcher(module, "siglip", siglip, "Fills ds, if there is one, and means.");
    def_sm90(module, "clip_statistics", clip_statistics_sm90,
             [](const ClipStatistics& call) { return contrastive_sm90_serves(call.pairs); });
    def_sm90(module, "clip_gradient", clip_gradient_sm90,
             [](const ClipGradient& call) { return contrastive_sm90_serves(call.to.pairs); });
    def_sm90(module, "siglip", siglip_sm90, [](const LogitRows& call) { return contrastive_sm90_serves(call.pairs); });
}

// ---- patch_embed

void bind_patch_operands(py::module_& module) {
    py::enum_<PixelType>(module, "PixelType")
        .value("float32", PixelType::kFloat32)
        .value("bfloat16", PixelType::kBFloat16)
        .value("float16", PixelType::kFloat16)
        .value("uint8", PixelType::kUint8);
    py::class_<Patches>(module, "Patches", "The patches of a tensor of images, by address: see patch_embed/call.h.")
        .def(
            py::init([](uintptr_t data, PixelType type, int batch, std::array<int, 3> grid, int64_t batch_stride,
                        std::array<int64_t, 3> grid_strides, std::array<int, 4> sizes, std::array<int64_t, 4> strides) {
                Patches patches{pointer<void>(data), type, batch, {}, batch_stride, {}, {}, {}};
                std::copy(grid.begin(), grid.end(), patches.grid);
                std::copy(grid_strides.begin(), grid_strides.end(), patches.grid_strides);
                std::copy(sizes.begin(), sizes.end(), patches.sizes);
                std::copy(strides.begin(), strides.end(), patches.strides);
                return patches;
            }),
            py::kw_only(), py::arg("data"), py::arg("type"), py::arg("batch"), py::arg("grid"), py::arg("batch_stride"),
            py::arg("grid_strides"), py::arg("sizes"), py::arg("strides"));
    py::class_<Normalisation>(module, "Normalisation", "Addresses of mean and std, and where channels are.")
        .def(py::init([](uintptr_t mean, uintptr_t std_dev, int channels, int pixels_inside) {
            return Normalisation{pointer<const float>(mean), pointer<const float>(std_dev), channels, pixels_inside};
        }));
    py::class_<Rows>(module, "Rows", "Aligned rows: address and stride in elements.")
        .def(py::init([](uintptr_t data, int64_t stride) { return Rows{pointer<const void>(data), stride}; }));
    py::class_<TokenGrad>(module, "TokenGrad", "(B, N, E): address, and the strides of the first two in elements.")
        .def(py::init([](uintptr_t data, int64_t batch, int64_t row) {
            return TokenGrad{pointer<const void>(data), batch, row};
        }));
}

void bind_patch_calls(py::module_& module) {
    py::class_<PatchEmbed>(module, "PatchEmbed", "A call: see patch_embed/call.h.")
        .def(py::init([](const Patches& images, const Normalisation& normalisation, const Rows& weight, PixelType type,
                         bool tf32, uintptr_t bias, uintptr_t positions, uintptr_t prefix, uintptr_t tokens,
                         int features, int prefix_rows, int position_rows) {
                 return PatchEmbed{images,
                                   normalisation,
                                   weight,
                                   type,
                                   tf32,
                                   pointer<const void>(bias),
                                   pointer<const void>(positions),
                                   pointer<const void>(prefix),
                                   pointer<void>(tokens),
                                   features,
                                   prefix_rows,
                                   position_rows};
             }),
             py::kw_only(), py::arg("images"), py::arg("normalisation"), py::arg("weight"), py::arg("type"),
             py::arg("tf32"), py::arg("bias"), py::arg("positions"), py::arg("prefix"), py::arg("tokens"),
             py::arg("features"), py::arg("prefix_rows"), py::arg("position_rows"));
    py::class_<PatchWeightGrad>(module, "PatchWeightGrad", "A call: see patch_embed/call.h.")
        .def(py::init([](const TokenGrad& grad, const Patches& images, const Normalisation& normalisation,
                         PixelType type, bool tf32, int features, uintptr_t d_weight, int64_t d_weight_stride,
                         std::array<int, 4> d_weight_sizes, std::array<int64_t, 4> d_weight_strides) {
                 PatchWeightGrad call{
                     grad, images, normalisation, type, tf32, features, pointer<void>(d_weight), d_weight_stride,
                     {},   {},     nullptr};
                 std::copy(d_weight_sizes.begin(), d_weight_sizes.end(), call.d_weight_sizes);
                 std::copy(d_weight_strides.begin(), d_weight_strides.end(), call.d_weight_strides);
                 return call;
             }),
             py::kw_only(), py::arg("grad"), py::arg("images"), py::arg("normalisation"), py::arg("type"),
             py::arg("tf32"), py::arg("features"), py::arg("d_weight"), py::arg("d_weight_stride"),
             py::arg("d_weight_sizes"), py::arg("d_weight_strides"))
        .def_property_readonly("workspace_bytes", &patch_weight_grad_workspace)
        .def("use_workspace",
             [](PatchWeightGrad& call, uintptr_t workspace) { call.workspace = pointer<void>(workspace); });
    py::class_<PatchImagesGrad>(module, "PatchImagesGrad", "A call: see patch_embed/call.h.")
        .def(py::init(
                 [](const TokenGrad& grad, const Rows& weight, PixelType type, bool tf32, int features,
                    const Patches& d_images) { return PatchImagesGrad{grad, weight, type, tf32, features, d_images}; }),
             py::kw_only(), py::arg("grad"), py::arg("weight"), py::arg("type"), py::arg("tf32"), py::arg("features"),
             py::arg("d_images"));
}

void bind_patch_embed(py::module_& module) {
    bind_patch_operands(module);
    bind_patch_calls(module);
    def_launcher(module, "patch_embed", patch_embed, "Fills tokens.");
    def_launcher(module, "patch_weight_grad", patch_weight_grad, "Fills d_weight.");
    def_launcher(module, "patch_images_grad", patch_images_grad, "Fills the patches of d_images.");
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
    // What the Python side has under names of its own; tests/compile/test_cuda_module.py holds them together.
    module.attr("largest_head") = kLargestHead;
    module.attr("hull_rows") = kHullRows;
    module.attr("gradient_scale") = kGradientScale;
    module.def("versions", &versions, "(CUDA the driver supports, 0 without one, CUDA the kernels were built with).");
    bind_patch_embed(module);
    bind_span_attention(module);
    bind_contrastive(module);
}
