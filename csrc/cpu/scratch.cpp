#define MMK_ISA portable
#include "scratch.h"

#include <cstdlib>
#include <new>

namespace mmk {

void* allocate(size_t bytes) {
    constexpr size_t kLine = 64;
    void* memory = std::aligned_alloc(kLine, (bytes + kLine) / kLine * kLine);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

void release(void* memory) { std::free(memory); }

}  // namespace mmk
