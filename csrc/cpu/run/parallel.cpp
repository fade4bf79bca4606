#include "cpu/run/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <memory>

// The OpenMP runtime's own entry points, called directly instead of through `#pragma omp`: the library then links no
// runtime and cannot bring a second thread pool beside torch's, whatever compiler built it (LLVM's and Intel's runtimes
// export the same names on Linux). Weak, so that a missing runtime is an error message and not a failed load.
extern "C" {
[[gnu::weak]] void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
[[gnu::weak]] int omp_get_max_threads();
[[gnu::weak]] int omp_get_num_threads();
[[gnu::weak]] int omp_get_thread_num();
}

namespace mmk {
namespace {

std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Team {
    void (*task)(void*, int64_t);
    void* context;
    int64_t count;
};

void work(void* data) {  // the runtime may give fewer threads than were asked for
    const Team& team = *static_cast<Team*>(data);
    for (int64_t i = omp_get_thread_num(); i < team.count; i += omp_get_num_threads()) team.task(team.context, i);
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

bool openmp_present() { return GOMP_parallel != nullptr && omp_get_max_threads != nullptr; }

int num_threads() { return forked ? 1 : omp_get_max_threads(); }

void run_tasks(int64_t count, void (*task)(void*, int64_t), void* context) {
    Team team{task, context, count};
    const int64_t threads = std::min<int64_t>(num_threads(), count);
    if (threads > 1) {
        GOMP_parallel(work, &team, static_cast<unsigned>(threads), 0);
    } else {
        for (int64_t i = 0; i < count; i++) task(context, i);
    }
}

void run_grid(int64_t n, int threads, void (*task)(void*, int64_t, int64_t, int64_t), void* context) {
    Grid grid{task, context, n, {0}, std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(n))};
    run_tasks(std::min<int64_t>(threads, n), walk, &grid);
}

}  // namespace mmk
