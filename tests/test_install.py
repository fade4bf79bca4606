"""Installing without a compiler, or without nvcc: the package works from what it has and says what is missing."""

import json
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


# Where the package under test is an editable install, its finder would give every package of this name its core.
WITHOUT_EDITABLE = 'import sys; sys.meta_path = [x for x in sys.meta_path if "__editable__" not in str(x)]; '


def run(target: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(target / "site")}
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_EDITABLE + code]
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


# ---- the CUDA kernels, by a cmake that only writes down what it was asked, and fails on them if it is told to


def install_with_recorder(folder: Path, fails: bool = False, **environment: str) -> subprocess.CompletedProcess:
    (folder / "bin").mkdir()
    cmake = folder / "bin" / "cmake"
    cmake.write_text(f'#!/bin/sh\necho "$@" >>{folder}/calls\ncase "$*" in *csrc/cuda*) exit {int(fails)};; esac\n')
    cmake.chmod(0o755)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    path = f"{folder}/bin:{os.environ['PATH']}"
    return install(folder, **({"PATH": path, "CUDA_HOME": "", "CUDA_PATH": "", "CUDACXX": ""} | environment))


def record(folder: Path) -> dict[str, dict[str, str]]:
    return json.loads((folder / "site" / "mmkernels" / "_build.json").read_text())


def test_the_cuda_kernels_are_built_where_nvcc_is(tmp_path):
    done = install_with_recorder(tmp_path, MMKERNELS_CUDA_ARCHS="80, 90a")
    assert done.returncode == 0, done.stderr
    core, _, cuda, _ = (tmp_path / "calls").read_text().splitlines()
    assert "csrc/cuda" not in core
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path}/bin/nvcc -DMMKERNELS_CUDA_ARCHS=80;90a" in cuda
    assert record(tmp_path) == {"core": {}, "cuda": {}}


def test_kernels_that_do_not_compile_leave_the_core_unharmed(tmp_path):
    done = install_with_recorder(tmp_path, fails=True)
    assert done.returncode == 0, done.stderr
    found = record(tmp_path)
    assert found["core"] == {}
    assert found["cuda"]["reason"].startswith("the CUDA kernels were not built: Command") and found["cuda"]["mend"]
    assert found["cuda"]["reason"] in run(tmp_path, "from mmkernels import backends; print(backends.missing('cuda'))")


def test_native_required_turns_kernels_that_do_not_compile_into_an_error(tmp_path):
    assert install_with_recorder(tmp_path, fails=True, MMKERNELS_NATIVE="require").returncode != 0


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MMKERNELS_CUDA": "0", "MMKERNELS_NATIVE": "require"}, "left out by MMKERNELS_CUDA=0 at install"),
        ({"CUDA_HOME": "/nowhere"}, "the CUDA kernels were not built: no nvcc was found"),
    ],
)
def test_without_nvcc_or_on_purpose_only_the_core_is_built(tmp_path, environment, reason):
    done = install_with_recorder(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "csrc/cuda" not in (tmp_path / "calls").read_text()
    assert record(tmp_path)["cuda"]["reason"] == reason
