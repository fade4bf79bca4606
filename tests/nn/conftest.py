"""How a module of ours is held against one of transformers: both on the same parameters, and a float64 truth.

The truth is the module of transformers itself, in float64, rid of what computes in float32 there whatever it is given:
its RMS norms and its attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import mmkernels
from mmkernels.check.budget import Quantity
from mmkernels.check.suite import CLOSE, CLOSE_DRAWS

DRAWS, PLAIN_DRAWS = 2, 14  # gates are single numbers, whose errors vary much from draw to draw


def _exact_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("exact", _exact_attention)
AttentionMaskInterface.register("exact", sdpa_mask)


def _exact_norm(self, x: Tensor) -> Tensor:
    weight = self.weight + 1 if type(self).__name__.startswith("Gemma") else self.weight
    eps = getattr(self, "variance_epsilon", None) or self.eps
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _exact(source: nn.Module) -> nn.Module:
    """A copy in float64, throughout."""
    twin = copy.deepcopy(source).double()
    for module in twin.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _exact_norm.__get__(module)
        if isinstance(getattr(module, "config", None), PretrainedConfig):
            module.config._attn_implementation = "exact"
    return twin


def redraw(module: nn.Module) -> nn.Module:
    """Draw every parameter anew: zero gates and the like would hide what stands behind them."""
    for parameter in module.parameters():
        matrix = parameter.dim() == 2
        parameter.data.normal_(0.0 if matrix else 0.5, parameter.shape[-1] ** -0.5 if matrix else 0.3)
        parameter.requires_grad_()
    return module.eval()


def _agrees(
    source: nn.Module,
    build: Callable[[nn.Module], nn.Module],
    theirs: Callable,
    ours: Callable,
    make: Callable,
    dtype: torch.dtype,
    autocast: bool = False,
    also: Iterable[Callable] = (),
) -> None:
    """Outputs and all gradients are those of transformers' `source`, within the error budget.

    build(source): the module of ours, on the very parameters of source. make(): the inputs of a draw; theirs(source,
    *inputs) and ours(module, *inputs): the rows to compare. autocast: both under torch.autocast to bfloat16.
    also: theirs in other words, whose errors count as plain PyTorch's too. None of it may be ours, whose mistakes would
    then excuse themselves.
    """

    def draw(quantities: dict[str, Quantity], with_ours: bool = True) -> dict[str, Quantity]:
        redraw(source.to(dtype))
        inputs = [x.to(dtype).requires_grad_() for x in make()]
        exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
        truths, upstream = _results(_exact(source), theirs, exact_inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plains = [_results(source, call, inputs, upstream)[0] for call in (theirs, *also)]
            if with_ours:
                module = build(source)
                results, _ = _results(source, lambda _, *x: ours(module, *x), inputs, upstream)
        for name, truth in truths.items():
            if name.endswith("k_layer_norm.bias"):
                continue  # it moves all scores of a query alike: its gradient is zero, and rounding all there is of it
            computed = torch.bfloat16 if autocast else dtype
            quantity = quantities.setdefault(name, Quantity(name, plains[0][name].dtype, computed))
            for plain in plains:
                quantity.add_plain(plain[name], truth)
            if with_ours:
                quantity.add_ours(results[name], truth)
        return quantities

    quantities: dict[str, Quantity] = {}
    # Under autocast every product rounds to bfloat16, and rarely many of them in one direction.
    for number in range(DRAWS + PLAIN_DRAWS * (4 if autocast else 1)):
        draw(quantities, with_ours=number < DRAWS)
    # Of a query with one key the gradient is a difference of two equal sums, rounded in different orders here, alike in
    # plain code: a draw in a hundred has such a query where it matters. Most draws decide.
    close = [name for name, quantity in quantities.items() if 1 < quantity.ratio < CLOSE]
    others = [draw({}) for _ in range(CLOSE_DRAWS if close else 0)]
    for name in close:
        if sorted(each[name].ratio for each in others)[CLOSE_DRAWS // 2] <= 1:
            del quantities[name]
    failures = [failure for quantity in quantities.values() if (failure := quantity.failure())]
    assert not failures, "\n".join(failures)


def _results(source, call, inputs, upstream=None) -> tuple[dict[str, Tensor], Tensor]:
    """Output and gradients by name; the parameters are the source's own, whichever module computes with them."""
    named = {f"input {i}": x for i, x in enumerate(inputs)} | dict(source.named_parameters())
    out = call(source, *inputs)
    if upstream is None:
        upstream = torch.randn(out.shape).to(torch.bfloat16).double()  # the same number in every dtype
    grads = torch.autograd.grad(out, list(named.values()), upstream.to(out.dtype))
    return {"output": out.detach(), **{f"d {name}": grad for name, grad in zip(named, grads, strict=True)}}, upstream


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are so small that threads would only wait for one another; results do not depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def agrees() -> Callable:
    return _agrees


def _compiles_once(module: nn.Module, draws: Iterable[tuple]) -> None:
    """One graph without breaks serves every draw of inputs, results and gradients as without it."""
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    stance = "default"
    for inputs in draws:
        leaves = [x.requires_grad_() for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        leaves += module.parameters()
        with torch.compiler.set_stance(stance):
            a = compiled(*inputs)
        b, stance = module(*inputs), "fail_on_recompile"
        upstream = torch.randn_like(b)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(a, leaves, upstream), torch.autograd.grad(b, leaves, upstream))


@pytest.fixture
def compiles_once() -> Callable:
    return _compiles_once


@pytest.fixture
def redrawn() -> Callable:
    return redraw


@pytest.fixture
def served(backend):
    """The calls of the test are served by each of the backends in turn."""
    with mmkernels.use_backend(backend):
        yield backend


@pytest.fixture
def loads_state() -> Callable:
    """loads_state(module)(source): the module, on the parameters of `source` by its state_dict as it stands."""

    def build(module: nn.Module) -> Callable:
        def load(source: nn.Module) -> nn.Module:
            module.load_state_dict(source.state_dict(keep_vars=True), assign=True)
            return module

        return load

    return build
