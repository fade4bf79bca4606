// mbarriers, and the bulk copies into shared memory that complete on them.
#include "emulator/mbarrier.h"

#include <algorithm>
#include <deque>
#include <map>

#include "emulator/shadow.h"

namespace mmk::emulator {
namespace {

struct Copy {
    std::vector<Piece> pieces;
    int bytes;
    Clock clock;  // of the thread that issued it
    Site site;
};

struct Barrier {
    int count, pending;  // arrivals: of a phase, and still missing in this one
    int64_t bytes;       // still missing in this phase
    int phase;           // parity of the phase that is under way
    int copier;          // where clocks count the copies that completed on it
    uint32_t landed;     // of these, how many
    Clock arrived;
    std::vector<Clock> completed;  // what lay in the past of each phase's end
    std::deque<Copy> copies;
    const Thread* unfenced;  // initialised by this thread, not yet visible to the async proxy
};
std::map<const uint64_t*, Barrier> barriers;

Barrier& find(const uint64_t* address, Site site) {
    const auto found = barriers.find(address);
    if (found == barriers.end()) fail(site, "mbarrier: not initialised");
    return found->second;
}

void complete_phase(Barrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.count;
    if (detects_races()) barrier.completed.push_back(barrier.arrived);
}

// The phase that a wait for this parity is sure to see the end of, -1 where that is of no phase. A wait that returns
// late has seen more, but it might have returned as soon as that one ended, for all that the thread knows: which is the
// next after the last one whose end it knows of, or that one.
int awaited_phase(const Barrier& barrier, int parity) {
    const Clock& clock = current->clock;
    const auto known = [&](const Clock& end) {
        return std::equal(end.begin(), end.end(), clock.begin(), [](uint32_t x, uint32_t y) { return x <= y; });
    };
    int last = static_cast<int>(barrier.completed.size()) - 1;
    while (last >= 0 && !known(barrier.completed[static_cast<size_t>(last)])) last--;
    return (last & 1) == parity ? last : last + 1;
}

void land(Barrier& barrier) {
    const Copy copy = std::move(barrier.copies.front());
    barrier.copies.pop_front();
    barrier.landed++;
    for (const Piece& piece : copy.pieces) {
        mark_landed(piece.shared, piece.bytes, barrier.copier, barrier.landed);
        if (piece.global != nullptr) memcpy(piece.shared, piece.global, piece.bytes);
        if (piece.global == nullptr) memset(piece.shared, 0, piece.bytes);
    }
    join(barrier.arrived, copy.clock);
    if (detects_races()) barrier.arrived[static_cast<size_t>(barrier.copier)] = barrier.landed;
    barrier.bytes -= copy.bytes;
    complete_phase(barrier);
}

// To the block in whose shared memory the barrier and the pieces lie.
void copy_to_block(std::vector<Piece> pieces, int bytes, uint64_t* address, Site site) {
    Barrier& barrier = find(address, site);
    if (barrier.unfenced != nullptr) {
        fail(site, "bulk copy on an mbarrier whose init was not fenced: no fence.mbarrier_init");
    }
    if (!written_in_past(address)) fail(site, "RACE: copy on an mbarrier whose init is not ordered before it");
    for (const Piece& piece : pieces) {
        check_write(piece.shared, piece.bytes, site, By::kAsyncProxy);
        if (piece.global != nullptr) check_read(piece.global, piece.bytes, site, By::kAsyncProxy);
        memset(piece.shared, 0xFF, piece.bytes);
        mark_filling(piece.shared, piece.bytes, true);
    }
    Copy copy{std::move(pieces), bytes, current->clock, site};
    if (detects_races()) current->clock[current->id]++;
    barrier.copies.push_back(std::move(copy));
}

struct Wait {
    Barrier* barrier;
    int parity;
};
bool is_over(void* argument) {
    const auto [barrier, parity] = *static_cast<Wait*>(argument);
    while (barrier->phase == parity && !barrier->copies.empty()) land(*barrier);
    return barrier->phase != parity;
}

}  // namespace

void begin_mbarriers(size_t) { barriers.clear(); }

void end_mbarriers() {
    for (const auto& [address, barrier] : barriers) {
        if (barrier.copies.empty()) continue;
        const Site site = barrier.copies.front().site;
        throw Error(std::string(site.file) + ":" + std::to_string(site.line) +
                    ": block ends with a bulk copy in flight");
    }
}

void mbarrier_init(uint64_t* address, int count, Site site) {
    check_aligned(address, sizeof *address, "mbarrier", site);
    check_shared(address, sizeof *address, "mbarrier", site);
    check_write(address, sizeof *address, site);
    if (count < 1) fail(site, "mbarrier for %d arrivals", count);
    const auto before = barriers.find(address);
    const size_t number = before == barriers.end() ? barriers.size() : 0;
    if (number >= kMostMbarriers * cluster_blocks) fail(site, "mbarrier: more than %zu in a block", kMostMbarriers);
    const int copier = before == barriers.end() ? static_cast<int>(threads.size() + number) : before->second.copier;
    const uint32_t landed = before == barriers.end() ? 0 : before->second.landed;
    barriers[address] = {count, count, 0, 0, copier, landed, Clock(clock_size(), 0), {}, {}, current};
}

void mbarrier_init_fence() {
    for (auto& [address, barrier] : barriers) {
        if (barrier.unfenced == current) barrier.unfenced = nullptr;
    }
}

void mbarrier_arrive_at(uint64_t* address, int rank, Site site) {
    check_block(rank, "arrival at an mbarrier", site);
    mbarrier_arrive(static_cast<uint64_t*>(shared_pointer_of(rank, address)), 0, site);
}

void mbarrier_arrive(uint64_t* address, int expected_bytes, Site site) {
    Barrier& barrier = find(address, site);
    if (!written_in_past(address)) fail(site, "RACE: arrival at an mbarrier whose init is not ordered before it");
    if (barrier.pending == 0) fail(site, "mbarrier: more arrivals than the %d of a phase", barrier.count);
    release(*current, barrier.arrived);
    barrier.bytes += expected_bytes;
    barrier.pending--;
    complete_phase(barrier);
}

void mbarrier_wait(uint64_t* address, int parity, Site site) {
    Wait wait{&find(address, site), parity};
    if (!written_in_past(address)) fail(site, "RACE: wait at an mbarrier whose init is not ordered before it");
    const int phase = detects_races() ? awaited_phase(*wait.barrier, parity) : -1;
    if (wait.barrier->phase == parity) poll(is_over, &wait, "a wait for an mbarrier", site);
    if (phase >= 0) join(current->clock, wait.barrier->completed[static_cast<size_t>(phase)]);
}

void async_proxy_fence() {
    if (detects_races()) current->fenced = ++current->clock[current->id];
}

void bulk_copy_in(std::vector<Piece> pieces, int bytes, uint64_t* address, Site site) {
    for (const Piece& piece : pieces) check_shared(piece.shared, piece.bytes, "bulk copy", site);
    copy_to_block(std::move(pieces), bytes, address, site);
}

void bulk_multicast(const std::vector<Piece>& pieces, int bytes, uint64_t* address, uint32_t blocks, Site site) {
    for (const Piece& piece : pieces) check_shared(piece.shared, piece.bytes, "bulk copy", site);
    for (int rank = 0; blocks >> rank != 0; rank++) {
        if ((blocks >> rank & 1) == 0) continue;
        check_block(rank, "a multicast copy", site);
        std::vector<Piece> there = pieces;
        for (Piece& piece : there) piece.shared = static_cast<char*>(shared_pointer_of(rank, piece.shared));
        copy_to_block(std::move(there), bytes, static_cast<uint64_t*>(shared_pointer_of(rank, address)), site);
    }
}
}  // namespace mmk::emulator
