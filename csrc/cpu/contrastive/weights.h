// From the statistics of a row of logits (or of a column) to its loss and to its part of dS.
//
// With P the positives of a row, |P| of them, M columns in all, e the smoothing, a the row's share of the loss:
//
//   loss   a [R - mean_P S + e (mean_P S - mean S)],   R the log of the sum of exp S over all that is not ignored
//   dS     a exp(S - R) - a (1 - e) / |P| on P - a e / M
//
// of which the terms with 1 / M, mean S among them, are left to the caller: they are sums of features. The rest is kept
// as the weight w of the others, the weight v of the positives and the target t:
//
//   dS = w exp(S - m),   on P: v exp(S - m) - t
//
// One positive: it is not in the sum r of the others, so with a_i = exp S_ii the loss is log(1 + r / a_i), and dS there
// is - r / (a_i + r), which keep their digits however small they are; v = 0. Several: their shares differ from 1 / |P|
// by themselves, there is nothing to keep.
#pragma once
#include "cpu/contrastive/statistics.h"

namespace mmk::MMK_ISA {

// What a row says of its one positive, q_ii; x, r: the maximum of the others, and the sum.
struct OwnPair {
    double loss;    // log(1 + r / a)
    double missed;  // r / (a + r): what the own pair's probability is short of 1
    double weight;  // times exp(S - x): the probability of any other pair

    OwnPair(double q_ii, double x, double r, double factor) {
        const double lead = factor * (q_ii - x);
        if (lead >= 0) {
            const double fade = std::exp2(-lead), rest = r * fade;
            loss = std::log1p(rest);
            missed = rest / (1 + rest);
            weight = fade / (1 + rest);
        } else {  // NaN comes here, too
            const double total = std::exp2(lead) + r;
            loss = std::log(total) - lead * kLn2;
            missed = r / total;
            weight = 1 / total;
        }
    }
};

class WeightsOf {  // `count` rows or columns
  public:
    explicit WeightsOf(int64_t count) : padded_(round_up(count, kTile)), memory_(3 * padded_) {
        std::fill_n(memory_.get(), 3 * padded_, 0.0f);  // no weights past the last
    }
    float* weight() const { return memory_.get(); }
    float* positive_weight() const { return memory_.get() + padded_; }
    float* target() const { return memory_.get() + 2 * padded_; }
    Weights with(const LogSumExp& statistics) const { return {statistics.max, weight(), positive_weight(), target()}; }

  private:
    int64_t padded_;
    Scratch<float> memory_;
};

// Of each of `count` rows; positives(i): how many of them it has.
template <class Positives>
static double judge(const LogSumExp& statistics, int64_t count, double scale, double share, double smoothing,
                    const Positives& positives, const WeightsOf& to) {
    const double factor = std::abs(scale) * kLog2e;
    double loss = 0;
    for (int64_t i = 0; i < count; i++) {
        const auto number = static_cast<double>(positives(i));
        if (number == 0) continue;
        const double x = statistics.max[i], r = statistics.sum[i], mean = statistics.positive[i] / number;
        if (number == 1) {
            const OwnPair own(mean, x, r, factor);
            loss += own.loss;
            to.weight()[i] = static_cast<float>(share * own.weight);
            to.target()[i] = static_cast<float>(share * (own.missed - smoothing));
        } else {
            loss += std::log(r) + factor * kLn2 * (x - mean);
            to.weight()[i] = to.positive_weight()[i] = static_cast<float>(share / r);
            to.target()[i] = static_cast<float>(share * (1 - smoothing) / number);
        }
        loss += smoothing * std::abs(scale) * mean;
    }
    return share * loss;
}

}  // namespace mmk::MMK_ISA
