"""What every test shares: random inputs from a printed seed, and the packages that need help to import on a CPU."""

import os
from pathlib import Path

# Before torch is imported: the threads of two workers of a parallel run would spin on each other's processors.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from draws import SEED
from torchvision_stub import make_importable

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

make_importable()  # timm and open_clip import it


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would begin with the files of many tests, and leave the slow ones of few to one worker at the end.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_install.py")  # minutes of builds, on one worker


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"drawn with MMKERNELS_TEST_SEED={SEED}")


@pytest.fixture(autouse=True)
def seed() -> int:
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture
def decoy(tmp_path) -> Path:
    """A folder with another mmkernels, which nothing started in it may take for this one."""
    (tmp_path / "mmkernels").mkdir()
    (tmp_path / "mmkernels" / "__init__.py").write_text("raise ImportError('not this one')")
    return tmp_path


@pytest.fixture(params=["reference", "cpu"])
def backend(request) -> str:
    return request.param
