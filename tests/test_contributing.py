"""CONTRIBUTING.md names every file that an op touches, and what is common to all ops knows none of them."""

import re
from pathlib import Path

import pytest

import mmkernels
from mmkernels import cli
from mmkernels.backends import HOT_PATHS
from mmkernels.bench import cases as bench_cases
from mmkernels.check import cases as check_cases

ROOT = Path(__file__).parents[1]
SECTION = re.search(r"^## Adding an op\n.*?^```\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)[1]
NAMES = {name: {name, *functions} for name, functions in HOT_PATHS.items()}  # of a hot path
EACH_FOR_A_REASON_OF_ITS_OWN = {"tests/test_backends.py", "tests/integrations/test_accelerate.py"}


def listed() -> list[tuple[str, str]]:
    """Of each file of the list its pattern, and the backend whose kernels need it, "" for every op."""
    found, needed = [], ""
    for line in filter(None, SECTION.splitlines()):
        if line.endswith(":"):
            needed = "".join(re.findall(r"(\w+)\.py", line))
        else:
            found.append((re.split(r"\s{2,}", line)[0], needed))
    return found


def needing(backend: str) -> list[str]:
    return [name for name in HOT_PATHS if (ROOT / "mmkernels" / "ops" / name / f"{backend or 'op'}.py").exists()]


def mentions(file: Path, names: set[str]) -> bool:
    return re.search(rf"(?<![A-Za-z0-9])({'|'.join(names)})(?![A-Za-z0-9])", file.read_text()) is not None


@pytest.mark.parametrize("pattern, backend", listed())
def test_every_op_has_the_files_that_are_listed(pattern, backend):
    for name in needing(backend):
        files = list(ROOT.glob(pattern.replace("<hot path>", name)))
        assert files, f"{name} has no {pattern}"
        assert "<hot path>" in pattern or any(mentions(file, NAMES[name]) for file in files), (
            f"{pattern} says nothing of {name}"
        )


def test_every_file_that_tells_of_all_ops_is_listed():
    """Where the others stand, the next one has to."""
    folders = ("csrc", "docs", "mmkernels", "scripts", "tests")
    sources = [*ROOT.glob("*"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    known = {file for pattern, _ in listed() for file in ROOT.glob(pattern)}
    known |= {ROOT / name for name in (*EACH_FOR_A_REASON_OF_ITS_OWN, "CONTRIBUTING.md")}
    for file in sources:
        if file.suffix not in (".cpp", ".cu", ".h", ".md", ".py", ".sh", ".txt") or file in known:
            continue
        for backend in {backend for _, backend in listed()}:
            told = [mentions(file, NAMES[name]) for name in needing(backend)]
            assert not all(told), f"CONTRIBUTING.md does not list {file.relative_to(ROOT)}"


def test_the_hot_paths_are_those_that_are_there():
    folders = {file.parent.name for file in (ROOT / "mmkernels" / "ops").glob("*/__init__.py")}
    functions = [name for functions in HOT_PATHS.values() for name in functions]
    assert set(HOT_PATHS) == folders and set(functions) <= set(mmkernels.__all__)
    assert list(cli.OPS) == functions
    for gathered in (check_cases, bench_cases):
        assert list(gathered.OPS) == functions == list(dict.fromkeys(case.op for case in gathered.CASES))


def generic_files() -> list[Path]:
    harness = [file for room in ("check", "bench") for file in (ROOT / "mmkernels" / room).glob("*.py")]
    common = [file for file in harness if file.name != "cases.py" and not file.stem.startswith(tuple(HOT_PATHS))]
    return sorted([*common, *(ROOT / "benchmarks").glob("*.py"), ROOT / "mmkernels" / "cli.py"])


@pytest.mark.parametrize("file", generic_files(), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_what_is_common_to_all_ops_knows_none(file):
    """Neither by name nor by the class of its cases: what is special about an op, its row says."""
    classes = {type(case).__name__ for gathered in (check_cases, bench_cases) for case in gathered.CASES}
    known = classes.union(*NAMES.values()) & set(re.findall(r"\w+", file.read_text()))
    assert not known, f"{file} knows {known}"
