// An OpenMP runtime on plain threads: what the sanitizers see is then all of the program. `threads` is how many there
// may be.
#pragma once
#include <thread>
#include <vector>

#include "cpu/run/parallel.h"

static int threads = 1;
static thread_local int number = 0, team_size = 1;
static void run_team(void (*body)(void*), void* data, unsigned count, unsigned) {
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

[[maybe_unused]] static const bool on_threads = [] {
    mmk::use_openmp({run_team, [] { return threads; }, [] { return team_size; }, [] { return number; }});
    return true;
}();
