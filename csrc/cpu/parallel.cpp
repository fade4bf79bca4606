#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>

// The OpenMP runtime's own entry points, called directly instead of through `#pragma omp`: the library then links no
// runtime and cannot bring a second thread pool beside torch's, whatever compiler built it (LLVM's and Intel's runtimes
// export the same names on Linux). Weak, so that a missing runtime is an error message and not a failed load.
extern "C" {
[[gnu::weak]] void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
[[gnu::weak]] int omp_get_max_threads();
}

namespace mmk {
namespace {

std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Team {
    void (*task)(void*, int64_t);
    void* context;
    int64_t count;
    std::atomic<int64_t> next;
};

void work(void* data) {
    Team& team = *static_cast<Team*>(data);
    for (int64_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.count;) team.task(team.context, i);
}

}  // namespace

bool openmp_present() { return GOMP_parallel != nullptr && omp_get_max_threads != nullptr; }

int num_threads() { return forked ? 1 : omp_get_max_threads(); }

void run_tasks(int64_t count, void (*task)(void*, int64_t), void* context) {
    Team team{task, context, count, {0}};
    const int64_t threads = std::min<int64_t>(num_threads(), count);
    if (threads > 1) {
        GOMP_parallel(work, &team, static_cast<unsigned>(threads), 0);
    } else {
        work(&team);
    }
}

}  // namespace mmk
