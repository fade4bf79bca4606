// A kernel for each kind of bug that the emulator claims to report, and its corrected twin, kBug = false, which differs
// in nothing else. `planted NAME bug|good` runs one of them and prints what was reported, "NaN" if the result has one,
// or "nothing".
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/isa/cluster.h"
#include "cuda/isa/launch.h"
#include "cuda/isa/tensor_map.h"
#include "cuda/isa/wgmma.h"

using namespace mmk;
using namespace mmk::cuda;

// 128 threads, 4096 bytes of dynamic shared memory; `in` and `out` are 4096 numbers each, `out` not yet written.
constexpr int kThreads = 128, kNumbers = 4096, kSharedBytes = 4096;
static CUtensorMap matrix_map;  // of `in` as 64 rows of 64, in boxes of 8 rows of 32

#define PLANT(name)      \
    template <bool kBug> \
    __global__ void name([[maybe_unused]] const float* in, [[maybe_unused]] float* out)
#define SHARED_FLOATS(s)           \
    MMK_DYNAMIC_SHARED(s##_bytes); \
    float* const s = reinterpret_cast<float*>(s##_bytes)
#define THREAD const int t = static_cast<int>(threadIdx.x)

// ---- barriers and warps

PLANT(missing_syncthreads) {
    SHARED_FLOATS(s);
    THREAD;
    s[t] = 1;
    if (!kBug) __syncthreads();
    out[t] = s[t ^ 32];
}
PLANT(missing_syncwarp) {
    SHARED_FLOATS(s);
    THREAD;
    s[t] = 1;
    if (!kBug) __syncwarp();
    out[t] = s[t ^ 1];
}
PLANT(write_after_read) {
    SHARED_FLOATS(s);
    THREAD;
    for (int i = 0; i < 3; i++) {
        s[t] = 1;
        __syncthreads();
        out[t] = s[(t + 64) % kThreads];
        if (!kBug) __syncthreads();
    }
}
PLANT(warps_race_through_static_shared) {
    MMK_SHARED(int, count, 1);
    THREAD;
    if (t == 0) count[0] = 0;
    __syncthreads();
    if (kBug) count[0]++;
    if (!kBug) atomicAdd(&count[0], 1);
    __syncthreads();
    out[t] = static_cast<float>(count[0]);
}
PLANT(uninitialised_shared) {
    SHARED_FLOATS(s);
    THREAD;
    if (t < (kBug ? 100 : kThreads)) s[t] = 1;
    __syncthreads();
    out[t] = s[t];
}
PLANT(uninitialised_register) {
    THREAD;
    float x[4];
    for (int i = 0; i < (kBug ? 3 : 4); i++) x[i] = in[t];
    out[t] = std::abs(x[t % 4]) <= 1 ? 1 : NAN;  // the pattern of the emulator's builds is far beyond 1
}
PLANT(divergent_barrier) {
    THREAD;
    if (!kBug || t < 16) __syncthreads();
}
PLANT(two_barriers) {
    THREAD;
    if (!kBug || t < 64)
        __syncthreads();
    else
        __syncthreads();
}
PLANT(named_barrier_counts) {
    THREAD;
    if (t < 64)
        named_barrier_sync(1, kBug ? 64 : 128);
    else
        named_barrier_sync(1, 128);
}
PLANT(named_barrier_left_over) {
    THREAD;
    if (t < 64)
        named_barrier_arrive(1, 128);
    else if (!kBug)
        named_barrier_sync(1, 128);
}
PLANT(named_barrier_part_of_a_warp) { named_barrier_sync(1, kBug ? 100 : 128); }
PLANT(shuffle_without_a_lane) {
    THREAD;
    if (!kBug || t % 32 != 7) out[t] = __shfl_xor_sync(kAllLanes, 1.0f, 1);
}
PLANT(shuffle_from_outside) {
    THREAD;
    if (t % 32 < 16) out[t] = __shfl_xor_sync(0xFFFFu, 1.0f, kBug ? 16 : 8);
}
PLANT(shuffle_of_another_mask) {
    THREAD;
    out[t] = __shfl_xor_sync(kBug && t % 32 < 16 ? 0xFFFFu : kAllLanes, 1.0f, 8);
}
PLANT(mma_in_a_branch) {
    THREAD;
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (!kBug || t % 32 < 31) mma<Float16>(d, a, b);
    out[t] = d[0];
}
PLANT(elect_in_a_branch) {
    THREAD;
    if (kBug ? t == 0 : t < 32) elect_one();
}

// ---- cp.async

PLANT(copy_without_wait) {
    SHARED_FLOATS(s);
    THREAD;
    cp_async<16>(s + t * 4, in + t * 4, true);
    cp_async_commit();
    if (!kBug) cp_async_wait<0>();
    out[t] = s[t * 4];
    cp_async_wait<0>();
}
PLANT(wait_too_weak) {
    SHARED_FLOATS(s);
    THREAD;
    cp_async<16>(s + t * 4, in + t * 4, true);
    cp_async_commit();
    cp_async_wait<kBug ? 1 : 0>();
    out[t] = s[t * 4];
    cp_async_wait<0>();
}
PLANT(commit_too_late) {
    SHARED_FLOATS(s);
    THREAD;
    cp_async<16>(s + t * 4, in + t * 4, true);
    if (!kBug) cp_async_commit();
    cp_async_wait<0>();
    out[t] = s[t * 4];
    cp_async_commit();
    cp_async_wait<0>();
}
PLANT(wait_without_barrier) {
    SHARED_FLOATS(s);
    THREAD;
    cp_async<16>(s + t * 4, in + t * 4, true);
    cp_async_commit();
    cp_async_wait<0>();
    if (!kBug) __syncthreads();
    out[t] = s[(t ^ 64) * 4];
}
PLANT(copy_into_a_live_buffer) {
    SHARED_FLOATS(s);
    THREAD;
    for (int i = 0; i < 2; i++) {
        cp_async<16>(s + t * 4, in + t * 4, true);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        out[t] = s[(t ^ 64) * 4];
        if (!kBug) __syncthreads();
    }
}
PLANT(copy_never_waited_for) {
    SHARED_FLOATS(s);
    THREAD;
    cp_async<16>(s + t * 4, in, true);
    cp_async_commit();
    if (!kBug) cp_async_wait<0>();
}
PLANT(copy_never_committed) {
    SHARED_FLOATS(s);
    THREAD;
    cp_async<16>(s + t * 4, in, true);
    if (!kBug) cp_async_commit();
    cp_async_wait<0>();
}
PLANT(misaligned_copy) {
    SHARED_FLOATS(s);
    THREAD;
    cp_async<16>(s + t * 4, in + (kBug ? 1 : 4), true);
    cp_async_commit();
    cp_async_wait<0>();
}
PLANT(misaligned_ldmatrix) {
    SHARED_FLOATS(s);
    THREAD;
    for (int i = t; i < 1024; i += kThreads) s[i] = 0;
    __syncthreads();
    uint32_t r[4];
    ldmatrix_x4(r, s_bytes + t % 32 * (kBug ? 18 : 16));
}

// ---- bounds and alignment

PLANT(shared_overrun) {
    SHARED_FLOATS(s);
    THREAD;
    s[kSharedBytes / 4 - kThreads + t + (kBug ? 1 : 0)] = 1;
}
PLANT(static_shared_overrun) {
    MMK_SHARED(float, s, kThreads);
    THREAD;
    float* const p = s;
    p[t + (kBug ? 1 : 0)] = 1;
}
PLANT(copy_overruns_shared) {
    SHARED_FLOATS(s);
    THREAD;
    cp_async<16>(s_bytes + kSharedBytes - (kBug ? 100 : kThreads) * 16 + t * 16, in, true);
    cp_async_commit();
    cp_async_wait<0>();
    static_cast<void>(s);
}
PLANT(global_read_overrun) {
    THREAD;
    out[t] = in[kNumbers - kThreads + t + (kBug ? 1 : 0)];
}
PLANT(global_write_overrun) {
    THREAD;
    out[kNumbers - kThreads + t + (kBug ? 1 : 0)] = 1;
}
PLANT(copy_reads_outside) {
    SHARED_FLOATS(s);
    THREAD;
    cp_async<16>(s + t * 4, in + kNumbers + t * 4, !kBug ? false : true);
    cp_async_commit();
    cp_async_wait<0>();
}
PLANT(register_array_overrun) {
    THREAD;
    float x[4] = {1, 1, 1, 1};
    volatile int i = kBug ? 4 : 3;
    out[t] = x[i];
}
PLANT(misaligned_vector) {
    THREAD;
    out[t] = reinterpret_cast<const float4*>(in + (kBug ? 1 : 4) * t)->x;
}
PLANT(blocks_collide) { out[threadIdx.x + blockIdx.x * (kBug ? 127 : 128)] = 1; }
PLANT(read_of_another_block) {
    THREAD;
    out[static_cast<int>(blockIdx.x) * kThreads + t] = 1;
    if (blockIdx.x == 1) out[2 * kThreads + t] = out[kBug ? t : kThreads + t];
}

// ---- mbarriers and bulk copies

// Thread 0 initialises a barrier for `count` arrivals; returns it.
MMK_DEVICE uint64_t* new_barrier(int count, bool fence = true, bool sync = true, int place = 1022) {
    SHARED_FLOATS(s);
    uint64_t* const barrier = reinterpret_cast<uint64_t*>(s + place);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, count);
        if (fence) mbarrier_init_fence();
    }
    if (sync) __syncthreads();
    return barrier;
}
MMK_DEVICE void load_numbers(float* to, const float* from, uint64_t* barrier, int expected = kThreads * 4) {
    if (threadIdx.x != 0) return;
    mbarrier_arrive_expect(barrier, expected);
    bulk_load(to, from, kThreads * 4, barrier);
}

