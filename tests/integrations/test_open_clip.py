"""open_clip's losses, accelerated: the same values and gradients, calls, checkpoints and way back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from open_clip import loss as losses

from mmkernels import accelerate, restore
from mmkernels.ops.contrastive import cpu, reference


def inputs(dtype=torch.float64, count=7):
    image, text = (F.normalize(torch.randn(count, 16, dtype=dtype)) for _ in range(2))
    return {"image_features": image, "text_features": text, "logit_scale": torch.tensor(11.0, dtype=dtype)}


def of_captions():
    return {"logits": torch.randn(7, 5, 9, dtype=torch.float64), "labels": torch.randint(0, 9, (7, 5))}


BIAS = {"logit_bias": torch.tensor(-3.0).double()}
CASES = {
    "clip": (losses.ClipLoss, dict),
    "clip, cached labels": (lambda: losses.ClipLoss(cache_labels=True), dict),
    "clip with a bias": (losses.ClipLoss, lambda: BIAS),
    "siglip": (losses.SigLipLoss, lambda: BIAS),
    "coca": (lambda: losses.CoCaLoss(2.0, 1.5), of_captions),
    "coca without clip": (lambda: losses.CoCaLoss(2.0, 0.0), of_captions),
}


def found(loss, call, output_dict):
    leaves = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in call.items()}
    value = loss(**leaves, output_dict=output_dict)
    values = list(value.values()) if output_dict else list(value) if isinstance(value, tuple) else [value]
    sum(values).backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values() if x.requires_grad]
    return list(value) if output_dict else [], [x.detach() for x in values] + gradients


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_the_same(name, monkeypatch):
    make, others = CASES[name]
    plain, call = make(), inputs() | others()
    ours = copy.deepcopy(plain)
    report = accelerate(ours, verbose=False)
    assert [(entry.kind, entry.what) for entry in report.swapped] == [("loss", "loss")] and not report.left
    assert isinstance(ours, type(plain)) and type(ours).__qualname__ == type(plain).__qualname__
    for output_dict in (False, True):
        (want_names, wants), (names, values) = (found(loss, call, output_dict) for loss in (plain, ours))
        assert names == want_names
        for value, want in zip(values, wants, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-14)

    again = pickle.loads(pickle.dumps(ours))  # by what checkpoints of a whole training state do
    assert torch.equal(found(again, call, False)[1][0], found(ours, call, False)[1][0])
    assert type(restore(ours)) is type(plain)


def test_the_loss_is_ours(monkeypatch):
    """A swap that changes nothing would pass the test above."""
    seen = []
    for module in (reference, cpu):
        whole = module.clip_loss_with_grads
        monkeypatch.setattr(module, "clip_loss_with_grads", lambda *args, f=whole: seen.append(f) or f(*args))
    for make, others in (CASES["clip"], CASES["coca"]):
        ours = make()
        accelerate(ours, backend="reference", verbose=False)
        found(ours, inputs() | others(), False)
        assert len(seen) == 1 and seen.pop().__module__ == reference.__name__


def test_what_is_left():
    class Own(losses.ClipLoss):
        def get_logits(self, *args, **kwargs):
            return super().get_logits(*args, **kwargs)

    patched = losses.SigLipLoss()
    patched.get_ground_truth = lambda *args, **kwargs: None
    for loss, words in (
        (losses.DistillClipLoss(), "a teacher's logits"),
        (Own(), "a subclass of open_clip's loss"),
        (patched, "logits or labels of its own"),
        (losses.ClipLoss(use_horovod=True, world_size=2), "Horovod"),
    ):
        with pytest.warns(UserWarning, match=words):
            (entry,) = accelerate(loss, verbose=False).left
        assert words in entry.what and entry.kind == "loss"


def test_an_older_call_is_left(monkeypatch):
    """That of open_clip 2.24, whose fourth argument is another."""

    def forward(self, image_features, text_features, logit_scale, output_dict=False):
        raise NotImplementedError

    monkeypatch.setattr(losses.ClipLoss, "forward", forward)
    for loss in (losses.ClipLoss(), losses.CoCaLoss(2.0, 1.0)):
        with pytest.warns(UserWarning, match="called otherwise than that of open_clip 3"):
            assert not accelerate(loss, verbose=False).swapped


def test_a_mode_without_the_gradient_is_named():
    loss = losses.ClipLoss(local_loss=True, world_size=2)
    (entry,) = accelerate(loss, verbose=False).swapped
    assert "gather_with_grad is False" in entry.what
