// Patch embedding, forward, for sm_80 and later.
//
//   x = images, or (images / 255 - mean) / std                 rounded to the type of the weight
//   tokens[b, prefix_rows + p, e] = sum_k x[b, p, k] weight[e, k] + bias[e] + positions[p, e]
//
// A block makes 128 patches by 128 features, see product.h; pixels are gathered by copies to shared memory that
// overlap with the products of three earlier steps, or by way of registers where they have to be converted. The sums
// go through shared memory, so that bias and positions are added and tokens stored by rows, 16 bytes a thread.
// More blocks, behind the others, write the prefix.
//
// Memory moved: the images once for every 128 features, out of the L2 cache but for the first time, since the blocks of
// the same patches are neighbours; likewise the weight for every 128 patches; positions once an image; the tokens.
#include "cuda/patch_embed/gather.h"

namespace mmk::cuda {
namespace {

using namespace tiles;

struct Plan {
    PatchEmbed call;
    PixelPlan pixels;
    unsigned tiles;  // blocks of patches; the others write prefixes
    int tiles_across;
    bool aligned;  // may rows of tokens and of what is added to them be moved by 16 bytes?
};

// ---- rows of tokens, eight numbers of one at a time

template <class T>
struct Eight {
    static constexpr int kLines = 8 * static_cast<int>(sizeof(T)) / 16;
    float x[8] = {};

    // Adds numbers [column, min(column + 8, width)) of a row, if there is one.
    MMK_DEVICE void add(const void* row, int column, int width, bool aligned) {
        if (row == nullptr) return;
        T numbers[8];
        const T* const from = static_cast<const T*>(row) + column;
        if (aligned) {
            uint4 lines[kLines];
#pragma unroll
            for (int i = 0; i < kLines; i++) lines[i] = reinterpret_cast<const uint4*>(from)[i];
            memcpy(numbers, lines, sizeof lines);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) numbers[i] = column + i < width ? from[i] : T(0.0f);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += static_cast<float>(numbers[i]);
    }

    MMK_DEVICE void add_sums(const float* sums) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(sums + i);
            x[i] += four.x, x[i + 1] += four.y, x[i + 2] += four.z, x[i + 3] += four.w;
        }
    }

    MMK_DEVICE void store(void* row, int column, int width, bool aligned) const {
        T numbers[8];
#pragma unroll
        for (int i = 0; i < 8; i++) numbers[i] = T(x[i]);
        T* const to = static_cast<T*>(row) + column;
        if (aligned) {
            uint4 lines[kLines];
            memcpy(lines, numbers, sizeof lines);
#pragma unroll
            for (int i = 0; i < kLines; i++) reinterpret_cast<uint4*>(to)[i] = lines[i];
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (column + i < width) to[i] = numbers[i];
            }
        }
    }
};

// Writes up to 128 x 128 numbers of the tokens of an image's `tokens_each` patches or prefixes, rows from m0 and
// columns from e0; `begin` has what all of a thread's rows begin with, finish(eight, row, token) adds the rest.
template <class T, class Finish>
MMK_DEVICE void store_tokens(const Plan& p, int m0, int count, int tokens_each, int first_token, int e0,
                             const Eight<T>& begin, const Finish& finish) {
    const PatchEmbed& call = p.call;
    const int thread = static_cast<int>(threadIdx.x), column = e0 + thread % 16 * 8;
    if (column >= call.features) return;
    for (int row = thread / 16; row < kTile && m0 + row < count; row += kThreads / 16) {
        const int image = (m0 + row) / tokens_each, token = first_token + (m0 + row) % tokens_each;
        const int64_t tokens_all = int64_t{call.prefix_rows} + p.pixels.patches;
        const auto row_of = [&](const void* rows, int64_t index) {
            return static_cast<T*>(const_cast<void*>(rows)) + index * call.features;
        };
        Eight<T> eight = begin;
        finish(eight, row, token, column);
        const int64_t position = token - (tokens_all - call.position_rows);
        if (call.positions != nullptr && position >= 0) {
            eight.add(row_of(call.positions, position), column, call.features, p.aligned);
        }
        eight.store(row_of(call.tokens, image * tokens_all + token), column, call.features, p.aligned);
    }
}

template <class T>
MMK_DEVICE void store_prefix(const Plan& p, int block) {
    const PatchEmbed& call = p.call;
    const int m0 = block / p.tiles_across * kTile, e0 = block % p.tiles_across * kTile;
    const auto finish = [&](Eight<T>& eight, int, int token, int column) {
        const T* const row = static_cast<const T*>(call.prefix) + int64_t{token} * call.features;
        eight.add(row, column, call.features, p.aligned);
    };
    store_tokens<T>(p, m0, call.images.batch * call.prefix_rows, call.prefix_rows, 0, e0, Eight<T>{}, finish);
}

