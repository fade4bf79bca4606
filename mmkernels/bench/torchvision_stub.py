"""Makes torchvision importable beside a CPU build of torch.

PyPI's torchvision has CUDA operators only, which a CPU torch cannot load; its import then fails at the first operator it
describes, and with it that of transformers, timm and open_clip, which want it for their transforms alone. Naming the
operators is enough for these.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

_OPERATORS = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
_library: list[torch.library.Library] = []  # names live as long as their library does


def make_importable() -> None:
    """Names torchvision's operators where, and only where, it is installed and its import fails for want of them."""
    if _library or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            return  # whoever needs it will read why it fails
        _library.append(torch.library.Library("torchvision", "DEF"))
        for name in _OPERATORS:
            _library[0].define(f"{name}(Tensor x) -> Tensor")
