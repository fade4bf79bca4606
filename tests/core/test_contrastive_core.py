"""The compiled contrastive losses at instruction-set levels: right, steady, in bounds, in little memory.

tests/test_check.py covers the level this processor would choose; here others are run, too, and what only the C++ can
get wrong is tried: tails of every tile, tiles kept or computed again, work cut differently among threads.
"""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from programs import bounds, races

from mmkernels import clip_loss, siglip_loss
from mmkernels.check import run_case, select

LOSSES = ("clip_loss", "siglip_loss")


@pytest.fixture(params=LOSSES)
def loss(request):
    if request.param == "clip_loss":
        return lambda image, text, scale, bias: clip_loss(image, text, scale, backend="cpu")
    return lambda image, text, scale, bias: siglip_loss(image, text, scale, bias, backend="cpu")


def evaluate(loss, image, text, scale, bias=-10.0):
    """The loss and the gradients of both features and of the scale."""
    leaves = [x.detach().requires_grad_() for x in (image, text, torch.tensor(scale))]
    value = loss(*leaves, torch.tensor(bias))
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(*job, id=f"{job[0].op}-{job[0].name}-{job[1]}") for op in LOSSES for job in select(op, quick=True)],
)
def test_every_level_equals_the_reference(level, case, dtype, seed):
    outcome = run_case(case, dtype, "cpu", "cpu", seed)
    assert outcome.passed, "\n".join([outcome.reproduce(), *outcome.failures])


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_around_every_tile(level, op, dtype, seed):
    """Each number of pairs with a width of some, and each width with a number of pairs."""
    case = next(case for case, _ in select(op, "37x65"))
    draw = random.Random(f"{seed} {level} {op} {dtype}")
    numbers, widths = (47, 49, 95, 97, 143, 145, 193, 289, 385), (7, 16, 17, 47, 49)
    sizes = {(pairs, draw.choice(widths)) for pairs in numbers} | {(draw.choice(numbers), width) for width in widths}
    for pairs, width in sorted(sizes):
        outcome = run_case(replace(case, pairs=pairs, width=width), dtype, "cpu", "cpu", seed)
        assert outcome.passed, f"{pairs} x {width}: {outcome.failures}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pairs", [190, 701, 2501])  # tiles of 48 rows, of 144, and bands of two tiles
def test_bitwise_the_same_for_any_number_of_threads(same_for_any_threads, level, loss, dtype, pairs):
    image, text = torch.randn(2, pairs, 40).div(6).to(dtype)
    same_for_any_threads(lambda: evaluate(loss, image, text, 14.0))


def test_tiles_computed_again_are_those_that_were_kept():
    """8600 pairs: the last tiles do not fit into the store between the sweeps, and their rows get both kinds."""
    pairs, scale, rows = 8600, 3.0, slice(8400, 8600)
    image, text = torch.randn(2, pairs, 8) / 2
    loss, *gradients = evaluate(lambda i, t, s, _: clip_loss(i, t, s, backend="cpu"), image, text, scale)
    wide = image.double(), text.double()
    sums = [sum_exp(a, b, scale) for a, b in (wide, wide[::-1])]
    own = scale * (wide[0] * wide[1]).sum(1)
    truth = (sum(x.log() for x in sums) / 2 - own).mean()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    for a, b, by_row, by_column, found in zip(wide, wide[::-1], sums, sums[::-1], gradients[:2], strict=True):
        weights = (scale * a[rows] @ b.T).exp() * (1 / by_row[rows, None] + 1 / by_column) / 2
        expected = scale / pairs * (weights @ b - b[rows])
        assert (found[rows] - expected).abs().max() < 1e-5 * expected.abs().max()


def sum_exp(rows, columns, scale):
    """The sum of the exponentials of each row of logits, without all of them at once."""
    return torch.cat([(scale * part @ columns.T).exp().sum(1) for part in rows.split(500)])


def test_pairs_told_apart_for_certain_cost_exactly_nothing(level):
    image = torch.eye(300, 320)
    for value in evaluate(lambda i, t, s, _: clip_loss(i, t, s, backend="cpu"), image, image, 500.0):
        assert not value.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("row", [0, 150, 299])
@pytest.mark.parametrize("side", [0, 1])
def test_a_bad_feature_is_never_a_plausible_loss(level, loss, bad, row, side):
    features = torch.randn(2, 300, 33)
    features[side, row, 32] = bad
    value, *gradients = evaluate(loss, *features, 14.0)
    assert not value.isfinite() and not gradients[2].isfinite()
    if bad != bad:  # the sigmoid of an infinite logit is 0 or 1, and the gradient of its row may well be finite
        assert gradients[side][row].isnan().all()


def test_logits_far_beyond_the_range_of_exp(level, loss):
    """Raw features at scale 100: logits of 10^4 and more, of either sign."""
    image, text = torch.randn(2, 200, 512)
    for value in evaluate(loss, image, text, 100.0):
        assert value.isfinite().all()


MEMORY = """
import torch, torch.nn.functional as F
from mmkernels import clip_loss
def memory(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
image, text = (F.normalize(x, dim=1, out=x).requires_grad_() for x in torch.randn(2, 32768, 512))
clip_loss(image[:300], text[:300], 100.0, backend="cpu").backward()
image.grad = text.grad = None
before = memory("VmRSS")
clip_loss(image, text, 100.0, backend="cpu").backward()
print(memory("VmHWM") - before - 2 * 4 * image.numel())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_of_32768_pairs(tmp_path):
    """Eager code would take 12 GB; the limit is 512 MB beyond the features and their gradients."""
    run = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 512e6


@pytest.mark.parametrize("program", bounds("sanitize_contrastive.cpp"), ids=str)
def test_in_bounds_and_defined(program, passes):
    """With sizes that are multiples of nothing and tensors that end where their memory ends."""
    passes(program)


@pytest.mark.parametrize("program", races("sanitize_contrastive.cpp"), ids=str)
def test_tasks_without_a_barrier_do_not_race(program, passes):
    passes(program)
