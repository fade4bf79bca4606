"""`python -m mmkernels.bench.contrastive_rank FOLDER`: the ranks of one case.

What to measure stands in FOLDER/task.json, and each rank leaves what it found in FOLDER/<rank>.pt. It is started by
contrastive_ranks.py, in a network of its own where that is possible.

Every implementation computes the gradients of the loss over all ranks' pairs, each rank those of its own rows, and of
the scalars. The wall clock and the CPU seconds are the slowest rank's, and memory is what a rank's own process grew by.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from .. import backends
from ..check.draw import Draw
from ..check.precision import exact_float32
from .cases import CASES, OPS
from .contrastive import as_function, open_clip_losses, siglip_kernel
from .machine import synchronize
from .measure import Stopwatch, with_peak_memory
from .op import Function, Values

MOST_ROUNDS = 10
_WARM_ROWS = 16

# name -> arguments of open_clip's class: what trains on the gradient of the loss with the least of logits on a rank
OPEN_CLIP = {
    "clip_loss": {"open_clip local_loss": {"local_loss": True, "gather_with_grad": True}},
    "siglip_loss": {f"open_clip {name}": {"dist_impl": name} for name in ("bidir", "gather")},
}


def main(folder: str) -> None:
    _raise_loopback()
    task = json.loads((Path(folder) / "task.json").read_text())
    mp.spawn(_rank, (folder, task), nprocs=task["ranks"])


def _raise_loopback() -> None:
    """A new network has a loopback that is down, which only its owner may raise; elsewhere it is up."""
    get_flags, set_flags, up = 0x8913, 0x8914, 1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP of <linux/if.h>
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, suppress(OSError):
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, get_flags, request))[1]
        if not flags & up:
            fcntl.ioctl(any_socket, set_flags, struct.pack("16sh14x", b"lo", flags | up))


def _rank(rank: int, folder: str, task: dict) -> None:
    ranks, device = task["ranks"], task["device"]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(task["threads"])
    store = f"file://{folder}/store"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=store, rank=rank, world_size=ranks)
    try:
        with exact_float32():
            torch.save(_Rank(rank, ranks, task).measured(), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
    # torch.distributed.nn, which open_clip uses, keeps gloo's threads alive: torn down under them, Python may abort.
    sys.stderr.flush()
    os._exit(0)


class _Rank:
    def __init__(self, rank: int, ranks: int, task: dict) -> None:
        self.rank, self.ranks, self.device, self.seconds = rank, ranks, task["device"], task["seconds"]
        case = next(x for x in CASES if (x.op, x.name) == (task["op"], task["case"]))
        self.op = OPS[case.op].op
        call = case.make(Draw(task["seed"], case.op, case.name), getattr(torch, task["dtype"]), self.device)
        rows = case.pairs // ranks
        self.tensors = {
            name: x[rank * rows : (rank + 1) * rows].clone() if x.dim() else x for name, x in call.tensors.items()
        }
        self.stopwatch = Stopwatch(self.device)
        self.own_network = task["own_network"]

    def measured(self) -> dict[str, dict]:
        functions = self._functions()
        failed = {
            name: {"reason": reason} for name, function in functions.items() if (reason := self._failure(function))
        }
        if ours := [name for name in failed if name.startswith("mmkernels")]:
            raise RuntimeError(failed[ours[0]]["reason"])
        functions = {name: function for name, function in functions.items() if name not in failed}
        runs = {name: partial(self._run, function, self.tensors) for name, function in functions.items()}
        found = {}
        for name, run in runs.items():
            dist.barrier()
            found[name] = dict(zip(("values", "peak_bytes"), with_peak_memory(run, self.device), strict=True))
        first = {name: self._time(run) for name, run in runs.items()}
        rounds = [first, *self._alternate(runs, sum(x["seconds"] for x in first.values()))]
        every = {name: x | {key: [y[name][key] for y in rounds] for key in first[name]} for name, x in found.items()}
        return every | failed

    def _failure(self, function: Function) -> str | None:
        """Why a first call fails, on a few rows, which also opens connections and loads code."""
        try:
            self._run(function, {name: x[:_WARM_ROWS] if x.dim() else x for name, x in self.tensors.items()})
        except Exception as reason:  # a peer's is told in its place, ours is raised
            return f"{type(reason).__name__}: {reason}"
        return None

    def _functions(self) -> dict[str, Function]:
        explained = backends.explain(self.op.call, **self.tensors)
        chosen = next((x.backend for x in explained if x.chosen), "none")  # the call says why
        functions = {f"mmkernels:{chosen}": partial(self.op.call, group=dist.group.WORLD, reduce="sum")}
        losses = open_clip_losses()
        if losses is None:
            return functions
        cls = {"clip_loss": losses.ClipLoss, "siglip_loss": losses.SigLipLoss}[self.op.name]
        here = {"rank": self.rank, "world_size": self.ranks}
        theirs = {name: as_function(cls(**options, **here)) for name, options in OPEN_CLIP[self.op.name].items()}
        triton_peer = siglip_kernel(self.op.name, self.device)
        if triton_peer is not None:
            theirs["siglip-kernel"] = as_function(triton_peer(**here))
        return theirs | functions

    def _run(self, function: Function, tensors: dict[str, Tensor]) -> Values:
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        loss = function(**leaves)
        loss.backward()
        return {self.op.result: loss.detach()} | {f"d_{name}": x.grad for name, x in leaves.items()}

    def _alternate(self, runs: dict[str, Callable[[], Values]], a_round: float) -> list[dict[str, dict]]:
        names, rounds = list(runs), min(max(int(self.seconds / a_round), 2), MOST_ROUNDS)
        orders = (names[k % len(names) :] + names[: k % len(names)] for k in range(1, rounds))
        return [{name: self._time(runs[name]) for name in order} for order in orders]

    def _time(self, run: Callable[[], Values]) -> dict[str, float | None]:
        """Of one call, of all ranks: the most wall clock and CPU seconds, and what the loopback carried."""
        self.stopwatch.sweep()
        dist.barrier()
        before, cpu, start = _loopback_bytes(), _cpu_seconds(), time.perf_counter()
        run()
        synchronize(self.device)
        spent = torch.tensor([time.perf_counter() - start, _cpu_seconds() - cpu], device=self.device)
        dist.barrier()
        carried = _loopback_bytes() - before
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        seconds, cpu = spent.tolist()
        return {"seconds": seconds, "cpu_seconds": cpu, "wire_bytes": carried if self.own_network else None}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _loopback_bytes() -> int:
    """Sent so far: by all ranks, and by whoever else is in this network."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    numbers = next(line.partition(":")[2].split() for line in lines if line.strip().startswith("lo:"))
    return int(numbers[8])


if __name__ == "__main__":
    main(sys.argv[1])
