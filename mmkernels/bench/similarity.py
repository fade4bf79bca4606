"""The largest inner products: what models do today, and the sizes of codebooks and of retrieval."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check.draw import Draw
from ..check.op import Call, Op, evaluate
from ..check.similarity import MAX_SIMILARITY, NEAREST_CODE, plain_distances, plain_max_similarity
from .op import PASSES, Measured, Peer, Series, Truth

ROWS = 256  # vectors, or texts, whose truth is worked out at a time


def _truth_by_blocks(op: Op, call: Call, upstream: Tensor) -> Truth:
    """The first tensor, and the result, block by block of rows; the other's gradient is the sum of theirs."""
    wide = call.in_dtype(torch.float64)
    rows, others = wide.tensors
    blocks = []
    for part, fed in zip(wide.tensors[rows].split(ROWS), upstream.split(ROWS), strict=True):
        block = Call(wide.tensors | {rows: part}, wide.options, wide.differentiable)
        blocks.append(evaluate(op.call, block, op, fed, backend="reference"))
    whole = {name: torch.cat([block[name] for block in blocks]) for name in (op.result, f"d_{rows}")}
    return Truth(whole | {f"d_{others}": sum(block[f"d_{others}"] for block in blocks)}, {})


def _measured(op: Op, peer: Peer) -> Measured:
    return Measured(op, lambda call: [peer], truth_by_chunks=partial(_truth_by_blocks, op))


OPS = (
    _measured(NEAREST_CODE, Peer("all distances", plain_distances)),
    _measured(MAX_SIMILARITY, Peer("all products", plain_max_similarity)),
)


@dataclass(frozen=True)
class CodeCase:
    """Vectors of a batch of pictures and a codebook, with the losses of both."""

    vectors: int
    codes: int
    width: int
    op: str = "nearest_code"
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: tuple[str, ...] = ()
    quick: bool = False
    passes: tuple[str, ...] = PASSES

    @property
    def name(self) -> str:
        return f"{self.vectors}x{self.codes}x{self.width}"

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        tensors = {"x": draw.normal(self.vectors, self.width), "codes": draw.normal(self.codes, self.width)}
        return Call({name: x.to(device, dtype) for name, x in tensors.items()}, {}, ("x", "codes"))

    def upstream(self, draw: Draw, call: Call) -> Tensor:
        return draw.normal(self.vectors).to(call.tensors["x"].device, torch.float32)

    def flops(self, direction: str) -> int:
        return 2 * self.vectors * self.codes * self.width

    def bytes(self, direction: str, call: Call) -> int:
        once = sum(x.nbytes for x in call.tensors.values()) + call.tensors["x"].nbytes
        return once * (2 if direction == "fwd_bwd" else 1)

    def eager_bytes(self, direction: str, call: Call) -> int:
        return 3 * self.vectors * self.codes * call.tensors["x"].element_size()


@dataclass(frozen=True)
class SimilarityCase:
    """As many texts as images, with so many tokens each."""

    pairs: int
    text_tokens: int
    image_tokens: int
    width: int
    op: str = "max_similarity"
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: tuple[str, ...] = ()
    quick: bool = False
    passes: tuple[str, ...] = PASSES

    @property
    def name(self) -> str:
        return f"{self.pairs}x{self.text_tokens}x{self.image_tokens}x{self.width}"

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        tokens = {"texts": self.text_tokens, "images": self.image_tokens}
        tensors = {name: draw.normal(self.pairs, count, self.width) for name, count in tokens.items()}
        unit = {name: F.normalize(x.to(device).float(), dim=-1).to(dtype) for name, x in tensors.items()}
        return Call(unit, {}, tuple(unit))

    def upstream(self, draw: Draw, call: Call) -> Tensor:
        return draw.normal(self.pairs, self.pairs).to(call.tensors["texts"].device, torch.float32)

    def flops(self, direction: str) -> int:
        """Of the backward a row of D numbers for each text token and image, and one for its image token."""
        tokens, image = self.pairs**2 * self.text_tokens, self.image_tokens
        return 2 * tokens * self.width * (image + 2 if direction == "fwd_bwd" else image)

    def bytes(self, direction: str, call: Call) -> int:
        once = sum(x.nbytes for x in call.tensors.values()) + 4 * self.pairs**2
        return once * (2 if direction == "fwd_bwd" else 1)

    def eager_bytes(self, direction: str, call: Call) -> int:
        products = self.pairs**2 * self.text_tokens * self.image_tokens * call.tensors["texts"].element_size()
        return (3 if direction == "fwd_bwd" else 1) * products


CASES = (
    CodeCase(300, 500, 16, devices=(), quick=True),
    CodeCase(4096, 8192, 256),  # Chameleon
    CodeCase(4096, 16384, 8),  # Janus
    CodeCase(4096, 32768, 4),  # Emu3
    CodeCase(16384, 16384, 256),
    SimilarityCase(20, 5, 30, 32, devices=(), quick=True),
    SimilarityCase(256, 1, 32, 256),  # BLIP-2
    SimilarityCase(1024, 1, 32, 256),
    SimilarityCase(32, 24, 1030, 128),  # ColPali
)
_CODES = {k: CodeCase(4096, k, 64) for k in (256, 1024, 4096, 16384, 65536)}
_PAIRS = {n: SimilarityCase(n, 1, 32, 256) for n in (64, 128, 256, 512, 1024)}
GROWTH = (
    Series("nearest_code", "codes", "codes of 64 numbers, for 4096 vectors", _CODES),
    Series("max_similarity", "pairs", "pairs of a text of one token and an image of 32, D = 256", _PAIRS),
)
