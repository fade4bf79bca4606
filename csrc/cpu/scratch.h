// Aligned working memory that lives as long as the call that asked for it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mmk {

void* allocate(size_t bytes);  // on a cache-line boundary; throws std::bad_alloc
void release(void* memory);

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