PLANT(bulk_copy_without_wait) {
    SHARED_FLOATS(s);
    THREAD;
    uint64_t* const barrier = new_barrier(1);
    load_numbers(s, in, barrier);
    if (!kBug) mbarrier_wait(barrier, 0);
    out[t] = s[t];
    mbarrier_wait(barrier, 0);
}
PLANT(wrong_parity) {
    SHARED_FLOATS(s);
    THREAD;
    uint64_t* const barrier = new_barrier(1);
    load_numbers(s, in, barrier);
    mbarrier_wait(barrier, kBug ? 1 : 0);
    out[t] = s[t];
    mbarrier_wait(barrier, 0);
}
PLANT(wrong_parity_of_the_second_phase) {
    SHARED_FLOATS(s);
    THREAD;
    uint64_t* const barrier = new_barrier(1);
    for (int i = 0; i < 2; i++) {
        load_numbers(s, in, barrier);
        mbarrier_wait(barrier, kBug ? 0 : i);
        out[t] = s[t];
        __syncthreads();
    }
    mbarrier_wait(barrier, 1);
}
PLANT(wrong_byte_count) {
    SHARED_FLOATS(s);
    uint64_t* const barrier = new_barrier(1);
    load_numbers(s, in, barrier, kBug ? 528 : 512);
    mbarrier_wait(barrier, 0);
}
PLANT(arrival_missing) {
    uint64_t* const barrier = new_barrier(kBug ? 129 : 128);
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, 0);
}
PLANT(no_init_fence) {
    SHARED_FLOATS(s);
    uint64_t* const barrier = new_barrier(1, !kBug);
    load_numbers(s, in, barrier);
    mbarrier_wait(barrier, 0);
}
PLANT(no_sync_after_init) {
    uint64_t* const barrier = new_barrier(128, true, !kBug);
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, 0);
}
PLANT(mbarrier_does_not_order) {  // those who write arrive, or not
    SHARED_FLOATS(s);
    THREAD;
    uint64_t* const barrier = new_barrier(kThreads);
    if (kBug) mbarrier_arrive(barrier);
    s[t] = 1;
    if (!kBug) mbarrier_arrive(barrier);
    mbarrier_wait(barrier, 0);
    out[t] = s[t ^ 64];
}
PLANT(arrivals_too_few) {  // of three warps that write, the fourth is sure of one
    SHARED_FLOATS(s);
    THREAD;
    uint64_t* const barrier = new_barrier(kBug ? 1 : 3);
    if (t < 96) {
        s[t] = 1;
        __syncwarp();
        if (t % 32 == 0) mbarrier_arrive(barrier);
        return;
    }
    mbarrier_wait(barrier, 0);
    for (int i = 0; i < 96; i += 32) out[t - i] = s[t - 32 - i];
}
PLANT(copy_that_another_warp_waited_for) {  // that a later one was issued and has ended says nothing of it
    SHARED_FLOATS(s);
    THREAD;
    uint64_t* const barrier = new_barrier(1);
    uint64_t* const later = new_barrier(1, true, true, 1020);
    load_numbers(s, in, barrier);
    load_numbers(s + kThreads, in, later);
    if (!kBug || t < 32) mbarrier_wait(barrier, 0);
    mbarrier_wait(later, 0);
    out[t] = s[t];
}
PLANT(bulk_copy_in_flight_at_the_end) {
    SHARED_FLOATS(s);
    uint64_t* const barrier = new_barrier(1);
    load_numbers(s, in, barrier);
    if (!kBug) mbarrier_wait(barrier, 0);
}
PLANT(bulk_copy_over_unfenced_stores) {
    SHARED_FLOATS(s);
    THREAD;
    s[t] = 1;
    if (!kBug) async_proxy_fence();
    uint64_t* const barrier = new_barrier(1);  // a __syncthreads() within
    load_numbers(s, in, barrier);
    mbarrier_wait(barrier, 0);
}
PLANT(tile_off_its_alignment) {
    SHARED_FLOATS(s);
    THREAD;
    uint64_t* const barrier = new_barrier(1);
    if (t == 0) {
        mbarrier_arrive_expect(barrier, 1024);
        tensor_load(s + (kBug ? 16 : 32), &matrix_map, {0, 0}, barrier);
    }
    mbarrier_wait(barrier, 0);
}
PLANT(store_without_proxy_fence) {
    SHARED_FLOATS(s);
    THREAD;
    s[t] = 1;
    if (!kBug) async_proxy_fence();
    __syncthreads();
    if (t != 0) return;
    bulk_store(out, s, kThreads * 4);
    bulk_store_commit();
    bulk_store_wait_read<0>();
}
PLANT(overwritten_while_stored) {
    SHARED_FLOATS(s);
    THREAD;
    s[t] = 1;
    async_proxy_fence();
    __syncthreads();
    if (t != 0) return;
    bulk_store(out, s, kThreads * 4);
    bulk_store_commit();
    if (!kBug) bulk_store_wait_read<0>();
    s[5] = NAN;
    bulk_store_wait_read<0>();
}
PLANT(store_never_waited_for) {
    SHARED_FLOATS(s);
    THREAD;
    s[t] = 1;
    async_proxy_fence();
    __syncthreads();
    if (t != 0) return;
    bulk_store(out, s, kThreads * 4);
    bulk_store_commit();
    if (!kBug) bulk_store_wait_read<0>();
}
template <int kCount>
MMK_DEVICE void registers() {
    release_registers<kCount>();
}
PLANT(bad_register_count) { registers<kBug ? 20 : 24>(); }

