// How the forward of span attention cuts a row of the batch into blocks of queries, and what each of them sees. One
// plan serves all heads, and every row of a batch that shares its spans. O(runs T) time and memory.
//
// The query heads that share a key head are lanes beside each other: lane = query * group + head of the group. So they
// share the loads of the keys, and a block covers fewer queries, which see more alike.
#pragma once
#include "cpu/product/matmul.h"
#include "cpu/span_attention/segments.h"

namespace mmk::MMK_ISA {

// What the lanes of a block see by one of the runs of their queries.
struct LaneSpans {
    int32_t lo[kTileColumns], hi[kTileColumns];
    Span outer[kTileVectors];  // of each vector: outside, no lane of it sees a key
    Span inner[kTileVectors];  // inside, every lane does
};

struct QueryBlock {  // at most kTileVectors vectors of lanes, the last one of them perhaps not full
    int64_t first_lane, lanes;

    int vectors() const { return static_cast<int>(ceil_div(lanes, kLanes)); }
};

// Blocks of one segment: the work of a task, for each key head.
struct Part {
    int64_t batch_row;
    int64_t first_block, last_block;
    int64_t segment;
    Span hull;  // of the keys that the blocks see
};

class Plan {
  public:
    // `group` query heads share a key head; part_lanes: about as many lanes has a part.
    Plan(int64_t group, int64_t runs, int64_t part_lanes)
        : group_(group), runs_(runs), part_blocks_(std::max<int64_t>(1, part_lanes / kTileColumns)) {}

    void add(int64_t batch_row, const SpanTable& spans, const Segment& segment) {
        covered_.push_back({covered(spans, segment)});
        const Panels panels((segment.last - segment.first) * group_);
        const int64_t parts = ceil_div(panels.count, part_blocks_);
        for (int64_t i = 0; i < parts; i++) {
            add_part(batch_row, spans, segment, panels, panels.count * i / parts, panels.count * (i + 1) / parts);
        }
    }

    const std::vector<Part>& parts() const { return parts_; }
    const QueryBlock& block(int64_t i) const { return blocks_[i]; }
    const LaneSpans& spans(int64_t block, int64_t run) const { return spans_[block * runs_ + run]; }
    const std::vector<Span>& covered_by(const Part& part) const { return covered_[part.segment].spans; }
    int64_t runs() const { return runs_; }

  private:
    struct Covered {
        std::vector<Span> spans;
    };

    void add_part(int64_t batch_row, const SpanTable& spans, const Segment& segment, const Panels& panels,
                  int64_t first_panel, int64_t last_panel) {
        Span hull{INT32_MAX, 0};
        const auto first_block = static_cast<int64_t>(blocks_.size());
        for (int64_t p = first_panel; p < last_panel; p++) {
            const int64_t last_lane = std::min(panels.first(p + 1), (segment.last - segment.first) * group_);
            blocks_.push_back({segment.first * group_ + panels.first(p), last_lane - panels.first(p)});
            for (int64_t run = 0; run < runs_; run++) {
                spans_.push_back(lane_spans(spans, run, blocks_.back()));
                for (const Span outer : spans_.back().outer) {
                    if (!outer.empty()) hull = {std::min(hull.lo, outer.lo), std::max(hull.hi, outer.hi)};
                }
            }
        }
        parts_.push_back({batch_row, first_block, static_cast<int64_t>(blocks_.size()),
                          static_cast<int64_t>(covered_.size()) - 1, hull.empty() ? Span{0, 0} : hull});
    }

    LaneSpans lane_spans(const SpanTable& table, int64_t run, const QueryBlock& block) const {
        LaneSpans spans;
        for (int v = 0; v < kTileVectors; v++) {
            Span outer{INT32_MAX, 0}, inner{0, INT32_MAX};
            for (int64_t lane = v * kLanes; lane < (v + 1) * kLanes; lane++) {
                // Lanes past the last never need a mask: nobody reads them.
                Span span{0, INT32_MAX};
                if (lane < block.lanes) {
                    span = table(run, (block.first_lane + lane) / group_);
                    if (!span.empty()) outer = {std::min(outer.lo, span.lo), std::max(outer.hi, span.hi)};
                }
                inner = {std::max(inner.lo, span.lo), std::min(inner.hi, span.hi)};
                spans.lo[lane] = span.lo, spans.hi[lane] = span.hi;
            }
            spans.outer[v] = outer.empty() ? Span{0, 0} : outer, spans.inner[v] = inner;
        }
        return spans;
    }

    int64_t group_, runs_, part_blocks_;
    std::vector<Part> parts_;
    std::vector<QueryBlock> blocks_;
    std::vector<LaneSpans> spans_;  // [block][run]
    std::vector<Covered> covered_;  // of each segment
};

}  // namespace mmk::MMK_ISA
