"""What keeps the CUDA kernels from serving a call is said before anything is launched, with the way out. The module and
the devices are made up: no GPU is needed to see the words."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch

import mmkernels
from mmkernels import backends

LOADED = ("mmkernels.ops._cuda_tensors", "mmkernels.ops.span_attention.cuda")  # with the made-up module in them


@pytest.fixture
def capability(monkeypatch) -> dict[int, tuple[int, int]]:
    """Of each device, by its number."""
    of = {0: (9, 0), 1: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of[device.index])
    return of


@pytest.fixture
def launched() -> list[tuple[str, object, tuple[int, int]]]:
    """The kernels, calls and streams that the made-up module was given."""
    return []


@pytest.fixture
def load(monkeypatch, capability, launched):
    """load(name, architectures): a module of mmkernels.ops beside a mmkernels._cuda built for these, with the kernels
    `forward`, which Hopper has its own of for all calls but "odd" ones."""
    before = {name: sys.modules.pop(name, None) for name in LOADED}

    def call(name: str, architectures: tuple[str, ...] = ("80", "90a", "120+ptx")) -> ModuleType:
        built = SimpleNamespace(emulated=False, architectures=architectures, SpanAttention=None, Heads=None)
        built.forward = lambda call, stream: launched.append(("forward", call, stream))
        built.forward_sm90 = lambda call, stream: launched.append(("forward_sm90", call, stream))
        built.forward_sm90_serves = lambda call: call != "odd"
        monkeypatch.setitem(sys.modules, "mmkernels._cuda", built)
        monkeypatch.setattr(mmkernels, "_cuda", built, raising=False)
        return importlib.import_module(f"mmkernels.ops.{name}")

    yield call
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def tensor(device: str = "cuda:0", dtype: torch.dtype = torch.bfloat16, head: int = 64) -> SimpleNamespace:
    """As much of one as the checks look at."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 5, 2, head))


def test_a_dtype_that_no_kernel_has_is_named_with_those_that_one_has(load):
    unsupported_tensor = load("_cuda_tensors").unsupported_tensor
    assert unsupported_tensor("q", tensor()) is None
    assert unsupported_tensor("q", tensor(dtype=torch.float64)) == "it serves q of bfloat16, float16, not torch.float64"
    assert unsupported_tensor("q", tensor(dtype=torch.float32)).endswith("; the triton backend serves float32")
    assert unsupported_tensor("q", tensor("cpu")) == "it serves tensors on cuda, q is on cpu"


def test_a_head_that_is_too_large_is_named_with_the_largest(load):
    unsupported = load("span_attention.cuda").unsupported
    assert unsupported(tensor(head=576), tensor(head=576), tensor(head=576)) is None
    said = unsupported(tensor(), tensor(), tensor(head=577))
    assert said == "it serves heads of up to 576 numbers, those of v have 577"


@pytest.mark.parametrize(("device", "fits"), [((8, 0), True), ((8, 6), False), ((8, 9), False), ((12, 0), False)])
def test_wide_heads_need_a_device_whose_blocks_have_the_shared_memory(load, capability, device, fits):
    capability[0], name = device, "sm_{}{}".format(*device)
    unsupported = load("span_attention.cuda").unsupported
    assert unsupported(*[tensor(head=256)] * 3) is None
    said = "it serves heads of up to 256 numbers, those of q have 257"
    said = None if fits else f"on {name}, whose blocks have 99 KiB of shared memory, {said}"
    assert unsupported(*[tensor(head=257)] * 3) == said


