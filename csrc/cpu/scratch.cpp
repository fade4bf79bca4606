#ifndef MMK_ISA
#define MMK_ISA portable
#endif
#include "scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <new>

namespace mmk {

void* allocate(size_t bytes) {
    constexpr size_t kLine = 64, kHugePage = 2 << 20;
    // Fresh memory costs a page fault a page, 2 us each for 4 KB: more than the work on it. Large blocks ask for large
    // pages.
    const size_t boundary = bytes < 2 * kHugePage ? kLine : kHugePage;
    const size_t size = (bytes + boundary) / boundary * boundary;
    void* memory = std::aligned_alloc(boundary, size);
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (boundary == kHugePage) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return memory;
}

void release(void* memory) { std::free(memory); }

}  // namespace mmk
