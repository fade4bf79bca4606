// The instructions of sm_90a that order and copy: mbarriers, bulk copies, tiles of tensors (TMA), registers of a
// warpgroup. Products are in wgmma.h, the maps of tensors in tensor_map.h.
//
// A kernel that uses these has its body in #if MMK_SM90A, since the file may be compiled for other devices too.
#pragma once
#include "cuda/isa/ptx.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MMK_SM90A 1
#else
#define MMK_SM90A 0
#endif

#ifdef __CUDACC__
#include <cuda.h>
#pragma nv_diag_suppress 177  // where bodies are left out, what only they use is unused
#endif

namespace mmk::cuda {

// ---- mbarriers: a phase ends when `count` threads have arrived and the bytes they expect have come

MMK_DEVICE void mbarrier_init(uint64_t* barrier, int count MMK_SITE) {
#ifdef __CUDACC__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#else
    emulator::mbarrier_init(barrier, count, site);
#endif
}

// By the thread that initialised them, before any copy completes on them.
MMK_DEVICE void mbarrier_init_fence() {
#ifdef __CUDACC__
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
    emulator::mbarrier_init_fence();
#endif
}

MMK_DEVICE void mbarrier_arrive(uint64_t* barrier MMK_SITE) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
    emulator::mbarrier_arrive(barrier, 0, site);
#endif
}

// Arrives, and lets the phase wait for `bytes` of copies besides.
MMK_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes MMK_SITE) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#else
    emulator::mbarrier_arrive(barrier, bytes, site);
#endif
}

// Waits until the phase of this parity is over: 0 for the first, 1 for the second, 0 for the third ...; 1 on a fresh
// barrier returns at once. A phase that ended twice over looks as if it had not: nobody may fall two phases behind.
MMK_DEVICE void mbarrier_wait(uint64_t* barrier, int parity MMK_SITE) {
#ifdef __CUDACC__
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "wait:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra wait;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#else
    emulator::mbarrier_wait(barrier, parity, site);
#endif
}

// What the calling thread stored in shared memory before becomes visible to bulk copies and wgmma; then a barrier.
MMK_DEVICE void async_proxy_fence() {
#ifdef __CUDACC__
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
    emulator::async_proxy_fence();
#endif
}

// True in one lane of a converged warp. With `lane == 0` nvcc wraps each bulk copy in a loop over the lanes. Let it
// enclose a whole loop of waits and copies: a lane that only waits could fall two phases behind.
MMK_DEVICE bool elect_one(MMK_ONLY_SITE) {
#ifdef __CUDACC__
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
#else
    return emulator::elect_one(site);
#endif
}

// Registers a thread of the calling warpgroup may use from here on: a producer gives, consumers take.
template <int kCount>
MMK_DEVICE void release_registers(MMK_ONLY_SITE) {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#else
    emulator::set_max_registers(kCount, site);
#endif
}
template <int kCount>
MMK_DEVICE void take_registers(MMK_ONLY_SITE) {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#else
    emulator::set_max_registers(kCount, site);
#endif
}

// ---- copies into shared memory, by one thread; they complete on a barrier

// `bytes` and both addresses are multiples of 16.
MMK_DEVICE void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier MMK_SITE) {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
#else
    emulator::bulk_load(to, from, bytes, barrier, site);
#endif
}

// The box of a tensor from element `at` on (dimension 0, the dense one, first), zeros where there is no tensor. `to` is
// a multiple of 128, and of the repeat of the map's swizzle (1024 for 128 bytes).
template <int kRank>
MMK_DEVICE void tensor_load(void* to, const CUtensorMap* map, const int (&at)[kRank], uint64_t* barrier MMK_SITE) {
    static_assert(kRank >= 2 && kRank <= 5);
#ifdef __CUDACC__
#define MMK_TENSOR_LOAD(rank, coordinates, ...)                                                  \
    asm volatile("cp.async.bulk.tensor." rank                                                    \
                 ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" coordinates \
                 "}], [%2];" ::"r"(shared_address(to)),                                          \
                 "l"(map), "r"(shared_address(barrier)), __VA_ARGS__                             \
                 : "memory")
    if constexpr (kRank == 2) {
        MMK_TENSOR_LOAD("2d", "%3, %4", "r"(at[0]), "r"(at[1]));
    } else if constexpr (kRank == 3) {
        MMK_TENSOR_LOAD("3d", "%3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]));
    } else if constexpr (kRank == 4) {
        MMK_TENSOR_LOAD("4d", "%3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
    } else {
        MMK_TENSOR_LOAD("5d", "%3, %4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));
    }
#undef MMK_TENSOR_LOAD
#else
    emulator::tensor_load(to, *map, at, kRank, barrier, site);
#endif
}

// ---- copies out of shared memory, by one thread, in groups; async_proxy_fence() and a barrier come before

MMK_DEVICE void bulk_store(void* to, const void* from, int bytes MMK_SITE) {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
                 "r"(bytes)
                 : "memory");
#else
    emulator::bulk_store(to, from, bytes, site);
#endif
}

// What lies outside the tensor is not written.
template <int kRank>
MMK_DEVICE void tensor_store(const CUtensorMap* map, const int (&at)[kRank], const void* from MMK_SITE) {
    static_assert(kRank >= 2 && kRank <= 4);
#ifdef __CUDACC__
#define MMK_TENSOR_STORE(rank, coordinates, ...)                                                  \
    asm volatile("cp.async.bulk.tensor." rank ".global.shared::cta.bulk_group [%0, {" coordinates \
                 "}], [%1];" ::"l"(map),                                                          \
                 "r"(shared_address(from)), __VA_ARGS__                                           \
                 : "memory")
    if constexpr (kRank == 2) {
        MMK_TENSOR_STORE("2d", "%2, %3", "r"(at[0]), "r"(at[1]));
    } else if constexpr (kRank == 3) {
        MMK_TENSOR_STORE("3d", "%2, %3, %4", "r"(at[0]), "r"(at[1]), "r"(at[2]));
    } else {
        MMK_TENSOR_STORE("4d", "%2, %3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
    }
#undef MMK_TENSOR_STORE
#else
    emulator::tensor_store(*map, at, kRank, from, site);
#endif
}

MMK_DEVICE void bulk_store_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
    emulator::bulk_commit();
#endif
}

// Until at most kPending groups still read shared memory. A thread that stored waits so before it ends; what it wrote
// is there when the kernel ends.
template <int kPending>
MMK_DEVICE void bulk_store_wait_read() {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#else
    emulator::bulk_wait(kPending, true);
#endif
}

}  // namespace mmk::cuda
