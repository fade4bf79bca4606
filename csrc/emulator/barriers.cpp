// The sixteen barriers of a block, of which __syncthreads is number 0, that of a cluster, and the clocks that they
// join.
#include "emulator/barriers.h"

#include <algorithm>

#include "emulator/block.h"

namespace mmk::emulator {
namespace {

constexpr int kNamed = 16, kWarpgroups = 8;

struct Barrier {
    int expected = 0, arrived = 0;
    Site site{};
    bool whole_block = false;
    std::vector<uint32_t> waiting;  // of each warp, the lanes
    std::vector<int> line;          // of each warp, where its lanes arrived
    Clock clock;
};

Barrier barriers[kMostBlocks][kNamed + kWarpgroups];  // of a block; the last ones for meet_warpgroup

struct Arrival {
    int threads;
    bool wait, whole_block, orders_memory;
    const char* what;
};

// That of the cluster: nobody arrives again before it has waited.
struct {
    size_t arrived = 0;
    int phase = 0;
    Clock clock, completed;
    std::vector<Thread*> waiting;
    std::vector<int> calls;  // of each thread: arrivals and waits
} cluster;

void open(Barrier& barrier, const Arrival& arrival, Site site) {
    const size_t warps = (threads.size() + kWarp - 1) / kWarp;
    barrier.expected = arrival.threads;
    barrier.site = site;
    barrier.whole_block = arrival.whole_block;
    barrier.waiting.assign(warps, 0);
    barrier.line.assign(warps, 0);
    barrier.clock.assign(clock_size(), 0);
}

void arrive(int id, const Arrival& arrival, Site site) {
    Barrier& barrier = barriers[current->rank][id];
    if (barrier.arrived == 0) open(barrier, arrival, site);
    if (barrier.expected != arrival.threads) {
        fail(site, "barrier %d: %d threads here, %d at %s:%d", id, arrival.threads, barrier.expected, barrier.site.file,
             barrier.site.line);
    }
    int& line = barrier.line[current->warp->id];
    if (line != 0 && line != site.line) {
        fail(site, "barrier %d: lanes of one warp are at different barriers, others in line %d", id, line);
    }
    if (arrival.whole_block && barrier.whole_block && barrier.site.line != site.line) {
        fail(site, "divergent __syncthreads: other threads are at %s:%d", barrier.site.file, barrier.site.line);
    }
    line = site.line;
    release(*current, barrier.clock);
    if (arrival.wait) barrier.waiting[current->warp->id] |= 1u << current->lane;
    if (++barrier.arrived < barrier.expected) {
        if (arrival.wait) suspend(arrival.what, site);
        return;
    }
    barrier.arrived = 0;
    for (Thread& thread : threads) {
        if ((barrier.waiting[thread.warp->id] >> thread.lane & 1) == 0) continue;
        if (arrival.orders_memory) join(thread.clock, barrier.clock);
        wake(thread);
    }
}

}  // namespace

void begin_barriers() {
    for (auto& of_block : barriers) {
        for (Barrier& barrier : of_block) barrier.arrived = 0;
    }
    cluster = {};
    cluster.calls.assign(threads.size(), 0);
}

void end_barriers() {
    for (const auto& of_block : barriers) {
        for (int id = 0; id < kNamed; id++) {
            const Barrier& barrier = of_block[id];
            if (barrier.arrived == 0) continue;
            throw Error("barrier " + std::to_string(id) + " has " + std::to_string(barrier.arrived) +
                        " arrivals left when the block ends, the first of them at " + barrier.site.file + ":" +
                        std::to_string(barrier.site.line));
        }
    }
    if (cluster.arrived != 0) throw Error("the cluster's barrier has arrivals left when the cluster ends");
}

void sync_threads(Site site) { arrive(0, {static_cast<int>(block_threads), true, true, true, "__syncthreads"}, site); }

void named_barrier(int id, int count, bool wait, Site site) {
    if (id < 0 || id >= kNamed) fail(site, "named barrier %d: there are 16", id);
    if (count < kWarp || count % kWarp != 0 || count > static_cast<int>(block_threads)) {
        fail(site, "named barrier of %d threads: not a number of whole warps of this block", count);
    }
    arrive(id, {count, wait, false, true, "a named barrier"}, site);
}

void meet_warpgroup(Site site) {
    const int group = current->id % static_cast<int>(block_threads) / kWarpgroup;
    if (static_cast<size_t>(group + 1) * kWarpgroup > block_threads) fail(site, "not a whole warpgroup");
    arrive(kNamed + group, {kWarpgroup, true, false, false, "an operation of the warpgroup"}, site);
}

void complete_cluster_barrier() {
    const auto ended = std::count_if(threads.begin(), threads.end(), [](const Thread& thread) { return thread.ended; });
    if (cluster.arrived == 0 || cluster.arrived + static_cast<size_t>(ended) < threads.size()) return;
    cluster.arrived = 0;
    cluster.phase++;
    cluster.completed = cluster.clock;
    for (Thread* const thread : cluster.waiting) wake(*thread);
    cluster.waiting.clear();
}

void cluster_arrive(Site site) {
    int& calls = cluster.calls[static_cast<size_t>(current->id)];
    if (calls++ % 2 != 0) fail(site, "cluster barrier: an arrival before the wait for the one before");
    if (cluster.arrived == 0) cluster.clock.assign(clock_size(), 0);
    release(*current, cluster.clock);
    cluster.arrived++;
    complete_cluster_barrier();
}

void cluster_wait(Site site) {
    int& calls = cluster.calls[static_cast<size_t>(current->id)];
    const int phase = calls++ / 2;  // that it waits for the end of
    if (calls % 2 != 0) fail(site, "cluster barrier: a wait without an arrival");
    if (cluster.phase == phase) {
        cluster.waiting.push_back(current);
        suspend("a cluster's barrier", site);
    }
    join(current->clock, cluster.completed);
}

size_t clock_size() { return detects_races() ? threads.size() + kMostMbarriers * cluster_blocks : 0; }

void join(Clock& clock, const Clock& other) {
    for (size_t i = 0; i < clock.size(); i++) clock[i] = std::max(clock[i], other[i]);
}

void release(Thread& thread, Clock& into) {
    if (!detects_races()) return;
    join(into, thread.clock);
    thread.clock[thread.id]++;
}

void sync_clocks(int warp, uint32_t mask) {
    if (!detects_races()) return;
    Thread* const first = &threads[warp * kWarp];
    Clock all(clock_size(), 0);
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) release(first[__builtin_ctz(lanes)], all);
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) join(first[__builtin_ctz(lanes)].clock, all);
}

}  // namespace mmk::emulator
