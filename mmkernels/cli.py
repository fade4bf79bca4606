"""The command line: `mmkernels info`, `mmkernels check`, `mmkernels bench`."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import backends

OPS = ("clip_loss", "siglip_loss", "patch_embed", "span_attention", "rotary_embed")
MODELS = ("clip-vit-b-16", "clip-vit-b-16-step-256", "siglip-so400m", "qwen2.5-vl-1024", "mllama-cross-attention")
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 where a check or a budget was missed, 2 for a wrong command."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if getattr(options, "device", None) == "cuda" and not torch.cuda.is_available():
        console.print("[red]torch sees no GPU here[/]; leave --device out, or see `mmkernels info`")
        return 2
    # `timeout` and job schedulers end a program with SIGTERM: what is known by then is worth its table and its file.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return options.command(options, console)
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmkernels", description="Fused kernels for multimodal models.")
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="versions, instruction set, and which backend is there or why not")
    info.set_defaults(command=_info)

    check = commands.add_parser("check", help="does every kernel equal its reference on this machine?")
    check.set_defaults(command=_check)
    check.add_argument("--op", choices=OPS)
    check.add_argument("--case", metavar="NAME", help="one case, as the table names it")
    check.add_argument("--backend", choices=backends.NAMES)
    check.add_argument("--device", choices=DEVICES)
    check.add_argument("--dtype", choices=DTYPES)
    check.add_argument("--seed", type=int, help="of the inputs; a fresh one is drawn and printed otherwise")
    check.add_argument("--quick", action="store_true", help="only the small cases")
    check.add_argument("--json", metavar="FILE", help="write the outcomes there too")

    bench = commands.add_parser("bench", help="how fast, against what one would use instead?")
    bench.set_defaults(command=_bench)
    bench.add_argument("--op", choices=OPS, action="append", help="may be repeated, like --case, --dtype and --pass")
    bench.add_argument("--case", metavar="NAME", action="append")
    models = f"a whole model instead, plain and accelerated: {', '.join(MODELS)}"
    bench.add_argument("--model", metavar="NAME", action="append", choices=MODELS, help=models)
    bench.add_argument("--dtype", choices=DTYPES, action="append")
    bench.add_argument("--pass", choices=("fwd", "fwd_bwd"), action="append", dest="passes")
    bench.add_argument("--device", choices=DEVICES)
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    bench.add_argument("--json", metavar="FILE", help="write every figure there")
    return parser


def _info(options: argparse.Namespace, console: Console) -> int:
    from .bench.machine import environment

    table = Table(show_header=False, box=None)
    env = environment()
    env["instruction set"] = _instruction_sets(env.pop("isa"))
    for name, value in env.items():
        table.add_row(f"[bold]{name}[/]", escape(str(value)) if value is not None else "[dim]none[/]")
    console.print(table, soft_wrap=True)
    for name in backends.NAMES:
        reason = backends.missing(name)
        state = "[green]there[/]" if reason is None else f"[yellow]not there:[/] {escape(reason)}"
        console.print(f"backend [bold]{name}[/]: {state}", soft_wrap=True)
    return 0


def _instruction_sets(chosen: object) -> str | None:
    if chosen is None:
        return None
    from . import _core

    return f"{chosen} (of {', '.join(_core.isa_levels())}; MMKERNELS_CPU_ISA caps the choice)"


def _check(options: argparse.Namespace, console: Console) -> int:
    from .bench.machine import environment
    from .check.report import print_report, write_json
    from .check.session import Request, places, run

    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    chosen = {name: getattr(options, name) for name in ("op", "case", "backend", "device", "dtype", "quick")}
    request = Request(seed=seed, **chosen)
    found = places(request)
    if not any(request.cases(place) for place in found):
        return _no_such_case(console, options.case, "check")
    with _progress(console) as step:
        records = run(request, found, step)
    print_report(console, records, found, seed)
    if options.json:
        write_json(options.json, records, found, environment())
    wanted_but_missing = options.backend and all(place.missing for place in found)
    return int(bool(wanted_but_missing) or any(record["failures"] for record in records))


def _bench(options: argparse.Namespace, console: Console) -> int:
    from .bench import PASSES, Request, run
    from .bench.cases import DTYPES as USUAL
    from .bench.machine import environment
    from .bench.report import print_report, write_json

    request = Request(
        ops=tuple(options.op or ()),
        cases=tuple(options.case or ()),
        dtypes=tuple(getattr(torch, name) for name in options.dtype) if options.dtype else USUAL,
        passes=tuple(options.passes or PASSES),
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        quick=options.quick,
        seed=options.seed,
    )
    measure = functools.partial(run, request)
    if options.model:
        measure = _of_models(options.model, request)
    elif not request.selected():
        return _no_such_case(console, ", ".join(options.case or ()), "bench")
    env = environment()
    console.print(
        f"[bold]{env['gpu'] if request.device == 'cuda' else env['cpu']}[/], torch {env['torch']}, {_how(env)}"
    )
    with _progress(console) as step:
        report = measure(env, step)
    print_report(console, report)
    if options.json:
        write_json(options.json, report)
    return int(not report.passed)


def _of_models(names: list[str], request) -> Callable:
    if any(importlib.util.find_spec(needed) is None for needed in ("transformers", "sklearn")):
        raise SystemExit('--model needs transformers and scikit-learn: pip install "mmkernels[examples]"')
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:  # operators of another build of torch
            raise SystemExit(
                f"--model: the torchvision here does not fit torch {torch.__version__}, and transformers fails with it "
                f"({error}); mend: pip uninstall torchvision, which no model of the bench needs"
            ) from error
    from .bench.model_runner import run_models
    from .bench.models import MODELS

    models = [model for model in MODELS if model.name in names]
    sizes = request.target_seconds, request.quick
    return functools.partial(run_models, models, request.dtypes, request.passes, request.device, *sizes)


def _how(env: dict) -> str:
    return f"{env['threads']} threads, instruction set {env['isa'] or 'none: the compiled core is missing'}"


def _no_such_case(console: Console, name: str | None, command: str) -> int:
    from .bench import CASES as MEASURED
    from .check import CASES as CHECKED

    names = dict.fromkeys(case.name for case in (CHECKED if command == "check" else MEASURED))
    console.print(f"[red]no case is called {escape(repr(name))}[/]; there are: {escape('; '.join(names))}")
    return 2


@contextmanager
def _progress(console: Console) -> Iterator:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting")

        def step(description: str, done: int, total: int) -> None:
            progress.update(task, description=escape(description), completed=done, total=total)

        yield step


if __name__ == "__main__":
    sys.exit(main())
