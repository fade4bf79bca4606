"""What travels between the processes of a group, and what each of them is told when that fails. Imports torch only.

torch.distributed does the work, under the group's own timeout. An exchange that fails raises `DistributedError`, which
names the exchange, this rank, its peers, the seconds it took and, as far as the group's store tells, who is missing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The same by two names: torch 2.13 warns of the older ones, which are all that earlier ones have.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

PATIENCE = 5.0  # seconds for which a rank whose exchange failed waits for the others to sign that they are there


class DistributedError(RuntimeError):
    """An exchange between the ranks of a group failed; the message says which, where, and who did not answer."""


def resolve(op: str, group: object) -> dist.ProcessGroup:
    """The process group that is meant by one, by a one-dimensional device mesh, or by (mesh, name of a dimension)."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{op}: group is given, but torch.distributed is not initialised; call init_process_group")
    if isinstance(group, dist.ProcessGroup):
        return group
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        return _of_mesh(op, group)
    if isinstance(group, tuple) and len(group) == 2 and isinstance(group[0], DeviceMesh):
        return group[0].get_group(group[1])
    raise TypeError(
        f"{op}: group is {type(group).__name__}; accepted are a ProcessGroup (torch.distributed.group.WORLD for all "
        "ranks), a one-dimensional DeviceMesh, and (DeviceMesh, name of a dimension)"
    )


