"""Accelerated models trained on two processes, over gloo: wrapped in DDP or sharded by FSDP, before or after."""

import copy
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from agreement import in_float64, misses
from families import FAMILIES, drawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from torchvision_stub import make_importable

from mmkernels import accelerate

PROCESSES = 2
SEED = int(os.environ["MMKERNELS_TEST_SEED"])  # conftest's
FAMILY = {family.name: family for family in FAMILIES}
NAMES = ["clip", "llava", "qwen2_5_vl"]
HOWS = ["ddp", "ddp, wrapped first", "fsdp"]


def model_of(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return drawn(FAMILY[name].build()).train()


def inputs_of(name: str, seed: int, rank: int) -> dict:
    torch.manual_seed(seed + 1 + rank)
    return FAMILY[name].inputs("left")


def scalar(model: nn.Module, inputs: dict) -> torch.Tensor:
    outputs = model(**inputs)
    return outputs.logits.square().mean() if outputs.loss is None else outputs.loss


def gradients(model: nn.Module) -> dict:
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in grads.items()}


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in model.modules():
        if type(module).__name__.endswith(("EncoderLayer", "DecoderLayer", "Block")):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params=set(scalars(model)))


def scalars(model: nn.Module) -> list[nn.Parameter]:
    """CLIP's temperature: FSDP shards no such parameter, of a plain model neither."""
    return [parameter for parameter in model.parameters() if parameter.dim() == 0]


def train(rank: int, folder: str, seed: int) -> None:
    """A step of each model in each way; one pair of processes for all, since they take long to start."""
    make_importable()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    try:
        for name, how in itertools.product(NAMES, HOWS):
            found = a_step(name, how, inputs_of(name, seed, rank), seed)
            if rank == 0:
                torch.save(found, f"{folder}/{name}, {how}")
        torch.distributed.barrier()  # nobody leaves while another still talks to it
    finally:
        torch.distributed.destroy_process_group()


def a_step(name: str, how: str, inputs: dict, seed: int) -> dict:
    """The mean loss of all processes, and its gradients."""
    model = model_of(name, seed)
    outer = wrapped(model, how) if "first" in how else None
    accelerate(model, verbose=False)
    outer = outer or wrapped(model, how)
    loss = scalar(outer, inputs)
    loss.backward()
    for shared in [loss.detach(), *(p.grad for p in scalars(model) if how == "fsdp")]:
        torch.distributed.all_reduce(shared.div_(PROCESSES))
    fallbacks = accelerate(model, verbose=False).fallbacks
    assert not fallbacks, fallbacks
    return {"output loss": loss.detach(), **gradients(outer)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    root = str(Path(__file__).parents[2])  # where the processes find this module by the name that it has here,
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, root])  # and last, since the package they try is the one installed
        mp.spawn(train, (str(folder), SEED), PROCESSES)
    return folder


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_one_process(trained, seed, name, how):
    ours = torch.load(trained / f"{name}, {how}")
    plain = model_of(name, seed)
    swapped = len(accelerate(copy.deepcopy(plain), verbose=False).swapped)
    truth = in_one_process(copy.deepcopy(plain).double(), name, seed, in_float64)
    found = misses(truth, in_one_process(plain, name, seed), {name: ours[name] for name in truth}, swapped)
    assert not found, "\n".join(found)


def in_one_process(model: nn.Module, name: str, seed: int, cast=lambda x: x) -> dict:
    """The mean over the processes' inputs, of one after the other."""
    total = 0
    for rank in range(PROCESSES):
        loss = scalar(model, tree_map(cast, inputs_of(name, seed, rank))) / PROCESSES
        loss.backward()
        total = total + loss.detach()
    return {"output loss": total, **gradients(model)}
