#include "emulator/shared_memory.h"

#include <cstdlib>
#include <map>
#include <new>

#include "emulator/block.h"
#include "emulator/shadow.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define MMK_POISON(p, bytes) __asan_poison_memory_region(p, bytes)
#define MMK_UNPOISON(p, bytes) __asan_unpoison_memory_region(p, bytes)
#else
#define MMK_POISON(p, bytes) (void)0
#define MMK_UNPOISON(p, bytes) (void)0
#endif

namespace mmk::emulator {
namespace {

constexpr size_t kMargin = 64 << 10, kStaticBytes = 48 << 10, kGap = 256;
constexpr size_t kAlignment = 1024;         // of the dynamic part; the repeat of the widest swizzle
constexpr uint32_t kDynamicAddress = 1024;  // in the window: the first kilobyte is the system's, 0 stays invalid

struct Block {
    char* all;
    char *dynamic, *statics;
    size_t statics_used;
    std::map<const void*, char*> variables;  // where each static variable lies
};
std::vector<Block> blocks;  // of the cluster
size_t block_bytes, dynamic_bytes;
size_t warp_count;

Block& own() { return blocks[current != nullptr ? static_cast<size_t>(current->rank) : 0]; }

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

SharedMemory::SharedMemory(size_t bytes, size_t warps) {
    block_bytes = kMargin + round_up(bytes, kAlignment) + kMargin + kStaticBytes + kMargin;
    dynamic_bytes = bytes;
    warp_count = warps;
    for (size_t rank = 0; rank < cluster_blocks; rank++) {
        char* const all = static_cast<char*>(std::aligned_alloc(kAlignment, block_bytes));
        if (all == nullptr) throw std::bad_alloc();
        char* const dynamic = all + kMargin;
        blocks.push_back({all, dynamic, dynamic + round_up(bytes, kAlignment) + kMargin, 0, {}});
        MMK_POISON(all, block_bytes);
        MMK_UNPOISON(dynamic, dynamic_bytes);
        watch_shared(dynamic, dynamic_bytes, warps, static_cast<int>(rank));
    }
}

SharedMemory::~SharedMemory() {
    for (const Block& block : blocks) {
        MMK_UNPOISON(block.all, block_bytes);
        std::free(block.all);
    }
    blocks.clear();
    forget_shared();
    current = nullptr;
}

void poison_shared() {
    for (const Memory& memory : shared_memories()) memset(memory.begin, 0xFF, memory.bytes);
}

void* dynamic_shared() { return own().dynamic; }

void* static_shared(const void* variable, size_t bytes) {
    Block& block = own();
    char*& place = block.variables[variable];
    if (place == nullptr) {  // the first thread of the launch that comes by
        if (block.statics_used + bytes > kStaticBytes) throw Error("more than 48 KiB of static shared memory");
        place = block.statics + block.statics_used;
        block.statics_used += round_up(bytes + kGap, kGap);
        MMK_UNPOISON(place, bytes);
        memset(place, 0xFF, bytes);
        watch_shared(place, bytes, warp_count, current->rank);
    }
    return place;
}

uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const char*>(p) - own().dynamic) + kDynamicAddress;
}
void* shared_pointer(uint32_t address) { return own().dynamic + (static_cast<int64_t>(address) - kDynamicAddress); }
void* shared_pointer_of(int rank, const void* p) {
    return blocks[static_cast<size_t>(rank)].dynamic + (static_cast<const char*>(p) - own().dynamic);
}

void load_from(void* to, size_t bytes, const void* here, int rank, Site site) {
    check_block(rank, "load", site);
    check_aligned(here, bytes, "load from another block", site);
    check_shared(here, bytes, "load from another block", site);
    const void* const there = shared_pointer_of(rank, here);
    check_read(there, bytes, site, By::kThreadAcrossBlocks);
    memcpy(to, there, bytes);
}

bool in_shared_margin(const void* p, size_t bytes) {
    const char* begin = static_cast<const char*>(p);
    for (const Block& block : blocks) {
        if (begin + bytes > block.all && begin < block.all + block_bytes) return true;
    }
    return false;
}
long shared_offset(const void* p) { return static_cast<const char*>(p) - own().dynamic; }

void check_shared(const void* p, size_t bytes, const char* what, Site site) {
    const char* begin = static_cast<const char*>(p);
    for (const Memory& memory : shared_memories()) {
        if (memory.rank != current->rank) continue;
        if (begin >= memory.begin && begin + bytes <= memory.begin + memory.bytes) return;
    }
    fail(site, "%s: %zu bytes at offset %ld of %zu bytes of dynamic shared memory", what, bytes, shared_offset(p),
         dynamic_bytes);
}

void check_aligned(const void* p, size_t alignment, const char* what, Site site) {
    if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
        fail(site, "%s: address misaligned, must be a multiple of %zu", what, alignment);
    }
}

}  // namespace mmk::emulator
