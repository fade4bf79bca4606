// Attention within short segments: windows of a vision tower, small images, captions.
#pragma once
#include "cpu/span_attention/segments.h"

namespace mmk::MMK_ISA {

// Whether a segment is served by span_short: all of its keys are one block, and it has few rows, counting for each
// query the query heads that share a key head: no more than the general forward makes a task of.
// Fewer rows than half a vector leave too many lanes idle.
static inline bool is_short(const SpanAttention& call, const Segment& segment) {
    constexpr int64_t kKeys = 192, kFewest = kLanes / 2, kRows = 768;
    const int64_t rows = (segment.last - segment.first) * (call.q.heads / call.k.heads);
    return call.spans.runs == 1 && segment.hi - segment.lo <= kKeys && kFewest <= rows && rows <= kRows;
}

// Attends for these segments.
void span_short(const SpanAttention& call, const std::vector<RowSegment>& segments);

}  // namespace mmk::MMK_ISA
