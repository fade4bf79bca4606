"""The command line: `mmkernels info`, `explain`, `check`, `bench` and `plan`."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import backends
from ._version import __version__

try:
    import shtab
except ImportError:  # installed without its dependencies
    shtab = None

OPS = tuple(name for names in backends.HOT_PATHS.values() for name in names)
MODELS = (
    "clip-vit-b-16", "clip-vit-b-16-step-256", "siglip-so400m", "qwen2.5-vl-1024", "mllama-cross-attention",
    "llava-packed-or-padded", "llava-packed-or-masked",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")

RIGHT, WRONG, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes
EXIT_CODES = """exit codes:
  0    everything is right
  1    a kernel is off, or one that was asked for could not run
  2    the command is wrong, or asks for what is not here; nothing was run
  130  interrupted, by Ctrl-C or SIGTERM; what was known by then is printed and written
"""
LOG_SECONDS = 5.0  # between lines of progress, where there is no terminal

Step = Callable[[str, int, int], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, one of EXIT_CODES; a wrong command raises SystemExit(2)."""
    options = _parser().parse_args(arguments)
    if getattr(options, "device", None) == "cuda" and not torch.cuda.is_available():
        options.error("argument --device: torch sees no GPU here; leave it out, or see `mmkernels info`")
    # `timeout` and job schedulers end a program with SIGTERM: what is known by then is worth its table and its file.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return options.command(options, Console())
    except KeyboardInterrupt:  # before there was anything to tell
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- what can be asked


def _parser() -> argparse.ArgumentParser:
    parser = _described(argparse.ArgumentParser, prog="mmkernels", description="Fused kernels for multimodal models.")
    parser.add_argument("--version", action="version", version=f"mmkernels {__version__}")
    if shtab:
        shtab.add_argument_to(parser, "--print-completion", help="print a completion script for this shell, and exit")
    commands = parser.add_subparsers(required=True, metavar="command")
    add = functools.partial(_described, commands.add_parser)
    _add_info(add("info", help="versions, instruction set, and which backend is there or why not"))
    _add_explain(add("explain", help="what each backend makes of a call of an op, on this machine"))
    _add_check(add("check", help="does every kernel equal its reference on this machine?"))
    _add_bench(add("bench", help="how fast, against what one would use instead?"))
    _add_plan(add("plan", help="what would packing give on documents of these lengths?"))
    return parser


def _described(make: Callable[..., argparse.ArgumentParser], *args: str, **texts: str) -> argparse.ArgumentParser:
    texts.setdefault("description", texts.get("help", ""))
    return make(*args, **texts, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_info, error=parser.error)
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_explain, error=parser.error)
    parser.add_argument("op", choices=OPS, help="a function of mmkernels")
    parser.add_argument("--case", metavar="NAME", help="a call of this case of bench or check (a small one of bench)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the call's tensors (float32)")
    parser.add_argument("--device", choices=DEVICES, default=_default_device(), help="where they are (a GPU's, if any)")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_check, error=parser.error)
    parser.add_argument("--op", choices=OPS, help="only this op")
    parser.add_argument("--case", metavar="NAME", help="only this case, as the table names it")
    parser.add_argument("--backend", choices=backends.NAMES, help="only this backend, which has to be there then")
    parser.add_argument("--device", choices=DEVICES, help="only on this device")
    parser.add_argument("--dtype", choices=DTYPES, help="only in this dtype")
    parser.add_argument("--seed", type=int, help="of the inputs; a fresh one is drawn and printed otherwise")
    parser.add_argument("--quick", action="store_true", help="only the small cases")
    _add_json(parser, "write the outcomes there too")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_bench, error=parser.error)
    parser.add_argument("--op", choices=OPS, action="append", help="only this op; may be repeated, as the next four")
    parser.add_argument("--case", metavar="NAME", action="append", help="only this case, as the table names it")
    models = f"a whole model instead, plain and accelerated: {', '.join(MODELS)}"
    parser.add_argument("--model", metavar="NAME", action="append", choices=MODELS, help=models)
    growth = "series of sizes instead, --case naming one: how time and memory grow"
    parser.add_argument("--growth", action="store_true", help=growth)
    ranks = "losses across processes instead: on so many ranks, such as 2,4"
    parser.add_argument("--ranks", metavar="N[,N...]", type=_ranks, help=ranks)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="in this dtype (float32 and bfloat16)")
    parser.add_argument(
        "--pass",
        choices=("fwd", "fwd_bwd"),
        action="append",
        dest="passes",
        help="forward alone, or forward and backward (both)",
    )
    parser.add_argument("--device", choices=DEVICES, default=_default_device(), help="where (on a GPU, if any)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (0)")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds each")
    _add_json(parser, "write every figure there")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_plan, error=parser.error)
    lines = "a document a line, as JSON: its tokens, or an object with `tokens`; .gz too; - reads standard input"
    data = parser.add_argument("data", metavar="DATA.jsonl", help=lines)
    room = "what a rank has room for in a step"
    parser.add_argument("--tokens", metavar="N", type=_from_one, required=True, help=room)
    parser.add_argument("--patches", metavar="N", type=_from_one, help="the same for patches of pictures (no limit)")
    parser.add_argument("--images", metavar="N", type=_from_one, help="the same for pictures (no limit)")
    parser.add_argument("--ranks", metavar="W", type=_from_one, default=1, help="that share the work (1)")
    batch = "documents that a padded batch, which packs are compared with, holds at most (8)"
    parser.add_argument("--batch", metavar="B", type=_from_one, default=8, help=batch)
    plot = parser.add_argument("--plot", metavar="FILE", type=_picture, help="draw it there, as .png or .svg")
    if shtab:
        data.complete = plot.complete = shtab.FILE
    _add_json(parser, "write the figures there")


