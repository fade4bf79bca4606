"""flash-attn's calls for packed documents, whoever provides them: flash-attn 3, flash-attn 2, or torch's build of it.

A provider takes the tokens of all documents in a row, q (Tq, H, D), k and v (Tk, Hkv, D), with a unit last stride and
rows at 16 bytes, and gives out (Tq, H, D) and lse, float32 (H, Tq); backward, the three gradients. The conventions are
flash-attn's: nothing is written for tokens of no document; a query that sees nothing has zeros and an lse of +inf
(flash-attn 3: -inf), and an lse of +inf handed back gives it no gradient; the last query of a causal document stands at
its last key. The backward pass is asked for in the way that adds in a fixed order, here as everywhere in this package.

What is called lies one layer below flash_attn_varlen_func, whose backward pass belongs to its own autograd.Function.
Beside each call stands since when it is as it is written here; it is looked for when it is first wanted.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

OLDEST = (2, 7)  # of flash-attn 2: before it, the calls took a pair for the window and returned eight tensors
DEVICE = "cuda"  # the tests put another provider, and another device, here

Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Varlen:
    """What a call takes beside q, k and v. Lengths may be larger than any document's. A window of `back` keys before a
    query and `ahead` after it; -1: all there are."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    back: int
    ahead: int
    scale: float
    softcap: float

    @property
    def causal(self) -> bool:
        return self.back < 0 and self.ahead == 0

    def lengths(self) -> dict[str, object]:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return {name: getattr(self, name) for name in names}

    def window(self) -> dict[str, int]:
        return {"window_size_left": self.back, "window_size_right": self.ahead}


class FlashAttn3:
    """The operators that the interface of flash-attn 3 registers; torch.nn.attention calls the very same."""

    name = "flash-attn 3"

    def missing(self) -> str | None:
        return _import("flash_attn_interface")[1]

    def unsupported(self, head: int, softcap: float, capability: tuple[int, int]) -> str | None:
        if capability != (9, 0):
            return "it is for Hopper"
        return "its steady backward pass takes heads of up to 192 numbers" if head > 192 else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Varlen) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, num_splits=1, **self._options(call))
        return out, lse

    def backward(self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Varlen) -> Grads:
        grads = tuple(map(_empty_like, (q, k, v)))
        torch.ops.flash_attn_3.bwd(d_out, q, k, v, out, lse, *grads, deterministic=True, **self._options(call))
        return grads

    def _options(self, call: Varlen) -> dict[str, object]:
        options = {"softmax_scale": call.scale, "is_causal": call.causal, "softcap": call.softcap}
        return call.lengths() | call.window() | options


class FlashAttn2:
    """flash_attn.flash_attn_interface, of 2.7 or later."""

    name = "flash-attn 2"

    def missing(self) -> str | None:
        found, reason = _import("flash_attn.flash_attn_interface")
        if found is None:
            return reason
        version = importlib.import_module("flash_attn").__version__
        old = tuple(map(int, version.split(".")[:2])) < OLDEST
        return f"it is {version}, and {'.'.join(map(str, OLDEST))} is needed" if old else None

    def unsupported(self, head: int, softcap: float, capability: tuple[int, int]) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Varlen) -> tuple[Tensor, Tensor]:
        # Some versions declare that the call writes to q, k and v, which it does not. `data` has a version of its own:
        # else autograd would refuse whoever saved q for the backward pass before.
        kernel = _import("flash_attn.flash_attn_interface")[0]._flash_attn_varlen_forward
        out, lse, *_ = kernel(q.data, k.data, v.data, **self._options(call))
        return out, lse

    def backward(self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Varlen) -> Grads:
        kernel = _import("flash_attn.flash_attn_interface")[0]._flash_attn_varlen_backward
        d_q, d_k, d_v = map(_empty_like, (q, k, v))
        kernel(d_out, q, k, v, out, lse, dq=d_q, dk=d_k, dv=d_v, deterministic=True, **self._options(call))
        return d_q, d_k, d_v

    def _options(self, call: Varlen) -> dict[str, object]:
        options = {"softmax_scale": call.scale, "causal": call.causal, "softcap": call.softcap}
        return call.lengths() | call.window() | options | {"dropout_p": 0.0, "alibi_slopes": None}


class TorchVarlen:
    """What torch.nn.attention.varlen calls, of torch 2.10 or later."""

    name = "torch's own"

    def missing(self) -> str | None:
        if _import("torch.nn.attention.varlen")[0] is None:
            return f"torch is {torch.__version__}, and 2.10 is needed"
        if not torch.backends.cuda.is_flash_attention_available():
            return f"torch {torch.__version__} was built without it"
        return None

    def unsupported(self, head: int, softcap: float, capability: tuple[int, int]) -> str | None:
        if softcap:
            return "it takes no softcap"
        if head > 192 and capability[1] != 0:
            return f"it is not for heads of {head} numbers on sm_{capability[0]}{capability[1]}"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Varlen) -> tuple[Tensor, Tensor]:
        lengths = call.lengths().values()
        options = {"scale": call.scale} | call.window()
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, call.causal, False, **options)
        return out, lse

    def backward(self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Varlen) -> Grads:
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        tensors = d_out, q, k, v, out, lse, *call.lengths().values()
        options = {"scale": call.scale} | call.window()
        with _steady():
            return torch.ops.aten._flash_attention_backward(*tensors, 0.0, call.causal, *no_dropout, **options)


PROVIDERS = (FlashAttn3(), FlashAttn2(), TorchVarlen())  # the first that serves a call is taken


def missing() -> str | None:
    """Why none of them runs on this machine, and what mends it; None when one does."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; mend: install one with, from pytorch.org"
    if not torch.cuda.is_available():
        return "torch sees no GPU; mend: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    reasons = {each.name: _missing(each) for each in PROVIDERS}
    if None in reasons.values():
        return None
    return f"{_told(reasons)}; mend: pip install 'mmkernels[flash-attn]', or torch 2.10 or later"


def unsupported(head: int, softcap: float, device: torch.device) -> str | None:
    """Why none of those that are here serves a call with such heads."""
    reasons = _reasons(head, softcap, device)
    return None if None in reasons.values() else _told(reasons)


def provider(head: int, softcap: float, device: torch.device) -> FlashAttn3 | FlashAttn2 | TorchVarlen:
    """The first that serves the call, by what the forward and the backward pass both know."""
    reasons = _reasons(head, softcap, device)
    return next(each for each in PROVIDERS if reasons[each.name] is None)


def _reasons(head: int, softcap: float, device: torch.device) -> dict[str, str | None]:
    place = capability(device)
    return {each.name: _missing(each) or each.unsupported(head, softcap, place) for each in PROVIDERS}


def _told(reasons: dict[str, str | None]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


@functools.cache
def _missing(each: FlashAttn3 | FlashAttn2 | TorchVarlen) -> str | None:
    return each.missing()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _import(name: str) -> tuple[ModuleType | None, str | None]:
    """The module, or why there is none: a package built for another torch fails at this point, in ways of its own."""
    try:
        return importlib.import_module(name), None
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}.")
        return None, "it is not installed" if absent else f"it does not load: {error}"


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@contextmanager
def _steady() -> Iterator[None]:
    """torch's backward pass adds in a fixed order where this global switch is on, and an error and not a warning."""
    was_on, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = was_on and was_filling  # a cost that nobody asked for
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling
