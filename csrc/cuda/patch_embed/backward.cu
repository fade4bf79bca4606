// Patch embedding, backward, for sm_80 and later.
//
//   d_weight[e, k] = sum_bp grad[b, p, e] x[b, p, k]            x as in forward.cu, gathered and normalised again
//   d_images[b, p, k] = sum_e grad[b, p, e] weight[e, k]        every pixel belongs to one patch: stored, not added
//
// d_weight is a few tiles of 128 x 128 and a long sum over patches, too few blocks for a GPU: the patches are split
// into runs, as many as the sizes ask for whatever the GPU. Each block sums over one run into a float32 copy of its
// own; a second kernel adds the copies, in order. What lies where in the images and in grad changes from step to step
// by patches: one warp walks ahead of the copies and leaves the offsets of the next steps' rows in shared memory.
//
// Memory moved: for d_weight grad once for every 128 pixels of a patch and the images once for every 128 features, out
// of the L2 cache but for the first time, since the blocks of a run are neighbours, and 8 bytes for each number of each
// copy; for d_images grad once for every 128 pixels and the weight for every 128 patches, and the pixels, stored one by
// one.
#include "cuda/patch_embed/gather.h"

namespace mmk::cuda {
namespace {

using namespace tiles;

constexpr Layout kDeep = Layout::kDeep, kWide = Layout::kWide;
constexpr int kBlocks = 256;  // that a split aims at: two for each multiprocessor of the largest GPUs

int tiles_of(int64_t size) { return static_cast<int>((size + kTile - 1) / kTile); }

// ---- the gradient of the weight

struct WeightPlan {
    PatchWeightGrad call;
    PixelPlan pixels;
    Digits in_grad;  // offset of a patch's row of grad
    int tiles_down, tiles_across, run, runs;
};

template <class T>
struct Offsets {  // of the rows of one step
    int64_t images[kDepth<T>], grad[kDepth<T>];
};

// The next row that a thread finds the offsets of. It waits in shared memory: every thread would give registers to what
// few need once a step.
struct RowWalk {
    Walk image, grad;
    int patch;
};

template <class T>
MMK_DEVICE void find_rows(const WeightPlan& p, RowWalk& walk, Offsets<T>& to, int end) {
    const bool valid = walk.patch < end;
    to.images[threadIdx.x] = valid ? walk.image.offset : -1;
    to.grad[threadIdx.x] = valid ? walk.grad.offset : -1;
    walk.patch += kDepth<T>;
    walk.image.advance(p.pixels.in_grid);
    walk.grad.advance(p.in_grad);
}

template <class T, bool kExact, Source kSource>
__global__ __launch_bounds__(kThreads, kBlocksTogether<kExact, kSource>) void patch_weight_grad_kernel(
    const __grid_constant__ WeightPlan p) {
    MMK_DYNAMIC_SHARED(memory);
    MMK_SHARED(Offsets<T>, offsets, kStages);  // of the steps that are under way
    MMK_SHARED(RowWalk, walks, kDepth<T>);
    const Shared<T, kWide, kWide> shared(memory);
    const int tiles = p.tiles_down * p.tiles_across, block = static_cast<int>(blockIdx.x);
    const int run = block / tiles, tile = block % tiles;  // the blocks of a run are neighbours
    const int e0 = tile / p.tiles_across * kTile, k0 = tile % p.tiles_across * kTile;
    const int first = run * p.run, end = min(first + p.run, p.pixels.count);

    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kDepth<T>) {
        const int patch = first + thread;
        walks[thread] = {Walk(p.pixels.in_grid, patch), Walk(p.in_grad, patch), patch};
        for (int step = 0; step < kStages; step++) find_rows(p, walks[thread], offsets[step], end);
    }
    __syncthreads();
    Product<T, kExact, kWide, kWide> product;
    Gather<T, kSource, kWide> gather(p.pixels, k0);
    const Rows grad{p.call.grad.data, 0};
    run_pipeline((end - first + kDepth<T> - 1) / kDepth<T>,
                 [&](int step) {
                     const Offsets<T>& rows = offsets[step % kStages];
                     copy_tile<T, kWide>(
                         shared.left(step), grad, [&](int row) { return rows.grad[row]; }, e0, filled(p.call.features));
                     gather.fetch(shared.right(step), rows.images);
                     if (step >= kStages - 1 && thread < kDepth<T>) {
                         find_rows(p, walks[thread], offsets[(step + 1) % kStages], end);
                     }
                 },
                 [&](int step) { gather.put(shared.right(step)); },
                 [&](int step) { product.add(shared.left(step), shared.right(step)); });

