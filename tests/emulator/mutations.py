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
        "span_attention_forward.cu",
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
        ("the mask is a key off", "spans.see(i, j0 + column)) s =", "spans.see(i, j0 + column + 1)) s ="),
        ("the last blocks of a span are not masked", "j0 + kKeys > hull.common_end", "j0 > hull.common_end"),
        ("a row that sees nothing yet", "largest == -INFINITY ? 0.0f : largest", "largest"),
        (
            "half of the sum of weights",
            "            total[i] += __shfl_xor_sync(kAllLanes, total[i], 2);\n",
            "",
        ),
        ("key heads in turns", "head / (p.heads / p.key_heads)", "head % p.key_heads"),
        ("values beyond the hull are loaded", "(values, v, j0, hull.end - j0)", "(values, v, j0, p.keys - j0)"),
        ("keys beyond the tensor are loaded", "j0 + kKeys, hull.end - j0 - kKeys)", "j0 + kKeys, kKeys)"),
        ("values that are NaN stay", "if (masked) make_finite", "if (p.runs < 0) make_finite"),
        ("flags of spoilt rows are never cleared", "next_flags[thread] = 0", "flags[kKeys - 1] += 0"),
        ("shared memory a tile short", "(kRows + 2 * kKeys) *", "(kRows + kKeys) *"),
        ("a warp stores beyond the queries", "row < present) lse[row]", "row <= present) lse[row]"),
    ),
    *of(
        "span_attention_device.h",
        "test_span_attention.py",
        ("rows are read beyond the last", "row < present && column < from.width;", "row <= present;"),
        ("the span of a query behind the last", "inside = row < p.queries", "inside = row <= p.queries"),
        ("ends beyond the keys", "min(p.hi[slice * p.queries + row], p.keys)", "p.hi[slice * p.queries + row]"),
        ("ldmatrix meets conflicts of banks", "kPitch = kWidth + 8", "kPitch = kWidth"),
        ("operands of the right are not transposed", "ldmatrix_x4_trans(b", "ldmatrix_x4(b"),
    ),
    *of(
        "span_attention_forward_sm90.cu",
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
        ("the mask is a key off", "spans.see(i, walk.key0 + column)) s", "spans.see(i, walk.key0 + column + 1)) s"),
        ("half of the bytes are waited for", "kCount * kWidth * 2);", "kCount * kWidth);"),
        ("barriers unseen by TMA", "        mbarrier_init_fence();\n", ""),
        ("barriers used before they are made", "init();\n    __syncthreads();", "init();"),
        ("a product that was never committed", "        wgmma_commit();\n", ""),
        ("registers not fenced before a product", "        wgmma_fence();\n", ""),
        ("half a step along a row of keys", "within = k % Tile::kPiece * 2;", "within = k % Tile::kPiece;"),
        (
            "the second run goes by the spans of the first",
            "if (walk.run != run) spans =",
            "if (walk.run < run) spans =",
        ),
        (
            "one warp too few gives back keys",
            "mbarrier_init(&key_empty[stage], kConsumerWarps)",
            "mbarrier_init(&key_empty[stage], kConsumerWarps - 1)",
        ),
    ),
]
