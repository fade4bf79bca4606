"""What each op promises to whoever calls it otherwise than plainly: right, or refused with a reason. The table of
docs/promises.md is this one; test_the_table_is_in_the_docs says so."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from op_calls import OPS, assert_same, by, drawn, scalar, wide
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

NAMES = [name for name in OPS if "," not in name]
RIGHT, REFUSED = "right", "refused"


class Calls(torch.nn.Module):
    """Of the op, as a model has it."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *inputs):
        return self.f(*inputs)


def leaves(inputs):
    return [x.detach().clone().requires_grad_() for x in inputs]


def gradients(f, inputs):
    some = leaves(inputs)
    scalar(f)(*some).backward()
    return [x.grad for x in some]


def outputs(out):
    return list(out) if isinstance(out, tuple) else [out]


# ---- ways to call an op: each raises, or compares what it gets


def backward(ours, plain, inputs):
    assert_same(gradients(ours, inputs), gradients(plain, wide(inputs)))


def second_derivative(ours, plain, inputs):
    def penalty(f):
        return lambda *some: grad(scalar(f))(*some).square().sum()

    assert_same(grad(penalty(ours))(*inputs), grad(penalty(plain))(*wide(inputs)))


def forward_mode(ours, plain, inputs):
    assert_same(jvp(ours, tuple(inputs), tuple(inputs))[1], jvp(plain, tuple(wide(inputs)), tuple(wide(inputs)))[1])


def func_grad(ours, plain, inputs):
    assert_same(grad(scalar(ours))(*inputs), grad(scalar(plain))(*wide(inputs)))


def vmap_of_grad(ours, plain, inputs):
    few = torch.stack([inputs[0], inputs[0] / 2])
    dims = (0, *[None] * (len(inputs) - 1))
    found, truth = (vmap(grad(scalar(f)), dims) for f in (ours, plain))
    assert_same(found(few, *inputs[1:]), truth(few.double(), *wide(inputs[1:])))


def compiled(ours, plain, inputs):
    torch.compiler.reset()
    assert_same(gradients(torch.compile(ours, backend="aot_eager", fullgraph=True), inputs), gradients(ours, inputs))


def exported(ours, plain, inputs):
    program = torch.export.export(Calls(ours), tuple(inputs))
    assert_same(outputs(program.module()(*inputs)), outputs(ours(*inputs)))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_same(outputs(torch.export.load(file).module()(*inputs)), outputs(ours(*inputs)))


def traced(ours, plain, inputs):
    others = [x / 2 for x in inputs]
    assert_same(outputs(torch.jit.trace(Calls(ours), tuple(inputs))(*others)), outputs(ours(*others)))


def drawn_by_fx(ours, plain, inputs):
    torch.fx.symbolic_trace(lambda x: ours(x, *inputs[1:]))


def checkpointed(ours, plain, inputs):
    for reentrant in (False, True):

        def again(*some, reentrant=reentrant):
            return checkpoint(ours, *some, use_reentrant=reentrant)

        assert_same(gradients(again, inputs), gradients(ours, inputs))


def saved_on_cpu(ours, plain, inputs):
    some = leaves(inputs)
    with torch.autograd.graph.save_on_cpu():
        loss = scalar(ours)(*some)
    assert_same(list(torch.autograd.grad(loss, some)), gradients(ours, inputs))


def autocast(ours, plain, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = outputs(ours(*inputs)), outputs(plain(*inputs))
    exact = outputs(plain(*wide(inputs)))
    for a, b, truth in zip(found, theirs, exact, strict=True):
        assert (a - truth).norm() <= 2 * (b - truth).norm() + 0.01 * truth.norm()


def inference_then_training(ours, plain, inputs):
    with torch.inference_mode():
        out = outputs(ours(*inputs))
    assert_same(out, outputs(plain(*wide(inputs))))
    assert_same(gradients(ours, inputs), gradients(plain, wide(inputs)))


def on_meta(ours, plain, inputs):
    found = outputs(ours(*(x.to("meta") for x in inputs)))
    assert all(x.is_meta and x.shape == y.shape for x, y in zip(found, outputs(ours(*inputs)), strict=True))


def copied(ours, plain, inputs):
    """Its results, and what they saved."""
    twin = copy.deepcopy(Calls(ours))
    assert_same(gradients(twin, inputs), gradients(ours, inputs))


def sharded(ours, plain, inputs):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        ours(distribute_tensor(inputs[0], mesh, [Replicate()]), *inputs[1:])
    finally:
        dist.destroy_process_group()


WAYS = {
    "backward": (backward, {}),
    "a derivative of a gradient": (
        second_derivative,
        dict.fromkeys(["span_attention", "clip_loss", "siglip_loss"], "cannot be differentiated again"),
    ),
    "forward mode: jvp, dual numbers": (forward_mode, {}),
    "torch.func.grad": (func_grad, {}),
    "vmap, gradients of each sample": (vmap_of_grad, {}),
    "torch.compile, whole": (compiled, {}),
    "torch.export, saved and loaded": (exported, {}),
    "torch.jit.trace": (traced, {}),
    "torch.fx": (drawn_by_fx, dict.fromkeys(NAMES, "must be a torch.Tensor, got Proxy")),
    "checkpoint, of either sort": (checkpointed, {}),
    "what backward needs, saved elsewhere": (saved_on_cpu, {}),
    "autocast": (autocast, {}),
    "inference mode, then training": (inference_then_training, {}),
    "meta tensors": (on_meta, {}),
    "copies": (copied, {}),
    "DTensor": (sharded, dict.fromkeys(NAMES, "is a DTensor")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_kept(way, name):
    attempt, refusals = WAYS[way]
    ours, plain, inputs = drawn(name)
    if name in refusals:
        with pytest.raises((RuntimeError, TypeError, ValueError), match=refusals[name]):
            attempt(by(ours, "cpu"), plain, inputs)
    else:
        attempt(by(ours, "cpu"), plain, inputs)


def table() -> str:
    lines = [f"| | {' | '.join(f'`{name}`' for name in NAMES)} |", "|---" * (len(NAMES) + 1) + "|"]
    for way, (_, refusals) in WAYS.items():
        lines.append(f"| {way} | {' | '.join(REFUSED if name in refusals else RIGHT for name in NAMES)} |")
    return "\n".join(lines)


def test_the_table_is_in_the_docs():
    assert table() in (Path(__file__).parents[1] / "docs" / "promises.md").read_text(), table()
