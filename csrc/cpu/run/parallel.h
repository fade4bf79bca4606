// Work shared among the threads of the OpenMP runtime that torch has loaded.
#pragma once
#include <cstdint>

namespace mmk {

// The entry points of an OpenMP runtime, called directly instead of through `#pragma omp`: the library then links no
// runtime and cannot bring a second thread pool beside torch's, whatever compiler built it.
struct OpenMp {
    void (*parallel)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);  // GOMP_parallel
    int (*get_max_threads)();
    int (*get_num_threads)();
    int (*get_thread_num)();
};

// The runtime that all below works on; before this nothing of it may run.
void use_openmp(const OpenMp& found);

// Threads the next `run_tasks` of this thread may use: torch.get_num_threads(), or 1 in a forked child, where the
// parent's pool does not exist and entering it would hang.
int num_threads();

// Calls task(context, i) for every i in [0, count), at most num_threads(), at once: call i on thread i of the pool,
// where the pool has that many.
void run_tasks(int64_t count, void (*task)(void*, int64_t), void* context);

// Calls task(context, worker, i, j) for every i and j in [0, n) in diagonal waves: wave t holds the pairs
// (i, (i + t) mod n), which share no i and no j. Two calls that share one never overlap and always come in the order of
// the waves, so sums kept an i and a j are deterministic without a lock. worker < threads: no two calls at work have
// the same.
void run_grid(int64_t n, int threads, void (*task)(void*, int64_t, int64_t, int64_t), void* context);

}  // namespace mmk