// ---- wgmma: operands of 64 x 16 zeros, 2048 bytes without a swizzle

MMK_DEVICE uint64_t zeros(bool proxy_fence = true, int count = kSharedBytes / 4) {
    SHARED_FLOATS(s);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) s[i] = 0;
    if (proxy_fence) async_proxy_fence();
    __syncthreads();
    return matrix_descriptor(shared_address(s), 128, 256, Swizzle::kNone);
}
template <int kCount>
MMK_DEVICE void multiply(float (&d)[kCount], uint64_t operand, bool accumulate = false) {
    wgmma<BFloat16, Major::kK, Major::kK>(d, operand, operand, accumulate);
    wgmma_commit();
}

PLANT(wgmma_without_fence) {
    float d[32];
    const uint64_t operand = zeros();
    if (!kBug) wgmma_fence();
    multiply(d, operand);
    wgmma_wait<0>(d);
}
PLANT(wgmma_without_proxy_fence) {
    float d[32];
    const uint64_t operand = zeros(!kBug);
    wgmma_fence();
    multiply(d, operand);
    wgmma_wait<0>(d);
}
PLANT(wgmma_without_wait) {
    THREAD;
    float d[32];
    const uint64_t operand = zeros();
    wgmma_fence();
    multiply(d, operand);
    if (!kBug) wgmma_wait<0>(d);
    out[t] = d[3];
    wgmma_wait<0>(d);
}
PLANT(wgmma_wait_too_weak) {
    THREAD;
    float d[32], e[32];
    const uint64_t operand = zeros();
    wgmma_fence();
    multiply(d, operand);
    multiply(e, operand);
    wgmma_wait<kBug ? 1 : 0>(d, e);
    wgmma_wait<0>();
    out[t] = d[0] + e[0];
}
PLANT(wait_does_not_name_the_accumulator) {
    THREAD;
    float d[32];
    const uint64_t operand = zeros();
    wgmma_fence();
    multiply(d, operand);
    if (kBug) wgmma_wait<0>();
    if (!kBug) wgmma_wait<0>(d);
    out[t] = d[31];
}
PLANT(accumulator_written_in_flight) {
    float d[32];
    const uint64_t operand = zeros();
    wgmma_fence();
    multiply(d, operand);
    if (!kBug) wgmma_wait<0>(d);
    for (float& x : d) x = 0;
    wgmma_fence();
    multiply(d, operand, true);
    wgmma_wait<0>(d);
}
PLANT(wgmma_in_flight_at_the_end) {
    float d[32];
    const uint64_t operand = zeros();
    wgmma_fence();
    multiply(d, operand);
    if (!kBug) wgmma_wait<0>(d);
}
PLANT(wgmma_by_three_warps) {
    THREAD;
    float d[32];
    const uint64_t operand = zeros();
    if (kBug && t >= 96) return;
    wgmma_fence();
    multiply(d, operand);
    wgmma_wait<0>(d);
}
PLANT(operand_off_its_swizzle) {
    SHARED_FLOATS(s);
    float d[4];
    const uint64_t a = zeros();
    const uint64_t b = matrix_descriptor(shared_address(s) + (kBug ? 512 : 1024), 16, 1024, Swizzle::k128);
    wgmma_fence();
    wgmma<BFloat16, Major::kK, Major::kK>(d, a, b, false);
    wgmma_commit();
    wgmma_wait<0>(d);
}
PLANT(operand_outside_shared_memory) {
    float d[32];
    const uint64_t operand = zeros();
    SHARED_FLOATS(s);
    const uint64_t beyond = matrix_descriptor(shared_address(s) + kSharedBytes - 1024, 128, 256, Swizzle::kNone);
    wgmma_fence();
    multiply(d, kBug ? beyond : operand);
    wgmma_wait<0>(d);
}
PLANT(operand_released_by_one_warp) {  // overwritten when the warpgroup has released it
    SHARED_FLOATS(s);
    THREAD;
    float d[32];
    uint64_t* const barrier = new_barrier(kBug ? 1 : 4);
    const uint64_t operand = zeros(true, 512);
    wgmma_fence();
    multiply(d, operand);
    wgmma_wait<0>(d);
    if (kBug ? t == 0 : t % 32 == 0) mbarrier_arrive(barrier);
    if (t != 127) return;
    mbarrier_wait(barrier, 0);
    s[0] = 1;
}

