// Tiles of patches for a product: pixels gathered from where they lie into shared memory.
//
// The address of pixel k of patch m is a sum of two offsets. A thread gathers the same columns of a tile in each of its
// rows: the offset of a row is in shared memory, that of its column in its registers, and walks on from step to step
// without a division.
#pragma once
#include <algorithm>
#include <climits>
#include <string>

#include "cuda/isa/launch.h"
#include "cuda/patch_embed/call.h"
#include "cuda/patch_embed/product.h"

namespace mmk::cuda::tiles {

template <class T>
constexpr PixelType kPixelType = std::is_same_v<T, float>      ? PixelType::kFloat32
                                 : std::is_same_v<T, BFloat16> ? PixelType::kBFloat16
                                                               : PixelType::kFloat16;

__host__ __device__ constexpr int size_of(PixelType type) {
    return type == PixelType::kFloat32 ? 4 : type == PixelType::kUint8 ? 1 : 2;
}

// ---- indices of four digits in a mixed base, and the offsets they amount to

struct Digits {
    int sizes[4];
    int64_t strides[4];
    // Of an index that grows by a fixed step:
    int step_digits[4];
    int64_t step;      // what the step's digits amount to
    int64_t carry[4];  // what digit i amounts to when it overflows into the next one
};

inline Digits digits(const int (&sizes)[4], const int64_t (&strides)[4], int step = 0) {
    Digits d{};
    for (int i = 3; i >= 0; i--) {
        d.sizes[i] = sizes[i];
        d.strides[i] = strides[i];
        d.step_digits[i] = i > 0 ? step % std::max(sizes[i], 1) : step;
        d.step += d.step_digits[i] * strides[i];
        if (i > 0) d.carry[i] = strides[i - 1] - sizes[i] * strides[i];
        step /= std::max(sizes[i], 1);
    }
    return d;
}

struct Walk {
    int digit[4];  // the first one is never looked at
    int64_t offset;

    Walk() = default;
    MMK_DEVICE Walk(const Digits& d, int index) : offset(0) {
#pragma unroll
        for (int i = 3; i > 0; i--) {
            digit[i] = index % d.sizes[i];
            index /= d.sizes[i];
            offset += digit[i] * d.strides[i];
        }
        offset += index * d.strides[0];
    }

    MMK_DEVICE void advance(const Digits& d) {
        offset += d.step;
        int carried = 0;
#pragma unroll
        for (int i = 3; i > 0; i--) {
            digit[i] += d.step_digits[i] + carried;
            carried = digit[i] >= d.sizes[i];
            if (carried) {
                digit[i] -= d.sizes[i];
                offset += d.carry[i];
            }
        }
    }
};

// ---- pixels

// How pixels are read. Where neither their type nor their place allows more, one by one.
enum class Source {
    kLines,       // copies of 16 bytes
    kWords,       // copies of 4 bytes
    kBytePairs,   // uint8, into 16 bits
    kFloatPairs,  // float32, into 16 bits
    kAny,
};

template <class T>
constexpr int vector_of(Source source) {
    return source == Source::kLines ? 16 / sizeof(T) : source == Source::kAny || sizeof(T) == 4 ? 1 : 2;
}

// T: the type of the product.
template <class T>
Source source_of(const Patches& images) {
    const auto comes_by = [&](int count) {  // does every count-th pixel of a run lie at a multiple of their size?
        if (images.strides[3] != 1 || images.sizes[3] % count != 0) return false;
        bool all = reinterpret_cast<uintptr_t>(images.data) % static_cast<size_t>(count * size_of(images.type)) == 0;
        for (int i = 0; i < 3; i++) all &= images.sizes[i] == 1 || images.strides[i] % count == 0;
        for (int i = 0; i < 3; i++) all &= images.grid[i] == 1 || images.grid_strides[i] % count == 0;
        return all && (images.batch == 1 || images.batch_stride % count == 0);
    };
    const bool same = images.type == kPixelType<T>;
    if constexpr (sizeof(T) == 4) return same ? Source::kWords : Source::kAny;
    if (same && comes_by(8)) return Source::kLines;
    if (!comes_by(2)) return Source::kAny;
    if (same) return Source::kWords;
    return images.type == PixelType::kUint8     ? Source::kBytePairs
           : images.type == PixelType::kFloat32 ? Source::kFloatPairs
                                                : Source::kAny;
}

// f(std::integral_constant<Source, s>) for the source s of these images.
template <class T, class F>
Error for_source(const Patches& images, const F& f) {
    const Source source = source_of<T>(images);
    if (source == Source::kWords) return f(std::integral_constant<Source, Source::kWords>{});
    if constexpr (sizeof(T) == 2) {
        if (source == Source::kLines) return f(std::integral_constant<Source, Source::kLines>{});
        if (source == Source::kBytePairs) return f(std::integral_constant<Source, Source::kBytePairs>{});
        if (source == Source::kFloatPairs) return f(std::integral_constant<Source, Source::kFloatPairs>{});
    }
    return f(std::integral_constant<Source, Source::kAny>{});
}

// Blocks that share a multiprocessor. FFMA needs the registers of a second, and so does whatever pixel can be
// converted.
template <bool kExact, Source kSource>
constexpr int kBlocksTogether = kExact || kSource == Source::kAny ? 1 : 2;

// (x / 255 - mean) / std of one channel. For 16-bit numbers as x scale - shift, whose error is nothing to theirs; for
// float32 every operation is rounded as written, since pixels of a channel that are all a little off do not average
// out.
template <class T>
class ChannelFactors {
    static constexpr bool kExact = sizeof(T) == 4;

