// Attention of few queries against many keys: decoding from a cache.
#pragma once
#include "cpu/span_attention/segments.h"

namespace mmk::MMK_ISA {

// Whether a segment that is not short is served by span_decode: it has few rows, counting for each query the query
// heads that share a key head. Sums over the lanes then cost less than the general path's packing and transposing.
// Where there are few heads, too, only keys are many enough to keep all threads busy, and it is span_decode that shares
// them out.
static inline bool decodes(const SpanAttention& call, const Segment& segment) {
    constexpr int64_t kRows = 16, kRowsOfFewHeads = 64, kFewHeads = 8, kManyKeys = 2048;
    const bool shares_keys = call.k.heads < kFewHeads && segment.hi - segment.lo >= kManyKeys;
    const int64_t rows = (segment.last - segment.first) * (call.q.heads / call.k.heads);
    return call.spans.runs == 1 && rows <= (shares_keys ? kRowsOfFewHeads : kRows);
}

// Attends for these segments.
void span_decode(const SpanAttention& call, const std::vector<RowSegment>& segments);

}  // namespace mmk::MMK_ISA
