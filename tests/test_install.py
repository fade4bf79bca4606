"""Installing without a compiler, or without nvcc: the package works from what it has and says what is missing."""

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

from mmkernels import _core
from mmkernels._installation import reinstall

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """A copy of the checkout, where what is built is nobody else's."""
    folder = tmp_path_factory.mktemp("sources")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files.check_returncode()
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def sdist(sources) -> Path:
    build = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=sources, capture_output=True, check=True)
    return next(sources.glob("mmkernels-*.tar.gz"))


def install(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    """A source distribution or a wheel, into a folder of its own."""
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
        (
            {"CXX": "/nowhere/c++"},
            "not built: Could not find the compiler specified in the environment variable CXX: /n",
        ),
        ({"MMKERNELS_NATIVE": "0"}, "left out by MMKERNELS_NATIVE=0 at install"),
    ],
)
def test_without_a_compiler_it_installs_works_and_says_so(sdist, tmp_path, environment, reason):
    done = install(sdist, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    code = (
        "import torch, mmkernels; x = torch.randn(5, 8); print(mmkernels.clip_loss(x, x, 3.0).item()); "
        "print(mmkernels.backends.missing('cpu'))"
    )
    loss, missing = run(tmp_path, code).splitlines()
    assert float(loss) >= 0
    assert reason in missing and "mend: " in missing and "pip install" in missing


def test_a_wheel_of_the_source_distribution_runs_where_no_compiler_is(sources, tmp_path):
    """Made without the checkout: what the core is made of is in the source distribution."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"MMKERNELS_CUDA": "0"}
    script = [sources / "scripts" / "build_wheels.sh", sys.executable]
    built = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    wheel = next(sources.glob("dist/cpu/mmkernels-*-manylinux_*.whl"))
    done = install(wheel, tmp_path, PATH="")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in run(tmp_path, "import mmkernels; print(mmkernels.__file__)")
    arguments = ["check", "--quick", "--op", "rotary_embed", "--backend", "cpu"]
    assert "rotary_embed" in run(tmp_path, f"import sys; from mmkernels.cli import main; sys.exit(main({arguments}))")


def test_native_required_turns_a_missing_compiler_into_an_error(sdist, tmp_path):
    done = install(sdist, tmp_path, CXX="/nowhere/c++", MMKERNELS_NATIVE="require")
    assert done.returncode != 0
    assert not (tmp_path / "site" / "mmkernels").exists()


# ---- the CUDA kernels, by a cmake that only writes down what it was asked, and fails on them if it is told to


FAILS = """\
echo "In file included from error.h:3:"
echo "a.cu(3): error: identifier \\"x\\" is undefined"
echo "2 errors"
exit 1 """


def install_with_recorder(
    sdist: Path, folder: Path, fails: str = "exit 0", **environment: str
) -> subprocess.CompletedProcess:
    (folder / "bin").mkdir()
    cmake = folder / "bin" / "cmake"
    cmake.write_text(f'#!/bin/sh\necho "$@" >>{folder}/calls\ncase "$*" in *csrc/cuda*) {fails};; esac\n')
    cmake.chmod(0o755)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    path = f"{folder}/bin:{os.environ['PATH']}"
    return install(sdist, folder, **({"PATH": path, "CUDA_HOME": "", "CUDA_PATH": "", "CUDACXX": ""} | environment))


def record(folder: Path) -> dict[str, dict[str, str]]:
    return json.loads((folder / "site" / "mmkernels" / "_build.json").read_text())


def test_the_cuda_kernels_are_built_where_nvcc_is(sdist, tmp_path):
    done = install_with_recorder(sdist, tmp_path, MMKERNELS_CUDA_ARCHS="80, 90a")
    assert done.returncode == 0, done.stderr
    core, _, cuda, _ = (tmp_path / "calls").read_text().splitlines()
    assert "csrc/cuda" not in core
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path}/bin/nvcc -DMMKERNELS_CUDA_ARCHS=80;90a" in cuda
    assert record(tmp_path) == {"core": {}, "cuda": {}}


def test_kernels_that_do_not_compile_leave_the_core_unharmed(sdist, tmp_path):
    done = install_with_recorder(sdist, tmp_path, fails=FAILS)
    assert done.returncode == 0, done.stderr
    found = record(tmp_path)
    assert found["core"] == {}
    complaint = 'the CUDA kernels were not built: a.cu(3): error: identifier "x" is undefined ('
    assert found["cuda"]["reason"].startswith(complaint) and found["cuda"]["mend"]
    assert found["cuda"]["reason"] in run(tmp_path, "from mmkernels import backends; print(backends.missing('cuda'))")


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (
            '{"dir_info": {"editable": true}, "url": "file:///a%20b/c"}',
            "pip install --force-reinstall --no-deps -e '/a b/c'",
        ),
        ('{"dir_info": {}, "url": "file:///src"}', "pip install --force-reinstall --no-deps /src"),
        ('{"archive_info": {}, "url": "file:///mmkernels.whl"}', "--no-deps --no-binary mmkernels mmkernels"),
        (None, "--no-deps --no-binary mmkernels mmkernels"),
    ],
)
def test_installing_anew_is_said_for_where_the_package_came_from(monkeypatch, tmp_path, origin, command):
    if origin:
        (tmp_path / "direct_url.json").write_text(origin)
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(tmp_path))
    assert reinstall().endswith(command)


def test_the_mend_that_is_printed_mends(sources, tmp_path):
    """From a folder, with no compiler; then by the command that is printed, where a cmake hands out the core that the
    package under test has."""
    venv.create(tmp_path / "venv", with_pip=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    for old in site.glob("setuptools*"):  # Python's own
        shutil.rmtree(old)
    others = [path for path in sys.path if "site-packages" in path]  # torch and its kin
    (site / "others.pth").write_text("\n".join(others))
    cmake = tmp_path / "bin" / "cmake"
    cmake.parent.mkdir()
    cmake.write_text("""\
#!/bin/sh
for x in "$@"; do
    case "$x" in -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=*) cp "$CORE" "${x#*=}" ;; esac