def _of_mesh(op: str, mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        raise ValueError(
            f"{op}: group is a DeviceMesh of {mesh.ndim} dimensions {names}; give one of them, such as mesh['dp'], or "
            "mesh['replicate', 'shard']._flatten() for the ranks of both"
        )
    return mesh.get_group()


class Comm:
    """The exchanges of one call of an op in a group."""

    def __init__(self, op: str, group: dist.ProcessGroup) -> None:
        self.op, self.group = op, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def agree(self, header: dict[str, int], own: Sequence[int], problem: Exception | None, device) -> list[list[int]]:
        """`own` of every rank, in one small exchange that also compares the header, which must be the same on all.

        A rank whose arguments are wrong takes part in it with its problem, and then raises it: the others need not wait
        for it until the timeout. They raise what it said.
        """
        if problem is not None:
            self._leave_word(problem)
        mine = torch.tensor([problem is not None, *header.values(), *own], dtype=torch.int64, device=device)
        everyone = mine.new_empty(self.size * len(mine))
        with self.doing("comparing the arguments of"):
            _all_gather(everyone, mine, group=self.group)
            rows = everyone.view(self.size, -1).tolist()
        if problem is not None:
            raise problem
        wrong = [rank for rank, row in enumerate(rows) if row[0]]
        if wrong:
            raise ValueError(f"{self.op}: " + "; ".join(self._word_of(rank) for rank in wrong))
        for place, label in enumerate(header, 1):
            found = [row[place] for row in rows]
            if len(set(found)) > 1:
                raise ValueError(f"{self.op}: {label} differs between the ranks of the group: {found}")
        return [row[1 + len(header) :] for row in rows]

    def all_gather(self, x: Tensor, sizes: Sequence[int], what: str) -> Tensor:
        """The rows of all ranks, `sizes` of them, one below the other."""
        return self.start_all_gather(x, sizes, what)()

    def start_all_gather(self, x: Tensor, sizes: Sequence[int], what: str) -> Callable[[], Tensor]:
        """The same, begun: the result waits for it. Uneven parts are padded to the largest, as gloo and NCCL want."""
        most, doing = max(sizes), f"gathering {what} from"
        if min(sizes) < most:
            padded = x.new_zeros(most, *x.shape[1:])
            padded[: len(x)] = x
            x = padded
        x, out = x.contiguous(), x.new_empty(self.size * most, *x.shape[1:])
        with self.doing(doing):
            work = _all_gather(out, x, group=self.group, async_op=True)

        def wait(sent: Tensor = x) -> Tensor:  # which must live until then
            with self.doing(doing):
                work.wait()
            if min(sizes) == most:
                return out
            parts = out.view(self.size, most, *sent.shape[1:])
            return torch.cat([part[:count] for part, count in zip(parts, sizes, strict=True)])

        return wait

    def all_reduce(self, x: Tensor, what: str, maximum: bool = False) -> Tensor:
        """x, in place: its sum over the ranks, or its maximum."""
        with self.doing(f"adding up {what} of"):
            dist.all_reduce(x, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=self.group)
        return x

    def start_sum_of_rows(self, x: Tensor, sizes: Sequence[int], what: str) -> Callable[[], Tensor]:
        """Begins to add up this rank's rows of every rank's x, whose rows are those of rank 0, of rank 1, ...

        On a CPU, and where ranks have uneven numbers of rows, every part travels as it is, and they are added in the
        order of the ranks: the same bits with any library. Between nodes of GPUs that would take each part over one
        network card; NCCL's reduction adds inside a node first, and leaves over all of its cards.
        """
        if x.is_cuda and min(sizes) == max(sizes):
            return self._start_reduce_scatter(x, sizes, what)
        mine, doing = sizes[self.rank], f"returning {what} to"
        x, out = x.contiguous(), x.new_empty(self.size * mine, *x.shape[1:])
        with self.doing(doing):
            work = dist.all_to_all_single(out, x, [mine] * self.size, list(sizes), group=self.group, async_op=True)

        def wait(sent: Tensor = x) -> Tensor:
            with self.doing(doing):
                work.wait()
            first, *others = out.view(self.size, mine, *sent.shape[1:])
            total = first.clone()
            for other in others:
                total += other
            return total

        return wait

    def _start_reduce_scatter(self, x: Tensor, sizes: Sequence[int], what: str) -> Callable[[], Tensor]:
        x, out, doing = x.contiguous(), x.new_empty(sizes[self.rank], *x.shape[1:]), f"returning {what} to"
        with self.doing(doing):
            work = _reduce_scatter(out, x, group=self.group, async_op=True)

        def wait(sent: Tensor = x) -> Tensor:  # which must live until then
            with self.doing(doing):
                work.wait()
            return out

        return wait

    # ---- failures

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """`what`, such as "gathering texts from", with all other ranks."""
        start = time.monotonic()
        try:
            yield
        except Exception as error:  # RuntimeError, DistBackendError, and ValueError of torch's own checks
            seconds = time.monotonic() - start
            peers = [rank for rank in range(self.size) if rank != self.rank]
            said = str(error).strip().splitlines()[0][:200]
            raise DistributedError(
                f"{self.op}: {what} ranks {peers} failed on rank {self.rank} of {self.size} after {seconds:.1f} s: "
                f"{said}. {self._roll_call()}. How long they wait is init_process_group's timeout"
            ) from error

    def _store(self) -> dist.Store:
        return dist.distributed_c10d._get_default_store()  # torch has no public way to a group's store

    def _key(self, kind: str, rank: int) -> str:
        return f"mmkernels/{self.group.group_name}/{kind}/{dist.get_global_rank(self.group, rank)}"

    def _leave_word(self, error: Exception) -> None:
        """Of this rank's own error, before it is raised, for whoever waits for it."""
        with contextlib.suppress(Exception):  # without the store the others are told less; the error is raised anyway
            self._store().set(self._key("raised", self.rank), f"{type(error).__name__}: {error}"[:500])

    def _word_of(self, rank: int) -> str:
        key, store = self._key("raised", rank), self._store()
        said = store.get(key).decode() if store.check([key]) else "an error"
        return f"rank {rank} raised {said}"

    def _roll_call(self) -> str:
        """Who is still there: every rank whose exchange failed signs, and waits a little for the others to."""
        try:
            store = self._store()
            store.set(self._key("alive", self.rank), "1")
            missing = [rank for rank in range(self.size) if rank != self.rank]
            deadline = time.monotonic() + PATIENCE
            while missing and time.monotonic() < deadline:
                missing = [rank for rank in missing if not store.check([self._key("alive", rank)])]
                time.sleep(0.1)
        except Exception as error:  # of any kind, by the store's: it is said, and must not hide what failed first
            said = str(error).strip().splitlines()[0][:80]
            return f"The store does not answer either ({said}): the process that holds it, rank 0, is likely gone"
        if missing:
            ranks = ", ".join(map(str, missing))
            return f"No answer from rank {ranks}: dead, hanging, elsewhere in the program, or waiting still"
        return "All ranks answer: their calls differ, or a message was lost"
