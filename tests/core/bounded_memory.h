// Memory for the tensors of a test, beyond whose end nothing may be read or written. AddressSanitizer sees to that;
// without it a page follows that nobody may touch.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
static void* take_bounded(size_t bytes, size_t alignment = 8) {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, bytes) != 0) std::abort();
    return memory;
}
static void drop_bounded(void* memory, size_t) { std::free(memory); }
#else
static size_t whole_pages(size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return (bytes + page - 1) / page * page;
}
// It ends where the page begins, or less than `alignment` before.
static void* take_bounded(size_t bytes, size_t alignment = 1) {
    const size_t room = whole_pages(bytes), guard = whole_pages(1);
    void* pages = mmap(nullptr, room + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(static_cast<char*>(pages) + room, guard, PROT_NONE) != 0) std::abort();
    return static_cast<char*>(pages) + (room - bytes) / alignment * alignment;
}
static void drop_bounded(void* memory, size_t bytes) {
    char* pages = static_cast<char*>(memory) - reinterpret_cast<uintptr_t>(memory) % whole_pages(1);
    munmap(pages, whole_pages(bytes) + whole_pages(1));
}
#endif
