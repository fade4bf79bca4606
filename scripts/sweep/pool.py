"""Every case in a process of its own, forked from one that has imported the libraries: a crash, a hang or a model that
eats the memory loses one row and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from . import libraries
from .cases import Case, Row

Work = Callable[[Case], Iterator[Row]]


@dataclass
class Limits:
    workers: int = 2
    seconds: float = 120.0
    gigabytes: float = 12.0


@dataclass
class _Running:
    case: Case
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    until: float
    rows: list[Row]


def run(cases: Sequence[Case], work: Work, limits: Limits) -> Iterator[tuple[Case, list[Row]]]:
    """The rows of each case, as they come."""
    waiting, running = list(reversed(cases)), []
    try:
        while waiting or running:
            while waiting and len(running) < limits.workers:
                running.append(_start(waiting.pop(), work, limits))
            wait([x.pipe for x in running], timeout=1.0)
            for one in list(running):
                why = _read(one) or ("over the time limit" if time.monotonic() > one.until else None)
                if why is None:
                    continue
                running.remove(one)
                _end(one)
                yield one.case, _complete(one, why)
    finally:
        for one in running:
            _end(one)


def _start(case: Case, work: Work, limits: Limits) -> _Running:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, work, there, limits), daemon=True)
    process.start()
    there.close()
    return _Running(case, process, here, time.monotonic() + limits.seconds, [])


def _child(case: Case, work: Work, pipe: Connection, limits: Limits) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)  # models warn, and print
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    most = int(limits.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for row in work(case):
        pipe.send(row)
    pipe.send(None)


def _read(one: _Running) -> str | None:
    """Takes what has come; returns why no more will, "" being no reason to mind."""
    while True:
        try:
            if not one.pipe.poll():
                return None
            row = one.pipe.recv()
        except (EOFError, OSError):
            one.process.join(5)
            return f"the process died with {_signal(one.process.exitcode)}"
        if row is None:
            return "done"
        one.rows.append(row)


def _signal(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _end(one: _Running) -> None:
    if one.process.is_alive():
        one.process.kill()
    one.process.join()
    one.pipe.close()


def _complete(one: _Running, why: str) -> list[Row]:
    """A row for each way. Work tells when the plain model has run: what ends a process after that is our fault, unless
    it only took long."""
    ways = libraries.ways(one.case.library)
    rows = [row for row in one.rows if row.way in ways]
    if why == "done":
        return rows
    plain_ran = any(row.way == "plain" for row in one.rows)
    died = plain_ran and "died" in why
    return rows + [Row(one.case, way, "WRONG" if died else "cannot be built", why) for way in ways[len(rows) :]]
