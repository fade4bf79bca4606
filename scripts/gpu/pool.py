"""Rows measured in processes of their own, each within a limit of time: one that hangs, crashes, or leaves the GPU in
an error from which its process does not recover, loses itself and no other."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

START_SECONDS = 120.0  # until a process has imported what its first row needs


class Row(NamedTuple):
    """`measure` is called in another process; what it raises is the row's failure."""

    name: str
    measure: Callable[[], dict]


class Pool:
    """Processes that stay from one `run` to the next, since each takes seconds to import torch. What they print goes to
    the end of a file."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._keep(0)

    def run(self, rows: Sequence[Row], workers: int, seconds: float, until: float) -> Iterator[tuple[str, dict]]:
        """The result of each row as it comes, by `workers` at a time, `seconds` for each at most. Of rows under way
        at the time `until` (of time.monotonic) just this is said; those that were not begun have none."""
        waiting = deque(rows)
        self._keep(min(workers, len(rows)))
        while time.monotonic() < until:
            for worker in self._workers:
                if worker.row is None and waiting:
                    worker.give(waiting.popleft(), seconds)
            busy = [worker for worker in self._workers if worker.row is not None]
            if not busy:
                return
            wait([worker.pipe for worker in busy], timeout=0.5)
            for worker in busy:
                row, result = worker.row, worker.result()
                if result is not None:
                    if worker.ended:
                        self._workers[self._workers.index(worker)] = _Worker(self._log)
                    yield row.name, result
        for worker in [worker for worker in self._workers if worker.row is not None]:
            worker.end()
            self._workers.remove(worker)
            yield worker.row.name, {"skipped": f"was under way for {worker.age:.0f} s when the step's time was up"}

    def _keep(self, count: int) -> None:
        while len(self._workers) > count:
            self._workers.pop().end()
        while len(self._workers) < count:
            self._workers.append(_Worker(self._log))


class _Worker:
    def __init__(self, log: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a process that has used a GPU must not be forked
        self.pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, log))
        self._process.start()
        there.close()
        self.row: Row | None = None
        self.ended = False

    @property
    def age(self) -> float:
        """Seconds that the row has taken."""
        return time.monotonic() - self._since

    def give(self, row: Row, seconds: float) -> None:
        self.row, self._seconds, self._since = row, seconds, time.monotonic()
        self._until = self._since + START_SECONDS
        with suppress(OSError):  # it died at its start: the pipe's end is read next
            self.pipe.send(row)

    def result(self) -> dict | None:
        """Of the row, once there is one."""
        try:
            while self.pipe.poll():
                answer = self.pipe.recv()
                if answer is None:  # it begins
                    self._since = time.monotonic()
                    self._until = self._since + self._seconds
                    continue
                self.row, self.ended = None, answer.pop("ended")
                if self.ended:
                    self.end()
                return answer
        except (EOFError, OSError):
            self._process.join(5)
            return self._lost(f"its process died with {_told(self._process.exitcode)}")
        if time.monotonic() > self._until:
            return self._lost(f"took longer than {self._seconds:.0f} s, and was ended")
        return None

    def end(self) -> None:
        """With all the processes that it started. One that does not go even so is left behind."""
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(OSError):  # before it had a group of its own
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join(5)
        self.pipe.close()

    def _lost(self, why: str) -> dict:
        self.end()
        self.row, self.ended = None, True
        return {"failure": why}


def _told(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _serve(pipe: Connection, log: Path) -> None:
    os.setsid()
    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)  # a process that the GPU does not let go holds nobody's pipe
    ended = False
    while not ended:
        start = time.monotonic()
        try:
            row = pipe.recv()  # imports what measures it
            pipe.send(None)
            start = time.monotonic()
            result = row.measure()
        except EOFError:
            return
        except Exception as error:
            result = {"failure": f"{type(error).__name__}: {error}"}
        gc.collect()
        broken = _broken_gpu()
        if broken:
            result.setdefault("failure", f"left the GPU in an error: {broken}")
            ended = True
        try:
            pipe.send(result | {"seconds": round(time.monotonic() - start, 2), "ended": ended})
        except BrokenPipeError:
            return  # who asked is gone


def _broken_gpu() -> str | None:
    """The error that every further call of this process would meet."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return str(error).splitlines()[0]
    return None
