// mbarriers, and the bulk copies into shared memory that complete on them.
#include "mbarrier.h"

#include <deque>
#include <map>

#include "shadow.h"

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
    Clock arrived, completed;
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
    barrier.completed = barrier.arrived;
}

void land(Barrier& barrier) {
    const Copy copy = std::move(barrier.copies.front());
    barrier.copies.pop_front();
    for (const Piece& piece : copy.pieces) {
        mark_filling(piece.shared, piece.bytes, false);
        if (piece.global != nullptr) memcpy(piece.shared, piece.global, piece.bytes);
        if (piece.global == nullptr) memset(piece.shared, 0, piece.bytes);
    }
    join(barrier.arrived, copy.clock);
    barrier.bytes -= copy.bytes;
    complete_phase(barrier);
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
    const Clock none(detects_races() ? threads.size() : 0, 0);
    barriers[address] = {count, count, 0, 0, none, none, {}, current};
    release(*current, barriers[address].completed);
}

void mbarrier_init_fence() {
    for (auto& [address, barrier] : barriers) {
        if (barrier.unfenced == current) barrier.unfenced = nullptr;
    }
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
    if (wait.barrier->phase == parity) poll(is_over, &wait, "a wait for an mbarrier", site);
    join(current->clock, wait.barrier->completed);
}

void async_proxy_fence() {
    if (detects_races()) current->fenced = ++current->clock[current->id];
}

void bulk_copy_in(std::vector<Piece> pieces, int bytes, uint64_t* address, Site site) {
    Barrier& barrier = find(address, site);
    if (barrier.unfenced != nullptr) {
        fail(site, "bulk copy on an mbarrier whose init was not fenced: no fence.mbarrier_init");
    }
    for (const Piece& piece : pieces) {
        check_shared(piece.shared, piece.bytes, "bulk copy", site);
        check_write(piece.shared, piece.bytes, site, By::kAsyncProxy);
        if (piece.global != nullptr) check_read(piece.global, piece.bytes, site, By::kAsyncProxy);
        memset(piece.shared, 0xFF, piece.bytes);
        mark_filling(piece.shared, piece.bytes, true);
    }
    Copy copy{std::move(pieces), bytes, current->clock, site};
    if (detects_races()) current->clock[current->id]++;
    barrier.copies.push_back(std::move(copy));
}

}  // namespace mmk::emulator
