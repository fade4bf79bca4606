// What a warpgroup of span attention's forward on Hopper keeps in registers, and does between two products: scores into
// weights by a running softmax, and at the end the rows of out and of lse.
#pragma once
#include "cuda/span_attention/device.h"

namespace mmk::cuda::sm90 {

// What thread 32 w + 4 g + t of a warpgroup holds of its 64 queries: rows 16 w + g and, eight further, i = 1. Element e
// of `s` and of `o`: i = e / 2 % 2, column 8 (e / 4) + 2 t + e % 2.
template <class T, int kWidth, int kKeys>
struct Attention {
    float s[kKeys / 2];                     // scores, then weights
    uint32_t weights[kKeys / 16][4];        // rounded, as the left operand of a product
    float o[kWidth / 2] = {};               // sum of weighted values
    float top[2] = {-INFINITY, -INFINITY};  // largest score so far, in units of log 2
    float total[2] = {};                    // this thread's share of the sum of weights
    float fade[2];                          // by how much the last step lessens what was summed before

    // Calls f(s, i, column) of each score.
    template <class F>
    MMK_DEVICE void each(int lane, const F& f) {
#pragma unroll
        for (int e = 0; e < kKeys / 2; e++) f(s[e], e / 2 % 2, e / 4 * 8 + lane % 4 * 2 + e % 2);
    }

    // Scores into weights relative to the largest score so far.
    MMK_DEVICE void weigh(float factor) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float largest = -INFINITY;
#pragma unroll
            for (int e = 2 * i; e < kKeys / 2; e += 4) largest = fmaxf(largest, fmaxf(s[e], s[e + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
            largest = fmaxf(top[i], largest * factor);
            const float pivot = largest == -INFINITY ? 0.0f : largest;  // -inf - -inf is NaN
            fade[i] = exp2_approx(top[i] - pivot);
            top[i] = largest;
            total[i] *= fade[i];
#pragma unroll
            for (int e = 2 * i; e < kKeys / 2; e += 4) {
                s[e] = exp2_approx(s[e] * factor - pivot);
                s[e + 1] = exp2_approx(s[e + 1] * factor - pivot);
                total[i] += s[e] + s[e + 1];
            }
        }
    }

    // In most steps no score of the warp's rows exceeds those before it, and every factor is 1.
    MMK_DEVICE void lessen() {
        if (!__any_sync(kAllLanes, fade[0] != 1.0f || fade[1] != 1.0f)) return;
#pragma unroll
        for (int e = 0; e < kWidth / 2; e++) o[e] *= fade[e / 2 % 2];
    }

    MMK_DEVICE void round_weights() {
#pragma unroll
        for (int e = 0; e < kKeys / 4; e++) weights[e / 4][e % 4] = pack2<T>(s[2 * e], s[2 * e + 1]);
    }

    // What the weights become where values were not finite.
    MMK_DEVICE void make_nan(const int* non_finite_rows, const Spans& spans, int key0, int lane) {
#pragma unroll
        for (int e = 0; e < kKeys / 4; e++) {
            const int i = e % 2, column = e / 2 * 8 + lane % 4 * 2;
            const auto nan = [&](int c) { return non_finite_rows[c] != 0 && spans.see(i, key0 + c) ? 0x7FFFu : 0u; };
            weights[e / 4][e % 4] |= nan(column) | nan(column + 1) << 16;
        }
    }

    // The warp's rows of `out` and of lse.
    MMK_DEVICE void store(const Matrix<T>& out, float* lse, int present, int lane) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            total[i] += __shfl_xor_sync(kAllLanes, total[i], 1);
            total[i] += __shfl_xor_sync(kAllLanes, total[i], 2);
            const bool empty = total[i] == 0;
            const float factor = empty ? 0.0f : 1.0f / total[i];
            const int row = lane / 4 + 8 * i;
            if (lane % 4 == 0 && row < present) lse[row] = empty ? -INFINITY : (top[i] + log2f(total[i])) * kLn2;
#pragma unroll
            for (int n = 0; n < kWidth / 8; n += 4) {
                uint32_t both[4] = {};
#pragma unroll
                for (int j = 0; j < 4 && n + j < kWidth / 8; j++) {
                    const int e = (n + j) * 4 + 2 * i;
                    both[j] = pack2<T>(o[e] * factor, o[e + 1] * factor);
                }
                gather(both, lane);
                if (row < present) store_chunk(out, row, (n + lane % 4) * 8, both);
            }
        }
    }

  private:
    // Lane 4 g + t has two of the eight columns of four chunks, and gets the eight of chunk t: a transposition.
    MMK_DEVICE static void gather(uint32_t (&x)[4], int lane) {
#pragma unroll
        for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                const int low = bit == 1 ? 2 * pair : pair, high = low + bit;
                const bool upper = (lane & bit) != 0;
                const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? x[low] : x[high], bit);
                (upper ? x[low] : x[high]) = other;
            }
        }
    }

    MMK_DEVICE static void store_chunk(const Matrix<T>& out, int row, int column, const uint32_t (&chunk)[4]) {
        if (column >= out.width) return;
        T* const to = out.data + row * out.stride + column;
        if (out.aligned) {
            *reinterpret_cast<uint4*>(to) = {chunk[0], chunk[1], chunk[2], chunk[3]};
            return;
        }
        T numbers[8];
        memcpy(numbers, chunk, sizeof numbers);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (column + j < out.width) to[j] = numbers[j];
        }
    }
};

}  // namespace mmk::cuda::sm90
