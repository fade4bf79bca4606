// Operations of a warp on registers: the rendezvous of its lanes, shuffles, votes.
#include "emulator/block.h"

namespace mmk::emulator {

void meet(uint32_t mask, WarpWork work, void* argument, const char* what, Site site) {
    Warp& warp = *current->warp;
    const uint32_t self = 1u << current->lane;
    if ((mask & self) == 0) fail(site, "%s: mask %08x leaves out the calling lane", what, mask);
    // Lanes of a mask that are elsewhere may still come, as after a branch: if they never do, it is a deadlock.
    Meeting *meeting = nullptr, *unused = nullptr;
    for (Meeting& other : warp.meetings) {
        if (other.arrived == 0) {
            unused = &other;
        } else if (other.mask == mask && other.work == work && other.line == site.line) {
            meeting = &other;
        }
    }
    if (meeting == nullptr) {
        meeting = unused != nullptr ? unused : &warp.meetings.emplace_back();
        *meeting = {mask, 0, work, site.line, {}};
    }
    meeting->argument[current->lane] = argument;
    meeting->arrived |= self;
    if (meeting->arrived != mask) return suspend(what, site);
    meeting->arrived = 0;
    warp.ready |= mask & ~self;
    work(mask, meeting->argument);
}

namespace {

template <class Body>
void for_lanes(uint32_t mask, Body&& body) {
    for (; mask != 0; mask &= mask - 1) body(__builtin_ctz(mask));
}

struct Shuffle {
    uint64_t value;
    int source;
    bool outside;
};

void exchange(uint32_t mask, void* const* argument) {
    uint64_t values[kWarp];
    for_lanes(mask, [&](int lane) { values[lane] = static_cast<Shuffle*>(argument[lane])->value; });
    for_lanes(mask, [&](int lane) {
        auto& shuffle = *static_cast<Shuffle*>(argument[lane]);
        shuffle.outside = (mask >> shuffle.source & 1) == 0;
        if (!shuffle.outside) shuffle.value = values[shuffle.source];
    });
}

void collect_votes(uint32_t mask, void* const* argument) {
    uint32_t votes = 0;
    for_lanes(mask, [&](int lane) { votes |= *static_cast<uint32_t*>(argument[lane]) << lane; });
    for_lanes(mask, [&](int lane) { *static_cast<uint32_t*>(argument[lane]) = votes; });
}

}  // namespace

uint64_t shuffle(uint32_t mask, uint64_t value, int source_lane, Site site) {
    Shuffle shuffle{value, source_lane, false};
    meet(mask, exchange, &shuffle, "a shuffle", site);
    if (shuffle.outside) fail(site, "shuffle reads lane %d, which is not in the mask %08x", source_lane, mask);
    return shuffle.value;
}

uint32_t ballot(uint32_t mask, bool vote, Site site) {
    uint32_t votes = vote ? 1 : 0;
    meet(mask, collect_votes, &votes, "a vote", site);
    return votes;
}

bool elect_one(Site site) {
    ballot(~0u, true, site);  // elect.sync needs the whole warp
    return current->lane == 0;
}

void sync_warp(uint32_t mask, Site site) {
    meet(
        mask, [](uint32_t lanes, void* const*) { sync_clocks(current->warp->id, lanes); }, nullptr, "__syncwarp", site);
}

}  // namespace mmk::emulator
