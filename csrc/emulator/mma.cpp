// ldmatrix and mma: what the lanes of a warp hold of a matrix, as the PTX ISA lays it out.
#include <algorithm>

#include "emulator/shadow.h"

namespace mmk::emulator {
namespace {

// Lane 4 g + t holds, of each 8 x 8 block of a product, row g and columns 2 t, 2 t + 1.
int row_of(int lane) { return lane / 4; }
int column_of(int lane) { return lane % 4 * 2; }

struct Load {
    uint32_t* registers;
    const void* row;
    int matrices;
    bool transpose;
};

// Lanes 8 i to 8 i + 7 name the rows of matrix i, which goes to register i of every lane.
void load_matrices(uint32_t, void* const* argument) {
    const auto load = [&](int lane) { return *static_cast<const Load*>(argument[lane]); };
    for (int i = 0; i < load(0).matrices; i++) {
        uint16_t matrix[8][8];
        int in_bank[8] = {};  // of the eight groups of four banks that a row can fall into
        for (int row = 0; row < 8; row++) {
            const void* const address = load(i * 8 + row).row;
            memcpy(matrix[row], address, sizeof matrix[row]);
            in_bank[shared_address(address) / 16 % 8]++;
        }
        counters().ldmatrix++;
        counters().bank_conflicts += static_cast<uint64_t>(*std::max_element(in_bank, in_bank + 8) - 1);
        for (int lane = 0; lane < kWarp; lane++) {
            const int row = row_of(lane), column = column_of(lane);
            const bool transpose = load(lane).transpose;
            const uint32_t low = transpose ? matrix[column][row] : matrix[row][column];
            const uint32_t high = transpose ? matrix[column + 1][row] : matrix[row][column + 1];
            load(lane).registers[i] = low | high << 16;
        }
    }
}

struct Product {
    float* d;
    const uint32_t *a, *b;
};

template <int kDepth>
void multiply(const float (&a)[16][kDepth], const float (&b)[kDepth][8], void* const* argument) {
    float sum[16][8] = {};
    for (int i = 0; i < 16; i++) {
        for (int k = 0; k < kDepth; k++) {
            for (int j = 0; j < 8; j++) sum[i][j] += a[i][k] * b[k][j];
        }
    }
    for (int lane = 0; lane < kWarp; lane++) {
        float* const d = static_cast<const Product*>(argument[lane])->d;
        for (int i = 0; i < 4; i++) d[i] += sum[row_of(lane) + i / 2 * 8][column_of(lane) + i % 2];
    }
    counters().mma++;
}

template <float (*kToFloat)(uint16_t)>
void multiply_halves(uint32_t, void* const* argument) {  // m16n8k16
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarp; lane++) {
        const auto& product = *static_cast<const Product*>(argument[lane]);
        const int row = row_of(lane), column = column_of(lane);
        for (int half = 0; half < 2; half++) {
            const auto number = [half](uint32_t bits) { return kToFloat(static_cast<uint16_t>(bits >> 16 * half)); };
            for (int i = 0; i < 4; i++) a[row + i % 2 * 8][column + i / 2 * 8 + half] = number(product.a[i]);
            for (int i = 0; i < 2; i++) b[column + i * 8 + half][row] = number(product.b[i]);
        }
    }
    multiply(a, b, argument);
}

void multiply_tf32(uint32_t, void* const* argument) {  // m16n8k8; the low 13 bits are not looked at
    float a[16][8], b[8][8];
    const auto number = [](uint32_t bits) { return float_of(bits & 0xFFFFE000); };
    for (int lane = 0; lane < kWarp; lane++) {
        const auto& product = *static_cast<const Product*>(argument[lane]);
        const int row = row_of(lane), column = lane % 4;
        for (int i = 0; i < 4; i++) a[row + i % 2 * 8][column + i / 2 * 4] = number(product.a[i]);
        for (int i = 0; i < 2; i++) b[column + i * 4][row] = number(product.b[i]);
    }
    multiply(a, b, argument);
}

}  // namespace

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transpose, Site site) {
    Load load{registers, row, matrices, transpose};
    if (current->lane < matrices * 8) {
        check_aligned(row, 16, "ldmatrix", site);
        check_shared(row, 16, "ldmatrix", site);
        check_read(row, 16, site);
    }
    meet(~0u, load_matrices, &load, "ldmatrix", site);
}

void mma(Number type, float* d, const uint32_t* a, const uint32_t* b, Site site) {
    Product product{d, a, b};
    const WarpWork work = type == Number::kBFloat16  ? multiply_halves<float_of_bfloat16>
                          : type == Number::kFloat16 ? multiply_halves<float_of_half>
                                                     : multiply_tf32;
    meet(~0u, work, &product, "mma", site);
}

}  // namespace mmk::emulator