// ---- running one of them

// ---- clusters: what a thread of block 0 copies to both blocks

constexpr int kBoxBytes = 8 * 32 * sizeof(float);

MMK_DEVICE void copy_to_both(float* s, uint64_t* barrier) {
    if (threadIdx.x != 0) return;
    mbarrier_arrive_expect(barrier, kBoxBytes);
    if (cluster_rank() == 0) tensor_multicast(s, &matrix_map, {0, 0}, barrier, 3);
}

PLANT(cluster_not_ready) {  // the other block has not made its barrier yet
    SHARED_FLOATS(s);
    THREAD;
    uint64_t* const barrier = new_barrier(1);
    if (!kBug) cluster_sync();
    copy_to_both(s, barrier);
    mbarrier_wait(barrier, 0);
    out[cluster_rank() * kThreads + t] = s[t];
    cluster_sync();
}
PLANT(live_in_the_other_block) {  // block 0 waits for the readers of both before it copies again, or for its own
    SHARED_FLOATS(s);
    THREAD;
    uint64_t* const full = new_barrier(1);
    uint64_t* const empty = new_barrier(kBug ? kThreads : 2 * kThreads, true, true, 1020);
    cluster_sync();
    for (int i = 0; i < 2; i++) {
        copy_to_both(s, full);
        mbarrier_wait(full, i);
        out[(2 * i + cluster_rank()) * kThreads + t] = s[t];
        if (!kBug || cluster_rank() == 0) mbarrier_arrive_at(empty, 0);
        if (cluster_rank() == 0) mbarrier_wait(empty, i);
    }
    cluster_sync();
}
PLANT(bytes_of_the_other_block) {  // a box from each, of which one is waited for
    SHARED_FLOATS(s);
    THREAD;
    uint64_t* const barrier = new_barrier(1);
    cluster_sync();
    if (t == 0) {
        mbarrier_arrive_expect(barrier, kBug ? kBoxBytes : 2 * kBoxBytes);
        tensor_multicast(s + cluster_rank() * kBoxBytes / 4, &matrix_map, {0, 0}, barrier, 3);
    }
    mbarrier_wait(barrier, 0);
    out[cluster_rank() * kThreads + t] = s[(1 - cluster_rank()) * kBoxBytes / 4 + t];
    cluster_sync();
}
PLANT(left_the_cluster) {  // block 1 calls, and does not wait for the answer
    THREAD;
    uint64_t* const barrier = new_barrier(1);
    cluster_sync();
    if (cluster_rank() == 1 && t == 0) mbarrier_arrive_at(barrier, 0);
    if (cluster_rank() == 0) mbarrier_wait(barrier, 0);
    if (cluster_rank() == 0 && t == 0) mbarrier_arrive_at(barrier, 1);
    if (cluster_rank() == 1 && !kBug) mbarrier_wait(barrier, 0);
}
PLANT(numbers_of_the_other_block) {  // are read before it has written them
    SHARED_FLOATS(s);
    THREAD;
    s[t] = static_cast<float>(t);
    if (!kBug) cluster_sync();
    const float4 its = load_from(1 - cluster_rank(), reinterpret_cast<const float4*>(s) + t / 4);
    out[cluster_rank() * kThreads + t] = its.x;
    cluster_sync();
}
PLANT(outside_the_cluster) {
    uint64_t* const barrier = new_barrier(2 * kThreads);
    cluster_sync();
    for (int rank = 0; rank < 2; rank++) mbarrier_arrive_at(barrier, kBug ? rank + 1 : rank);
    mbarrier_wait(barrier, 0);
    cluster_sync();
}