  public:
    ChannelFactors() = default;
    MMK_DEVICE ChannelFactors(const Normalisation& normalisation, int64_t channel) {
        const float mean = normalisation.mean[channel], std_dev = normalisation.std_dev[channel];
        const float inverse = 1.0f / std_dev;
        scale_ = kExact ? inverse : inverse * (1.0f / 255.0f);
        shift_ = kExact ? mean : mean * inverse;
        std_dev_ = std_dev;
    }
    MMK_DEVICE float apply(float x) const {
        return kExact ? divide(divide(x, 255.0f, 1.0f / 255.0f) - shift_, std_dev_, scale_) : fmaf(x, scale_, -shift_);
    }

  private:
    MMK_DEVICE static float divide(float x, float by, float inverse) {
        const float quotient = x * inverse;
        return fmaf(fmaf(-by, quotient, x), inverse, quotient);
    }
    float scale_, shift_, std_dev_;
};

MMK_DEVICE float float_of(PixelType type, uint32_t bits) {
    if (type == PixelType::kUint8) return static_cast<float>(bits);
    if (type == PixelType::kBFloat16) bits <<= 16;
    if (type == PixelType::kFloat16) {
        Float16 number;
        const auto half = static_cast<uint16_t>(bits);
        memcpy(&number, &half, sizeof number);
        return static_cast<float>(number);
    }
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

// What gathering needs to know, the same for all threads.
struct PixelPlan {
    Patches images;
    Normalisation normalisation;
    int pixels, patches, count;          // of a patch, of an image, in all
    Digits in_patch, in_grid, channels;  // offset of a pixel and of a patch, channel of a pixel
};

// Pixels are walked by kDepth in some products, patches in others.
template <class T>
PixelPlan pixel_plan(const Patches& images, const Normalisation& normalisation) {
    PixelPlan plan{};
    plan.images = images;
    plan.normalisation = normalisation;
    plan.pixels = images.sizes[0] * images.sizes[1] * images.sizes[2] * images.sizes[3];
    plan.patches = images.grid[0] * images.grid[1] * images.grid[2];
    plan.count = images.batch * plan.patches;
    const int* const grid = images.grid;
    const int64_t* const strides = images.grid_strides;
    plan.in_patch = digits(images.sizes, images.strides, kDepth<T>);
    plan.in_grid = digits({images.batch, grid[0], grid[1], grid[2]},
                          {images.batch_stride, strides[0], strides[1], strides[2]}, kDepth<T>);
    plan.channels = digits({1, 1, std::max(normalisation.channels, 1), std::max(normalisation.pixels_inside, 1)},
                           {0, 0, 1, 0}, kDepth<T>);
    return plan;
}

inline Error check(const std::string& kernel, const Patches& images, const Normalisation& normalisation) {
    constexpr int64_t kMost = INT_MAX - kTile;
    const auto product = [](int64_t first, const int* sizes, int count) {
        for (int i = 0; i < count; i++) first = first < 0 || sizes[i] < 0 ? -1 : std::min(first * sizes[i], kMost + 1);
        return first;
    };
    const int64_t pixels = product(1, images.sizes, 4), count = product(images.batch, images.grid, 3);
    if (pixels < 0 || count < 0) return Error(kernel + ": negative sizes");
    if (pixels > kMost || count > kMost) return Error(kernel + ": more patches or pixels than 32 bits number");
    if (images.type == PixelType::kUint8 && (normalisation.channels < 1 || normalisation.pixels_inside < 1)) {
        return Error(kernel + ": uint8 images need mean and std of each channel");
    }
    return {};
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// The thread's part of one tile of patches after another: kVector columns of every kApart-th row.
template <class T, Source kSource, Layout kLayout>
class Gather {
    using Tile = TileOf<T, kLayout>;
    static constexpr int kVector = vector_of<T>(kSource), kAcross = Tile::kColumns / kVector;
    static constexpr int kApart = kThreads / kAcross, kCount = Tile::kRows / kApart;
    static constexpr bool kAsync = kSource == Source::kLines || kSource == Source::kWords;
    static constexpr bool kNormalises = kSource == Source::kBytePairs || kSource == Source::kAny;
    static constexpr int kChannels = kNormalises ? kVector : 1;
    static constexpr PixelType kType = kSource == Source::kBytePairs    ? PixelType::kUint8
                                       : kSource == Source::kFloatPairs ? PixelType::kFloat32
                                                                        : kPixelType<T>;
    using Raw = std::conditional_t<kSource == Source::kFloatPairs, float2, uint32_t>;

  public:
    // Its first column is pixel k0.
    MMK_DEVICE Gather(const PixelPlan& plan, int k0)
        : plan_(plan), column_(static_cast<int>(threadIdx.x) % kAcross * kVector), k_(k0 + column_) {
        pixel_ = Walk(plan.in_patch, k_);
        if (normalises()) {
            for (int i = 0; i < kChannels; i++) channels_[i] = Walk(plan.channels, k_ + i);
            find_factors();
        }
    }

    // rows[r]: the offset of row r's patch; a row without one, -1, becomes zero.
    MMK_DEVICE void fetch(T* tile, const int64_t* rows) {
        const auto* const images = static_cast<const unsigned char*>(plan_.images.data);
        const int size = kSource == Source::kAny ? size_of(plan_.images.type) : size_of(kType);
        each([&](int i, int row) {
            const int64_t start = rows[row];
            const bool valid = start >= 0 && k_ < plan_.pixels;
            const unsigned char* const from = images + (valid ? start + pixel_.offset : 0) * size;
            if constexpr (kAsync) {
                cp_async<kVector* static_cast<int>(sizeof(T))>(tile + row * Tile::kPitch + column_, from, valid);
            } else {
                raw_[i] = {};
                if (valid) load(raw_[i], from, size);
            }
        });
    }

    // Stores what fetch left in registers.
    MMK_DEVICE void put(T* tile) const {
        if constexpr (!kAsync) {
            each([&](int i, int row) {
                T* const to = tile + row * Tile::kPitch + column_;
                if constexpr (kVector == 1) {
                    const float x = float_of(plan_.images.type, raw_[i]);
                    *to = T(normalises() ? factors_[0].apply(x) : x);
                } else {
                    float x[2];
                    if constexpr (kSource == Source::kFloatPairs) {
                        x[0] = raw_[i].x, x[1] = raw_[i].y;
                    } else {
                        x[0] = factors_[0].apply(static_cast<float>(raw_[i] & 0xFF));
                        x[1] = factors_[1].apply(static_cast<float>(raw_[i] >> 8));
                    }
                    const uint32_t both = pack2<T>(x[0], x[1]);
                    memcpy(to, &both, sizeof both);
                }
            });
        }
    }

    // kDepth pixels on.
    MMK_DEVICE void advance() {
        k_ += kDepth<T>;
        pixel_.advance(plan_.in_patch);
        if (normalises()) {
            for (int i = 0; i < kChannels; i++) channels_[i].advance(plan_.channels);
            find_factors();
        }
    }

  private:
    MMK_DEVICE bool normalises() const {
        return kNormalises && (kSource == Source::kBytePairs || plan_.images.type == PixelType::kUint8);
    }

    MMK_DEVICE void find_factors() {
#pragma unroll
        for (int i = 0; i < kChannels; i++) factors_[i] = ChannelFactors<T>(plan_.normalisation, channels_[i].offset);
    }

    template <class F>
    MMK_DEVICE void each(const F& f) const {
        const int first = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
        for (int i = 0; i < kCount; i++) f(i, first + i * kApart);
    }

    MMK_DEVICE static void load(float2& to, const unsigned char* from, int) {
        to = *reinterpret_cast<const float2*>(from);
    }
    MMK_DEVICE static void load(uint32_t& to, const unsigned char* from, int size) {
        if (kSource == Source::kBytePairs || size == 2) {
            to = *reinterpret_cast<const uint16_t*>(from);
        } else if (size == 1) {
            to = *from;
        } else {
            to = *reinterpret_cast<const uint32_t*>(from);
        }
    }

    const PixelPlan& plan_;
    const int column_;
    int k_;
    Walk pixel_, channels_[kChannels];
    ChannelFactors<T> factors_[kChannels];
    Raw raw_[kAsync ? 1 : kCount];
};

// A tile of a dense matrix, rows at source.data + offset(r), columns from `column` to `width`; zeros where there is no
// row, which an offset of -1 says, or no column.
template <class T, Layout kLayout, class Offset>
MMK_DEVICE void copy_tile(T* tile, const Rows& source, const Offset& offset, int column, int width) {
    using Tile = TileOf<T, kLayout>;
    constexpr int kVector = 16 / sizeof(T), kAcross = Tile::kColumns / kVector, kApart = kThreads / kAcross;
    const int c = static_cast<int>(threadIdx.x) % kAcross * kVector, first = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
    for (int i = 0; i < Tile::kRows / kApart; i++) {
        const int row = first + i * kApart;
        const int64_t start = offset(row);
        const bool valid = start >= 0 && column + c < width;
        const T* const from = static_cast<const T*>(source.data) + (valid ? start + column + c : 0);
        cp_async<16>(tile + row * Tile::kPitch + c, from, valid);
    }
}

// The width of rows that zeros fill up.
MMK_DEVICE int filled(int width) { return (width + 7) / 8 * 8; }

// Strides of one row alone may be any.
inline Error check(const std::string& kernel, const char* name, const void* data, bool multiples_of_8) {
    if (is_aligned(data) && multiples_of_8) return {};
    return Error(kernel + ": the rows of " + name +
                 " have to be aligned to 16 bytes, and 8 numbers or a multiple apart");
}

inline Error check(const std::string& kernel, const Rows& weight, int features) {
    return check(kernel, "weight", weight.data, features < 2 || weight.stride % 8 == 0);
}

inline Error check(const std::string& kernel, const TokenGrad& grad, const Patches& images) {
    const bool rows = images.grid[0] * images.grid[1] * images.grid[2] < 2 || grad.row % 8 == 0;
    return check(kernel, "grad", grad.data, rows && (images.batch < 2 || grad.batch % 8 == 0));
}

}  // namespace mmk::cuda::tiles