    product.store(shared.sums());
    __syncthreads();
    const int k = k0 + thread % kTile;
    if (k >= p.pixels.pixels) return;
    float* const copy = static_cast<float*>(p.call.workspace) + int64_t{run} * p.call.features * p.pixels.pixels;
    for (int row = thread / kTile; row < kTile && e0 + row < p.call.features; row += kThreads / kTile) {
        copy[int64_t{e0 + row} * p.pixels.pixels + k] = shared.sums()[row * kSumsPitch + thread % kTile];
    }
}

struct SumPlan {
    const float* copies;
    void* d_weight;
    int64_t count, row_stride;
    Digits in_row;
    int pixels, runs;
};

template <class T>
__global__ __launch_bounds__(kThreads) void patch_weight_sum_kernel(const __grid_constant__ SumPlan p) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= p.count) return;
    float sum = 0;
    for (int run = 0; run < p.runs; run++) sum += p.copies[run * p.count + i];
    const int64_t row = i / p.pixels, offset = Walk(p.in_row, static_cast<int>(i % p.pixels)).offset;
    static_cast<T*>(p.d_weight)[row * p.row_stride + offset] = T(sum);
}

// The run of patches that a block sums over, a multiple of a step.
template <class T>
void split(WeightPlan& plan) {
    const int64_t tiles = std::max<int64_t>(int64_t{plan.tiles_down} * plan.tiles_across, 1), count = plan.pixels.count;
    const int64_t wanted = std::max<int64_t>(1, std::min(kBlocks / tiles, count / (4 * kDepth<T>)));
    const int64_t steps = ((count + wanted - 1) / wanted + kDepth<T> - 1) / kDepth<T>;
    plan.run = static_cast<int>(std::max<int64_t>(steps, 1) * kDepth<T>);
    plan.runs = static_cast<int>((count + plan.run - 1) / plan.run);
}

template <class T>
WeightPlan weight_plan(const PatchWeightGrad& call) {
    WeightPlan plan{call, pixel_plan<T>(call.images, call.normalisation), {}, 0, 0, 0, 0};
    plan.in_grad =
        digits({1, 1, call.images.batch, plan.pixels.patches}, {0, 0, call.grad.batch, call.grad.row}, kDepth<T>);
    plan.tiles_down = tiles_of(call.features);
    plan.tiles_across = tiles_of(plan.pixels.pixels);
    split<T>(plan);
    return plan;
}

template <class T, bool kExact, Source kSource>
Error run(const WeightPlan& plan, unsigned blocks, cudaStream_t stream) {
    const Launch at{"patch_weight_grad", blocks, kThreads, Shared<T, kWide, kWide>::kBytes, stream};
    return launch(at, patch_weight_grad_kernel<T, kExact, kSource>, plan);
}

template <class T, bool kExact>
Error run(const PatchWeightGrad& call, cudaStream_t stream) {
    const WeightPlan plan = weight_plan<T>(call);
    const int64_t blocks = int64_t{plan.tiles_down} * plan.tiles_across * plan.runs;
    const int64_t count = int64_t{call.features} * plan.pixels.pixels, sum_blocks = (count + kThreads - 1) / kThreads;
    if (blocks > INT_MAX || sum_blocks > INT_MAX) return Error("patch_weight_grad: the weight is too large");
    if (blocks > 0) {
        const auto run_source = [&](auto source) {
            return run<T, kExact, decltype(source)::value>(plan, static_cast<unsigned>(blocks), stream);
        };
        if (Error error = for_source<T>(call.images, run_source)) return error;
    }
    if (count == 0) return {};
    const Digits in_row = digits(call.d_weight_sizes, call.d_weight_strides);
    const SumPlan sum{static_cast<const float*>(call.workspace),
                      call.d_weight,
                      count,
                      call.d_weight_stride,
                      in_row,
                      plan.pixels.pixels,
                      plan.runs};
    const Launch at{"patch_weight_sum", static_cast<unsigned>(sum_blocks), kThreads, 0, stream};
    return launch(at, patch_weight_sum_kernel<T>, sum);
}

// ---- the gradient of the images

struct ImagesPlan {
    PatchImagesGrad call;
    PixelPlan pixels;
    Digits in_grad;
    int tiles_across;
};

MMK_DEVICE void store_pixel(const Patches& images, int64_t at, float x) {
    switch (images.type) {
        case PixelType::kFloat32:
            static_cast<float*>(images.data)[at] = x;
            break;
        case PixelType::kBFloat16:
            static_cast<BFloat16*>(images.data)[at] = BFloat16(x);
            break;
        default:
            static_cast<Float16*>(images.data)[at] = Float16(x);
    }
}

