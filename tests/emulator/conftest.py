"""What the tests of the emulator share: its three builds, and programs in C++ that run kernels in them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from emulator_build import BUILDS, HERE, compile_all, emulator_sources, link, link_module


@pytest.fixture(scope="session", params=BUILDS)
def build(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def objects(build, tmp_path_factory) -> Path:
    """Where the objects of this build are, each compiled once, also by the processes of a parallel run; mutants.py
    names a place that outlives the tests."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Path(os.environ.get("MMKERNELS_EMULATOR_OBJECTS", shared / "objects"), build)


@pytest.fixture(scope="session")
def emulator(build, objects) -> list[Path]:
    """The objects of the emulator in this build."""
    return compile_all(build, emulator_sources(), objects)


@pytest.fixture(scope="session")
def module(build, emulator, objects, tmp_path_factory) -> Path:
    """mmkernels._cuda of this build."""
    return link_module(build, emulator, objects, tmp_path_factory.mktemp(f"{build}-module") / "_cuda.so")


@pytest.fixture(scope="session")
def run(build, emulator, objects, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """run([sources], *arguments): the program made of these files of tests/emulator, compiled once a build, and run."""
    programs = {}

    def call(sources: list[str], *arguments: str) -> subprocess.CompletedProcess:
        if sources[0] not in programs:
            program = tmp_path_factory.mktemp(f"{build}-{Path(sources[0]).stem}") / "program"
            own = compile_all(build, [HERE / source for source in sources], objects)
            programs[sources[0]] = link(build, emulator + own, program)
        # A thread that met an error is abandoned, with what it had allocated.
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
        command = [programs[sources[0]], *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return call
