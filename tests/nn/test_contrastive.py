"""open_clip's losses and ours, called alike."""

import inspect

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

import mmkernels.nn

NAMES = ["ClipLoss", "SigLipLoss"]


def inputs(n: int = 48, d: int = 32) -> tuple[torch.Tensor, ...]:
    image, text = (F.normalize(torch.randn(n, d), dim=-1).requires_grad_() for _ in range(2))
    return image, text, torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_open_clips(name):
    ours, theirs = getattr(mmkernels.nn, name), getattr(open_clip.loss, name)
    for method in ("__init__", "forward", "get_logits", "get_ground_truth"):
        a, b = (inspect.signature(getattr(cls, method)).parameters for cls in (ours, theirs))
        a = [(p.name, p.default) for p in a.values() if p.name != "chunk_size"]  # of versions to come
        assert a == [(p.name, p.default) for p in b.values()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_results_are_open_clips(name, with_bias):
    args = inputs() if with_bias else (*inputs()[:3], None)
    ours, theirs = getattr(mmkernels.nn, name)(), getattr(open_clip.loss, name)()
    torch.testing.assert_close(ours(*args), theirs(*args))
    wanted = [x for x in args if x is not None]
    torch.testing.assert_close(torch.autograd.grad(ours(*args), wanted), torch.autograd.grad(theirs(*args), wanted))
    (key,) = theirs(*args, output_dict=True)
    torch.testing.assert_close(ours(*args, output_dict=True)[key], theirs(*args))


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_are_open_clips(name):
    """Whatever they make anew, and whatever they call."""

    def makes_logits(cls):
        class Doubled(cls):
            def get_logits(self, *args, **kwargs):
                logits = super().get_logits(*args, **kwargs)
                return tuple(2 * x for x in logits) if isinstance(logits, tuple) else 2 * logits

        return Doubled

    def makes_labels(cls):
        class Turned(cls):
            def get_ground_truth(self, *args, **kwargs):
                return super().get_ground_truth(*args, **kwargs).flip(0)

        return Turned

    def calls_both(cls):
        class Entropy(cls):
            def forward(self, image, text, scale, bias):
                logits = self.get_logits(image, text, scale, bias)
                rest = (image.dtype,) if name == "SigLipLoss" else ()
                return (logits if rest else logits[0] @ logits[1]).sum() + self.get_ground_truth(
                    image.device, *rest, len(image)
                ).float().std()

        return Entropy

    args = inputs()
    for made in (makes_logits, makes_labels, calls_both):
        ours, theirs = (made(getattr(module, name))() for module in (mmkernels.nn, open_clip.loss))
        torch.testing.assert_close(ours(*args), theirs(*args))


@pytest.mark.parametrize("name", NAMES)
def test_a_method_put_on_one_loss_counts(name):
    args, losses = inputs(), [getattr(module, name)() for module in (mmkernels.nn, open_clip.loss)]
    for loss in losses:
        loss.get_logits = lambda *x, own=loss.get_logits, **y: own(x[0], x[1].flip(0), *x[2:], **y)
    torch.testing.assert_close(losses[0](*args), losses[1](*args))


def test_how_newer_versions_cut_their_logits_changes_nothing():
    args = inputs()
    assert torch.equal(mmkernels.nn.SigLipLoss(chunk_size=8)(*args), mmkernels.nn.SigLipLoss()(*args))


@pytest.mark.parametrize("name", NAMES)
def test_several_processes_need_a_group_of_theirs(name):
    with pytest.raises(ValueError, match=f"{name}: world_size is 4, but torch.distributed is not initialised"):
        getattr(mmkernels.nn, name)(rank=1, world_size=4)(*inputs())


def test_an_unknown_exchange_is_refused():
    with pytest.raises(ValueError, match="SigLipLoss: dist_impl is 'ring'; accepted are 'bidir', 'shift'"):
        mmkernels.nn.SigLipLoss(dist_impl="ring")
