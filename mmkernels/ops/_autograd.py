"""How an op takes part in differentiation, whatever asks for it: backward, forward mode, the transforms of torch.func,
a derivative of a gradient, torch.compile.

Each of them wants its torch.autograd.Function in a form of its own, so an op says once what it computes, and gets all.
Its gradients are an op too, over everything they depend on: whoever differentiates a gradient comes upon it, by
whichever door.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


class Op:
    """To be subclassed with the static methods forward(*args), setup_context, backward, jvp and vmap, as
    torch.autograd.Function has them; and with without_gradient(*args), if that is less work than forward."""

    recorded: type[Function]  # with the context in forward: torch binds the arguments of the other form at 20 us a call
    compiled: type[Function]  # for torch.compile, which does not follow a jvp
    transformed: type[Function]  # for torch.func

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "forward"):  # what several ops share
            return

        def forward(ctx, *args):
            outputs = cls.forward(*args)
            cls.setup_context(ctx, args, outputs)
            return outputs

        cls.compiled = _function(cls, forward=forward, backward=cls.backward)
        cls.recorded = _function(cls, forward=forward, backward=cls.backward, jvp=cls.jvp)
        if "without_gradient" not in vars(cls):
            cls.without_gradient = staticmethod(cls.forward)
        names = ("forward", "setup_context", "backward", "jvp", "vmap")
        cls.transformed = _function(cls, **{name: getattr(cls, name) for name in names})

    @classmethod
    def call(cls, inputs: tuple[Tensor | None, ...], *args):
        """forward(*args), recorded if a derivative by one of the inputs, which are among args, may be asked for."""
        needs_backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        if torch.compiler.is_compiling():
            return cls.compiled.apply(*args) if needs_backward else cls.without_gradient(*args)
        if torch._C._are_functorch_transforms_active():
            return cls.transformed.apply(*args)
        return cls.recorded.apply(*args) if needs_backward or is_forward_mode() else cls.without_gradient(*args)


class OnceDifferentiable(Op):
    """The gradients of an op that has no second derivative: who asks for it is told. To be subclassed with forward and
    vmap. torch's own once_differentiable says nothing where the incoming gradient needs none."""

    op: str

    def __init_subclass__(cls, **kwargs) -> None:
        def refuse(ctx, *_):
            raise RuntimeError(f"mmkernels: the gradients of {cls.op} cannot be differentiated again")

        cls.backward = cls.jvp = staticmethod(refuse)
        super().__init_subclass__(**kwargs)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass


def _function(cls: type[Op], **names: Callable) -> type[Function]:
    return type(cls.__name__, (Function,), {name: staticmethod(function) for name, function in names.items()})


def is_forward_mode() -> bool:
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


# ---- rules for vmap


def looped(forward: Callable) -> Callable:
    """A call for each element of the mapped axis: what each costs is what it costs alone."""

    def vmap(info, in_dims, *args):
        if not info.batch_size:
            raise NotImplementedError("mmkernels: vmap over an axis of length 0")
        calls = [forward(*_element(i, in_dims, args)) for i in range(info.batch_size)]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(torch.stack(x) for x in zip(*calls, strict=True)), (0,) * len(calls[0])

    return staticmethod(vmap)


def _element(i: int, in_dims: tuple, args: tuple) -> list:
    return [x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)]


def folded(forward: Callable, batched: int, shared: int) -> Callable:
    """One call for all, for an op whose tensors begin with a batch axis: the mapped axis becomes part of it.

    The first `batched` arguments have the batch's length there; the next `shared`, all of them, may have 1 instead, for
    the whole of it; the rest are none that can be mapped. Any but the first may be None.
    """

    def vmap(info, in_dims, *args):
        count = batched + shared
        size, dims = info.batch_size, in_dims[:count]
        if any(dim is not None for dim in in_dims[count:]):
            raise NotImplementedError("mmkernels: vmap over an argument that is one for the whole batch")
        tensors = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(args[:count], dims, strict=True)]
        length = tensors[0].shape[0 if dims[0] is None else 1]
        differ = any(
            dim is not None or (x is not None and len(x) > 1)
            for x, dim in list(zip(tensors, dims, strict=True))[batched:]
        )
        whole = [
            x if x is None or (place >= batched and not differ) else _fold(x, dim is not None, size, length)
            for place, (x, dim) in enumerate(zip(tensors, dims, strict=True))
        ]
        outputs = forward(*whole, *args[count:])
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (size, length)), 0
        return tuple(x.unflatten(0, (size, length)) for x in outputs), (0,) * len(outputs)

    return staticmethod(vmap)


def _fold(x: Tensor, is_mapped: bool, size: int, length: int) -> Tensor:
    x = x if is_mapped else x.expand(size, *x.shape)
    return x.expand(size, length, *x.shape[2:]).flatten(0, 1).contiguous()
