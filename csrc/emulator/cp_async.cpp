// cp.async: copies of 4, 8 or 16 bytes that land when their thread waits for their group, and not before.
#include <deque>

#include "emulator/shadow.h"

namespace mmk::emulator {
namespace {

struct Copy {
    void* to;
    const void* from;
    size_t bytes, valid;
    Site site;
};
struct Copies {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};
std::vector<Copies> of_thread;

void land(const Copy& copy) {
    mark_filling(copy.to, copy.bytes, false);
    check_read(copy.from, copy.valid, copy.site);
    check_write(copy.to, copy.bytes, copy.site);
    if (copy.valid != 0) memcpy(copy.to, copy.from, copy.valid);
    memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
}

}  // namespace

void begin_copies(size_t count) { of_thread.assign(count, {}); }

void end_copies(const Thread& thread) {
    const Copies& copies = of_thread[thread.id];
    if (!copies.open.empty()) fail(copies.open[0].site, "thread ends with a cp.async that was never committed");
    for (const auto& group : copies.groups) {
        if (!group.empty()) fail(group[0].site, "thread ends with a cp.async in flight");
    }
}

void cp_async(void* to, const void* from, int bytes, int valid_bytes, Site site) {
    const Copy copy{to, from, static_cast<size_t>(bytes), static_cast<size_t>(valid_bytes), site};
    check_aligned(to, copy.bytes, "cp.async", site);
    if (valid_bytes != 0) check_aligned(from, copy.bytes, "cp.async", site);
    check_shared(to, copy.bytes, "cp.async", site);
    check_write(to, copy.bytes, site);
    memset(to, 0xFF, copy.bytes);
    mark_filling(to, copy.bytes, true);
    of_thread[current->id].open.push_back(copy);
}

void cp_async_commit() {
    Copies& copies = of_thread[current->id];
    copies.groups.push_back(std::move(copies.open));
    copies.open.clear();
}

void cp_async_wait(int pending) {
    auto& groups = of_thread[current->id].groups;
    while (static_cast<int>(groups.size()) > pending) {
        for (const Copy& copy : groups.front()) land(copy);
        groups.pop_front();
    }
}

}  // namespace mmk::emulator
