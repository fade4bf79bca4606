"""What mutants.py breaks: a place in a kernel each, of which `old` is the first text that reads so."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    file: str  # of csrc/cuda
    what: str
    old: str
    new: str
    tests: str  # of tests/emulator


def of(file: str, tests: str, *broken: tuple[str, str, str]) -> list[Mutation]:
    return [Mutation(file, *each, tests) for each in broken]


MUTATIONS = [
    *of(
        "span_attention/forward_sm80.cu",
        "test_span_attention.py",
        (
            "keys are used before their copy has ended",
            "cp_async_wait<0>();\n            __syncthreads();  // the keys",
            "__syncthreads();  // the keys",
        ),
        ("no barrier before keys are used", "__syncthreads();  // the keys are here", "// the keys are here"),
        (
            "values are used before their copy has ended",
            "cp_async_wait<0>();\n            if (masked)",
            "if (masked)",
        ),
        ("no barrier before values are used", "__syncthreads();  // the values are here", "// the values are here"),
        ("the last blocks of a span are not masked", "j0 + kKeys > hull.common_end", "j0 > hull.common_end"),
        ("a row that sees nothing yet", "largest == -INFINITY ? 0.0f : largest", "largest"),
        (
            "half of the sum of weights",
            "            total[i] += __shfl_xor_sync(kAllLanes, total[i], 2);\n",
            "",
        ),
        ("key heads in turns", "head / (p.heads / p.key_heads)", "head % p.key_heads"),
        ("values beyond the tensor are loaded", "(values, v, j0, hull.end - j0)", "(values, v, j0, kKeys)"),
        ("keys beyond the tensor are loaded", "j0 + kKeys, hull.end - j0 - kKeys)", "j0 + kKeys, kKeys)"),
        ("values that are NaN stay", "if (masked) make_finite", "if (p.runs < 0) make_finite"),
        ("flags of rows that are not finite are never cleared", "next_flags[thread] = 0", "next_flags[thread] += 0"),
        ("shared memory a tile short", "(kRows + 2 * kKeys) *", "(kRows + kKeys) *"),
        ("a warp stores beyond the queries", "row < present)", "row <= present)"),
        ("wide heads: scores of half of the numbers", "x[n][0] += its.x, ", ""),
        (
            "wide heads: the other warp's scores are read before they are there",
            "named_barrier_sync(",
            "if (false) named_barrier_sync(",
        ),
        ("wide heads: both warps add the first columns", "values + column0", "values"),
        ("the log-sum-exp is 1e-5 too large", "log2f(total[i])) * kLn2;", "log2f(total[i])) * kLn2 + 1e-5f;"),
    ),
    *of(
        "span_attention/device.h",
        "test_span_attention.py",
        ("rows are read beyond the last", "row < present && column < from.width;", "row <= present;"),
        ("the span of a query behind the last", "inside = row < p.queries", "inside = row <= p.queries"),
        ("ends beyond the keys", "min(p.hi[slice * p.queries + row], p.keys)", "p.hi[slice * p.queries + row]"),
        ("the mask is a key off at the end", "column < end[i] ? s", "column <= end[i] ? s"),
        ("the mask is a key off at the beginning", "column >= begin[i] ? s", "column > begin[i] ? s"),
        (
            "the last keys of a span are not masked",
            "if (key0 + kKeys > hull.common_end) {",
            "if (key0 > hull.common_end) {",
        ),
        ("ldmatrix meets conflicts of banks", "kPitch = kWidth + 8", "kPitch = kWidth"),
        ("operands of the right are not transposed", "ldmatrix_x4_trans(b", "ldmatrix_x4(b"),
    ),
    *of(
        "span_attention/forward_sm90.cu",
        "test_span_attention.py",
        (
            "the first keys are used before they are there",
            "mbarrier_wait(&control.key_full[at.stage], at.parity);\n        turns.take();",
            "turns.take();",
        ),
        (
            "keys are copied over those in use",
            "mbarrier_wait(&control.key_empty[at.stage], at.parity ^ 1);",
            "mbarrier_wait(&control.key_empty[at.stage], at.parity);",
        ),
        ("scores are read while they are computed", "        wgmma_wait<0>(attention.s);\n", ""),
        ("the next scores are not waited for", "            wgmma_wait<1>(attention.s);\n", ""),
        (
            "values are given back while they are multiplied",
            "wgmma_wait<0>(attention.o);\n            if (!first)",
            "if (!first)",
        ),
        ("what is made finite is not shown to wgmma", "                async_proxy_fence();\n", ""),
        (
            "values are used before they are looked through",
            "                mbarrier_wait(&control.value_clean[at.stage], at.parity);\n",
            "",
        ),
        ("nobody has the first turn", "        if (group == 1) turns.pass();", "        // "),
        (
            "the warpgroups do not take turns",
            "            turns.take();\n            if (!more) break;",
            "            if (!more) break;",
        ),
        ("half of the bytes are waited for", "(full, sizeof to)", "(full, sizeof to / 2)"),
        ("barriers unseen by TMA", "        mbarrier_init_fence();\n", ""),
        ("barriers used before they are made", "init();\n    __syncthreads();", "init();"),
        ("registers not fenced before a product", "        wgmma_fence();\n", ""),
        (
            "the second run goes by the spans of the first",
            "if (walk.run != run) spans =",
            "if (walk.run < run) spans =",
        ),
        (
            "values are used before they are there",
            "            mbarrier_wait(&control.value_full[at.stage], at.parity);\n            if (masked) {\n"
            "                mbarrier_wait",
            "            if (masked) {\n                mbarrier_wait",
        ),
        (
            "one warp alone has looked through the values",
            "mbarrier_init(&value_clean[stage], kHelperWarps)",
            "mbarrier_init(&value_clean[stage], 1)",
        ),
        (
            "one warp too few gives back keys",
            "mbarrier_init(&key_empty[stage], kConsumerWarps)",
            "mbarrier_init(&key_empty[stage], kConsumerWarps - 1)",
        ),
    ),
    *of(
        "span_attention/softmax_sm90.h",
        "test_span_attention.py",
        ("a maximum that rose in the second row alone", "fade[0] != 1.0f || fade[1] != 1.0f", "fade[0] != 1.0f"),
        ("the log-sum-exp is 1e-5 too large", "log2f(total[i])) * kLn2;", "log2f(total[i])) * kLn2 + 1e-5f;"),
    ),
    *of(
        "span_attention/tiles_sm90.h",
        "test_span_attention.py",
        ("a product that was never committed", "    wgmma_commit();\n", ""),
        ("half a step along a row of keys", "k * 16 % kColumns * 2);", "k * 16 % kColumns);"),
        ("one exponent of ones too few is looked for", "carries(was.z) | carries(was.w)", "carries(was.z)"),
    ),
    *of(
        "span_attention/prepare.cu",
        "test_span_attention_backward.py",
        ("the last queries that see a block of keys", "end = i + 1;", "end = i;"),
        ("the gradient of lse is added", "delta -= call.d_lse[line]", "delta += call.d_lse[line]"),
        ("the gradient of lse is that of the first head", "call.d_lse[line]", "call.d_lse[line % p.queries]"),
    ),
    *of(
        "span_attention/backward_sm80.cu",
        "test_span_attention_backward.py",
        ("keys are used before their copy has ended", "cp_async_wait<0>();\n            if (masked)", "if (masked)"),
        ("no barrier before keys are used", "            __syncthreads();  // the tiles", "            // the tiles"),
        ("no barrier before queries are used", "\n        __syncthreads();  // the tiles", "\n        // the tiles"),
        ("flags cleared while they are read", "non_finite[(turn + 1) % kFlags", "non_finite[turn % kFlags"),
        ("the first head of a group counts for all", "walk.head) * p.queries", "walk.first_head) * p.queries"),
        ("every run goes by the first one's queries", "entry[static_cast<int64_t>(run) * key_blocks()]", "entry[0]"),
        ("queries beyond the last are read", "present = p.queries - walk.row0", "present = kStep"),
        ("masks are left out at the end of the keys", " || hull.common_end < key_end", ""),
        ("wide heads: a warp's scores are those of the first", "part * kOwn / 2 + x / 2", "x / 2"),
        ("wide heads: the last warp's part is left out", "other < kParts", "other < kParts - 1"),
        (
            "wide heads: sums are overwritten while they are read",
            "__syncwarp();  // other lanes may",
            "// other lanes may",
        ),
        (
            "wide heads: sums are read before they are there",
            "            meet();\n            float4 sum",
            "            float4 sum",
        ),
        (
            "wide heads: weights are read before they are there",
            "            meet();\n#pragma unroll\n            for (int i = 0; i < kCount * kParts",
            "#pragma unroll\n            for (int i = 0; i < kCount * kParts",
        ),
        ("wide heads: results of all warps lie in the first columns", "head), warp.column0);", "head), 0);"),
    ),
    *of(
        "span_attention/query_grad_sm90.cu",
        "test_span_attention_backward.py",
        ("scores are read while they are computed", "        wgmma_wait<1>(s);\n", ""),
        ("keys are given back while they are multiplied", "wgmma_wait<0>(dq)", "wgmma_wait<1>(dq)"),
        ("what is made finite is not shown to wgmma", "        async_proxy_fence();\n", ""),
    ),
    *of(
        "span_attention/key_grads_sm90.cu",
        "test_span_attention_backward.py",
        ("products with values are read while they are computed", "wgmma_wait<1>(dp)", "wgmma_wait<2>(dp)"),
        (
            "blocks that share keys: both take every step",
            "step_number++ % call.sharers == own",
            "step_number++ >= 0 * own",
        ),
        ("blocks that share keys: a part of the sums is left out", "dk[4 * i + 1] += k.y, ", ""),
        ("blocks that share keys: sums lie on tiles in use", "cluster_sync();  // no step", "// no step"),
        ("blocks that share keys: sums are read before they are there", "cluster_sync();  // the sums", "// the sums"),
        ("blocks that share keys: one leaves while its sums are read", "cluster_sync();  // and read", "// and read"),
        ("the keys of the row before", "hold(k_left, shared.k, key - block.row,", "hold(k_left, shared.k, group * 64,"),
        ("queries are used before they are there", "    mbarrier_wait(&shared.ring.own, 0);\n", ""),
    ),
    *of(
        "contrastive/tiles_sm80.cu",
        "test_contrastive.py",
        ("stages are used before their copy has ended", "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"),
        (
            "columns beyond the last count as logits",
            "tile.inside(row, column)) s =",
            "tile.inside(row, 0 * column)) s =",
        ),
        ("features are read beyond their width", "i < present && k0 < left)", "i < present)"),
        ("sums are stored beyond the rows", "if (x < tile.rows) {", "{"),
        ("every text lies beside its image", "shift = j0 - i0 - pairs.offset;", "shift = j0 - i0;"),
        (
            "the diagonal is left in the sums",
            "            s = kLowest;\n        });\n    }\n    if",
            "        });\n    }\n    if",
        ),
        (
            "the diagonal has the gradient of any pair",
            "if (pair.positive && pair.counted) d = p_.",
            "if (false) d = p_.",
        ),
        (
            "ids are those of other rows",
            "image_id<kAlone>(pairs, tile.i0 + x, tile.i0 + tile.rows)",
            "image_id<kAlone>(pairs, x, tile.rows)",
        ),
        (
            "the one positive is left in the sum of its row",
            "id(j) == found.alone.image[place.row + row] ? kLowest : x",
            "id(j) == kNoImage ? kLowest : x",
        ),
        (
            "what is to be ignored counts in a column",
            "found.ids.text[place.column + column]) s = kLowest;",
            "found.ids.text[place.column + column]) s *= 1.0f;",
        ),
        (
            "what is to be ignored has a gradient",
            "kSame != Same::kIgnored || own || !same",
            "kSame != Same::kIgnored || own || same",
        ),
        ("positives of one half of a row alone", "positives[x] + positives[kTile + x]", "positives[x]"),
        (
            "half of what the gradient of SigLIP's scale is made of is a hundredth too large, where no pair is its own",
            "const float d = loss.slope(pair, i, j);",
            "const float d = loss.slope(pair, i, j);\n"
            "if constexpr (kPlain && Loss::kSums == 3) loss.sums[1] += j == 0 ? 0.01f * d * pair.product : 0.0f;",
        ),
    ),
    *of(
        "contrastive/device.h",
        "test_contrastive.py",
        (
            "logits are rounded before their difference is taken",
            "exp2_approx((q - maximum) * factor)",
            "exp2_approx(q * factor - maximum * factor)",
        ),
        ("a scale of 0 makes logits of what is none", "if (factor < 0x1p-100f) factor = 0x1p-100f;", ""),
        ("a scale below 0 turns the softmax round", "scale < 0.0f ? -1.0f : 1.0f", "1.0f"),
        ("each of several positives stays out of the sum", "pairs.image_counts[i] == 1", "pairs.image_counts[i] >= 1"),
        ("ids are read beyond the last text", "return j < end && (!kAlone", "return j <= end && (!kAlone"),
        (
            "the one positive is of infinite weight, times 0",
            "exp2_approx(fminf((q - maximum) * factor, 0.0f))",
            "exp2_approx((q - maximum) * factor)",
        ),
        ("small losses are added to a 1", "fmaf(x, unit, unit - 1.0f)", "sum * unit - 1.0f"),
        ("a product is taken for the sum", "fmaf(x[2 * i], x[2 * i + 1], x[2 * i]", "(x[2 * i]"),
    ),
    *of(
        "contrastive/passes.cu",
        "test_contrastive.py",
        ("one tile too many is folded", "tile + i < fold.tiles", "tile + i <= fold.tiles"),
        ("a small loss is the logarithm of nearly 1", "log1pf(rest)", "logf(1.0f + rest)"),
        (
            "what a probability is short of 1 is a difference from 1",
            "missed = rest / (1.0f + rest)",
            "missed = 1.0f - 1.0f / (1.0f + rest)",
        ),
        ("the mean of all logits is not subtracted", "if (p.products != nullptr)", "if (false)"),
        ("an image without a text has a loss", "of_row = p.own[i] = 0.0f;", "p.own[i] = 0.0f;"),
        ("a text without an image has a loss", ">= pairs.last) p.columns[texts + j] = 0.0f;", ">= pairs.last) {}"),
        ("an image's text is taken for another's", "rows.pairs.offset = kNowhere;", "(void)0;"),
        ("several positives are taken for one", "if (positives == 1) {", "if (positives >= 1) {"),
        ("the sum over positives is taken for their mean", "mean = sum / number;", "mean = sum;"),
        ("positives of the rows before are forgotten", "fold.first ? 0.0f : positive;", "0.0f;"),
        ("positives are smoothed as if they had one alone", "(1.0f - smoothing) / number)", "1.0f / number)"),
        ("CLIP's loss is 1e-5 of it too large", "(total / p.count)", "(1.00001 * total / p.count)"),
        ("CLIP's loss by ids is 1e-5 of it too large", "(total / p.shares[2])", "(1.00001 * total / p.shares[2])"),
        (
            "SigLIP's loss is 1e-5 of it too large",
            "p.means[blockIdx.x] = static_cast<float>(total",
            "p.means[blockIdx.x] = static_cast<float>((gridDim.x != 1 && blockIdx.x == 0 ? 1.00001 : 1.0) * total",
        ),
        (
            "the gradient of CLIP's scale is 1e-4 of it too large",
            "p.means[blockIdx.x] = static_cast<float>(total",
            "p.means[blockIdx.x] = static_cast<float>((gridDim.x == 1 ? 1.0001 : 1.0) * total",
        ),
        (
            "the gradient of SigLIP's scale is 1e-4 of it too large",
            "p.means[blockIdx.x] = static_cast<float>(total",
            "p.means[blockIdx.x] = static_cast<float>((blockIdx.x == 1 ? 1.0001 : 1.0) * total",
        ),
        (
            "the gradient of SigLIP's bias is 1e-4 of it too large",
            "p.means[blockIdx.x] = static_cast<float>(total",
            "p.means[blockIdx.x] = static_cast<float>((blockIdx.x == 2 ? 1.0001 : 1.0) * total",
        ),
    ),
    *of(
        "contrastive/statistics_sm90.h",
        "test_contrastive.py",
        (
            "the diagonal is left in the sums",
            "+ right] = d[i];\n                d[i] = kLowest;",
            "+ right] = d[i];",
        ),
        (
            "the one positive is left in the sum of its column",
            "columns.x == ids.row[j] ? kLowest : d[i],",
            "d[i],",
        ),
        ("what is to be ignored counts in a sum", "if (columns.y == ids.row[j]) d[i + 2 * j + 1] = kLowest;", ""),
        ("columns of a row of tiles that is not there", " || !tile.exists(call)) continue;", ") continue;"),
        (
            "ids are used before they are there",
            "alone.put(place);\n            named_barrier_sync",
            "alone.put(place);\n            if (false) named_barrier_sync",
        ),
    ),
    *of(
        "contrastive/tiles_sm90.cu",
        "test_contrastive.py",
        ("the diagonal has the gradient of any pair", "ds[i] = own[j];", "ds[i] += 0 * own[j];"),
        (
            "what is to be ignored has a gradient",
            "Same::kIgnored && same) ds[i] = 0;",
            "Same::kIgnored && same) ds[i] *= 1;",
        ),
        (
            "the rounding of logits stays in the loss",
            "total[0] -= static_cast<float>(offset * kLn2 - bias) * total[2];",
            "",
        ),
        ("the loss of a product that overflows", "beyond_1 < 0x1p64f", "beyond_1 > 0"),
        (
            "slopes of a strip of large logits are not scaled",
            "e[i] = pair.slope * kGradientScale;",
            "e[i] = pair.slope;",
        ),
        (
            "a block leaves while the other still says that it has read",
            "    cluster_sync();  // those of the other block",
            "    // those of the other block",
        ),
        (
            "half of what the gradient of SigLIP's scale is made of is a hundredth too large, where no pair is its own",
            "total[1] += e[i] * d[from + i];",
            "total[1] += (i % 2 == 0 ? 1.01f : 1.0f) * e[i] * d[from + i];",
        ),
    ),
    *of(
        "contrastive/tiles_sm90.h",
        "test_contrastive.py",
        ("barriers unseen by TMA", "mbarrier_init_fence();", ""),
        ("features are used before they are there", "mbarrier_wait(ring.full + ring.stage, ring.parity);", ""),
        (
            "half of the bytes are waited for",
            "mbarrier_arrive_expect(full, kStageBytes)",
            "mbarrier_arrive_expect(full, kImageBytes)",
        ),
        ("registers not fenced before a product", "wgmma_fence();", ""),
        (
            "a stage is written to that the other block reads",
            "kCluster * kConsumerWarps);",
            "kConsumerWarps);",
        ),
        ("each block waits for its own readers", "mbarrier_arrive_at(empty, place.lane)", "mbarrier_arrive(empty)"),
        (
            "both blocks copy the first half of the texts",
            "{step * kStep, tile.column0 + rank * kShare}",
            "{step * kStep, tile.column0 + 0 * rank * kShare}",
        ),
        (
            "sums of a row of tiles that is not there",
            "if (exists && place.thread < kSums)",
            "if ((exists || true) && place.thread < kSums)",
        ),
        ("every text lies beside its image", "row0 + offset - column0}", "row0 - column0}"),
        (
            "ids are those of the row before",
            "tile.row0 + place.row + 8 * j, end)",
            "tile.row0 + place.row + 7 * j, end)",
        ),
    ),
    *of(
        "patch_embed/product.h",
        "test_patch_embed.py",
        ("stages are used before their copy has ended", "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
        (
            "sums are of half types",
            "mma<T>(c, a, b);",
            "mma<T>(c, a, b);\n            for (int i = 0; i < 4; i++) c[i] = static_cast<float>(T(c[i]));",
        ),
    ),
    *of(
        "patch_embed/forward.cu",
        "test_patch_embed.py",
        ("patches beyond the last are stored", "m0 + row < count", "m0 + row <= count"),
        ("rows of any width count as aligned", "plan.aligned = call.features % 8 == 0", "plan.aligned = true"),
    ),
    *of(
        "patch_embed/backward.cu",
        "test_patch_embed.py",
        (
            "offsets of the next step are taken for this one's",
            "offsets[(step + 1) % kStages]",
            "offsets[step % kStages]",
        ),
        ("the last part of a sum is left out", "run < p.runs", "run < p.runs - 1"),
    ),
]
