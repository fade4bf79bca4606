"""Work on several processes of one group: over gloo, or each with a GPU of its own over NCCL."""

import faulthandler
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchvision_stub import make_importable


def start(rank: int, ranks: int, library: str, folder: str, work, seconds: float, args: tuple) -> None:
    faulthandler.enable()
    make_importable()
    torch.set_num_threads(1)
    if library == "nccl":
        torch.cuda.set_device(rank)
    timeout, store = timedelta(seconds=seconds), f"file://{folder}/store"
    dist.init_process_group(library, init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        work(rank, ranks, *args)
    finally:
        dist.destroy_process_group()
    # torch.distributed.nn, which open_clip uses, keeps the group and gloo's threads alive: an interpreter that is torn
    # down under them may abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def on_ranks(ranks: int, folder, work, *args, seconds: float = 120, library: str = "gloo") -> None:
    """Runs work(rank, ranks, *args) on each; it stands in a module of the tests."""
    root = str(Path(__file__).parents[1])  # where the processes find that module by the name that it has here,
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, root])  # and last, since the package they try is the one installed
        mp.spawn(start, (ranks, library, str(folder), work, seconds, args), nprocs=ranks)
