"""What every backend offers to schedules across ranks: statistics and gradients of a rectangle of logits, here of one
process's texts in pieces, against the loss as a whole in float64."""

import importlib
import random
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mmkernels.check.budget import Quantity, largest, ulp
from mmkernels.check.contrastive_truth import contrastive_truth
from mmkernels.ops.contrastive.pairing import Pairing, Shares, label
from mmkernels.ops.contrastive.weights import no_statistics, weigh

BACKENDS = [("reference", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16), ("triton", torch.float32)]
if getattr(sys.modules.get("mmkernels._cuda"), "emulated", False):  # tests/emulator/test_equivalence.py runs it so
    BACKENDS = [("cuda", torch.bfloat16)]
SLOW = ("triton", "cuda")  # interpreted, emulated


def kernels_of(backend: str):
    if backend == "triton":
        pytest.importorskip("triton")
    return importlib.import_module(f"mmkernels.ops.contrastive.{backend}")


def drawn(rng: random.Random) -> tuple[int, int, Pairing]:
    n, m = rng.randint(1, 90), rng.randint(1, 150)
    offset = rng.randint(-n + 1, m - 1)
    first = rng.randint(max(0, -offset), min(n, m - offset) - 1)
    last = rng.randint(first + 1, min(n, m - offset))
    same = rng.choice([None, "positives", "ignored"])
    if same is None:
        return n, m, Pairing(offset, first, last)
    ids = [torch.randint(0, 40, (count,)) for count in (n, m)]
    ids[1][0] = ids[0][0]
    labels, counts = label(*ids)
    return n, m, Pairing(offset, first, last, same, *labels, *(counts if same == "positives" else (None, None)))


def piece_of(pairing: Pairing, start: int, stop: int) -> Pairing:
    """The columns from `start` to `stop`."""
    ids, counts = (None if x is None else x[start:stop] for x in (pairing.text_ids, pairing.text_counts))
    own = (max(pairing.first, start - pairing.offset), min(pairing.last, stop - pairing.offset))
    own = own if own[0] < own[1] else (0, 0)
    return Pairing(pairing.offset - start, *own, pairing.same, pairing.image_ids, ids, pairing.image_counts, counts)


def counts_of(pairing: Pairing, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    positives = pairing.positives(n, m, torch.device("cpu"))
    return positives.sum(1), positives.sum(0)


def over_budget(op: str, call: tuple, found: list[torch.Tensor], **options) -> list[str]:
    """found: the loss and its gradients. Half features are multiplied with a dS that is rounded to their dtype. In one
    draw a few elements make up that error, and how far plain code is off is luck. So twice the most that it can be is
    allowed: how far the gradients respond to logits that move by its epsilon."""
    image, text, scale, *bias = call
    truth, response = contrastive_truth(op, *call, **options)
    values = dict(zip(("loss", *truth.named)[: len(found)], found, strict=True))
    if image.dtype == torch.float64:
        errors = {name: largest(value - getattr(truth, name)) for name, value in values.items()}
        return [name for name, error in errors.items() if error > 1e-11 * max(1.0, largest(getattr(truth, name)))]
    plain, _ = contrastive_truth(op, *call, dtype=torch.float32, **options)
    logits, failures = scale * image.double() @ text.double().T + sum(bias), []
    rounding = torch.finfo(image.dtype).eps if image.dtype != torch.float32 else 0.0
    for name, value in values.items():
        moved = largest(getattr(response, name))
        if name.endswith("features"):
            moved *= 1 + rounding / (2 * ulp(torch.float32, largest(logits)))
        quantity = Quantity(name, torch.float32, torch.float32)
        quantity.add(value.float(), getattr(plain, name), getattr(truth, name), moved)
        failures.append(quantity.failure())
    return [failure for failure in failures if failure]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_pieces_are_the_whole(backend, dtype, seed):
    kernels, rng = kernels_of(backend), random.Random(seed)
    for _ in range(8 if backend in SLOW else 40):
        n, m, pairing = drawn(rng)
        scale, direction = rng.choice([20.0, -20.0, 100.0]), rng.choice(["both", "image_to_text", "text_to_image"])
        image, text = (F.normalize(torch.randn(count, 20)).to(dtype) for count in (n, m))
        cuts = sorted({0, m, *(rng.randint(0, m) for _ in range(2))})
        pieces = [(slice(a, b), piece_of(pairing, a, b)) for a, b in pairwise(cuts)]
        wide = torch.promote_types(dtype, torch.float32)
        factor, shares = torch.tensor(scale, dtype=wide), Shares.of(pairing, direction)

        rows, columns = no_statistics(n, image), []
        for part, of_piece in pieces:
            columns.append(no_statistics(part.stop - part.start, text))
            kernels.clip_statistics(image, text[part], factor, of_piece, rows, columns[-1])
        counts = counts_of(pairing, n, m)
        row_losses, row_weights = weigh(rows, counts[0], factor, shares.row, 0.0)
        column_losses, column_weights = weigh(torch.cat(columns, 1), counts[1], factor, shares.column, 0.0)
        found = [(row_losses.sum() + column_losses.sum()) / shares.count, 0, [], 0]
        for part, of_piece in pieces:
            weights = row_weights, column_weights[:, part].contiguous()
            d_image, d_text, d_scale = kernels.clip_gradients(
                image, text[part], factor, of_piece, *weights, shares.count
            )
            found[1:] = found[1] + d_image, [*found[2], d_text], found[3] + d_scale
        found[2] = torch.cat(found[2])

        failures = over_budget("clip_loss", (image, text, scale), found, pairing=pairing, direction=direction)
        assert not failures, (failures, n, m, pairing, direction, scale)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_siglips_pieces_add_up(backend, dtype, seed):
    kernels, rng = kernels_of(backend), random.Random(seed)
    for _ in range(5 if backend in SLOW else 20):
        n, m, pairing = drawn(rng)
        image, text = (F.normalize(torch.randn(count, 20)).to(dtype) for count in (n, m))
        cut, wide = rng.randint(1, m), torch.promote_types(dtype, torch.float32)
        scalars = torch.tensor(8.0, dtype=wide), torch.tensor(-3.0, dtype=wide)
        parts = [slice(0, cut), slice(cut, m)][: 1 if cut == m else 2]
        calls = [(image, text[x], *scalars, piece_of(pairing, x.start, x.stop), n) for x in parts]
        loss, d_image, d_text, *d_scalars = zip(*(kernels.siglip_loss_with_grads(*x) for x in calls), strict=True)
        found = sum(loss), sum(d_image), torch.cat(d_text), *map(sum, d_scalars)
        torch.testing.assert_close(sum(loss), sum(kernels.siglip_loss(*x) for x in calls))
        failures = over_budget("siglip_loss", (image, text, 8.0, -3.0), found, pairing=pairing)
        assert not failures, (failures, n, m, pairing)