def _add_json(parser: argparse.ArgumentParser, text: str) -> None:
    option = parser.add_argument("--json", metavar="FILE", type=_writable, help=text)
    if shtab:
        option.complete = shtab.FILE


def _ranks(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(map(int, text.split(",")))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks, from 2 on, nor several as 2,4")
    return counts


def _from_one(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return number


def _picture(path: str) -> str:
    if Path(path).suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{path!r} must end in .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install matplotlib")
    return _writable(path)


def _writable(path: str) -> str:
    """Refused now, not when minutes of measuring are to be written."""
    file = Path(path)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{path!r} is a folder")
    if not file.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(file.parent)!r}")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path!r} cannot be written to")
    return path


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- answers


def _info(options: argparse.Namespace, console: Console) -> int:
    facts = _facts()
    if options.json:
        print(json.dumps(facts, indent=1))
        return RIGHT
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    states = facts.pop("backends")
    for name, value in (facts | {f"backend {name}": state for name, state in states.items()}).items():
        table.add_row(name, "[dim]none[/]" if value is None else escape(str(value)))
    console.print(table)
    return RIGHT


def _facts() -> dict:
    from .bench.machine import environment
    from .check.session import Request, places

    facts = environment()
    facts["instruction set"] = _instruction_sets(facts.pop("isa"))
    return facts | {"backends": {place.backend: place.state for place in places(Request())}}


def _instruction_sets(chosen: object) -> str | None:
    if chosen is None:
        return None
    from . import _core

    return f"{chosen} (of {', '.join(_core.isa_levels())}; MMKERNELS_CPU_ISA caps the choice)"


def _explain(options: argparse.Namespace, console: Console) -> int:
    from .bench import cases as measured
    from .check import cases as checked
    from .check.draw import Draw

    ours = (measured.CASES, measured.OPS[options.op].op.call), (checked.CASES, checked.OPS[options.op].call)
    known = [(case, function) for cases, function in ours for case in cases if case.op == options.op]
    found = next((each for each in known if options.case in (None, each[0].name)), None)
    if found is None:
        _no_such_case(options, options.case, [case for case, _ in known])
    case, function = found
    call = case.make(Draw(0, case.op, case.name), getattr(torch, options.dtype), options.device)
    shapes = ", ".join(f"{name} {str(x.dtype).removeprefix('torch.')} {[*x.shape]}" for name, x in call.tensors.items())
    console.print(f"[bold]{options.op}[/], {escape(case.name)}, on {options.device}: {escape(shapes)}")
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    for candidate in backends.explain(function, **call.tensors, **call.options):
        table.add_row(f"[bold]{candidate.backend}[/]", escape(candidate.state))
    console.print(table)
    return RIGHT


def _check(options: argparse.Namespace, console: Console) -> int:
    from .bench.machine import environment
    from .check import CASES
    from .check.report import print_report, write_json
    from .check.session import Request, expected_seconds, places, run

    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    chosen = {name: getattr(options, name) for name in ("op", "case", "backend", "device", "dtype", "quick")}
    request = Request(seed=seed, **chosen)
    found = places(request)
    if not any(request.cases(place) for place in found):
        _no_such_case(options, options.case, CASES)
    count = sum(len(request.cases(place)) for place in found if not place.missing)
    _announce(console, _count(count, "case"), expected_seconds(request, found))
    with _progress(console) as step:
        records = run(request, found, step)
    print_report(console, records, found, seed)
    if options.json:
        write_json(options.json, records, found, environment())
    if any(record.get("interrupted") for record in records):
        return INTERRUPTED
    wanted_but_missing = options.backend and all(place.missing for place in found)
    return WRONG if wanted_but_missing or any(record["failures"] for record in records) else RIGHT


