// Rows that attention will want soon, asked for a line at a time while it computes. The rows of one head are a whole
// token apart, where no hardware prefetcher follows, and a burst of requests would stall for want of miss buffers.
#pragma once
#include "cpu/simd.h"

namespace mmk::MMK_ISA {

class Prefetcher {
  public:
    // `rows` rows of `count` elements, `stride` apart. Where too much waits already, nothing happens.
    template <class T>
    void add(const T* first, int64_t stride, int64_t rows, int64_t count) {
        if (last_ - next_ == kMost || rows <= 0) return;
        ranges_[last_++ % kMost] = {reinterpret_cast<const char*>(first), stride * static_cast<int64_t>(sizeof(T)),
                                    std::min(rows, kRows), count * static_cast<int64_t>(sizeof(T))};
        if (left_ == 0) advance();
    }

    MMK_INLINE void step() {
        if (left_ == 0) return;
        MMK_UNROLL for (int i = 0; i < kAtOnce; i++) __builtin_prefetch(row_ + column_ + i * kLine, 0, 2);
        column_ += kAtOnce * kLine;
        if (column_ < bytes_) return;
        column_ = 0, row_ += stride_;
        if (--left_ == 0 && next_ != last_) advance();
    }

  private:
    struct Range {
        const char* row;
        int64_t stride, rows, bytes;
    };
    static constexpr uint32_t kMost = 8;
    static constexpr int kAtOnce = 4;  // lines; more than a row has are its neighbours', which are wanted soon, too
    static constexpr int64_t kLine = 64, kRows = 128;  // of a range: longer ones pay for their first rows by themselves

    void advance() {
        const Range& range = ranges_[next_++ % kMost];
        row_ = range.row, stride_ = range.stride, left_ = range.rows, bytes_ = range.bytes, column_ = 0;
    }

    const char* row_ = nullptr;
    int64_t left_ = 0, column_ = 0, stride_ = 0, bytes_ = 0;
    uint32_t next_ = 0, last_ = 0;
    Range ranges_[kMost];
};

}  // namespace mmk::MMK_ISA
