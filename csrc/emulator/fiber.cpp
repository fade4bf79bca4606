#include "emulator/fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly; other processors need their own emulator_switch_stack"
#endif

// emulator_switch_stack(save, to): pushes what the calling convention lets a function keep, and changes stacks.
extern "C" void emulator_switch_stack(void** save, void* to);
asm(R"(
.text
.p2align 4
.type emulator_switch_stack,@function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
)");

namespace mmk::emulator {
namespace {

constexpr size_t kGuard = 4096;  // an unmapped page below each stack: an overflow traps instead of reaching a neighbour
constexpr size_t kSavedRegisters = 6;

char* stack_pool(size_t count) {
    static char* pool = nullptr;
    static size_t size = 0;
    if (size >= count) return pool;
    const size_t step = kStackBytes + kGuard;
    if (pool != nullptr) munmap(pool, size * step);
    void* memory =
        mmap(nullptr, count * step, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    size = 0;
    pool = nullptr;
    if (memory == MAP_FAILED) throw std::bad_alloc();
    pool = static_cast<char*>(memory);
    size = count;
    for (size_t i = 0; i < count; i++) mprotect(pool + i * step, kGuard, PROT_NONE);
    return pool;
}

#if defined(__SANITIZE_ADDRESS__)
Fiber* previous;  // the fiber that the running one took over from
#endif

}  // namespace

void prepare(Fiber& fiber, size_t index, size_t count, void (*entry)()) {
    char* stack = stack_pool(count) + index * (kStackBytes + kGuard) + kGuard;
    fiber = Fiber{};
    fiber.stack = stack;
    fiber.stack_bytes = kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);  // what the last fiber here left behind
#endif
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;  // the return address of `entry`, which never returns: keeps the stack aligned
    *--top = reinterpret_cast<void*>(entry);
    fiber.stack_pointer = top - kSavedRegisters;
}

void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    previous = &from;
    __sanitizer_start_switch_fiber(from.ended ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
    emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void begin_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &previous->stack, &previous->stack_bytes);
#endif
}

}  // namespace mmk::emulator