using Kernel = void (*)(const float*, float*);
struct Plant {
    const char* name;
    Kernel bug, good;
    int blocks = 1;
    unsigned cluster = 1;
};
#define ENTRY(name) {#name, name<true>, name<false>}
#define CLUSTER(name) {#name, name<true>, name<false>, 2, 2}
static const Plant kPlants[] = {
    ENTRY(missing_syncthreads),
    ENTRY(missing_syncwarp),
    ENTRY(write_after_read),
    ENTRY(warps_race_through_static_shared),
    ENTRY(uninitialised_shared),
    ENTRY(uninitialised_register),
    ENTRY(divergent_barrier),
    ENTRY(two_barriers),
    ENTRY(named_barrier_counts),
    ENTRY(named_barrier_left_over),
    ENTRY(named_barrier_part_of_a_warp),
    ENTRY(shuffle_without_a_lane),
    ENTRY(shuffle_from_outside),
    ENTRY(shuffle_of_another_mask),
    ENTRY(mma_in_a_branch),
    ENTRY(elect_in_a_branch),
    ENTRY(copy_without_wait),
    ENTRY(wait_too_weak),
    ENTRY(commit_too_late),
    ENTRY(wait_without_barrier),
    ENTRY(copy_into_a_live_buffer),
    ENTRY(copy_never_waited_for),
    ENTRY(copy_never_committed),
    ENTRY(misaligned_copy),
    ENTRY(misaligned_ldmatrix),
    ENTRY(shared_overrun),
    ENTRY(static_shared_overrun),
    ENTRY(copy_overruns_shared),
    ENTRY(global_read_overrun),
    ENTRY(global_write_overrun),
    ENTRY(copy_reads_outside),
    ENTRY(register_array_overrun),
    ENTRY(misaligned_vector),
    {"blocks_collide", blocks_collide<true>, blocks_collide<false>, 2},
    {"read_of_another_block", read_of_another_block<true>, read_of_another_block<false>, 2},
    ENTRY(bulk_copy_without_wait),
    ENTRY(wrong_parity),
    ENTRY(wrong_parity_of_the_second_phase),
    ENTRY(wrong_byte_count),
    ENTRY(arrival_missing),
    ENTRY(no_init_fence),
    ENTRY(no_sync_after_init),
    ENTRY(mbarrier_does_not_order),
    ENTRY(arrivals_too_few),
    ENTRY(copy_that_another_warp_waited_for),
    ENTRY(bulk_copy_in_flight_at_the_end),
    ENTRY(bulk_copy_over_unfenced_stores),
    ENTRY(tile_off_its_alignment),
    ENTRY(store_without_proxy_fence),
    ENTRY(overwritten_while_stored),
    ENTRY(store_never_waited_for),
    ENTRY(bad_register_count),
    ENTRY(wgmma_without_fence),
    ENTRY(wgmma_without_proxy_fence),
    ENTRY(wgmma_without_wait),
    ENTRY(wgmma_wait_too_weak),
    ENTRY(wait_does_not_name_the_accumulator),
    ENTRY(accumulator_written_in_flight),
    ENTRY(wgmma_in_flight_at_the_end),
    ENTRY(wgmma_by_three_warps),
    ENTRY(operand_off_its_swizzle),
    ENTRY(operand_outside_shared_memory),
    ENTRY(operand_released_by_one_warp),
    CLUSTER(cluster_not_ready),
    CLUSTER(live_in_the_other_block),
    CLUSTER(bytes_of_the_other_block),
    CLUSTER(left_the_cluster),
    CLUSTER(numbers_of_the_other_block),
    CLUSTER(outside_the_cluster),
};