template <class T, bool kExact>
__global__ __launch_bounds__(kThreads,
                             kExact ? 1 : 2) void patch_images_grad_kernel(const __grid_constant__ ImagesPlan p) {
    MMK_DYNAMIC_SHARED(memory);
    MMK_SHARED(int64_t, image_rows, kTile);
    MMK_SHARED(int64_t, grad_rows, kTile);
    const PatchImagesGrad& call = p.call;
    const Shared<T, kDeep, kWide> shared(memory);
    const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    const int m0 = block / p.tiles_across * kTile, k0 = block % p.tiles_across * kTile;
    if (thread < kTile) {
        const bool valid = m0 + thread < p.pixels.count;
        image_rows[thread] = valid ? Walk(p.pixels.in_grid, m0 + thread).offset : -1;
        grad_rows[thread] = valid ? Walk(p.in_grad, m0 + thread).offset : -1;
    }
    __syncthreads();

    Product<T, kExact, kDeep, kWide> product;
    const Rows grad{call.grad.data, 0};
    run_pipeline((call.features + kDepth<T> - 1) / kDepth<T>,
                 [&](int step) {
                     const int first = step * kDepth<T>;
                     copy_tile<T, kDeep>(
                         shared.left(step), grad, [&](int row) { return grad_rows[row]; }, first,
                         filled(call.features));
                     const auto weight_row = [&](int row) {
                         return first + row < call.features ? (first + row) * call.weight.stride : int64_t{-1};
                     };
                     copy_tile<T, kWide>(shared.right(step), call.weight, weight_row, k0, filled(p.pixels.pixels));
                 },
                 [](int) {}, [&](int step) { product.add(shared.left(step), shared.right(step)); });

    product.store(shared.sums());
    __syncthreads();
    const int k = k0 + thread % kTile;
    if (k >= p.pixels.pixels) return;
    const int64_t pixel = Walk(p.pixels.in_patch, k).offset;
    for (int row = thread / kTile; row < kTile && m0 + row < p.pixels.count; row += kThreads / kTile) {
        store_pixel(call.d_images, image_rows[row] + pixel, shared.sums()[row * kSumsPitch + thread % kTile]);
    }
}

template <class T, bool kExact>
Error run(const PatchImagesGrad& call, cudaStream_t stream) {
    ImagesPlan plan{call, pixel_plan<T>(call.d_images, {}), {}, 0};
    plan.in_grad = digits({1, 1, call.d_images.batch, plan.pixels.patches}, {0, 0, call.grad.batch, call.grad.row});
    plan.tiles_across = tiles_of(plan.pixels.pixels);
    const int64_t blocks = int64_t{tiles_of(plan.pixels.count)} * plan.tiles_across;
    if (blocks > INT_MAX) return Error("patch_images_grad: more pixels than the blocks of a launch");
    if (blocks == 0) return {};
    const size_t bytes = Shared<T, kDeep, kWide>::kBytes;
    const Launch at{"patch_images_grad", static_cast<unsigned>(blocks), kThreads, bytes, stream};
    return launch(at, patch_images_grad_kernel<T, kExact>, plan);
}

// ---- what both need

template <class Call>
Error run(const char* kernel, const Call& call, cudaStream_t stream) {
    if (call.features < 0 || call.features > INT_MAX - kTile) {
        return Error(std::string(kernel) + ": negative or too many features");
    }
    switch (call.type) {
        case PixelType::kBFloat16:
            return run<BFloat16, false>(call, stream);
        case PixelType::kFloat16:
            return run<Float16, false>(call, stream);
        case PixelType::kFloat32:
            return call.tf32 ? run<float, false>(call, stream) : run<float, true>(call, stream);
        default:
            return Error(std::string(kernel) + ": grad has to be of a floating type");
    }
}

}  // namespace

size_t patch_weight_grad_workspace(const PatchWeightGrad& call) {
    if (check("", call.images, call.normalisation) || call.features < 0) return 0;  // an error to come
    const WeightPlan plan = call.type == PixelType::kFloat32 ? weight_plan<float>(call) : weight_plan<BFloat16>(call);
    return sizeof(float) * static_cast<size_t>(plan.runs) * static_cast<size_t>(call.features) *
           static_cast<size_t>(plan.pixels.pixels);
}

Error patch_weight_grad(const PatchWeightGrad& call, cudaStream_t stream) {
    if (Error error = check("patch_weight_grad", call.images, call.normalisation)) return error;
    if (Error error = check("patch_weight_grad", call.grad, call.images)) return error;
    return run("patch_weight_grad", call, stream);
}

Error patch_images_grad(const PatchImagesGrad& call, cudaStream_t stream) {
    if (call.d_images.type == PixelType::kUint8) return Error("patch_images_grad: uint8 images have no gradient");
    if (Error error = check("patch_images_grad", call.d_images, {})) return error;
    if (Error error = check("patch_images_grad", call.weight, call.features)) return error;
    if (Error error = check("patch_images_grad", call.grad, call.d_images)) return error;
    return run("patch_images_grad", call, stream);
}

}  // namespace mmk::cuda
