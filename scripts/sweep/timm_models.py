"""timm's architectures: a small one or two of each kind in each of its module files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator

import timm
import torch
from timm.models import _registry
from torch import Tensor, nn

from .cases import Case
from .subject import CannotBeBuilt, Subject, first_that_runs

HAS_NAMES = False
MOST_PARAMETERS = 60_000_000
A_FILE = 4  # architectures of a module file, at most
# Words for how large an architecture is, the smallest first; what has none of them comes in between.
SIZES = [
    "test",
    "atto",
    "femto",
    "pico",
    "xxs",
    "nano",
    "xxt",
    "xt",
    "xs",
    "tiny",
    "mini",
    "ti",
    "t",
    "n",
    "s",
    "small",
]
LARGE = [
    "base",
    "b",
    "medium",
    "m",
    "large",
    "l",
    "xl",
    "xlarge",
    "xxl",
    "huge",
    "h",
    "giant",
    "g",
    "gigantic",
    "enormous",
]
# What constructors of transformers take; the first set that a model accepts is used.
VIT = {"depth": 2, "embed_dim": 64, "num_heads": 4}
SMALLER = (VIT, {"depths": (1, 1, 1, 1)}, {"depth": 2}, {"depths": (1, 1, 1)}, {"layers": (1, 1, 1, 1)}, {})


def version() -> str:
    return timm.__version__


def cases(families: Collection[str] = ()) -> list[Case]:
    """By module file; of each, one architecture a name, names differing before their first number."""
    files: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in timm.list_models():
        stem = re.match(r"[a-z]+(_(?!tiny|small|base|large)[a-z]+)?", name)
        files[_registry._model_to_module[name]][stem[0] if stem else name].append(name)
    found = []
    for family, kinds in sorted(files.items()):
        if not families or family in families:
            smallest = sorted((min(names, key=_size) for names in kinds.values()), key=_size)
            found += [Case("timm", family, name) for name in smallest[:A_FILE]]
    return found


def _size(name: str) -> tuple[float, int, str]:
    words = re.split(r"[_\d]+", name)
    small = [SIZES.index(word) for word in words if word in SIZES]
    large = [20 + LARGE.index(word) for word in words if word in LARGE]
    numbers = [int(x) for x in re.findall(r"\d+", name)]
    return min(small + large, default=19), max(numbers, default=0), name


def subject(case: Case) -> Subject:
    return first_that_runs(_builds(case.name), _candidates)


def _builds(name: str) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for more in SMALLER:
        for image in (64, None):
            sizes = {**more, **({"img_size": image} if image else {})}
            yield ("tiny" if more else "its own size"), lambda sizes=sizes: _build(name, sizes)


def _build(name: str, sizes: dict) -> nn.Module:
    with torch.device("meta"):
        try:
            count = sum(p.numel() for p in timm.create_model(name, num_classes=10, **sizes).parameters())
        except (RuntimeError, NotImplementedError):  # constructors that compute with what they make
            count = 0
    if count > MOST_PARAMETERS:
        raise CannotBeBuilt(f"{count / 1e6:.0f} million parameters at its smallest")
    return timm.create_model(name, num_classes=10, **sizes)


class _Candidate:
    padded = False

    def __init__(self, holds: str, values: dict):
        self.holds, self.values = holds, values

    def make(self, side: str) -> dict:
        return self.values


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    if "NaFlex" in type(model).__name__:
        yield _Candidate("padded patches", {"x": _padded_patches(model)})
    channels, *own = model.pretrained_cfg.get("input_size", (3, 224, 224))
    for size in (64, 96, own[-1]):
        torch.manual_seed(0)
        yield _Candidate(f"images of {size} x {size}", {"x": torch.randn(2, channels, size, size)})


def _padded_patches(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)
    width = model.embeds.proj.in_features if hasattr(model.embeds.proj, "in_features") else 16 * 16 * 3
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 8:] = False
    places = torch.stack([torch.arange(12) // 4, torch.arange(12) % 4], -1).expand(2, -1, -1).contiguous()
    return {"patches": torch.randn(2, 12, width), "patch_coord": places, "patch_valid": valid}
