"""Breaks the CUDA kernels one line at a time and sees which build of the emulator notices.

    python tests/emulator/mutants.py [--only TEXT] [--all-builds] [--table FILE]

A mutant is noticed when the kernel's own tests fail in a build, tried in the order of BUILDS; without --all-builds the
first that does ends its trial. Exit code 1 if one survives. The table gets a row as soon as a mutant was tried, and
keeps those of mutants that were not: a change of one kernel need not try the others again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from emulator_build import BUILDS
from mutations import MUTATIONS, Mutation
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[2]
# What the tests say. Out of time is a mutant that waits for ever, or a machine too busy to tell.
PASSED, NOTICED, OUT_OF_TIME = "passed", "noticed", "out of time"


@dataclass(frozen=True)
class Trial:
    """`found`: by build, what its tests said of the mutant; builds that were not run are missing."""

    mutation: Mutation
    found: dict[str, str]

    @property
    def survived(self) -> bool:
        return set(self.found.values()) == {PASSED}


class Workshop:
    """A copy of the tree, and for each build the objects of the unbroken one, which a mutant mostly shares."""

    def __init__(self, folder: Path):
        self._tree, self._whole = folder / "tree", folder / "objects"
        shutil.copytree(ROOT / "csrc", self._tree / "csrc")
        shutil.copytree(ROOT / "tests", self._tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("mmkernels", "pyproject.toml"):
            (self._tree / name).symlink_to(ROOT / name)
        self._log = ""

    def build_whole(self, tests: set[str]) -> None:
        """Compile everything once; tests that fail already would notice any mutant."""
        for build in BUILDS:
            if self._test(build, self._whole, *sorted(tests)) != PASSED:
                raise SystemExit(f"the tests fail before anything is broken, in the build {build}:\n{self._log}")

    def try_out(self, mutation: Mutation, all_builds: bool) -> Trial:
        source = self._tree / "csrc" / "cuda" / mutation.file
        text = source.read_text()
        if text.count(mutation.old) < 1:
            raise SystemExit(f"{mutation.file} does not contain {mutation.old!r}: bring the mutation up to date")
        source.write_text(text.replace(mutation.old, mutation.new, 1))
        found = {}
        try:
            with tempfile.TemporaryDirectory() as folder:
                objects = Path(folder) / "objects"
                subprocess.run(["cp", "-rl", self._whole, objects], check=True)
                # A header may be in any of them.
                stale = f"{source.parent.name}-{source.name}.o" if source.suffix == ".cu" else "*.o"
                for build in BUILDS:
                    for path in (objects / build).glob(stale):
                        if source.suffix == ".cu" or not path.name.startswith("emulator-"):
                            path.unlink()
                    found[build] = self._test(build, objects, mutation.tests)
                    if found[build] != PASSED and not all_builds:
                        break
        finally:
            source.write_text(text)
        return Trial(mutation, found)

    def _test(self, build: str, objects: Path, *tests: str) -> str:
        paths = [self._tree / "tests" / "emulator" / name for name in tests]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", build, "--rootdir", self._tree, *paths]
        environment = os.environ | {"MMKERNELS_EMULATOR_OBJECTS": str(objects), "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(command, cwd=self._tree, env=environment, capture_output=True, text=True)
        self._log = ran.stdout + ran.stderr
        if ran.returncode not in (0, 1):
            raise SystemExit(f"{' '.join(map(str, command))} ended with {ran.returncode}:\n{self._log}")
        if " error" in ran.stdout.splitlines()[-1] or "CalledProcessError: Command '['g++'" in self._log:
            raise SystemExit(f"what is broken does not compile:\n{self._log}")
        if ran.returncode == 0:
            return PASSED
        return OUT_OF_TIME if "subprocess.TimeoutExpired" in self._log else NOTICED


HEAD = """\
# Bugs planted in the CUDA kernels, and which build noticed

`tests/emulator/mutants.py` breaks `csrc/cuda` in one place at a time, as `tests/emulator/mutations.py` says, and runs
that kernel's tests in the emulator's builds (`docs/gpu.md`) in the order of the columns, until one of them fails. What
a build is not there to see, such as a race without consequence in the plain one, it passes; where a cell is empty it
was not run. "Out of time" is a mutant that waits for ever: its program did not end within 300 seconds.

    python tests/emulator/mutants.py --table docs/mutants.md                # all: hours, on two cores
    python tests/emulator/mutants.py --table docs/mutants.md --only FILE    # the rows of a kernel that was changed

"""


def row(mutation: Mutation) -> str:
    """How the mutant's row of the table begins."""
    return f"| `{mutation.file}` | {mutation.what} |"


def table(trials: list[Trial], earlier: str = "") -> str:
    """The rows of these, and of other mutants those of an earlier table."""
    rows = {}
    for mutation in MUTATIONS:
        rows |= {row(mutation): line for line in earlier.splitlines() if line.startswith(row(mutation))}
    for trial in trials:
        cells = [trial.found.get(build, "") for build in BUILDS]
        rows[row(trial.mutation)] = f"{row(trial.mutation)} {' | '.join(cells)} |"
    lines = ["| file | what is broken | " + " | ".join(BUILDS) + " |", "|---" * (2 + len(BUILDS)) + "|"]
    noticed = sum(f"| {NOTICED} |" in line or f"| {OUT_OF_TIME} |" in line for line in rows.values())
    count = f"Of {len(MUTATIONS)} mutants {len(rows)} were tried, and {noticed} of these noticed."
    return "\n".join([*lines, *(rows[row(m)] for m in MUTATIONS if row(m) in rows), "", count]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutations whose file or description contains this")
    parser.add_argument("--all-builds", action="store_true", help="also the builds after the first that notices")
    parser.add_argument("--table", type=Path, help="write the table, in Markdown, there")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if options.only in m.file or options.only in m.what]
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        console.print("compiling and testing the unbroken kernels")
        workshop.build_whole({m.tests for m in chosen})
        trials = []
        for mutation in track(chosen, "breaking", console=console):
            trials.append(workshop.try_out(mutation, options.all_builds))
            if options.table:
                earlier = options.table.read_text() if options.table.exists() else ""
                options.table.write_text(HEAD + table(trials, earlier))
    survivors = [trial for trial in trials if trial.survived]
    console.print(table(trials), markup=False)
    for trial in survivors:
        console.print(f"[red]nothing noticed[/]: {trial.mutation.file}: {trial.mutation.what}")
    console.print(f"{len(trials) - len(survivors)} of {len(trials)} mutants were noticed")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
