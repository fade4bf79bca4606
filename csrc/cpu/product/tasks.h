// Loops whose iterations are shared among threads.
#pragma once
#include <algorithm>

#include "cpu/product/amx.h"
#include "cpu/run/parallel.h"
#include "cpu/run/scratch.h"
#include "cpu/simd.h"

namespace mmk::MMK_ISA {

// Threads worth waking for this much arithmetic: entering a parallel region costs what a million operations do.
static MMK_INLINE int useful_threads(double flops) { return flops < 1e6 ? 1 : num_threads(); }

// [0, count) for `workers` threads. Each takes its own share first, the same one whenever a loop is run again, and
// finds in its caches what it left there the time before; a share whose owner is late is helped with. So which thread
// takes an index is open, and nothing may depend on it.
class Shares {
  public:
    Shares(int64_t count, int64_t workers) : count_(count), workers_(workers), next_(workers * kSpread) {
        for (int64_t w = 0; w < workers; w++) next_.get()[w * kSpread] = first(w);
    }

    // body(i) for every index that no other thread takes.
    template <class Body>
    void take(int64_t worker, Body&& body) const {
        for (int64_t turn = 0; turn < workers_; turn++) {
            const int64_t share = (worker + turn) % workers_, last = first(share + 1);
            for (int64_t i; (i = __atomic_fetch_add(&next_.get()[share * kSpread], 1, __ATOMIC_RELAXED)) < last;)
                body(i);
        }
    }

  private:
    static constexpr int64_t kSpread = 16;  // counters two cache lines apart

    int64_t first(int64_t share) const { return count_ * share / workers_; }

    int64_t count_, workers_;
    Scratch<int64_t> next_;
};

// body(worker) once on each of `threads` threads; worker < threads, and a thread has the same number every time.
template <class Body>
static void on_threads(int64_t threads, Body&& body) {
    const auto work = [](void* context, int64_t worker) {
        const TileShapes shapes;
        (*static_cast<std::remove_reference_t<Body>*>(context))(worker);
        end_streams();
    };
    run_tasks(threads, work, &body);
}

// body(i, worker) for every i in [0, count); worker < threads names a workspace no other thread uses meanwhile.
template <class Body>
static void for_each(int64_t count, int threads, Body&& body) {
    const int64_t workers = std::min<int64_t>(threads, count);
    const Shares shares(count, workers);
    on_threads(workers, [&](int64_t worker) { shares.take(worker, [&](int64_t i) { body(i, worker); }); });
}

}  // namespace mmk::MMK_ISA
