// The scheduler: runs the threads of one block, or cluster of blocks, after another in turns, until all have ended or
// none can go on.
#include "emulator/block.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "emulator/barriers.h"
#include "emulator/shadow.h"
#include "emulator/shared_memory.h"

namespace mmk::emulator {

Thread* current;
std::vector<Thread> threads;
size_t block_threads, cluster_blocks;
uint32_t cluster_number;

namespace {

constexpr size_t kMaxThreads = 1024, kMaxSharedBytes = 227 << 10;  // of an H100
constexpr unsigned kMaxGridYZ = 65535;

std::vector<Warp> warps;
Fiber host;  // the caller of run()
const std::function<void()>* kernel;
dim3 block_extent, grid_extent;
std::string error;
size_t ended, ended_of_block[kMostBlocks];
int turn;  // the warp that ran last goes on while it can
uint64_t random_state;

int choose_lane(uint32_t ready) {
    if (options().order == Order::kLowestFirst) return __builtin_ctz(ready);
    if (options().order == Order::kHighestFirst) return 31 - __builtin_clz(ready);
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    for (auto skip = (random_state >> 33) % static_cast<unsigned>(__builtin_popcount(ready)); skip > 0; skip--) {
        ready &= ready - 1;
    }
    return __builtin_ctz(ready);
}

// The next thread that can go on, null if there is none. Those that poll come last: asynchronous work lands late. Warps
// follow in the order of lanes: of two blocks of a cluster now the first ends before the other, now the second.
Thread* choose() {
    const int count = static_cast<int>(warps.size());
    const int step = options().order == Order::kHighestFirst ? count - 1 : 1;
    for (int i = 0; i < count; i++) {
        Warp& warp = warps[(turn + i * step) % count];
        if (warp.ready == 0) continue;
        turn = warp.id;
        const int lane = choose_lane(warp.ready);
        warp.ready &= ~(1u << lane);
        return &threads[warp.id * kWarp + lane];
    }
    for (Thread& thread : threads) {
        if (thread.ready == nullptr || !thread.ready(thread.ready_argument)) continue;
        thread.ready = nullptr;
        turn = thread.warp->id;
        return &thread;
    }
    return nullptr;
}

void run_thread(Fiber& from, Thread* to) {  // null: back to the host
    current = to;
    switch_fiber(from, to != nullptr ? static_cast<Fiber&>(*to) : host);
}

void thread_main() {
    begin_fiber();
    Thread& self = *current;
    (*kernel)();
    end_copies(self);
    end_bulk_stores(self);
    end_wgmma(self);
    self.ended = true;
    ended++;
    ended_of_block[self.rank]++;
    complete_cluster_barrier();
    run_thread(self, choose());
    abort();
}

std::string deadlock() {
    std::string text = "deadlock: ";
    const Thread* shown = nullptr;
    int count = 0;
    for (const Thread& thread : threads) {
        if (thread.ended || count == 4) continue;
        if (shown != nullptr && shown->waits_in == thread.waits_in && shown->site.line == thread.site.line) continue;
        text += "thread " + std::to_string(thread.id) + " waits in " + thread.waits_in + " at " + thread.site.file +
                ":" + std::to_string(thread.site.line) + "; ";
        shown = &thread;
        count++;
    }
    return text + std::to_string(ended) + " of " + std::to_string(threads.size()) + " threads have ended";
}

// x: of the first block.
void begin_cluster(unsigned x, unsigned y, unsigned z) {
    const size_t count = threads.size();
    cluster_number++;
    counters().blocks += cluster_blocks;
    ended = 0;
    for (size_t& of_block : ended_of_block) of_block = 0;
    turn = options().order == Order::kHighestFirst ? static_cast<int>(warps.size()) - 1 : 0;
    poison_shared();
    begin_barriers();
    begin_copies(count);
    begin_mbarriers(count);
    begin_bulk_stores(count);
    begin_wgmma(count);
    for (size_t i = 0; i < count; i++) {
        Thread& thread = threads[i];
        thread = Thread{};
        prepare(thread, i, count, thread_main);
        thread.id = static_cast<int>(i);
        thread.lane = thread.id % kWarp;
        thread.warp = &warps[i / kWarp];
        thread.rank = static_cast<int>(i / block_threads);
        thread.block = {x + static_cast<unsigned>(thread.rank), y, z};
        const unsigned id = static_cast<unsigned>(i % block_threads), row = block_extent.x,
                       plane = row * block_extent.y;
        thread.index = {id % row, id / row % block_extent.y, id / plane};
        thread.clock.assign(clock_size(), 0);
        if (detects_races()) thread.clock[i] = 1;
    }
    for (size_t i = 0; i < warps.size(); i++) {
        const size_t lanes = block_threads - i * kWarp % block_threads;  // in a cluster, warps are whole
        warps[i].id = static_cast<int>(i);
        warps[i].ready = lanes >= kWarp ? ~0u : (1u << lanes) - 1;
        warps[i].meetings.clear();
    }
}

void run_cluster() {
    run_thread(host, choose());
    if (!error.empty()) throw Error(error);
    if (ended != threads.size()) throw Error(deadlock());
    end_barriers();
    end_mbarriers();
}

void check_launch(const Extent& extent) {
    const auto& [grid, block, shared_bytes, cluster] = extent;
    const size_t count = size_t{block.x} * block.y * block.z;
    if (cluster < 1 || cluster > kMostBlocks || grid.x % cluster != 0 || (cluster > 1 && count % kWarpgroup != 0)) {
        throw Error("launch of " + std::to_string(grid.x) + " blocks of " + std::to_string(count) +
                    " threads in clusters of " + std::to_string(cluster));
    }
    if (count < 1 || count > kMaxThreads) throw Error("launch of " + std::to_string(count) + " threads a block");
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x >= 1u << 31 || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
        throw Error("launch of a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                    std::to_string(grid.z) + " blocks");
    }
    if (shared_bytes > kMaxSharedBytes) {
        throw Error("launch with " + std::to_string(shared_bytes) + " bytes of shared memory");
    }
}

}  // namespace

Options& options() {
    static Options value;
    return value;
}
Counters& counters() {
    static Counters value;
    return value;
}

const uint3& thread_index() { return current->index; }
const uint3& block_index() { return current->block; }
const dim3& block_size() { return block_extent; }
const dim3& grid_size() { return grid_extent; }
int lane() { return current->lane; }
int cluster_rank() { return current->rank; }

void run(const Extent& extent, const std::function<void()>& body) {
    static std::mutex one_launch;  // the state above is one machine's
    const std::lock_guard lock(one_launch);
    check_launch(extent);
    const dim3& grid = extent.grid;
    grid_extent = grid;
    block_extent = extent.block;
    block_threads = size_t{extent.block.x} * extent.block.y * extent.block.z;
    cluster_blocks = extent.cluster;
    kernel = &body;
    random_state = options().seed;
    error.clear();
    cluster_number = 0;
    threads.assign(block_threads * cluster_blocks, Thread{});
    warps.assign((threads.size() + kWarp - 1) / kWarp, Warp{});
    const SharedMemory memory(extent.shared_bytes, warps.size());
    begin_launch();
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x += extent.cluster) {
                begin_cluster(x, y, z);
                run_cluster();
            }
        }
    }
}

