"""What each rank of torchrun does: the snippets of the manual for several, whose losses and weights go to a file."""

from pathlib import Path

import torch
import torch.distributed as dist
import transformers as hf
from documents import model_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trained import PACKS, RATE, Told, arguments, blank_for, losses_of, names_for, snippet, weights

from mmkernels import accelerate
from mmkernels.packing import Collator, shard


def ready(name: str, rank: int) -> tuple[nn.Module, dict[str, object]]:
    model = model_of(name).train()
    accelerate(model, verbose=False)
    collator = Collator.of(model, blank=blank_for(name))
    names = names_for(name, model, collator, PACKS)
    return model, names | {"shard": shard, "rank": rank, "world_size": 2, "dist": dist}


def by_trainer(name: str, rank: int, folder: str) -> tuple[list[float], torch.Tensor]:
    class Trainer(Told, hf.Trainer):
        pass

    def made(_, **given):
        return hf.TrainingArguments(**arguments(folder), **given)

    model, names = ready(name, rank)
    exec(snippet("train_dataset=dealt"), names | {"Trainer": Trainer, "TrainingArguments": made})
    return Told.losses(), weights(model)


def by_loop(name: str, rank: int) -> tuple[list[float], torch.Tensor]:
    model, names = ready(name, rank)
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if type(module).__name__.endswith(("DecoderLayer", "EncoderLayer", "VisionBlock")):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = losses_of(model)
    exec(snippet("dist.all_reduce"), names | {"optimizer": torch.optim.SGD(model.parameters(), lr=RATE)})
    shares = torch.tensor(losses)  # of each step's loss, this rank's
    dist.all_reduce(shares)
    return shares.tolist(), weights(model)


def on_a_rank(target: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {"trainer": by_trainer("qwen2_5_vl", rank, target), "loop": by_loop("llava", rank)}
    if rank == 0:
        torch.save(found, Path(target) / "found.pt")
    dist.destroy_process_group()
