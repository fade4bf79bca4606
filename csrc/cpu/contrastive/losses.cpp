// The contrastive losses of CLIP and SigLIP on N images and M texts, features of D numbers, with all gradients.
//
// With p = I T^T (N x M), s the scale, b the bias, e the label smoothing, and where there are N pairs (weights.h and
// matches.h say what else may belong together):
//
//   CLIP     S = s p,  a_i = exp S_ii,  r_i = sum of exp S_ij over j other than i,  c_j the same over i other than j
//            loss = 1/2N sum_i [log(1 + r_i / a_i) + log(1 + c_i / a_i)] + e s/N (sum_i p_ii - 1/N sum_ij p_ij)
//            dS_ij = exp(S_ij) / 2 (1 / (a_i + r_i) + 1 / (a_j + c_j)) - e/N                    off the diagonal
//            dS_ii = e (1 - 1/N) - (r_i / (a_i + r_i) + c_i / (a_i + c_i)) / 2
//   SigLIP   S = s p + b,  z = 2 eye - 1
//            loss = 1/N sum_ij log(1 + exp(-z_ij S_ij))                 dS = -z sigmoid(-z S)
//   and      dI = s/N dS T,  dT = s/N dS^T I,  ds = 1/N sum dS p,  db = 1/N sum dS
//
// The N x N numbers exist a tile at a time (pairs.h). SigLIP takes one sweep over the tiles: product, loss and dS, both
// gradients; 6 N^2 D operations. CLIP takes two, since no entry of dS is known before all of its row and column is: a
// first one for r and c, a second one for the gradients. One tile of dS feeds both gradients, so that is 8 N^2 D
// operations, where eager code that spells the logits out twice takes 12 and moves N^2 numbers a dozen times.
//
// Online maximum. exp(S) overflows at S = 89, which scale 100 exceeds. A fixed offset would turn the sums into plain
// additions, but holds only for features of unit length and loses rows whose every logit lies 87 below it; rows and
// columns therefore keep their own running maximum, and sums relative to it, for any features and any scale. It costs a
// second exponential an entry, next to the D multiply-adds (4 % of the time at D = 512).
//
// Small losses. A pair that is told apart well has a loss, and probabilities short of 1, of some 1e-9: the difference
// of two numbers of float32 near 1 would leave nothing of them. So the diagonal stays out of the sums: r and c are sums
// of small numbers, and both the loss and dS_ii are made of their ratio to a. Where the diagonal is not the largest,
// with m that maximum, log(1 + r / a) is (m - S_ii) + log(exp(S_ii - m) + r exp(-m)), two terms of which neither is
// negative.
//
// Differences first. exp(S - m) is 2^(|s| / ln 2 (q - m)), q being p or, where s is negative, -p, and m a maximum of q.
// The difference of products that are close is exact, which leaves the exponent a relative error of one rounding.
// The logit itself, rounded before the subtraction, would be wrong by 4e-6 at 100, and a compiler that fuses
// s p - m in one place and not in another would make that a probability of 1 + 4e-6 for the maximum.
//
// Bounded store. Tiles of p that fit into kStoredTiles are kept from the first sweep, so that the second need not
// compute them again (6 N^2 D where all fit); the others are recomputed: memory stays O(N D).
//
// Diagonal waves. The second sweep adds to rows of dI and of dT at once. Tiles are therefore taken in waves
// (i, i + t mod n): see run_grid. No two tasks at work share a row of dI or dT, nothing is locked or added atomically,
// every row is summed in one order, and the result is the same to the bit for any number of threads.
//
// Memory moved. The second sweep takes blocks of 2 x 2 tiles. A block reads 2 kTile rows of I, of T, of dI and of dT
// from beyond the L2 cache and writes those of dI and dT back: 12 kTile D numbers for 16 kTile^2 D operations, 48
// operations a byte in float32. What is as large as N x N is moved at most twice, the tiles kept.
#include "cpu/contrastive/gradients.h"

