// Which pairs of a tile of logits belong together, and which are left out of the sums of the others.
#pragma once
#include "cpu/contrastive/call.h"
#include "cpu/contrastive/pairs.h"

namespace mmk::MMK_ISA {

// kLanes columns of one row: masks.
struct Match {
    IVec positive;           // belong together
    IVec of_row, of_column;  // stay out of the sum of their row, of their column
    IVec hidden;             // count nowhere
    IVec own;                // the row's own column: kept apart, see weigh()
};

// What a tile can hold, which its code is compiled for: nearly all tiles hold nothing.
enum class Matches { kNone, kOwn, kIds };

static MMK_INLINE IVec load_ids(const int32_t* p) {
    IVec v;
    memcpy(&v, p, sizeof v);
    return v;
}

class Matcher {
  public:
    explicit Matcher(const Rectangle& call)
        : pairing_(call.pairing),
          columns_(pairing_.same == Same::kNothing ? 0 : 2 * round_up(call.text.rows, kTile)),
          text_ids_(columns_.get()),
          text_alone_(text_ids_ + round_up(call.text.rows, kTile)) {
        if (pairing_.same == Same::kNothing) return;
        std::fill_n(text_ids_, 2 * round_up(call.text.rows, kTile), kNoId);
        for (int64_t j = 0; j < call.text.rows; j++) {
            text_ids_[j] = pairing_.text_ids[j];
            if (stays_out(pairing_.text_counts, j)) text_alone_[j] = pairing_.text_ids[j];
        }
    }

    bool has_own(int64_t i) const { return i >= pairing_.first && i < pairing_.last; }
    int64_t own(int64_t i) const { return has_own(i) ? i + pairing_.offset : kNoId; }
    int64_t owner(int64_t j) const { return has_own(j - pairing_.offset) ? j - pairing_.offset : kNoId; }
    bool by_ids() const { return pairing_.same == Same::kPositive; }

    Matches in_tile(int64_t i, int64_t rows, int64_t j, int64_t columns) const {
        if (pairing_.same != Same::kNothing) return Matches::kIds;
        const int64_t first = std::max(i, pairing_.first), last = std::min(i + rows, pairing_.last);
        const bool crossed = first < last && first + pairing_.offset < j + columns && last + pairing_.offset > j;
        return crossed ? Matches::kOwn : Matches::kNone;
    }

    template <Matches kMatches>
    MMK_INLINE Match at(int64_t i, int64_t j) const {
        Match match{};
        if constexpr (kMatches == Matches::kNone) return match;
        match.own = lane_index() == static_cast<int32_t>(own(i) - j);
        match.positive = match.of_row = match.of_column = match.own;
        if constexpr (kMatches == Matches::kIds) {
            const IVec ids = load_ids(text_ids_ + j), same = ids == pairing_.image_ids[i];
            if (by_ids()) {
                match.positive = same;
                match.of_row = stays_out(pairing_.image_counts, i) ? same : IVec{};
                match.of_column = load_ids(text_alone_ + j) == pairing_.image_ids[i];
            } else {
                match.of_row = match.of_column = same | match.own;
                match.hidden = same & ~match.own;
            }
        }
        return match;
    }

  private:
    static constexpr int32_t kNoId = -1;  // no column either

    // The one positive of a row stays out of its sum. Several have to be in it: their shares are unequal.
    bool stays_out(const int32_t* counts, int64_t i) const { return !by_ids() || counts[i] == 1; }

    Pairing pairing_;
    Scratch<int32_t> columns_;
    int32_t *text_ids_, *text_alone_;
};

// body(std::integral_constant<Matches, kMatches>{}) of what the tile holds.
template <class Body>
auto with_matches(Matches matches, Body&& body) {
    if (matches == Matches::kIds) return body(std::integral_constant<Matches, Matches::kIds>{});
    if (matches == Matches::kOwn) return body(std::integral_constant<Matches, Matches::kOwn>{});
    return body(std::integral_constant<Matches, Matches::kNone>{});
}

}  // namespace mmk::MMK_ISA