def _bench(options: argparse.Namespace, console: Console) -> int:
    from .bench import CASES, GROWTH, PASSES, Request, run
    from .bench import DTYPES as USUAL
    from .bench.growth_report import print_growth
    from .bench.machine import environment
    from .bench.ranks_report import print_ranks
    from .bench.report import print_report, write_json
    from .bench.runner import expected_seconds

    request = Request(
        ops=tuple(options.op or ()),
        cases=tuple(options.case or ()),
        dtypes=tuple(getattr(torch, name) for name in options.dtype) if options.dtype else USUAL,
        passes=tuple(options.passes or PASSES),
        device=options.device,
        quick=options.quick,
        seed=options.seed,
        growth=options.growth,
    )
    if options.growth and (options.ranks or options.model):
        options.error("argument --growth: neither --ranks nor --model has series of sizes")
    if options.ranks:
        (measure, count), seconds = _across_ranks(options, request), None
        print_report = print_ranks
    elif options.model:
        measure = _of_models(options, request)
        count, seconds = _count(len(options.model), "model"), None
    elif request.selected():
        measure = functools.partial(run, request)
        count, seconds = _count(len(request.selected()), "case"), expected_seconds(request)
        print_report = print_growth if options.growth else print_report
    else:
        _no_such_case(options, ", ".join(options.case or ()), GROWTH if options.growth else CASES)
    env = environment()
    console.print(
        f"[bold]{env['gpu'] if request.device == 'cuda' else env['cpu']}[/], torch {env['torch']}, {_how(env)}"
    )
    _announce(console, f"{count} in {_count(len(request.dtypes), 'dtype')}", seconds)
    with _progress(console) as step:
        report = measure(env, step)
    print_report(console, report)
    if options.json:
        write_json(options.json, report)
    return INTERRUPTED if report.interrupted else RIGHT if report.passed else WRONG


def _across_ranks(options: argparse.Namespace, request) -> tuple[Callable, str]:
    from .bench import contrastive_ranks as ranks

    if options.model or set(options.op or ()) - set(ranks.OPS_ACROSS):
        options.error(f"argument --ranks: what runs across processes is {' and '.join(ranks.OPS_ACROSS)}")
    if "fwd" in (options.passes or ()):
        options.error("argument --pass: across processes forward and backward are measured together")
    cases = ranks.selected(request)
    if not cases:
        _no_such_case(options, ", ".join(options.case), ranks.SQUARE)
    uneven = [f"{case.pairs} on {count}" for case in cases for count in options.ranks if case.pairs % count]
    if uneven:
        options.error(f"argument --ranks: open_clip knows even ranks only; not {', '.join(dict.fromkeys(uneven))}")
    if request.device == "cuda" and max(options.ranks) > torch.cuda.device_count():
        options.error(
            f"argument --ranks: NCCL wants a GPU for each rank, and {torch.cuda.device_count()} are here; "
            "--device cpu measures over gloo"
        )
    return functools.partial(ranks.run, request, options.ranks), _count(len(cases) * len(options.ranks), "case")


def _of_models(options: argparse.Namespace, request) -> Callable:
    if any(importlib.util.find_spec(needed) is None for needed in ("transformers", "sklearn")):
        options.error('argument --model: needs transformers and scikit-learn: pip install "mmkernels[examples]"')
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:  # operators of another build of torch
            options.error(
                f"argument --model: the torchvision here does not fit torch {torch.__version__}, and transformers "
                f"fails with it ({error}); mend: pip uninstall torchvision, which no model of the bench needs"
            )
    from .bench.model_runner import run_models
    from .bench.models import MODELS

    models = [model for model in MODELS if model.name in options.model]
    sizes = request.target_seconds, request.quick
    return functools.partial(run_models, models, request.dtypes, request.passes, request.device, *sizes)


def _plan(options: argparse.Namespace, console: Console) -> int:
    from .packing import Limits
    from .packing.preview import preview, read
    from .packing.preview_report import print_preview, write_json, write_plot

    limits = Limits(options.tokens, options.patches, options.images)
    try:
        with _progress(console) as step:
            documents = read(options.data, step)
            found = preview(documents, limits, ranks=options.ranks, batch=options.batch, step=step)
    except ValueError as error:
        options.error(str(error))
    print_preview(console, documents.name, found)
    if options.json:
        write_json(options.json, documents.name, found)
    if options.plot:
        write_plot(options.plot, documents, found)
    return RIGHT


def _how(env: dict) -> str:
    return f"{_count(env['threads'], 'thread')}, instruction set {env['isa'] or 'none: the compiled core is missing'}"


def _no_such_case(options: argparse.Namespace, name: str | None, cases: Sequence) -> None:
    names = "; ".join(dict.fromkeys(case.name for case in cases))
    options.error(f"argument --case: no case is called {name!r}; there are: {names}")


# ---- progress


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _announce(console: Console, count: str, seconds: float | None) -> None:
    """seconds: None where nobody has measured how long it takes."""
    if seconds is None:
        console.print(count)
    elif seconds < 90:
        console.print(f"{count}, about {max(10, round(seconds, -1)):.0f} seconds")
    else:
        console.print(f"{count}, about {seconds / 60:.0f} minutes")


@contextmanager
def _progress(console: Console) -> Iterator[Step]:
    """A bar on a terminal; in a log a line now and then, which shows that it lives."""
    if not console.is_terminal:
        yield _logged(console)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting")

        def step(description: str, done: int, total: int) -> None:
            progress.update(task, description=escape(description), completed=done, total=total)

        yield step


def _logged(console: Console) -> Step:
    start = last = time.monotonic()

    def step(description: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LOG_SECONDS:
            console.print(f"{now - start:.0f} s: {done} of {total} done, now {escape(description)}")
            last = now

    return step


if __name__ == "__main__":
    sys.exit(main())
