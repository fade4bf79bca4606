// How the queries of an attention call fall into segments: runs of consecutive queries that share keys with one another
// and with no neighbour outside, such as the documents of a packed batch.
//
// A query's hull is [lowest lo, highest hi) of its runs. A segment is a maximal run of queries in which the hull of
// each meets the union of those before it; queries that see nothing belong to the segment they stand in. Kernels work
// on one segment at a time, so that no block of queries straddles two documents, and load keys that no query of the
// segment sees (see `covered`) as zeros: then not even NaN in a foreign document, in padding or in a gap between runs
// can reach a query of this one. Two segments that are not neighbours may still share keys, as where spans go back to
// earlier ones.
//
// O(runs T) time, O(segments) memory. Nothing here depends on the number of threads.
#pragma once
#include <algorithm>
#include <climits>
#include <vector>

#include "cpu/simd.h"
#include "cpu/span_attention/call.h"

namespace mmk::MMK_ISA {

struct Span {  // keys [lo, hi)
    int32_t lo, hi;

    bool empty() const { return lo >= hi; }
    bool meets(Span other) const { return std::max(lo, other.lo) < std::min(hi, other.hi); }
};

// The spans of one row of the batch, clamped to its keys. An empty span reads as {0, 0}.
class SpanTable {
  public:
    SpanTable(const Spans& spans, int64_t batch_row, int64_t num_keys)
        : queries(spans.queries),
          runs(spans.runs),
          lo_(spans.lo + batch_row * spans.batch_stride),
          hi_(spans.hi + batch_row * spans.batch_stride),
          num_keys_(static_cast<int32_t>(std::min<int64_t>(num_keys, INT32_MAX))) {}

    Span operator()(int64_t run, int64_t query) const {
        const int64_t at = run * queries + query;
        const Span span{std::max(lo_[at], 0), std::min(hi_[at], num_keys_)};
        return span.empty() ? Span{0, 0} : span;
    }

    Span hull(int64_t query) const {
        Span hull{INT32_MAX, 0};
        for (int64_t run = 0; run < runs; run++) {
            const Span span = (*this)(run, query);
            if (!span.empty()) hull = {std::min(hull.lo, span.lo), std::max(hull.hi, span.hi)};
        }
        return hull.empty() ? Span{0, 0} : hull;
    }

    const int64_t queries, runs;

  private:
    const int32_t *lo_, *hi_;
    int32_t num_keys_;
};

struct Segment {
    int64_t first, last;  // queries [first, last)
    int32_t lo, hi;       // hull of their keys, {0, 0} if they see none

    Span hull() const { return {lo, hi}; }
};

struct RowSegment {  // of a row of the batch
    int64_t batch_row;
    Segment segment;
};

// In the order of the queries; every query is in one of them.
static inline std::vector<Segment> segments(const SpanTable& spans) {
    std::vector<Segment> found;
    Segment current{0, 0, 0, 0};
    for (int64_t query = 0; query < spans.queries; query++) {
        const Span hull = spans.hull(query);
        if (!hull.empty() && current.lo >= current.hi) {
            current.lo = hull.lo, current.hi = hull.hi;
        } else if (!hull.empty() && !hull.meets(current.hull())) {
            found.push_back({current.first, query, current.lo, current.hi});
            current = {query, query, hull.lo, hull.hi};
        } else if (!hull.empty()) {
            current.lo = std::min(current.lo, hull.lo), current.hi = std::max(current.hi, hull.hi);
        }
    }
    if (spans.queries > 0) found.push_back({current.first, spans.queries, current.lo, current.hi});
    return found;
}

// The keys that some query of the segment sees: ascending spans that neither meet nor touch. With one run a query that
// is the whole hull; several may leave gaps.
static inline std::vector<Span> covered(const SpanTable& spans, const Segment& segment) {
    if (segment.lo >= segment.hi) return {};
    if (spans.runs == 1) return {segment.hull()};
    std::vector<Span> all;
    for (int64_t run = 0; run < spans.runs; run++) {
        for (int64_t query = segment.first; query < segment.last; query++) {
            const Span span = spans(run, query);
            const bool known = !all.empty() && all.back().lo <= span.lo && span.hi <= all.back().hi;
            if (!span.empty() && !known) all.push_back(span);
        }
    }
    std::sort(all.begin(), all.end(), [](Span a, Span b) { return a.lo < b.lo; });
    size_t count = 0;
    for (const Span span : all) {
        if (count > 0 && span.lo <= all[count - 1].hi) {
            all[count - 1].hi = std::max(all[count - 1].hi, span.hi);
        } else {
            all[count++] = span;
        }
    }
    all.resize(count);
    return all;
}

}  // namespace mmk::MMK_ISA
