#ifndef MMK_ISA
#define MMK_ISA portable
#endif
#include "cpu/run/scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace mmk {
namespace {

constexpr size_t kLine = 64, kHugePage = 2 << 20;

struct alignas(kLine) Block {  // stands before the memory it describes
    size_t size;               // of the memory
};

// Freed blocks are kept for the next call, which would otherwise pay for every page of them anew: 2 us for 4 KB, more
// than the work on it, and a multiple of that in a virtual machine that hands free memory back to its host. A step of
// the contrastive loss at N = 8192 gains a quarter. The oldest goes when more than kKept bytes would lie idle.
constexpr size_t kKept = 352 << 20, kSlots = 32;
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kReuses = false;  // every block is a fresh one, whose end the sanitizer watches
#else
constexpr bool kReuses = true;
#endif

class Shelf {
  public:
    // A block of at least `size` bytes and less than twice that, nullptr if there is none.
    Block* take(size_t size) {
        const Turn turn(busy_);
        if (!turn.ours) return nullptr;
        size_t best = count_;
        for (size_t i = 0; i < count_; i++) {
            const size_t has = blocks_[i]->size;
            if (has >= size && has < 2 * size && (best == count_ || has < blocks_[best]->size)) best = i;
        }
        return best == count_ ? nullptr : remove(best);
    }

    void empty() {
        const Turn turn(busy_);
        while (turn.ours && count_ > 0) std::free(remove(0));
    }

    void put(Block* block) {
        const Turn turn(busy_);
        if (!turn.ours || block->size > kKept) return std::free(block);
        while (count_ == kSlots || bytes_ + block->size > kKept) std::free(remove(0));
        blocks_[count_++] = block;
        bytes_ += block->size;
    }

  private:
    // Nobody waits for his turn: who comes second does without the shelf. So a child forked in the middle of somebody's
    // turn does not hang, either.
    struct Turn {
        explicit Turn(std::atomic_flag& flag) : busy(flag), ours(!flag.test_and_set(std::memory_order_acquire)) {}
        ~Turn() {
            if (ours) busy.clear(std::memory_order_release);
        }
        Turn(const Turn&) = delete;
        Turn& operator=(const Turn&) = delete;
        std::atomic_flag& busy;
        const bool ours;
    };

    Block* remove(size_t i) {
        Block* block = blocks_[i];
        std::copy(blocks_ + i + 1, blocks_ + count_--, blocks_ + i);
        bytes_ -= block->size;
        return block;
    }

    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    Block* blocks_[kSlots] = {};  // oldest first
    size_t count_ = 0, bytes_ = 0;
};

Shelf shelf;

Block* fresh(size_t size) {
    const size_t boundary = size + sizeof(Block) < 2 * kHugePage ? kLine : kHugePage;
    const size_t whole = (size + sizeof(Block) + boundary - 1) / boundary * boundary;
    auto* block = static_cast<Block*>(std::aligned_alloc(boundary, whole));
    if (block == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (boundary == kHugePage) madvise(block, whole, MADV_HUGEPAGE);
#endif
    block->size = whole - sizeof(Block);
    return block;
}

}  // namespace

void* allocate(size_t bytes) {
    Block* block = kReuses ? shelf.take(bytes) : nullptr;
    return (block == nullptr ? fresh(bytes) : block) + 1;
}

void release(void* memory) {
    Block* block = static_cast<Block*>(memory) - 1;
    kReuses ? shelf.put(block) : std::free(block);
}

void release_kept() {
    shelf.empty();
#if defined(__GLIBC__)
    malloc_trim(0);  // blocks below 32 MiB may lie in malloc's own heap, which gives back its end alone
#endif
}

}  // namespace mmk
