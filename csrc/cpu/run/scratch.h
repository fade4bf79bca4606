// Aligned working memory that belongs to a call as long as it runs, and is kept for the calls to come.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mmk {

void* allocate(size_t bytes);  // on a cache-line boundary; throws std::bad_alloc
void release(void* memory);
void release_kept();  // what no call uses at the moment goes back to the system

namespace MMK_ISA {

// `count` uninitialised elements.
template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t count) : data_(static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)))) {}
    ~Scratch() { release(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* get() const { return data_; }

  private:
    T* data_;
};

}  // namespace MMK_ISA
}  // namespace mmk
