"""Which implementation serves a call: explicit choices never fall back, and every choice is explained."""

import re
import subprocess
import sys
import warnings

import pytest
import torch

import mmkernels
from mmkernels import backends

IMAGES, WEIGHT = torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 4, 4)


def chosen(**kwargs) -> str:
    (candidate,) = (c for c in mmkernels.explain("patch_embed", IMAGES, WEIGHT, **kwargs) if c.chosen)
    return candidate.backend


def test_auto_takes_the_compiled_core():
    assert chosen() == "cpu"


def test_a_choice_is_taken_from_argument_then_context_then_environment(monkeypatch):
    monkeypatch.setenv("MMKERNELS_BACKEND", "reference")
    assert chosen() == "reference"
    with mmkernels.use_backend("cpu"):
        assert chosen() == "cpu"
        assert chosen(backend="reference") == "reference"
        with mmkernels.use_backend("reference"):
            assert chosen() == "reference"
        assert chosen() == "cpu"
    assert chosen() == "reference"


def test_explain_says_a_line_for_each_backend_and_runs_nothing(monkeypatch):
    from mmkernels.ops.patch_embed import cpu

    monkeypatch.setattr(cpu, "patch_embed", lambda *_: pytest.fail("explain ran the kernel"))
    lines = repr(mmkernels.explain(mmkernels.patch_embed, IMAGES, WEIGHT)).splitlines()
    assert [line.split()[0] for line in lines] == list(backends.NAMES)
    assert [line.split()[0] for line in lines if line.split()[1] == "chosen"] == ["cpu"]


def test_explain_checks_the_arguments_as_the_call_does():
    with pytest.raises(ValueError, match="3 channels, weight 4"):
        mmkernels.explain("patch_embed", IMAGES, torch.zeros(4, 4, 4, 4))
    with pytest.raises(TypeError, match="not an op of mmkernels"):
        mmkernels.explain(torch.relu, IMAGES)


def test_a_named_backend_raises_instead_of_falling_back():
    with pytest.raises(mmkernels.BackendUnavailable, match=r"backend 'cuda' cannot serve this call: .+"):
        mmkernels.patch_embed(IMAGES, WEIGHT, backend="cuda")
    with pytest.raises(mmkernels.BackendUnavailable, match="float64"):
        mmkernels.patch_embed(IMAGES.double(), WEIGHT.double(), backend="cpu")


