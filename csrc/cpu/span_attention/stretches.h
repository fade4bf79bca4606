// Which lanes of a block of queries meet which keys of a block of keys, in the forward of span attention.
#pragma once
#include "cpu/span_attention/plan.h"

namespace mmk::MMK_ISA {

// Keys between two updates of the softmax: half-empty caches below, full ones above.
constexpr int64_t kKeyBlock = kHasAmx ? 128 : 256;

// Keys that are seen or not together: a tile of scores, with AMX two, whose pairs fill a tile's depth.
constexpr int kKeyGroup = kHasAmx ? 2 * kAmxDepth : kTileRows;

// Keys [first, first + count) of a block, of which the same vectors of lanes see some.
struct Stretch {
    int first, count;
    int vector, vectors;
};

class Stretches {
  public:
    // Of the keys [key, key + count), in groups of kKeyGroup.
    Stretches(const LaneSpans& spans, int vectors, int64_t key, int count) {
        const Span block{static_cast<int32_t>(key), static_cast<int32_t>(key + count)};
        bool all = true;
        for (int v = 0; v < vectors; v++) all &= spans.inner[v].lo <= block.lo && spans.inner[v].hi >= block.hi;
        if (all) {
            add({0, count, 0, vectors});
            return;
        }
        for (int at = 0; at < count; at += kKeyGroup) {
            const auto first = static_cast<int32_t>(key + at);
            const Span group{first, first + kKeyGroup};
            int begin = 0, end = vectors;
            while (begin < end && !spans.outer[begin].meets(group)) begin++;
            while (begin < end && !spans.outer[end - 1].meets(group)) end--;
            if (begin < end) add({at, kKeyGroup, begin, end - begin});
        }
    }

    const Stretch* begin() const { return stretches_; }
    const Stretch* end() const { return stretches_ + count_; }

  private:
    void add(Stretch next) {
        Stretch* last = stretches_ + count_ - 1;
        const bool same = count_ > 0 && last->first + last->count == next.first && last->vector == next.vector &&
                          last->vectors == next.vectors;
        if (same) {
            last->count += next.count;
        } else {
            stretches_[count_++] = next;
        }
    }

    Stretch stretches_[kKeyBlock / kKeyGroup];
    int count_ = 0;
};

}  // namespace mmk::MMK_ISA
