"""Installing without a compiler: the package works from its reference and says what is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def install(target: Path, **environment: str) -> subprocess.CompletedProcess:
    """What `pip install .` does, into a folder of its own, from a copy of the tracked sources."""
    source = target / "source"
    files = ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE", "csrc", "mmkernels")
    source.mkdir(parents=True)
    subprocess.run(f"cp -r {' '.join(files)} {source}", shell=True, cwd=ROOT, check=True)
    subprocess.run(f"rm -f {source}/mmkernels/*.so {source}/mmkernels/_build.json", shell=True, check=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target"]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    return subprocess.run(
        [*command, str(target / "site"), str(source)], capture_output=True, text=True, env=variables, check=False
    )


def run(target: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(target / "site")}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=target, check=True).stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nowhere/c++"}, "the compiled core was not built"),
        ({"MMKERNELS_NATIVE": "0"}, "left out by MMKERNELS_NATIVE=0 at install"),
    ],
)
def test_without_a_compiler_it_installs_works_and_says_so(tmp_path, environment, reason):
    done = install(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    code = (
        "import torch, mmkernels; x = torch.randn(5, 8); print(mmkernels.clip_loss(x, x, 3.0).item()); "
        "print(mmkernels.backends.missing('cpu'))"
    )
    loss, missing = run(tmp_path, code).splitlines()
    assert float(loss) >= 0
    assert reason in missing and "mend: " in missing and "pip install" in missing


def test_native_required_turns_a_missing_compiler_into_an_error(tmp_path):
    done = install(tmp_path, CXX="/nowhere/c++", MMKERNELS_NATIVE="require")
    assert done.returncode != 0
    assert not (tmp_path / "site" / "mmkernels").exists()
