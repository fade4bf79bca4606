// What the backward of span attention knows of one row of the batch before it touches a number: which queries share
// keys, how the rows of a key head lie in tiles, and which keys a tile sees. One plan serves all heads, and every row
// of the batch that has the same spans. O(runs T) memory.
#pragma once
#include <algorithm>
#include <climits>
#include <tuple>
#include <vector>

#include "cpu/product/matmul.h"
#include "cpu/span_attention/segments.h"

namespace mmk::MMK_ISA::attention_backward {

// A query of one of the heads that share a key head. Padding up to a whole tile has query -1.
struct Row {
    int32_t query, head;
};

// What one run of several rows has in common. Rows that see nothing at all count for nothing: they are loaded as zeros.
struct Hull {
    int32_t lo = INT_MAX, hi = 0;              // outside, no row sees a key
    int32_t inner_lo = 0, inner_hi = INT_MAX;  // inside, every row does

    void add(Span span) {
        if (span.empty()) {
            inner_hi = 0;
            return;
        }
        lo = std::min(lo, span.lo), hi = std::max(hi, span.hi);
        inner_lo = std::max(inner_lo, span.lo), inner_hi = std::min(inner_hi, span.hi);
    }
    bool meets(int64_t first, int64_t last) const { return lo < last && hi > first; }
    bool everyone_sees(int64_t first, int64_t last) const { return inner_lo <= first && last <= inner_hi; }
};

// Rows that share keys with no row outside the group, and these keys, whose gradients are the group's alone.
struct Group {
    int64_t first_row, last_row;  // whole tiles
    int64_t first_key, last_key;
};

class Plan {
  public:
    // `heads` query heads share a key head.
    Plan(const SpanTable& table, int64_t num_keys, int64_t heads) : runs(table.runs), seen_(num_keys) {
        for (const std::vector<Segment>& together : sharing_keys(segments(table))) {
            Group group{num_rows(), 0, together[0].lo, together[0].hi};
            for (const Segment& segment : together) {
                add_rows(table, segment, heads);
                group.first_key = std::min<int64_t>(group.first_key, segment.lo);
                group.last_key = std::max<int64_t>(group.last_key, segment.hi);
                for (const Span keys : covered(table, segment)) {
                    std::fill(seen_.begin() + keys.lo, seen_.begin() + keys.hi, true);
                }
            }
            group.last_row = num_rows();
            groups.push_back(group);
        }
        add_hulls();
    }

    int64_t num_rows() const { return static_cast<int64_t>(rows.size()); }
    const Span* spans(int64_t row) const { return spans_.data() + row * runs; }              // one a run
    const Hull* hulls(int64_t row) const { return hulls_.data() + row / kTileRows * runs; }  // of the row's tile
    bool sees_anything(int64_t row) const {
        return std::any_of(spans(row), spans(row) + runs, [](Span span) { return !span.empty(); });
    }
    bool meets(int64_t row, int64_t first_key, int64_t last_key) const {  // any row of the tile any of the keys
        return std::any_of(hulls(row), hulls(row) + runs, [&](const Hull& h) { return h.meets(first_key, last_key); });
    }
    // Whether any query sees the key. What none sees may hold NaN, and has gradients of zero.
    bool seen(int64_t key) const { return seen_[key]; }

    const int64_t runs;
    std::vector<Row> rows;
    std::vector<Group> groups;  // those without keys, then by their keys

  private:
    // Segments whose keys overlap, together, in the order of their queries.
    static std::vector<std::vector<Segment>> sharing_keys(std::vector<Segment> segments) {
        std::sort(segments.begin(), segments.end(), [](const Segment& a, const Segment& b) {
            return std::make_tuple(!a.hull().empty(), a.lo, a.first) <
                   std::make_tuple(!b.hull().empty(), b.lo, b.first);
        });
        std::vector<std::vector<Segment>> groups;
        int32_t end = 0;
        for (const Segment& segment : segments) {
            if (segment.lo >= end) groups.emplace_back();
            groups.back().push_back(segment);
            end = std::max(end, segment.hi);
        }
        for (auto& group : groups) {
            std::sort(group.begin(), group.end(), [](const Segment& a, const Segment& b) { return a.first < b.first; });
        }
        return groups;
    }

    // Tiles are not shared between segments, so that a row meets no number of a stranger's.
    void add_rows(const SpanTable& table, const Segment& segment, int64_t heads) {
        for (int64_t query = segment.first; query < segment.last; query++) {
            for (int64_t head = 0; head < heads; head++) {
                rows.push_back({static_cast<int32_t>(query), static_cast<int32_t>(head)});
                for (int64_t run = 0; run < runs; run++) spans_.push_back(table(run, query));
            }
        }
        rows.resize(round_up(num_rows(), kTileRows), Row{-1, 0});
        spans_.resize(num_rows() * runs, Span{0, 0});
    }

    void add_hulls() {
        hulls_.resize(num_rows() / kTileRows * runs);
        for (int64_t row = 0; row < num_rows(); row++) {
            if (!sees_anything(row)) continue;
            for (int64_t run = 0; run < runs; run++) hulls_[row / kTileRows * runs + run].add(spans(row)[run]);
        }
    }

    std::vector<Span> spans_;  // [row][run]
    std::vector<Hull> hulls_;  // [tile][run]
    std::vector<uint8_t> seen_;
};

}  // namespace mmk::MMK_ISA::attention_backward
