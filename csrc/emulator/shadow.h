// The race detector's memory of memory: for each byte of shared memory and of watched tensors, who wrote it last, and
// who read it last in each warp, as epochs (thread, clock of that thread). An access is in order when the epochs it
// meets are in the past of its thread's vector clock, which only barriers, __syncwarp and mbarriers join (shuffles and
// products of a warp do not). What a bulk copy wrote has an epoch of the copy's own, which those know who waited for
// it: to know that it was issued is not enough. After FastTrack (Flanagan and Freund, 2009), with a byte for a variable
// and a warp for a reader.
//
// In the plain and asan builds there is no shadow; the functions only keep the list of memories.
#pragma once
#include <string>
#include <vector>

#include "emulator/block.h"

namespace mmk::emulator {

struct Memory {
    char* begin;
    size_t bytes;
    bool global;
    int rank;                     // of shared memory, that of its block in the cluster
    size_t readers;               // 1, or the warps of the cluster
    std::vector<uint64_t> write;  // a word a byte
    std::vector<uint64_t> read;   // a word a byte and reader
    size_t offset(const void* p) const { return static_cast<size_t>(static_cast<const char*>(p) - begin); }
};
const std::vector<Memory>& shared_memories();

void watch_shared(char* begin, size_t bytes, size_t warps, int rank);
void forget_shared();
void begin_launch();  // what earlier launches wrote is initialised, and in the past

enum class By { kThread, kThreadAcrossBlocks, kAsyncProxy };  // across: by an instruction for other blocks' memory

// The current thread reads or writes.
void check_read(const void* p, size_t bytes, Site site, By by = By::kThread);
void check_write(const void* p, size_t bytes, Site site, By by = By::kThread);
std::string accessed_at();  // file and line of the load or store that is being checked

// A copy into these bytes is under way, or a copy that reads them; nobody may touch, or write, them.
void mark_filling(const void* p, size_t bytes, bool under_way);
void mark_landed(void* p, size_t bytes, int copier, uint32_t clock);  // by an epoch that is no thread's
void mark_draining(const void* p, size_t bytes, bool under_way);

// Was the last write to p in the past of the current thread?
bool written_in_past(const void* p);

}  // namespace mmk::emulator
