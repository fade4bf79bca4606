// Fibers: stacks of their own on one host thread, switched by hand. One of them is one CUDA thread.
#pragma once
#include <cstddef>

namespace mmk::emulator {

constexpr size_t kStackBytes = 256 << 10;

struct Fiber {
    void* stack_pointer = nullptr;  // where a suspended fiber goes on
    const void* stack = nullptr;    // lowest address; the sanitizer tells that of the host's own stack
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;  // the address sanitizer's
    bool ended = false;          // will never be switched to again
};

// Lets `fiber` begin in `entry` when it is switched to, on stack number `index` of a pool of `count`.
void prepare(Fiber& fiber, size_t index, size_t count, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to);
void begin_fiber();  // first thing in an entry

}  // namespace mmk::emulator
