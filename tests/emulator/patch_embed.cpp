// Runs the cases of one file through the kernels of patch embedding, each under several orders of threads, which have
// to give the same bits, and writes what they made to another. test_patch_embed.py knows both files.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/patch_embed/call.h"
#include "emulator/emulator.h"

using namespace mmk;
using namespace mmk::cuda;

constexpr emulator::Order kOrders[] = {emulator::Order::kRandom, emulator::Order::kLowestFirst,
                                       emulator::Order::kHighestFirst};

enum Op { kForward, kWeightGrad, kImagesGrad };
struct Blob {  // bytes of a tensor from its first number to its last; `offset` bytes behind an address that is aligned
    int64_t bytes, offset;  // bytes < 0: there is none
};
struct Header {
    int64_t op, type, tf32, features, prefix_rows, position_rows, channels, pixels_inside;
    int64_t image_type, batch, grid[3], batch_stride, grid_strides[3], sizes[4], strides[4];
    int64_t weight_stride, grad_batch, grad_row, row_stride, out_sizes[4], out_strides[4];
    Blob images, weight, mean, std_dev, bias, positions, prefix, grad, out;
};

static std::string case_name;
static int failures = 0;

static void fail(const std::string& why) {
    failures++;
    printf("FAILED %s: %s\n", case_name.c_str(), why.c_str());
}

// Exactly as large as its tensor, so that the sanitizers see what lies beyond.
class Storage {
  public:
    Storage(const Blob& blob, FILE* file) : blob_(blob), bytes_(size(), 0xFF) {
        if (file != nullptr && blob.bytes > 0 &&
            fread(bytes_.data() + blob.offset, 1, static_cast<size_t>(blob.bytes), file) !=
                static_cast<size_t>(blob.bytes)) {
            printf("FAILED: the file of cases ends early\n");
            exit(1);
        }
    }
    void* data() { return blob_.bytes < 0 ? nullptr : bytes_.data() + blob_.offset; }
    void watch(bool initialised) {
        if (blob_.bytes > 0) emulator::watch(data(), static_cast<size_t>(blob_.bytes), initialised);
    }
    bool operator==(const Storage& other) const { return bytes_ == other.bytes_; }
    void write(FILE* file) { fwrite(data(), 1, static_cast<size_t>(blob_.bytes), file); }

  private:
    size_t size() const { return blob_.bytes < 0 ? 0 : static_cast<size_t>(blob_.offset + blob_.bytes); }
    Blob blob_;
    std::vector<uint8_t> bytes_;
};

static Patches patches_of(const Header& h, void* data) {
    Patches p{data, static_cast<PixelType>(h.image_type), static_cast<int>(h.batch), {}, h.batch_stride, {}, {}, {}};
    for (int i = 0; i < 3; i++) p.grid[i] = static_cast<int>(h.grid[i]), p.grid_strides[i] = h.grid_strides[i];
    for (int i = 0; i < 4; i++) p.sizes[i] = static_cast<int>(h.sizes[i]), p.strides[i] = h.strides[i];
    return p;
}

static void run_case(FILE* from, FILE* to, const Header& h, int orders) {
    Storage images(h.images, from), weight(h.weight, from), mean(h.mean, from), std_dev(h.std_dev, from);
    Storage bias(h.bias, from), positions(h.positions, from), prefix(h.prefix, from), grad(h.grad, from);
    Storage first(h.out, nullptr);
    const auto small = [](int64_t size) { return static_cast<int>(size); };
    const Normalisation normalisation{static_cast<const float*>(mean.data()), static_cast<const float*>(std_dev.data()),
                                      small(h.channels), small(h.pixels_inside)};
    const auto type = static_cast<PixelType>(h.type);
    const TokenGrad tokens_grad{grad.data(), h.grad_batch, h.grad_row};
    for (int i = 0; i < orders; i++) {
        emulator::options() = {kOrders[i], 1};
        Storage out(h.out, nullptr);
        PatchEmbed forward{patches_of(h, images.data()),
                           normalisation,
                           {weight.data(), h.weight_stride},
                           type,
                           h.tf32 != 0,
                           bias.data(),
                           positions.data(),
                           prefix.data(),
                           out.data(),
                           small(h.features),
                           small(h.prefix_rows),
                           small(h.position_rows)};
        PatchWeightGrad weight_grad{tokens_grad,
                                    patches_of(h, images.data()),
                                    normalisation,
                                    type,
                                    h.tf32 != 0,
                                    small(h.features),
                                    out.data(),
                                    h.row_stride,
                                    {},
                                    {},
                                    nullptr};
        for (int d = 0; d < 4; d++) {
            weight_grad.d_weight_sizes[d] = small(h.out_sizes[d]);
            weight_grad.d_weight_strides[d] = h.out_strides[d];
        }
        const PatchImagesGrad images_grad{tokens_grad,       {weight.data(), h.weight_stride}, type, h.tf32 != 0,
                                          small(h.features), patches_of(h, out.data())};
        const size_t bytes = h.op == kWeightGrad ? patch_weight_grad_workspace(weight_grad) : 0;
        std::vector<uint8_t> workspace(bytes, 0xFF);
        weight_grad.workspace = workspace.data();
        for (Storage* storage : {&images, &weight, &mean, &std_dev, &bias, &positions, &prefix, &grad}) {
            storage->watch(true);
        }
        out.watch(false);
        if (bytes > 0) emulator::watch(workspace.data(), bytes, false);
        try {
            const Error error = h.op == kForward      ? patch_embed(forward, nullptr)
                                : h.op == kWeightGrad ? patch_weight_grad(weight_grad, nullptr)
                                                      : patch_images_grad(images_grad, nullptr);
            if (error) fail(error.message());
        } catch (const emulator::Error& error) {
            fail(error.what());
        }
        emulator::forget_watched();
        if (i == 0) {
            first = out;
        } else if (!(first == out)) {
            fail("depends on the order of threads");
        }
    }
    first.write(to);
}

int main(int, char** arguments) {
    FILE *const from = fopen(arguments[1], "rb"), *const to = fopen(arguments[2], "wb");
    emulator::counters() = {};
    Header header;
    for (int number = 0; fread(&header, sizeof header, 1, from) == 1; number++) {
        case_name = "case " + std::to_string(number);
        run_case(from, to, header, atoi(arguments[3]));
    }
    fclose(to);
    if (emulator::counters().bank_conflicts != 0) fail("has bank conflicts");
    if (failures == 0) printf("right\n");
    return failures != 0;
}
