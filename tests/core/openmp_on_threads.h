// The OpenMP entry points that parallel.cpp expects of the process, on plain threads: what the sanitizers see is then
// all of the program. `threads` is how many there may be.
#pragma once
#include <thread>
#include <vector>

static int threads = 1;
static thread_local int number = 0, team_size = 1;
extern "C" int omp_get_max_threads() { return threads; }
extern "C" int omp_get_num_threads() { return team_size; }
extern "C" int omp_get_thread_num() { return number; }
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned count, unsigned) {
    const auto member = [=](int i) {
        number = i, team_size = static_cast<int>(count);
        body(data);
        number = 0, team_size = 1;
    };
    std::vector<std::thread> team;
    for (int i = 1; i < static_cast<int>(count); i++) team.emplace_back(member, i);
    member(0);
    for (std::thread& thread : team) thread.join();
}