@pytest.mark.parametrize(
    ("device", "head", "chosen", "why_not"),
    [((9, 0), 576, "cuda", None), ((9, 0), 577, "reference", "576"), ((8, 6), 257, "triton", "up to 256 numbers")],
)
def test_heads_too_large_for_cuda_are_others(load, capability, monkeypatch, device, head, chosen, why_not):
    capability[0] = device
    pytest.importorskip("triton", reason="the Triton backend needs triton, which has wheels for Linux only")
    kernels, real = load("span_attention.cuda"), backends._load
    monkeypatch.setattr(backends, "missing", lambda name: None if name != "flash-attn" else "not installed")
    monkeypatch.setattr(backends, "_load", lambda op, name: kernels if name == "cuda" else real(op, name))
    found = backends._candidates("span_attention", "auto", *[tensor(head=head)] * 3)
    assert [each.backend for each in found if each.chosen] == [chosen]
    (cuda,) = (each for each in found if each.backend == "cuda")
    assert cuda.reason == why_not if why_not is None else why_not in cuda.reason


@pytest.mark.parametrize(
    ("architectures", "device", "runs"),
    [
        (("80",), (8, 0), True),
        (("80",), (8, 9), True),
        (("86",), (8, 0), False),
        (("80",), (9, 0), False),
        (("80+ptx",), (9, 0), True),
        (("80+ptx",), (7, 5), False),
        (("90a",), (9, 0), True),  # all but *_sm90.cu is compiled for 90
        (("100",), (10, 3), True),
        (("100f",), (10, 3), True),
        (("100a",), (10, 0), True),
        (("100a",), (10, 3), False),
        (("100a+ptx",), (10, 3), True),
        (("100",), (12, 0), False),
        (("120+ptx",), (10, 0), False),
    ],
)
def test_which_devices_a_build_runs_on(load, architectures, device, runs):
    assert load("_cuda_tensors", architectures).runs_on(device) == runs


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ((8, 0), "cuda:0 is sm_80, the build holds code for 90a, 120+ptx; mend: MMKERNELS_CUDA_ARCHS=80 pip install"),
        ((7, 5), "cuda:0 is sm_75; the kernels need sm_80 or later: the triton backend may serve it"),
    ],
)
def test_a_device_older_than_the_build_is_named_with_what_serves_it(load, capability, device, words):
    capability[0] = device
    assert load("_cuda_tensors", ("90a", "120+ptx")).unsupported_tensor("q", tensor()).startswith(words)


def test_hopper_is_offered_the_build_that_has_its_own_kernels(load):
    """sm_90 alone would leave them out."""
    assert "MMKERNELS_CUDA_ARCHS=90a " in load("_cuda_tensors", ("80",)).unsupported_tensor("q", tensor())


@pytest.fixture
def current(monkeypatch) -> list[int]:
    """The devices made current, one within another; a stream is (the current device, that of the stream)."""
    numbers = [0]

    @contextmanager
    def device(which: torch.device):
        numbers.append(which.index)
        yield
        numbers.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: SimpleNamespace(cuda_stream=(numbers[-1], of.index)))
    return numbers


@pytest.mark.parametrize(
    ("architectures", "device", "call", "name"),
    [
        (("80", "90a"), (9, 0), "call", "forward_sm90"),
        (("80", "90a"), (9, 0), "odd", "forward"),
        (("90a+ptx",), (9, 0), "call", "forward_sm90"),
        (("80", "90+ptx"), (9, 0), "call", "forward"),
        (("90a+ptx",), (10, 0), "call", "forward"),
    ],
)
def test_hoppers_kernels_are_called_where_they_are(
    load, capability, current, launched, architectures, device, call, name
):
    capability[0] = device
    load("_cuda_tensors", architectures).launch("forward", call, q=tensor())
    assert launched == [(name, call, (0, 0))]


def test_a_launch_goes_to_the_stream_of_its_tensors_device(load, current, launched):
    """Whatever device is current: the stream of another would be refused by the driver, or wait for the wrong work."""
    load("_cuda_tensors").launch("forward", "call", q=tensor("cuda:1"))
    assert launched == [("forward", "call", (1, 1))] and current == [0]


def test_tensors_of_two_devices_are_named(load, launched):
    with pytest.raises(ValueError, match="forward: lo is on cpu, q on cuda:1; move one"):
        load("_cuda_tensors").launch("forward", None, q=tensor("cuda:1"), k=tensor("cuda:1"), lo=tensor("cpu"))
    assert not launched
