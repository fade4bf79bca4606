// Bulk copies as an mbarrier sees them.
#pragma once
#include "emulator/block.h"

namespace mmk::emulator {

struct Piece {
    char* shared;
    char* global;  // null: outside the tensor; reads as zeros, is not written
    size_t bytes;
};

// A copy into shared memory that lands when somebody waits for `barrier`, and brings it `bytes`.
void bulk_copy_in(std::vector<Piece> pieces, int bytes, uint64_t* barrier, Site site);
// The same into each block of the cluster whose bit is set, where all lies as it does in the current thread's block.
void bulk_multicast(const std::vector<Piece>& pieces, int bytes, uint64_t* barrier, uint32_t blocks, Site site);

}  // namespace mmk::emulator
