"""The examples run, and show what they claim."""

import copy
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from draws import SEED
from ranks import on_ranks
from torch.distributed.tensor import DTensor

from mmkernels.nn import ClipLoss

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_train_clip_ends_with_equal_curves(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_clip.py", "--steps", "6", "--batch", "96"])
    runpy.run_path(str(EXAMPLES / "train_clip.py"), run_name="__main__")
    printed = capsys.readouterr().out
    difference = float(re.search(r"largest difference between the curves: (\S+)", printed)[1])
    assert difference <= 64 * 2**-23 * 4.6  # float32 rounding of a loss of log(96), over a few steps
    for name in ("plain", "mmkernels"):
        assert re.search(rf"{name} +\S+ ms a step, peak memory \d+ MiB", printed)


def test_padded_and_packed_documents_are_one_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["packed_documents.py", "--documents", "3", "--steps", "2"])
    runpy.run_path(str(EXAMPLES / "packed_documents.py"), run_name="__main__")
    printed = capsys.readouterr().out
    apart, largest = map(float, re.search(r"between the outputs: (\S+), the largest is (\S+)", printed).groups())
    assert apart <= 64 * 2**-23 * largest  # float32 rounding through four layers
    assert float(re.search(r"at most (\S+) apart", printed)[1]) <= 64 * 2**-23 * 4
    for name in ("padded", "packed"):
        assert re.search(rf"{name} .* ms .* MiB .* ms .* MiB", printed)


def test_compare_finds_a_clip_right(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_your_model.py"])
    runpy.run_path(str(EXAMPLES / "compare_your_model.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "swapped: 1 x Conv2d: patch embedding" in printed and "times as fast" in printed
    assert printed.rstrip().endswith("ok: every output and gradient is within its error budget")


def example(name: str) -> dict:
    """What it defines; an example may import one beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return runpy.run_path(str(EXAMPLES / name))


def check_accumulation(rank: int, ranks: int, seed: int, wrap: str) -> None:
    """Against one process with all pairs at a time, in float64."""
    code = example("train_clip_distributed.py")
    torch.manual_seed(seed)
    count, sizes = 3, (5, 2)  # microbatches, and how many pairs each has on the ranks: even, as open_clip wants them
    of_ranks = [[batch_of(sizes[k % 2]) for k in range(count)] for _ in range(ranks)]
    model = code["Towers"](code["make_model"]("small", seed)).double()
    whole = copy.deepcopy(model)
    images, tokens = (torch.cat([each[k] for batches in of_ranks for each in batches]) for k in (0, 1))
    image, text, scale = whole(images, tokens)
    logits, labels = scale * image @ text.T, torch.arange(len(image))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    limit = 1e-11 * whole.clip.visual_projection.weight.grad.abs().max()

    here = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": ranks}
    wrapped = code["WRAPS"][wrap](model)
    for step, cls, times in (("plain_step", code["open_clip_losses"]().ClipLoss, count), ("cached_step", ClipLoss, 1)):
        wrapped.model.zero_grad()
        value = code[step](wrapped, cls(**here), of_ranks[rank])
        torch.distributed.all_reduce(value)
        torch.testing.assert_close(value / ranks, loss.detach(), rtol=1e-12, atol=0)
        for (name, found), want in zip(model.named_parameters(), whole.parameters(), strict=True):
            grad = found.grad.full_tensor() if isinstance(found.grad, DTensor) else found.grad
            wanted = want.grad * (times if name == "logit_scale" else 1)
            assert (grad - wanted).abs().max() <= limit, (step, name)


def batch_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3, 64, 64).double(), torch.randint(0, 254, (count, 64))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_accumulated_gradients_are_those_of_the_whole(tmp_path, wrap):
    on_ranks(2, tmp_path, check_accumulation, SEED, wrap)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_train_clip_distributed_ends_with_equal_curves(wrap):
    stub = "import sys, runpy, torchvision_stub as stub; stub.make_importable(); sys.argv[:] = sys.argv[1:]; "
    launch = "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    script = [sys.executable, "-c", stub + launch, str(EXAMPLES / "train_clip_distributed.py")]
    options = ["--wrap", wrap, "--steps", "3", "--batch", "12", "--accumulate", "3"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [*torchrun, *script, *options], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    difference = float(re.search(r"largest difference between the curves: (\S+)", ran.stdout)[1])
    assert difference <= 64 * 2**-23 * 4.3  # float32 rounding of a loss of log(72), over a few steps
    assert abs(float(re.search(r": (\S+) x$", ran.stdout, re.M)[1]) - 3) <= 1e-3
    for name in ("plain", "mmkernels"):
        assert re.search(rf"{name} +\S+ ms a step, peak memory \d+ MiB", ran.stdout)


@pytest.mark.parametrize(
    "options, between",
    [(["--model", "llava", "--all"], ["sorted plain", "padded ours"]), (["--model", "qwen2_vl"], [])],
)
def test_padded_and_packed_training_are_one(options, between, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["packed_vlm.py", *options, "--documents", "3", "--steps", "2"])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(EXAMPLES / "packed_vlm.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    printed = " ".join(capsys.readouterr().out.split())
    ways = ["padded plain", *between, "packed ours"]
    for step in (1, 2):
        of_step = printed.partition(f"step {step}, loss: ")[2]
        losses = [float(re.match(rf".*?{way} (\d\.\d{{6}})", of_step)[1]) for way in ways]
        assert losses == pytest.approx([losses[0]] * len(ways), rel=1e-6)
    assert float(re.search(r"losses: at most (\S+) apart", printed)[1]) <= 1e-6
    share = [int(re.search(rf"{way} │ \d+ │ \d+\.\d\d │ \d+\.\d │ \d+ MiB │ (\d+)%", printed)[1]) for way in ways]
    assert share[0] < share[-1] == 100
