"""What modules inside a model return as it runs, and the gradients that this is given."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from .values import Named, named_outputs, without_padding

Call = tuple[str, int]  # the path of a module, and which of its calls


class Watch:
    """On the modules that were swapped, for the runs within `with`; `wide`: on all around them too, the model itself
    among them, and with the gradients, not only which rows have one.

    What is inside a swapped module is its own affair: it may compute otherwise."""

    def __init__(self, model: nn.Module, swapped: Iterable[str], attention_mask: object, wide: bool = False):
        self.returned: dict[Call, Named] = {}  # in the order in which they return
        self.rows: dict[Call, Named] = {}
        self.gradients: dict[Call, Named] = {}
        self.inside: list[str] = []  # entered and not left: where an exception came from
        self._mask, self._wide = attention_mask, wide
        self._calls: dict[str, int] = {}
        self._kept = {path for whole in ["", *swapped] for path in parts(whole)} if wide else {*swapped} - {""}
        self._modules = [(path, model.get_submodule(path)) for path in {"", *self._kept}]

    def __enter__(self) -> Watch:
        self._handles = [
            handle
            for path, module in self._modules
            for handle in (
                module.register_forward_pre_hook(lambda *_, path=path: self._enter(path)),
                module.register_forward_hook(lambda _, __, output, path=path: self._leave(path, output)),
            )
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, path: str) -> None:
        if not self._done():
            self.inside.append(path)

    def _leave(self, path: str, output: object) -> None:
        if self._done():
            return
        self.inside.pop()
        call = path, self._calls.get(path, 0)
        self._calls[path] = call[1] + 1
        if path in self._kept:
            outputs = named_outputs(output)
            self.returned[call] = {name: self._copy(x) for name, x in outputs.items()}
            for name, x in outputs.items():
                if x.requires_grad:
                    x.register_hook(lambda gradient, name=name: self._take_gradient(call, name, gradient))

    def _done(self) -> bool:
        """The model itself has returned: what runs now is checkpointing, in the course of backward."""
        return "" in self._calls

    def _take_gradient(self, call: Call, name: str, gradient: Tensor) -> None:
        gradient = self._copy(gradient)
        self.rows.setdefault(call, {})[name] = (gradient != 0).any(-1) if gradient.dim() else gradient != 0
        if self._wide:
            self.gradients.setdefault(call, {})[name] = gradient

    def _copy(self, x: Tensor) -> Tensor:
        return without_padding(x.detach(), self._mask).to("cpu", copy=True)  # what comes after may write to x

    def modules(self) -> tuple[Named, Named]:
        """What each call of a swapped module returned first, and which of its rows have a gradient."""
        returned, rows = {}, {}
        for call, outputs in self.returned.items():
            name = call[0] if not call[1] else f"{call[0]} (call {call[1] + 1})"
            main = next((key for key, x in outputs.items() if x.is_floating_point()), None)
            if main is not None:
                returned[name] = outputs[main]
            if main in self.rows.get(call, {}):
                rows[name] = self.rows[call][main]
        return returned, rows


def parts(path: str) -> list[str]:
    """The path and those above it, the model itself first."""
    names = path.split(".") if path else []
    return [".".join(names[:end]) for end in range(len(names) + 1)]
