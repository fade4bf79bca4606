"""A model's own forward, run without the N x N product of its logits until someone reads them.

The contrastive models of transformers, from 4.50 on, differ in how features come about and end alike:

    logits_per_text = torch.matmul(text_embeds, image_embeds.t()) * scale + bias
    logits_per_image = logits_per_text.t()

So none of their code is written anew. `putting_off(forward)` is that very forward, decorators and all, with another
`torch.matmul`: of two matrices it gives `Logits`, which remember what is done to them, and are computed as soon as it
is more than the lines above. `lazy(output)` computes what is left of them when it is read, in whatever way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Logits:
    """scale * rows @ columns.T + bias: the tensor that the model would have had, computed when someone needs it.

    All it reads is its own. The optimizer writes to a bias, and the user may write to rows and columns, which an output
    holds as embeds: copies of N x D numbers are cheap beside the N x N x D steps of a loss, they are right whoever
    writes what, and derivatives pass through them.
    """

    def __init__(self, rows: Tensor, columns: Tensor, scale: Tensor | None = None, bias: Tensor | None = None):
        self.rows, self.columns, self.scale, self.bias = rows, columns, scale, bias
        self._moment = _Moment(rows.device.type)
        self._compute: Callable[[], Tensor] | None = None
        self._tensor: Tensor | None = None

    @classmethod
    def of_product(cls, rows: Tensor, transposed: Tensor) -> Logits:
        rows, columns = rows.clone(), transposed.t().clone()
        return cls(rows, columns)._computed_by(lambda: torch.matmul(rows, columns.t()))

    def _computed_by(self, compute: Callable[[], Tensor]) -> Logits:
        self._compute = compute
        return self

    @property
    def is_computed(self) -> bool:
        return self._compute is None

    def tensor(self) -> Tensor:
        if self._compute is not None:
            with self._moment.again():
                self._tensor = self._compute()
            self._compute = None  # and with it what is between the product and this
        return self._tensor

    def __mul__(self, factor: Tensor) -> Logits | Tensor:
        if self.is_computed or not (_is_number(factor) and self.scale is None and self.bias is None):
            return self.tensor() * factor
        factor = factor.clone()
        return Logits(self.rows, self.columns, factor)._computed_by(lambda: self.tensor() * factor)

    def __truediv__(self, divisor: Tensor) -> Logits | Tensor:
        if self.is_computed or not (_is_number(divisor) and self.scale is None and self.bias is None):
            return self.tensor() / divisor
        divisor = divisor.clone()
        scale = divisor.to(torch.promote_types(divisor.dtype, torch.float32)).reciprocal()
        return Logits(self.rows, self.columns, scale)._computed_by(lambda: self.tensor() / divisor)

    def __add__(self, bias: Tensor) -> Logits | Tensor:
        if self.is_computed or not (_is_number(bias) and self.bias is None):
            return self.tensor() + bias
        bias = bias.clone()
        return Logits(self.rows, self.columns, self.scale, bias)._computed_by(lambda: self.tensor() + bias)

    def t(self) -> Logits | Tensor:
        if self.is_computed:
            return self.tensor().t()
        return Logits(self.columns, self.rows, self.scale, self.bias)._computed_by(lambda: self.tensor().t())

    T = property(t)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def __getattr__(self, name: str):
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*tree_map(_computed, args), **tree_map(_computed, kwargs or {}))


def _of_the_tensor(name: str) -> Callable:
    return lambda self, *args: getattr(self.tensor(), name)(*args)


for _name in ("getitem", "len", "neg", "sub", "matmul", "radd", "rsub", "rmul", "rtruediv"):  # not by __getattr__
    setattr(Logits, f"__{_name}__", _of_the_tensor(f"__{_name}__"))


def _is_number(x: object) -> bool:
    return isinstance(x, Tensor) and x.numel() == 1


def _computed(x):
    return x.tensor() if isinstance(x, Logits) else x


class _Moment:
    """The switches of torch that decide on a result's dtype and derivative, as they are now."""

    def __init__(self, device: str):
        self.inference, self.grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self.autocast = None
        if torch.amp.is_autocast_available(device):  # "meta" has none
            dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
            self.autocast = {"device_type": device, "dtype": dtype, "enabled": enabled}

    @contextmanager
    def again(self) -> Iterator[None]:
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
            if self.autocast is None:
                yield
            else:
                with torch.autocast(**self.autocast):
                    yield


# ---- a forward with another torch.matmul


class _Torch:
    """Stands for the module `torch` in the code of a forward."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def matmul(a: Tensor, b: Tensor, **kwargs) -> Logits | Tensor:
        if type(a) is type(b) is Tensor and a.dim() == b.dim() == 2 and not kwargs:  # not what stands for a tensor
            return Logits.of_product(a, b)
        return torch.matmul(a, b, **kwargs)


def putting_off(forward: FunctionType) -> FunctionType:
    """The same function, in the same decorators, that gives Logits where it multiplies two matrices.

    Made for one call: the names of its module are those of now, also where a user has put another function there.
    """
    inner = getattr(forward, "__wrapped__", None)
    if inner is None:
        names, closure = forward.__globals__ | {"torch": _Torch()}, forward.__closure__
    else:
        other, names = putting_off(inner), forward.__globals__
        closure = tuple(CellType(other) if cell.cell_contents is inner else cell for cell in forward.__closure__ or ())
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, closure)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


# ---- outputs


def lazy(output):
    """Of a ModelOutput with Logits in it: the same object, in which Logits become tensors when someone reads them."""
    output.__class__ = _lazy_class(type(output))
    return output


@functools.cache
def _lazy_class(plain: type) -> type:
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "_plain": plain}
    return type(plain.__name__, (_LazyOutput, plain), names)


class _LazyOutput:
    """Mixed into a ModelOutput before its class."""

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if isinstance(value, Logits):
            self[name] = value = value.tensor()
        return value

    def __getitem__(self, key):
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        if isinstance(key, int) and key == 0:
            return getattr(self, next(iter(self.keys())))  # the loss, for which no logits are computed
        return self.to_tuple()[key]

    def items(self):
        return [(name, getattr(self, name)) for name in self.keys()]

    def values(self):
        return [getattr(self, name) for name in self.keys()]

    def get(self, key, default=None):
        return getattr(self, key) if key in self.keys() else default

    def __reduce__(self):  # as the plain class: what is pickled or copied holds its logits
        self.values()
        _, *rest = super().__reduce__()
        return self._plain, *rest