namespace mmk::MMK_ISA {
namespace {

double operations(const Rectangle& call) {
    return 2.0 * static_cast<double>(call.image.rows) * static_cast<double>(call.text.rows) *
           static_cast<double>(call.image.columns);
}

// How many positives a row has: f(i) of the images, or of the texts.
template <class Body>
auto with_positives(const int32_t* counts, int64_t first, int64_t last, Body&& body) {
    if (counts != nullptr) return body([=](int64_t i) -> int64_t { return counts[i]; });
    return body([=](int64_t i) -> int64_t { return i >= first && i < last; });
}

template <class T>
ContrastiveResult clip(const ClipLoss& call) {
    const Rectangle& rectangle = call.rectangle;
    const Pairing& pairing = rectangle.pairing;
    const int threads = useful_threads(operations(rectangle));
    // The largest block first: freed last, it is the last that scratch.cpp would part with.
    const int64_t n = rectangle.image.rows, m = rectangle.text.rows;
    const Store stored(Tiling(n), Tiling(m), call.gradients.wanted);
    const Pairs<T> pairs(rectangle.image, rectangle.text, call.gradients.wanted, threads);
    const Matcher matcher(rectangle);
    const Logits logits(rectangle.scale);
    LogSumExp rows(n), columns(m);
    first_sweep(pairs, stored, logits, matcher, threads, rows, columns);

    const WeightsOf of_rows(n), of_columns(m);
    ContrastiveResult result{};
    result.loss = with_positives(pairing.image_counts, pairing.first, pairing.last, [&](const auto& positives) {
        return judge(rows, n, rectangle.scale, call.row_share, call.label_smoothing, positives, of_rows);
    });
    result.loss += with_positives(
        pairing.text_counts, pairing.first + pairing.offset, pairing.last + pairing.offset, [&](const auto& positives) {
            return judge(columns, m, rectangle.scale, call.column_share, call.label_smoothing, positives, of_columns);
        });
    result.loss /= call.count;
    if (!call.gradients.wanted) return result;

    const ClipTerms terms{of_rows.with(rows), of_columns.with(columns), logits};
    const Sums sums =
        second_sweep(pairs, matcher, stored, terms, rectangle.scale / call.count, call.gradients, threads);
    result.d_scale = sums.products / call.count;
    return result;
}

template <class T>
void statistics(const Rectangle& call, const Statistics& of_rows, const Statistics& of_columns) {
    const int threads = useful_threads(operations(call));
    const Pairs<T> pairs(call.image, call.text, false, threads);
    LogSumExp rows(call.image.rows, of_rows), columns(call.text.rows, of_columns);
    first_sweep(pairs, Store(pairs.rows, pairs.columns, false), Logits(call.scale), Matcher(call), threads, rows,
                columns);
    rows.copy_to(of_rows);
    columns.copy_to(of_columns);
}

// The columns' weights, with room for a whole vector past the last.
class PaddedWeights {
  public:
    PaddedWeights(const Weights& from, int64_t count) : padded_(round_up(count, kTile)), memory_(4 * padded_) {
        std::fill_n(memory_.get(), 4 * padded_, 0.0f);
        const float* const fields[] = {from.max, from.weight, from.positive_weight, from.target};
        for (int k = 0; k < 4; k++) std::copy_n(fields[k], count, field(k));
    }
    Weights get() const { return {field(0), field(1), field(2), field(3)}; }

  private:
    float* field(int k) const { return memory_.get() + k * padded_; }

    int64_t padded_;
    Scratch<float> memory_;
};

template <class T>
double gradients(const Rectangle& call, const Weights& rows, const Weights& columns, double count,
                 const Gradients& to) {
    const int threads = useful_threads(operations(call));
    const Pairs<T> pairs(call.image, call.text, true, threads);
    const PaddedWeights padded(columns, call.text.rows);
    const ClipTerms terms{rows, padded.get(), Logits(call.scale)};
    const Store none(pairs.rows, pairs.columns, false);
    return second_sweep(pairs, Matcher(call), none, terms, call.scale / count, to, threads).products / count;
}

template <class T>
ContrastiveResult siglip(const SigLipLoss& call) {
    const Rectangle& rectangle = call.rectangle;
    const int threads = useful_threads(operations(rectangle));
    const Pairs<T> pairs(rectangle.image, rectangle.text, call.gradients.wanted, threads);
    const SigLipTerms terms{splat(static_cast<float>(rectangle.scale)), splat(static_cast<float>(call.bias))};
    const Sums sums = second_sweep(pairs, Matcher(rectangle), Store(pairs.rows, pairs.columns, false), terms,
                                   rectangle.scale / call.count, call.gradients, threads);
    return {sums.loss / call.count, sums.products / call.count, sums.d_logits / call.count};
}

}  // namespace

ContrastiveResult clip_loss(const ClipLoss& call) {
    return with_element_type(call.rectangle.image.dtype, [&](auto type) { return clip<decltype(type)>(call); });
}

ContrastiveResult siglip_loss(const SigLipLoss& call) {
    return with_element_type(call.rectangle.image.dtype, [&](auto type) { return siglip<decltype(type)>(call); });
}

void clip_statistics(const Rectangle& call, const Statistics& rows, const Statistics& columns) {
    with_element_type(call.image.dtype, [&](auto type) { statistics<decltype(type)>(call, rows, columns); });
}

double clip_gradients(const Rectangle& call, const Weights& rows, const Weights& columns, double count,
                      const Gradients& to) {
    return with_element_type(call.image.dtype,
                             [&](auto type) { return gradients<decltype(type)>(call, rows, columns, count, to); });
}

}  // namespace mmk::MMK_ISA
