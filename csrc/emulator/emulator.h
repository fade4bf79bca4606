// A host emulator of the part of the CUDA execution model that our kernels use: the sources under csrc/cuda compile
// with g++ against it and run on a machine without a GPU.
//
// Execution. One fiber is one CUDA thread. The threads of a block, or of a cluster of blocks, take turns on one host
// thread, blocks and clusters run one after another; a thread gives way only at a warp operation, a barrier or a wait.
// An operation of a warp is a rendezvous: each lane leaves a pointer to its registers, and the last lane to come does
// the work of all.
//
// Asynchrony is lazy and poisoned. A copy lands at the last moment the program allows, its target holds NaN until then;
// so do the accumulators of wgmma. A missing or misplaced wait gives NaN instead of the right number by luck. Shared
// memory is poisoned when a block begins.
//
// Three builds of the same sources:
//   plain  fast. Reports what breaks a rule of the machine: lanes missing from a warp operation, threads that wait for
//          ever, addresses out of shared memory or misaligned, counts of barriers and bytes that do not add up.
//   asan   address and undefined-behaviour sanitizers over kernels and emulator: every access out of bounds.
//   race   each load and store of a kernel is looked up in a shadow memory with vector clocks (shadow.h): unordered
//          accesses of two threads or two blocks, memory read before it is written or while a copy to it is under way,
//          accesses outside every watched tensor, a missing fence between ordinary stores and the async proxy.
//
// Clusters. Blocks of a cluster reach each other's shared memory by multicast copies, by arrivals at each other's
// mbarriers and by loads, and in no other way; nobody may once a block has ended.
//
// Beyond it: stores to another block's shared memory, waiting between clusters, memory ordering weaker than the clocks,
// and time. Sums of products are in float32 in the order of k, the hardware's are not: no comparison to the bit.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "emulator/cuda_types.h"

namespace mmk::emulator {

// A fault of a kernel, with the file and line of it and the thread that met it.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A place in a kernel. As a default argument it is the caller's.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// Which of the threads that could go on does. A kernel must give the same bits in any order.
enum class Order { kLowestFirst, kHighestFirst, kRandom };
struct Options {
    Order order = Order::kLowestFirst;
    uint64_t seed = 1;  // of kRandom
};
Options& options();

// What ran since the counters were last cleared.
struct Counters {
    uint64_t blocks = 0, mma = 0, ldmatrix = 0;
    uint64_t bank_conflicts = 0;     // further passes that ldmatrix needed
    std::vector<int> wgmma_commits;  // which warpgroup committed, in order: shows whether ping-pong takes turns
};
Counters& counters();

// Tensors in global memory, for the race build: it checks their bytes, and once there is one it reports accesses to
// what is in none of them. `initialised`: may be read before it is written.
bool detects_races();
void watch(const void* begin, size_t bytes, bool initialised);
void forget_watched();

// Of a launch. cluster: how many neighbouring blocks along x are one.
struct Extent {
    dim3 grid, block;
    size_t shared_bytes;
    unsigned cluster = 1;
};

// Runs `body` once for every thread of the grid. Throws Error.
void run(const Extent& extent, const std::function<void()>& body);

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Extent& extent, const std::common_type_t<Parameters>&... arguments) {
    const auto body = [&] { kernel(arguments...); };
    run(extent,
        std::cref(body));  // by reference: the race build knows this thread's stack, not its heap
}

// ---- what the running thread sees

const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();
int lane();

void* dynamic_shared();
void* static_shared(const void* variable, size_t bytes);  // one place a block for each `variable`
uint32_t shared_address(const void* p);                   // in the 32-bit window of shared memory
void* shared_pointer(uint32_t address);

// ---- barriers and operations of a warp

void sync_threads(Site site);
void sync_warp(uint32_t mask, Site site);
void named_barrier(int id, int threads, bool wait, Site site);
uint64_t shuffle(uint32_t mask, uint64_t value, int source_lane, Site site);
uint32_t ballot(uint32_t mask, bool vote, Site site);
bool elect_one(Site site);
void atomic_access(const void* p, size_t bytes, Site site);

// ---- copies to shared memory and products of a warp (sm_80)

void cp_async(void* to, const void* from, int bytes, int valid_bytes, Site site);  // zeros from valid_bytes on
void cp_async_commit();
void cp_async_wait(int pending);
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transpose, Site site);

enum class Number { kBFloat16, kFloat16, kTf32 };
void mma(Number type, float* d, const uint32_t* a, const uint32_t* b, Site site);

// ---- mbarriers, bulk copies, tiles of tensors, products of a warpgroup (sm_90a)

void mbarrier_init(uint64_t* barrier, int count, Site site);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* barrier, int expected_bytes, Site site);
void mbarrier_wait(uint64_t* barrier, int parity, Site site);
void async_proxy_fence();

// In a cluster: the number of the running block, and a barrier of all its threads, in two parts.
int cluster_rank();
void cluster_arrive(Site site);
void cluster_wait(Site site);
void mbarrier_arrive_at(uint64_t* barrier, int rank, Site site);                // at the same barrier of another block
void load_from(void* to, size_t bytes, const void* here, int rank, Site site);  // what lies there in another block

void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier, Site site);
void bulk_store(void* to, const void* from, int bytes, Site site);
void bulk_commit();
void bulk_wait(int pending, bool read_only);  // read_only: shared memory may be written again

// Element i of a box of `box` elements a dimension; strides in bytes, dimension 0 is dense. swizzle: 0, 32, 64, 128.
// Returns false where cuTensorMapEncodeTiled would refuse.
bool encode_tensor_map(CUtensorMap& map, int element_bytes, int rank, void* base, const uint64_t* size,
                       const uint64_t* stride, const uint32_t* box, int swizzle);
void tensor_load(void* to, const CUtensorMap& map, const int* at, int rank, uint64_t* barrier, Site site);
// To the same place of every block of the cluster whose bit is set, and on the same barrier of each.
void tensor_multicast(void* to, const CUtensorMap& map, const int* at, int rank, uint64_t* barrier, uint32_t blocks,
                      Site site);
void tensor_store(const CUtensorMap& map, const int* at, int rank, const void* from, Site site);

// d (64, N) = a (64, 16) b (16, N) [+ d]. a comes from registers, or from descriptor_a where `a` is null; m_major_a,
// n_major_b: the operand's other dimension than k is the dense one.
struct Wgmma {
    int n;
    Number type;
    float* d;
    bool accumulate;
    const uint32_t* a;
    uint64_t descriptor_a, descriptor_b;
    bool m_major_a, n_major_b;
};
void wgmma(const Wgmma& product, Site site);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending, std::initializer_list<const float*> accumulators, Site site);
void set_max_registers(int count, Site site);

}  // namespace mmk::emulator
