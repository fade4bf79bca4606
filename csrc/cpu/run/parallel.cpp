#include "cpu/run/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <memory>

namespace mmk {
namespace {

OpenMp runtime;

std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Team {
    void (*task)(void*, int64_t);
    void* context;
    int64_t count;
};

void work(void* data) {  // the runtime may give fewer threads than were asked for
    const Team& team = *static_cast<Team*>(data);
    for (int64_t i = runtime.get_thread_num(); i < team.count; i += runtime.get_num_threads())
        team.task(team.context, i);
}

struct Grid {
    void (*task)(void*, int64_t, int64_t, int64_t);
    void* context;
    int64_t n;
    std::atomic<int64_t> next;
    std::unique_ptr<std::atomic<int64_t>[]> waves;  // how many calls of each i are done
};

void wait_until(const std::atomic<int64_t>& waves, int64_t done) {
    while (waves.load(std::memory_order_acquire) < done) sched_yield();
}

// Takes calls wave after wave. No barrier parts the waves: a call waits just for the two of the wave before that had
// its i and its j. Those were taken earlier, by threads that are at work on them or done, so somebody always goes on.
void walk(void* data, int64_t worker) {
    Grid& grid = *static_cast<Grid*>(data);
    for (int64_t k; (k = grid.next.fetch_add(1, std::memory_order_relaxed)) < grid.n * grid.n;) {
        const int64_t t = k / grid.n, i = k % grid.n;
        wait_until(grid.waves[i], t);
        wait_until(grid.waves[(i + 1) % grid.n], t);
        grid.task(grid.context, worker, i, (i + t) % grid.n);
        grid.waves[i].store(t + 1, std::memory_order_release);
    }
}

}  // namespace

void use_openmp(const OpenMp& found) { runtime = found; }

int num_threads() { return forked ? 1 : runtime.get_max_threads(); }

void run_tasks(int64_t count, void (*task)(void*, int64_t), void* context) {
    Team team{task, context, count};
    const int64_t threads = std::min<int64_t>(num_threads(), count);
    if (threads > 1) {
        runtime.parallel(work, &team, static_cast<unsigned>(threads), 0);
    } else {
        for (int64_t i = 0; i < count; i++) task(context, i);
    }
}

void run_grid(int64_t n, int threads, void (*task)(void*, int64_t, int64_t, int64_t), void* context) {
    Grid grid{task, context, n, {0}, std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(n))};
    run_tasks(std::min<int64_t>(threads, n), walk, &grid);
}

}  // namespace mmk
