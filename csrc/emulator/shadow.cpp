#include "emulator/shadow.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>

#include "emulator/shared_memory.h"

namespace mmk::emulator {
namespace {

// A word of the shadow, from the top: three flags, 18 bits of cluster, 11 of thread, 32 of its clock. 0: never. Cluster
// 0 lies before the launch. Words of shared memory that name another cluster than the running one count as 0.
constexpr uint64_t kFilling = uint64_t{1} << 63;   // a copy into the byte is under way
constexpr uint64_t kDraining = uint64_t{1} << 62;  // a bulk store still reads the byte
constexpr uint64_t kProxy = uint64_t{1} << 61;     // the async proxy wrote it
constexpr uint64_t kFlags = kFilling | kDraining | kProxy;
constexpr int kClusterShift = 43, kThreadShift = 32;
constexpr uint32_t kMaxClusters = (1u << 18) - 1;
constexpr uint64_t kBeforeLaunch = 1;
constexpr size_t kHostStackBytes = 8 << 20;

std::vector<Memory> shared, global;
const void* hook_address;  // of the instruction that made the access under check

uint32_t cluster_of(uint64_t word) { return static_cast<uint32_t>((word & ~kFlags) >> kClusterShift); }
int thread_of(uint64_t word) { return static_cast<int>(word >> kThreadShift & 2047); }
uint32_t clock_of(uint64_t word) { return static_cast<uint32_t>(word); }
uint64_t word_now() {
    return uint64_t{cluster_number} << kClusterShift | static_cast<uint64_t>(current->id) << kThreadShift |
           current->clock[current->id];
}

bool in_past(uint64_t word) {
    if (cluster_of(word) != cluster_number) return cluster_of(word) == 0;
    return thread_of(word) == current->id || clock_of(word) <= current->clock[thread_of(word)];
}

Memory* find(const void* p, size_t bytes) {
    const char* begin = static_cast<const char*>(p);
    for (auto* memories : {&shared, &global}) {
        for (Memory& memory : *memories) {
            if (begin + bytes > memory.begin && begin < memory.begin + memory.bytes) return &memory;
        }
    }
    return nullptr;
}

// Neither the host program's own data nor the stack of the thread that launched.
bool is_foreign(const void* p) {
    Dl_info info;
    const char *byte = static_cast<const char*>(p), *stack = static_cast<const char*>(host_stack_pointer());
    return dladdr(p, &info) == 0 && !(byte >= stack && byte < stack + kHostStackBytes);
}

// The memory of the access, null if it is none of the shadow's business.
Memory* memory_of(const void* p, size_t bytes, const char* what, Site site, By by = By::kThread) {
    Memory* const memory = find(p, bytes);
    if (memory != nullptr && !memory->global && memory->rank != current->rank && by == By::kThread) {
        fail(site, "%s of %zu bytes of the shared memory of another block", what, bytes);
    }
    if (memory == nullptr) {
        if (in_shared_margin(p, bytes)) {
            fail(site, "%s of %zu bytes outside shared memory, at offset %ld of its dynamic part", what, bytes,
                 shared_offset(p));
        }
        if (!global.empty() && is_foreign(p)) fail(site, "%s of %zu bytes outside every watched tensor", what, bytes);
        return nullptr;
    }
    const char* begin = static_cast<const char*>(p);
    if (begin < memory->begin || begin + bytes > memory->begin + memory->bytes) {
        fail(site, "%s of %zu bytes runs out of %zu bytes of %s memory, at offset %td", what, bytes, memory->bytes,
             memory->global ? "global" : "shared", begin - memory->begin);
    }
    return memory;
}

[[noreturn]] void race(Site site, const Memory& memory, const char* what, size_t offset, const char* other,
                       uint64_t word) {
    if (thread_of(word) >= static_cast<int>(threads.size())) {
        fail(site, "RACE: %s shared memory at offset %zu, unordered with a copy to it: this thread did not wait for it",
             what, offset);
    }
    fail(site, "RACE: %s %s memory at offset %zu, unordered with a %s by thread %d%s", what,
         memory.global ? "global" : "shared", offset, other, thread_of(word),
         cluster_of(word) != cluster_number ? " of another block" : "");
}

bool lacks_proxy_fence(uint64_t word, const Memory& memory, By by) {
    return by == By::kAsyncProxy && !memory.global && (word & kProxy) == 0 &&
           threads[thread_of(word)].fenced <= clock_of(word);
}

// Neighbouring bytes mostly share a word: visits runs of equal words once.
template <class Body>
void for_words(const uint64_t* words, size_t begin, size_t end, Body&& body) {
    for (size_t i = begin; i < end; i++) {
        if (i == begin || words[i] != words[i - 1]) body(words[i], i);
    }
}

}  // namespace

#if defined(MMK_EMULATOR_RACE)
bool detects_races() { return true; }
#else
bool detects_races() { return false; }
#endif

const std::vector<Memory>& shared_memories() { return shared; }

void watch_shared(char* begin, size_t bytes, size_t warps, int rank) {
    if (bytes == 0) return;
    const size_t words = detects_races() ? bytes : 0;
    shared.push_back(
        {begin, bytes, false, rank, warps, std::vector<uint64_t>(words), std::vector<uint64_t>(words * warps)});
}
void forget_shared() { shared.clear(); }

void watch(const void* begin, size_t bytes, bool initialised) {
    if (bytes == 0 || !detects_races()) return;
    global.push_back({static_cast<char*>(const_cast<void*>(begin)), bytes, true, 0, 1,
                      std::vector<uint64_t>(bytes, initialised ? kBeforeLaunch : 0), std::vector<uint64_t>(bytes)});
}
void forget_watched() { global.clear(); }

void begin_launch() {
    for (Memory& memory : global) {
        for (uint64_t& word : memory.write) word = word != 0 ? kBeforeLaunch : 0;
        std::fill(memory.read.begin(), memory.read.end(), 0);
    }
}

void check_read(const void* p, size_t bytes, Site site, By by) {
    if (!detects_races() || bytes == 0) return;
    Memory* const memory = memory_of(p, bytes, "read", site, by);
    if (memory == nullptr) return;
    if (cluster_number > kMaxClusters) throw Error("too many blocks for the race detector");
    const size_t begin = memory->offset(p), end = begin + bytes;
    for_words(memory->write.data(), begin, end, [&](uint64_t word, size_t i) {
        if (word == 0 || (!memory->global && cluster_of(word) != cluster_number)) {
            fail(site, "read of uninitialised %s memory at offset %zu", memory->global ? "global" : "shared", i);
        }
        if ((word & kFilling) != 0) {
            fail(site, "read of shared memory at offset %zu while a copy to it is under way: a wait is missing", i);
        }
        if (!in_past(word)) race(site, *memory, "read of", i, "write", word);
        if (lacks_proxy_fence(word, *memory, by)) {
            fail(site,
                 "shared memory at offset %zu was written by ordinary stores and is read by the async proxy: no "
                 "fence.proxy.async",
                 i);
        }
    });
    uint64_t* const read =
        &memory->read[memory->readers > 1 ? static_cast<size_t>(current->warp->id) * memory->bytes : 0];
    std::fill(read + begin, read + end, word_now());
}

void check_write(const void* p, size_t bytes, Site site, By by) {
    if (!detects_races() || bytes == 0) return;
    Memory* const memory = memory_of(p, bytes, "write", site, by);
    if (memory == nullptr) return;
    const size_t begin = memory->offset(p), end = begin + bytes;
    for_words(memory->write.data(), begin, end, [&](uint64_t word, size_t i) {
        if (word == 0 || (!memory->global && cluster_of(word) != cluster_number)) return;
        if ((word & kFilling) != 0) {
            fail(site, "write to shared memory at offset %zu while a copy to it is under way: a wait is missing", i);
        }
        if ((word & kDraining) != 0) {
            fail(site, "write to shared memory at offset %zu while a bulk store reads it: a wait is missing", i);
        }
        if (!in_past(word)) race(site, *memory, "write to", i, "write", word);
        if (lacks_proxy_fence(word, *memory, by)) {
            fail(site,
                 "shared memory at offset %zu was written by ordinary stores and is written by the async proxy: "
                 "no fence.proxy.async",
                 i);
        }
    });
    for (size_t reader = 0; reader < memory->readers; reader++) {
        for_words(&memory->read[reader * memory->bytes], begin, end, [&](uint64_t word, size_t i) {
            if (word == 0 || (!memory->global && cluster_of(word) != cluster_number)) return;
            if (!in_past(word)) race(site, *memory, "write to", i, "read", word);
        });
    }
    std::fill(&memory->write[begin], &memory->write[begin] + bytes, word_now() | (by == By::kAsyncProxy ? kProxy : 0));
}

// An atomic operation is unordered with nothing, but adds to something: the history of its bytes starts afresh.
void atomic_access(const void* p, size_t bytes, Site site) {
    if (!detects_races()) return;
    Memory* const memory = memory_of(p, bytes, "atomic operation", site);
    if (memory == nullptr) return;
    const size_t begin = memory->offset(p), end = begin + bytes;
    for_words(memory->write.data(), begin, end, [&](uint64_t word, size_t i) {
        if (word == 0 || (!memory->global && cluster_of(word) != cluster_number)) {
            fail(site, "atomic operation on uninitialised %s memory at offset %zu",
                 memory->global ? "global" : "shared", i);
        }
    });
    const uint64_t past = memory->global ? kBeforeLaunch : uint64_t{cluster_number} << kClusterShift;  // clock 0
    std::fill(&memory->write[begin], &memory->write[begin] + bytes, past);
}

static void mark(const void* p, size_t bytes, uint64_t flag, bool on) {
    if (!detects_races()) return;
    Memory* const memory = find(p, bytes);
    if (memory == nullptr) return;
    const size_t begin = memory->offset(p);
    for (size_t i = begin; i < begin + bytes; i++) {
        memory->write[i] = on ? memory->write[i] | flag : memory->write[i] & ~flag;
    }
}
void mark_landed(void* p, size_t bytes, int copier, uint32_t clock) {
    Memory* const memory = detects_races() ? find(p, bytes) : nullptr;
    if (memory == nullptr) return;
    const uint64_t word =
        kProxy | uint64_t{cluster_number} << kClusterShift | static_cast<uint64_t>(copier) << kThreadShift | clock;
    std::fill_n(memory->write.begin() + static_cast<ptrdiff_t>(memory->offset(p)), bytes, word);
}
void mark_filling(const void* p, size_t bytes, bool under_way) { mark(p, bytes, kFilling, under_way); }
void mark_draining(const void* p, size_t bytes, bool under_way) { mark(p, bytes, kDraining, under_way); }

bool written_in_past(const void* p) {
    const Memory* const memory = detects_races() ? find(p, 1) : nullptr;
    return memory == nullptr || in_past(memory->write[memory->offset(p)]);
}

std::string accessed_at() {
    Dl_info info;
    if (dladdr(hook_address, &info) == 0) return "?";
    char command[1200], text[512] = "";
    const size_t offset =
        static_cast<size_t>(static_cast<const char*>(hook_address) - static_cast<char*>(info.dli_fbase));
    snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset - 1);
    if (FILE* const output = popen(command, "r")) {
        if (fgets(text, sizeof text, output) == nullptr) text[0] = 0;
        pclose(output);
    }
    std::string place = text;
    while (!place.empty() && place.back() == '\n') place.pop_back();
    return place.empty() ? info.dli_fname : place;
}