def test_an_old_triton_is_named_with_what_mends_it(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.2.0")
    assert backends.missing.__wrapped__("triton") == ("triton is 3.2.0; the kernels need 3.4: take torch 2.8 or later")


class Built:
    """Stands for mmkernels._cuda."""

    architectures = ("80", "90a", "120+ptx")

    def __init__(self, driver: int):
        self.driver = driver

    def versions(self) -> tuple[int, int]:
        return self.driver, 13000


@pytest.mark.parametrize(
    ("driver", "torch_cuda", "gpu", "reason"),
    [
        (13000, None, False, r"torch .* is a build without CUDA; mend: install one"),
        (0, "13.0", False, r"there is no NVIDIA driver; mend: install one, of CUDA 13 or later"),
        (12040, "12.4", True, r"the driver is of CUDA 12\.4; mend: update the driver, or reinstall"),
        (13010, "13.0", False, r"torch sees no GPU; mend: look at nvidia-smi"),
    ],
)
def test_what_keeps_the_cuda_kernels_from_running_is_named(monkeypatch, driver, torch_cuda, gpu, reason):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = backends._unusable_gpu(Built(driver))
    assert re.match(r"built for sm_80, sm_90a, sm_120\+ptx by CUDA 13\.0, but " + reason, found)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends._unusable_gpu(Built(13010)) is None


def test_an_op_without_kernels_of_a_backend_says_so():
    assert backends.is_written("patch_embed", "cpu")
    assert not backends.is_written("rotary_embed", "cuda")


def test_a_backend_is_the_module_that_bears_its_name():
    assert backends.is_written("span_attention", "flash-attn")
    reasons = {c.backend: c.reason for c in mmkernels.explain("patch_embed", IMAGES, WEIGHT)}
    assert reasons["flash-attn"] == "it has no kernels of patch_embed"  # and not: it is not installed


def test_what_only_some_backends_need_is_made_for_those_who_may_serve(monkeypatch):
    considered = backends.considered
    assert considered("auto", "cuda", "cuda", "triton") and not considered("auto", "cpu", "cuda", "triton")
    assert considered("triton", "cpu", "cuda", "triton") and not considered("reference", "cuda", "cuda", "triton")
    assert not considered("auto", "cuda", "flash-attn") and considered("flash-attn", "cuda", "flash-attn")
    monkeypatch.setenv("MMKERNELS_BACKEND", "flash-attn")
    assert considered("auto", "cuda", "flash-attn") and not considered("triton", "cuda", "flash-attn")
    monkeypatch.setattr(backends, "_explaining", True)
    assert considered("triton", "cuda", "flash-attn")


def test_unknown_names_are_refused_with_what_is_accepted(monkeypatch):
    with pytest.raises(
        ValueError, match=r"'auto' or one of 'cuda', 'triton', 'flash-attn', 'cpu', 'reference', got 'gpu'"
    ):
        mmkernels.patch_embed(IMAGES, WEIGHT, backend="gpu")
    with pytest.raises(ValueError, match="got 'gpu'"), mmkernels.use_backend("gpu"):
        pass
    monkeypatch.setenv("MMKERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"MMKERNELS_BACKEND must be one of .* got 'gpu'"):
        mmkernels.patch_embed(IMAGES, WEIGHT)


def test_the_slow_way_is_announced_once():
    backends._warn_slow.cache_clear()
    with pytest.warns(UserWarning, match="served by the plain PyTorch reference"):
        mmkernels.patch_embed(IMAGES.double(), WEIGHT.double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mmkernels.patch_embed(IMAGES.double(), WEIGHT.double())
        mmkernels.patch_embed(IMAGES, WEIGHT)


@pytest.mark.parametrize(
    "name, call",
    [
        ("patch_embed", lambda: mmkernels.patch_embed(IMAGES.double(), WEIGHT.double())),
        ("patch_embed", lambda: mmkernels.nn.PatchEmbed(3, 4, 4).double()(IMAGES.double())),  # through torch's Module
        ("clip_loss and siglip_loss", lambda: mmkernels.clip_loss(*torch.zeros(2, 3, 4).double(), torch.ones(()))),
    ],
    ids=["function", "module", "loss"],
)
def test_the_slow_way_is_told_by_public_names_and_of_the_callers_line(name, call):
    backends._warn_slow.cache_clear()
    with pytest.warns(UserWarning, match=f"^mmkernels: {name}, on cpu tensors of torch.float64: served by") as caught:
        call()
    assert (caught[0].filename, caught[0].lineno) == (__file__, call.__code__.co_firstlineno)


def test_the_backward_pass_keeps_the_backend_of_its_forward(monkeypatch):
    from mmkernels.ops.patch_embed import cpu

    weight = WEIGHT.clone().requires_grad_()
    with mmkernels.use_backend("reference"):
        result = mmkernels.patch_embed(IMAGES, weight)
    monkeypatch.setattr(cpu, "patch_embed_backward", lambda *_: pytest.fail("backward switched to the cpu backend"))
    result.sum().backward()


def test_importing_needs_neither_triton_nor_the_core():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['mmkernels._core'] = None; import torch, mmkernels; "
        "print(mmkernels.patch_embed(torch.ones(1, 3, 8, 8), torch.ones(4, 3, 4, 4)).sum().item()); "
        "print(mmkernels.explain('patch_embed', torch.ones(1, 3, 8, 8), torch.ones(4, 3, 4, 4)))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    total, *lines = done.stdout.splitlines()
    assert float(total) == 4 * 4 * 3 * 16
    assert lines[-1].split() == ["reference", "chosen"]
    (core,) = (line for line in lines if line.startswith("cpu "))
    assert "mend" in core
