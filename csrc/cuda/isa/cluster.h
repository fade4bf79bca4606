// Clusters of blocks (sm_90): blocks of a cluster run at the same time on neighbouring multiprocessors, and a copy may
// go to the shared memory of several of them.
//
//   cluster_sync()                  once, when barriers are initialised: nobody reaches another block before
//   tensor_multicast(...)           lands at the same place of each block, and on the same barrier of each
//   mbarrier_arrive_at(empty, i)    so that whoever copies knows when block i may be written to again
//   load_from(i, p)                 what block i has written, and a cluster_sync has ordered before
//   cluster_sync()                  at the end: nobody leaves while others may still reach it
#pragma once
#include "cuda/isa/tma.h"

namespace mmk::cuda {

// The number of the block in its cluster: that of the block modulo the cluster's size.
MMK_DEVICE int cluster_rank() {
#ifdef __CUDACC__
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
#else
    return emulator::cluster_rank();
#endif
}

// By all threads of the cluster but for those that have ended; orders memory between its blocks as __syncthreads does
// within one.
MMK_DEVICE void cluster_sync(MMK_ONLY_SITE) {
#ifdef __CUDACC__
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    emulator::cluster_arrive(site);
    emulator::cluster_wait(site);
#endif
}

// Arrives at the barrier that lies in block `rank` as this one does here.
MMK_DEVICE void mbarrier_arrive_at(uint64_t* barrier, int rank MMK_SITE) {
#ifdef __CUDACC__
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
#else
    emulator::mbarrier_arrive_at(barrier, rank, site);
#endif
}

// What lies in block `rank` as `here`, aligned to 16 bytes, does here.
MMK_DEVICE float4 load_from(int rank, const float4* here MMK_SITE) {
    float4 x;
#ifdef __CUDACC__
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
        "}"
        : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
        : "r"(shared_address(here)), "r"(rank)
        : "memory");
#else
    emulator::load_from(&x, sizeof x, here, rank, site);
#endif
    return x;
}

// A box of two dimensions, as by tensor_load, to the same place of every block whose bit is set; it completes on the
// barrier that lies in each as `barrier` does here.
MMK_DEVICE void tensor_multicast(void* to, const CUtensorMap* map, const int (&at)[2], uint64_t* barrier,
                                 uint16_t blocks MMK_SITE) {
#ifdef __CUDACC__
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "h"(blocks)
        : "memory");
#else
    emulator::tensor_multicast(to, *map, at, 2, barrier, blocks, site);
#endif
}

}  // namespace mmk::cuda