void check_block(int rank, const char* what, Site site) {
    if (rank < 0 || static_cast<size_t>(rank) >= cluster_blocks) {
        fail(site, "%s: block %d of a cluster of %zu", what, rank, cluster_blocks);
    }
    if (ended_of_block[rank] == block_threads) fail(site, "%s: block %d of the cluster has ended", what, rank);
}

void fail(Site site, const char* format, ...) {
    char text[600], who[120] = "";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    Thread* const thread = current;
    if (thread != nullptr) {
        const int id = thread->id % static_cast<int>(block_threads);
        snprintf(who, sizeof who, "block (%u, %u, %u) thread %d (warp %d, lane %d): ", thread->block.x, thread->block.y,
                 thread->block.z, id, id / kWarp, thread->lane);
    }
    const std::string where = site.file != nullptr ? site.file + (":" + std::to_string(site.line)) : accessed_at();
    error = where + ": " + who + text;
    if (thread == nullptr) throw Error(error);
    run_thread(*thread, nullptr);  // for good: the thread is abandoned, kernels have no destructors to run
    abort();
}

void suspend(const char* what, Site site) {
    Thread& self = *current;
    self.waits_in = what;
    self.site = site;
    Thread* const next = choose();
    if (next != &self) run_thread(self, next);
}

const void* host_stack_pointer() { return host.stack_pointer; }

void poll(bool (*ready)(void*), void* argument, const char* what, Site site) {
    current->ready = ready;
    current->ready_argument = argument;
    suspend(what, site);
}

void wake(Thread& thread) {
    if (&thread != current) thread.warp->ready |= 1u << thread.lane;
}

}  // namespace mmk::emulator