template <class T, bool kExact, Source kSource>
__global__ __launch_bounds__(kThreads,
                             kBlocksTogether<kExact, kSource>) void patch_embed_kernel(const __grid_constant__ Plan p) {
    constexpr Layout kDeep = Layout::kDeep;
    MMK_DYNAMIC_SHARED(memory);
    MMK_SHARED(int64_t, rows, kTile);
    const PatchEmbed& call = p.call;
    if (blockIdx.x >= p.tiles) return store_prefix<T>(p, static_cast<int>(blockIdx.x - p.tiles));

    const Shared<T, kDeep, kDeep> shared(memory);
    const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    const int m0 = block / p.tiles_across * kTile, e0 = block % p.tiles_across * kTile;
    if (thread < kTile) rows[thread] = m0 + thread < p.pixels.count ? Walk(p.pixels.in_grid, m0 + thread).offset : -1;
    __syncthreads();

    Product<T, kExact, kDeep, kDeep> product;
    Gather<T, kSource, kDeep> gather(p.pixels, 0);
    const auto weight_row = [&](int row) {
        return e0 + row < call.features ? (e0 + row) * call.weight.stride : int64_t{-1};
    };
    run_pipeline((p.pixels.pixels + kDepth<T> - 1) / kDepth<T>,
                 [&](int step) {
                     gather.fetch(shared.left(step), rows);
                     copy_tile<T, kDeep>(shared.right(step), call.weight, weight_row, step * kDepth<T>,
                                         filled(p.pixels.pixels));
                 },
                 [&](int step) {
                     gather.put(shared.left(step));
                     gather.advance();
                 },
                 [&](int step) { product.add(shared.left(step), shared.right(step)); });

    product.store(shared.sums());
    __syncthreads();
    const int column = thread % 16 * 8;
    Eight<T> begin;
    if (e0 + column < call.features) begin.add(call.bias, e0 + column, call.features, p.aligned);
    const auto finish = [&](Eight<T>& eight, int row, int, int) {
        eight.add_sums(shared.sums() + row * kSumsPitch + column);
    };
    store_tokens<T>(p, m0, p.pixels.count, p.pixels.patches, call.prefix_rows, e0, begin, finish);
}

// ---- launching

template <class T, bool kExact, Source kSource>
Error run(const Plan& plan, unsigned blocks, cudaStream_t stream) {
    const size_t bytes = Shared<T, Layout::kDeep, Layout::kDeep>::kBytes;
    return launch(Launch{"patch_embed", blocks, kThreads, bytes, stream}, patch_embed_kernel<T, kExact, kSource>, plan);
}

template <class T, bool kExact>
Error run(const PatchEmbed& call, cudaStream_t stream) {
    Plan plan{call, pixel_plan<T>(call.images, call.normalisation), 0, (call.features + kTile - 1) / kTile, true};
    const auto blocks_of = [&](int64_t rows) { return (rows + kTile - 1) / kTile * plan.tiles_across; };
    const int64_t prefixes = int64_t{call.images.batch} * call.prefix_rows;
    const int64_t tiles = blocks_of(plan.pixels.count), blocks = tiles + blocks_of(prefixes);
    if (prefixes > INT_MAX - kTile || blocks > INT_MAX) return Error("patch_embed: more tokens than 32 bits number");
    if (blocks == 0) return {};
    plan.tiles = static_cast<unsigned>(tiles);
    plan.aligned = call.features % 8 == 0;
    for (const void* x : {call.bias, call.positions, call.prefix, const_cast<const void*>(call.tokens)}) {
        plan.aligned &= is_aligned(x);
    }
    return for_source<T>(call.images, [&](auto source) {
        return run<T, kExact, decltype(source)::value>(plan, static_cast<unsigned>(blocks), stream);
    });
}

}  // namespace

Error patch_embed(const PatchEmbed& call, cudaStream_t stream) {
    if (Error error = check("patch_embed", call.images, call.normalisation)) return error;
    if (Error error = check("patch_embed", call.weight, call.features)) return error;
    if (call.features < 0 || call.features > INT_MAX - kTile || call.prefix_rows < 0) {
        return Error("patch_embed: negative or too many features or prefixes");
    }
    switch (call.type) {
        case PixelType::kBFloat16:
            return run<BFloat16, false>(call, stream);
        case PixelType::kFloat16:
            return run<Float16, false>(call, stream);
        case PixelType::kFloat32:
            return call.tf32 ? run<float, false>(call, stream) : run<float, true>(call, stream);
        default:
            return Error("patch_embed: the weight has to be of a floating type");
    }
}

}  // namespace mmk::cuda
