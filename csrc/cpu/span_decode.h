// Attention of few queries against many keys: decoding from a cache.
#pragma once
#include "span_attention.h"

namespace mmk::MMK_ISA {

// Serves the call and returns true, if every segment of it has few enough rows (see span_decode.cpp) of one run each.
bool span_decode(const SpanAttention& call);

}  // namespace mmk::MMK_ISA
