// The shared memory of each block of a cluster: [margin] dynamic [margin] static variables, each with a gap behind it
// [margin]
#pragma once
#include <cstddef>

namespace mmk::emulator {

class SharedMemory {  // as long as a launch runs
  public:
    SharedMemory(size_t dynamic_bytes, size_t warps);
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
};

void poison_shared();                                // when a block begins: NaN, or -1
bool in_shared_margin(const void* p, size_t bytes);  // of the shared memory, but of none of its variables
long shared_offset(const void* p);

}  // namespace mmk::emulator