done
""")
    cmake.chmod(0o755)
    path = f"{tmp_path}/venv/bin:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"MMKERNELS_CUDA": "0", "PATH": path}
    environment |= {"PIP_NO_BUILD_ISOLATION": "0"}  # of all settings of pip the one that says no by 0

    def missing() -> str:
        code = "import mmkernels; print(mmkernels.backends.missing('cpu'))"
        command = [tmp_path / "venv" / "bin" / "python", "-W", "ignore", "-c", code]
        return subprocess.check_output(command, text=True, env=environment, cwd=tmp_path)

    command = ["pip", "install", "-q", "--no-deps", str(sources)]
    subprocess.run(command, env=environment | {"CXX": "/nowhere/c++"}, check=True)
    said, _, mend = missing().strip().partition(", then ")
    assert "the compiled core was not built" in said
    with_cmake = {"PATH": f"{cmake.parent}:{path}", "CORE": _core.__file__}
    subprocess.run(mend, shell=True, env=environment | with_cmake, check=True)
    assert missing() == "None\n"


def test_native_required_turns_kernels_that_do_not_compile_into_an_error(sdist, tmp_path):
    assert install_with_recorder(sdist, tmp_path, fails=FAILS, MMKERNELS_NATIVE="require").returncode != 0


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MMKERNELS_CUDA": "0", "MMKERNELS_NATIVE": "require"}, "left out by MMKERNELS_CUDA=0 at install"),
        ({"CUDA_HOME": "/nowhere"}, "the CUDA kernels were not built: no nvcc was found"),
    ],
)
def test_without_nvcc_or_on_purpose_only_the_core_is_built(sdist, tmp_path, environment, reason):
    done = install_with_recorder(sdist, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "csrc/cuda" not in (tmp_path / "calls").read_text()
    assert record(tmp_path)["cuda"]["reason"] == reason
