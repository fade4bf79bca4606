"""The largest inner products: what eager PyTorch writes, and the cases.

Which of two products is larger is not for rounding to say: the numbers are drawn so that every product and sum of them
is exact in float32. Equal products, which are rare then, and of one kind of case common, tell whether the first wins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.similarity import max_similarity, nearest_code
from .draw import DTYPES, Draw
from .op import Call, Op
from .poison import guarded


def distances(x: Tensor, codes: Tensor, *, backend: str | None = None) -> Tensor:
    """From each vector to its nearest code, squared: what the losses of a codebook are made of."""
    return _square(x, nearest_code(x, codes, backend=backend).quantised)


def plain_distances(x: Tensor, codes: Tensor) -> Tensor:
    """As transformers' Emu3, Janus and Chameleon look for the nearest."""
    with torch.no_grad():
        rows = x.flatten(0, -2)
        every = rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * rows @ codes.T
        indices = every.argmin(1)
    return _square(x, F.embedding(indices, codes).view(x.shape))


def _square(x: Tensor, quantised: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - quantised.to(wide)).square().sum(-1)


def plain_max_similarity(
    texts: Tensor, images: Tensor, *, cu_texts: Tensor | None = None, cu_images: Tensor | None = None
) -> Tensor:
    """All products, as BLIP-2 and ColPali make them; of texts and images of many lengths one at a time."""
    if cu_texts is None and cu_images is None:
        texts, images = (x if x.dim() == 3 else x[:, None] for x in (texts, images))
        return torch.einsum("ntd,mpd->nmtp", texts, images).max(3).values.sum(2)
    of_texts, of_images = _cut(texts, cu_texts), _cut(images, cu_images)
    return torch.stack([torch.stack([_similarity(text, image) for image in of_images]) for text in of_texts])


def _similarity(text: Tensor, image: Tensor) -> Tensor:
    products = text @ image.T
    return (products.max(1).values if len(image) else products.sum(1) - torch.inf).sum()


def _cut(x: Tensor, cu: Tensor | None) -> list[Tensor]:
    if cu is None:
        return list(x if x.dim() == 3 else x[:, None])
    return [x[first:last] for first, last in itertools.pairwise(cu.tolist())]


def _hides_nan(call: Call, run: Callable[..., Tensor]) -> list[str]:
    """The last element NaN, once of each tensor: whoever drops it hides that the model has diverged."""
    hidden = []
    for name, x in call.tensors.items():
        bad = x.detach().clone()
        bad[(-1,) * bad.dim()] = math.nan
        if not run(**(call.tensors | {name: bad}), **call.options).isnan().any():
            hidden.append(f"the result hides NaN in {name}")
    return hidden


NEAREST_CODE = Op(
    "nearest_code",
    ("distances",),
    distances,
    plain_distances,
    typed_by="x",
    seconds=(0.2, 2.0),
    wide=("distances",),
    exact=("distances",),
    probe=_hides_nan,
)
MAX_SIMILARITY = Op(
    "max_similarity",
    ("similarity",),
    max_similarity,
    plain_max_similarity,
    typed_by="texts",
    seconds=(0.2, 2.0),
    wide=("similarity",),
    exact=("similarity", "d_texts", "d_images"),
    probe=_hides_nan,
)
OPS = (NEAREST_CODE, MAX_SIMILARITY)


def _exact(draw: Draw, *shape: int, most: int = 128) -> Tensor:
    """Eight bits a number: a sum of 256 products has 23."""
    return draw.integers(-most, most, *shape).double() / 64


@dataclass(frozen=True)
class CodeCase:
    name: str
    shape: tuple[int, ...]  # of x
    codes: int
    op: str = "nearest_code"
    memory: str = "plain"
    most: int = 128  # numbers are below: the fewer there are, the more are equal
    quick: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES
    plain_draws: int = 0

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        x = _exact(draw, *self.shape, most=self.most)
        codes = _exact(draw, self.codes, self.shape[-1], most=self.most)
        tensors = {
            "x": guarded(x.to(device, dtype), self.memory),
            "codes": guarded(codes.to(device, dtype), self.memory),
        }
        return Call(tensors, {}, ("x", "codes"))

    def upstream(self, draw: Draw, result: Tensor) -> Tensor:
        return draw.normal(*result.shape)


@dataclass(frozen=True)
class SimilarityCase:
    name: str
    texts: tuple[int, ...]  # tokens of each
    images: tuple[int, ...]
    width: int
    op: str = "max_similarity"
    packed: bool = False  # with the places where they begin; else all are as long
    memory: str = "plain"
    most: int = 128
    quick: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES
    plain_draws: int = 0

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        tensors, starts = {}, {}
        for name, lengths in (("texts", self.texts), ("images", self.images)):
            values = _exact(draw, sum(lengths), self.width, most=self.most)
            if not self.packed:
                values = values if lengths[0] == 1 else values.unflatten(0, (len(lengths), lengths[0]))
            tensors[name] = guarded(values.to(device, dtype), self.memory)
            starts[f"cu_{name}"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        return Call(tensors, starts if self.packed else {}, ("texts", "images"))

    def upstream(self, draw: Draw, result: Tensor) -> Tensor:
        return draw.normal(*result.shape)


CASES = (
    CodeCase("N 37, K 100, D 8", (37, 8), 100, quick=True),
    CodeCase("one vector, one code", (1, 1), 1, quick=True, plain_draws=40),
    CodeCase("a batch of pictures", (2, 5, 7, 4), 300, quick=True),
    CodeCase("equal codes", (50, 3), 200, most=2, quick=True),
    CodeCase("D 72, columns far apart", (61, 72), 130, memory="strided"),
    CodeCase("D 200, transposed", (30, 200), 70, memory="columns"),
    CodeCase("beyond 2^31", (5, 16), 3, memory="far", dtypes=(torch.bfloat16,)),
    CodeCase("N 700, K 1500, several tiles and threads", (700, 48), 1500),
    SimilarityCase("5 texts of 7, 4 images of 9, D 16", (7,) * 5, (9,) * 4, 16, quick=True),
    SimilarityCase("a token a text, 32 an image", (1,) * 40, (32,) * 30, 64),
    SimilarityCase("a token each", (1,) * 21, (1,) * 50, 24, quick=True),
    SimilarityCase("of all lengths, some empty", (3, 0, 18, 1), (5, 40, 0, 1, 17), 40, packed=True, quick=True),
    SimilarityCase("equal products", (4, 9), (30, 7, 64), 3, packed=True, most=2, quick=True),
    SimilarityCase("D 72, columns far apart", (11,) * 6, (35,) * 3, 72, memory="strided"),
    SimilarityCase("transposed", (13, 2), (70, 5), 33, packed=True, memory="columns"),
    SimilarityCase("30 texts and images, several tiles and threads", (21,) * 30, (53,) * 30, 80),
)