int main(int, char** arguments) {
    const auto found = std::find_if(std::begin(kPlants), std::end(kPlants),
                                    [&](const Plant& plant) { return strcmp(plant.name, arguments[1]) == 0; });
    if (found == std::end(kPlants)) return 2;
    const Kernel kernel = strcmp(arguments[2], "bug") == 0 ? found->bug : found->good;
    float* const in = static_cast<float*>(std::aligned_alloc(128, kNumbers * sizeof(float)));
    float* const out = static_cast<float*>(std::aligned_alloc(128, kNumbers * sizeof(float)));
    std::fill_n(in, kNumbers, 1.0f);
    std::fill_n(out, kNumbers, 0.0f);
    emulator::watch(in, kNumbers * sizeof(float), true);
    emulator::watch(out, kNumbers * sizeof(float), false);
    const TensorLayout<2> matrix{in, {64, 64}, {256}, {32, 8}, RowSwizzle::k128};
    std::string report = "nothing";
    try {
        if (const Error error = encode<float>(matrix_map, "planted", matrix)) report = error.message();
        const Launch at{"planted",     static_cast<unsigned>(found->blocks), kThreads, kSharedBytes, nullptr,
                        found->cluster};
        if (const Error error = launch(at, kernel, in, out)) report = error.message();
        if (std::any_of(out, out + kNumbers, [](float x) { return std::isnan(x); })) report = "NaN";
    } catch (const emulator::Error& error) {
        report = error.what();
    }
    printf("%s\n", report.c_str());
    std::free(in);
    std::free(out);
}
