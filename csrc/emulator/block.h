// The threads of the running block, or cluster of blocks, for the files of the emulator: who runs, who waits, and for
// what.
#pragma once
#include <string>

#include "emulator/emulator.h"
#include "emulator/fiber.h"

namespace mmk::emulator {

// Of each thread, and behind these of the copies that complete on each mbarrier, how much of it is known to lie in the
// past; empty unless racing.
using Clock = std::vector<uint32_t>;
constexpr size_t kMostMbarriers = 32;  // in a block
constexpr unsigned kMostBlocks = 8;    // in a cluster
size_t clock_size();

// Every lane of `mask` comes to meet() with its own argument; the last one to come does the work of all.
using WarpWork = void (*)(uint32_t mask, void* const* argument);

// Lanes that came to an operation of their warp and wait for the others.
struct Meeting {
    uint32_t mask, arrived;
    WarpWork work;
    int line;
    void* argument[32];
};

struct Warp {
    int id = 0;
    uint32_t ready = 0;             // lanes that can run
    std::vector<Meeting> meetings;  // several at a time where lanes have parted
};

struct Thread : Fiber {
    int id = 0, lane = 0;  // id: in the cluster, block by block; so are those of warps
    int rank = 0;          // of its block in the cluster
    Warp* warp = nullptr;
    uint3 index{}, block{};
    const char* waits_in = nullptr;
    Site site{};
    bool (*ready)(void*) = nullptr;  // of a wait that polls
    void* ready_argument = nullptr;
    Clock clock;
    uint32_t fenced = 0;  // its clock at the last fence.proxy.async
};

extern Thread* current;  // null outside a kernel
extern std::vector<Thread> threads;
extern size_t block_threads, cluster_blocks;
extern uint32_t cluster_number;  // from 1 on, within the launch

constexpr int kWarp = 32, kWarpgroup = 128;

// Stops the kernel with an error at `site`, or at the access under check where that is {nullptr, 0}.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Site site, const char* format, ...);

void meet(uint32_t mask, WarpWork work, void* argument, const char* what, Site site);

void suspend(const char* what, Site site);  // the calling thread, until wake()
void wake(Thread& thread);

// The calling thread waits until ready(argument), and first of all until nobody else can run.
void poll(bool (*ready)(void*), void* argument, const char* what, Site site);

// The threads of a warpgroup meet; orders no memory between its warps.
void meet_warpgroup(Site site);

// Stops the kernel where a block of this rank is not in the cluster, or has ended.
void check_block(int rank, const char* what, Site site);

const void* host_stack_pointer();  // of the thread that launched

// ---- clocks: what is ordered before what

void release(Thread& thread, Clock& into);  // the past of `thread` becomes part of `into`
void join(Clock& clock, const Clock& other);
void sync_clocks(int warp, uint32_t mask);  // what these lanes did is ordered before what any of them does next

// ---- shared memory: the dynamic part, and behind a margin the static variables

void check_shared(const void* p, size_t bytes, const char* what, Site site);  // of the current thread's block
void* shared_pointer_of(int rank, const void* p);  // what lies there in another block as p does in this one
void check_aligned(const void* p, size_t alignment, const char* what, Site site);

// ---- what the other files do when a block begins, and when a thread or a block ends

void begin_copies(size_t threads);
void end_copies(const Thread& thread);
void begin_mbarriers(size_t threads);
void end_mbarriers();
void begin_bulk_stores(size_t threads);
void end_bulk_stores(Thread& thread);
void begin_wgmma(size_t threads);
void end_wgmma(const Thread& thread);

}  // namespace mmk::emulator