#if defined(MMK_EMULATOR_RACE)
// Kernels are compiled with -fsanitize=thread but linked without its library: these are the calls that g++ plants.
static void access(void* p, size_t bytes, bool write, const void* at) {
    if (current == nullptr) return;
    const char *byte = static_cast<const char*>(p), *stack = static_cast<const char*>(current->stack);
    if (byte >= stack && byte < stack + kStackBytes) return;
    if (p >= threads.data() && p < threads.data() + threads.size()) return;  // threadIdx
    hook_address = at;
    if (write) check_write(p, bytes, {nullptr, 0});
    if (!write) check_read(p, bytes, {nullptr, 0});
}
#endif

}  // namespace mmk::emulator

#if defined(MMK_EMULATOR_RACE)
#define MMK_HOOK(name, write, bytes) \
    void __tsan_##name(void* p) { mmk::emulator::access(p, bytes, write, __builtin_return_address(0)); }
#define MMK_HOOKS(bytes)                          \
    MMK_HOOK(read##bytes, false, bytes)           \
    MMK_HOOK(write##bytes, true, bytes)           \
    MMK_HOOK(unaligned_read##bytes, false, bytes) \
    MMK_HOOK(unaligned_write##bytes, true, bytes) \
    MMK_HOOK(volatile_read##bytes, false, bytes) MMK_HOOK(volatile_write##bytes, true, bytes)
extern "C" {
MMK_HOOKS(1) MMK_HOOKS(2) MMK_HOOKS(4) MMK_HOOKS(8) MMK_HOOKS(16) void __tsan_read_range(void* p, size_t n) {
    mmk::emulator::access(p, n, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) { mmk::emulator::access(p, n, true, __builtin_return_address(0)); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
#endif
