// The instructions of sm_80 that CUDA C++ has no word for. Layouts are those of the PTX ISA.
#pragma once
#include "cuda/isa/device.h"

namespace mmk::cuda {

MMK_DEVICE uint32_t shared_address(const void* p) {
#ifdef __CUDACC__
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
    return emulator::shared_address(p);
#endif
}

// ---- asynchronous copies: wanted in groups, waited for by group

// Copies kBytes (4, 8 or 16) from global to shared memory, or writes zeros if not `valid`; `from` is not read then.
template <int kBytes>
MMK_DEVICE void cp_async(void* to, const void* from, bool valid MMK_SITE) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef __CUDACC__
    if constexpr (kBytes == 16) {  // past the L1 cache
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(valid ? 16 : 0)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                     "r"(valid ? kBytes : 0)
                     : "memory");
    }
#else
    emulator::cp_async(to, from, kBytes, valid ? kBytes : 0, site);
#endif
}

MMK_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulator::cp_async_commit();
#endif
}

// Waits until at most kPending of the calling thread's groups are under way. Other threads see them after a barrier.
template <int kPending>
MMK_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
    emulator::cp_async_wait(kPending);
#endif
}

// ---- matrices in the registers of a warp; lane = 4 g + t

// Four 8 x 8 matrices of 16-bit numbers. Lane 8 i + r names row r of matrix i; register i of lane 4 g + t gets columns
// 2 t and 2 t + 1 of row g, or, transposed, rows 2 t and 2 t + 1 of column g.
MMK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row MMK_SITE) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::ldmatrix(r, row, 4, false, site);
#endif
}
MMK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row MMK_SITE) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::ldmatrix(r, row, 4, true, site);
#endif
}

#ifdef __CUDACC__
#define MMK_MMA(shape_and_types)                                                    \
    asm volatile("mma.sync.aligned." shape_and_types                                \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

// d (16, 8) += a (16, 16) b (16, 8), T = BFloat16 or Float16:
//   d[i]: row g + 8 (i / 2), column 2 t + i % 2
//   a[i]: row g + 8 (i % 2), columns 2 t + 8 (i / 2) + {0, 1};   b[i]: rows 2 t + 8 i + {0, 1}, column g
template <class T>
MMK_DEVICE void mma(float* d, const uint32_t* a, const uint32_t* b MMK_SITE) {
    constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
#ifdef __CUDACC__
    if constexpr (kBFloat16) {
        MMK_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
    } else {
        MMK_MMA("m16n8k16.row.col.f32.f16.f16.f32");
    }
#else
    emulator::mma(kBFloat16 ? emulator::Number::kBFloat16 : emulator::Number::kFloat16, d, a, b, site);
#endif
}

// d (16, 8) += a (16, 8) b (8, 8) of float32 numbers whose low 13 bits are not looked at; d as above,
//   a[i]: row g + 8 (i % 2), column t + 4 (i / 2);   b[i]: row t + 4 i, column g
MMK_DEVICE void mma_tf32(float* d, const uint32_t* a, const uint32_t* b MMK_SITE) {
#ifdef __CUDACC__
    MMK_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#else
    emulator::mma(emulator::Number::kTf32, d, a, b, site);
#endif
}
#undef MMK_MMA

// x with the 11 bits of tf32, rounded to nearest: what mma_tf32 looks at.
MMK_DEVICE uint32_t round_to_tf32(uint32_t x) {
#ifdef __CUDACC__
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(x)));
    return rounded;
#else
    const bool finite = (x & 0x7F800000) != 0x7F800000;
    return finite ? (x + 0x1000) & ~0x1FFFu : x;
#endif
}

// ---- the rest

// Barrier 1 to 15 (0 is __syncthreads) of `count` threads, a number of whole warps: some wait, some only arrive.
MMK_DEVICE void named_barrier_sync(int id, int count MMK_SITE) {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
#else
    emulator::named_barrier(id, count, true, site);
#endif
}
MMK_DEVICE void named_barrier_arrive(int id, int count MMK_SITE) {
#ifdef __CUDACC__
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
#else
    emulator::named_barrier(id, count, false, site);
#endif
}

// 2^x to 2 ulp; -inf gives 0.
MMK_DEVICE float exp2_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// 1 / x to an ulp, without the branches of a division; inf gives 0.
MMK_DEVICE float reciprocal_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

// x, of which the compiler knows nothing any more: what follows from it is computed where it is needed, rather than
// once and kept in registers.
MMK_DEVICE int opaque(int x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

}  // namespace mmk::cuda
