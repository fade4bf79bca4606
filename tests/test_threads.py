"""The compiled core shares torch's threads, and never hangs where they are missing."""

import importlib.util
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import mmkernels
from mmkernels import _core

SECONDS = 60  # a hang is what is looked for; a loaded machine is not


def features(n: int = 700) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.arange(2.0 * n * 24).reshape(2, n, 24).sin(), dim=-1)


def loss(pairs: torch.Tensor) -> torch.Tensor:
    return mmkernels.clip_loss(pairs[0], pairs[1], 30.0, backend="cpu")


def test_no_second_openmp_runtime_comes_with_the_core(tmp_path):
    code = "import torch, mmkernels._core; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    names = ("libgomp", "libomp", "libiomp")
    runtimes = {line.split()[-1] for line in maps.splitlines() if any(name in line for name in names)}
    assert len(runtimes) == 1, runtimes
    assert "torch" in runtimes.pop()


def test_without_torch_the_core_says_what_it_needs():
    code = (
        "import importlib.util as u; s = u.spec_from_file_location('_core', {!r}); m = u.module_from_spec(s); "
        "s.loader.exec_module(m)"
    ).format(importlib.util.find_spec("mmkernels._core").origin)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: mmkernels._core works on torch's OpenMP threads: import torch before it" in done.stderr


@pytest.mark.parametrize("threads_in_child", [None, 2])
def test_a_forked_child_does_not_hang(threads_in_child):
    pairs = features()  # not in the child: torch's own parallel functions do hang there
    expected = loss(pairs)  # the pool exists now, in this process only
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        if threads_in_child:
            torch.set_num_threads(threads_in_child)
        os.write(write, loss(pairs).numpy().tobytes())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(read, 4) == expected.numpy().tobytes()


class Losses(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return loss(features(500 + index))


def test_a_dataloader_worker_may_call_an_op():
    expected = [loss(features(500 + i)) for i in range(4)]
    loader = DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SECONDS)
    assert [value.item() for value in loader] == [value.item() for value in expected]


def test_threads_of_the_caller_get_the_same_answer():
    from concurrent.futures import ThreadPoolExecutor

    pairs = features()
    expected = loss(pairs)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(value, expected) for value in pool.map(lambda _: loss(pairs), range(16)))


MEMORY = """
import torch
from mmkernels import _core, clip_loss
def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
def step(n):
    features = torch.arange(2.0 * n * 24).reshape(2, n, 24).sin().requires_grad_()
    clip_loss(*features, 1.0, backend="cpu").backward()
step(100)
_core.release_kept()
before = resident()
for n in range(3000, 5200, 200):
    step(n)
kept = resident() - before
_core.release_kept()
print(kept, resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_working_memory_is_kept_in_bounds_and_given_back(tmp_path):
    """Up to 352 MiB stay for the next call; blocks of ever new sizes must not pile up. In a process of its own, since
    what other tests leave in malloc's heap would be counted."""
    run = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kept, rest = map(int, run.stdout.split())
    assert 32 << 20 < kept < 400 << 20
    assert rest < 16 << 20


def test_a_wrong_cap_on_the_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("MMKERNELS_CPU_ISA", "avx3")
    with pytest.raises(ValueError, match="MMKERNELS_CPU_ISA is 'avx3'; accepted are portable, avx2"):
        _core.isa()
