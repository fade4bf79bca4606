"""The contrastive models of transformers: the loss without N x N logits, which are there when someone reads them."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, drawn
from torch.utils import _pytree as pytree

from mmkernels import accelerate
from mmkernels.integrations.transformers import losses

CONTRASTIVE = [family for family in FAMILIES if "loss" in family.swapped]


@pytest.fixture(params=CONTRASTIVE, ids=lambda family: family.name)
def outputs(request):
    """What the plain and the accelerated model return, the logits of the latter not yet read."""
    model, inputs = drawn(request.param.build()), request.param.inputs("right")
    fast = copy.deepcopy(model)
    accelerate(fast, verbose=False)
    return model(**inputs), fast(**inputs)


def pending(output) -> bool:
    return isinstance(object.__getattribute__(output, "logits_per_text"), losses._Pending)


def test_loss_needs_no_logits(outputs):
    theirs, ours = outputs
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours["loss"], theirs.loss)
    torch.testing.assert_close(ours[0], theirs.loss)
    assert len(ours) == len(theirs) and list(ours.keys()) == list(theirs.keys()) and "logits_per_text" in ours
    assert isinstance(ours, type(theirs))
    ours.loss.backward()
    assert pending(ours)


READINGS = {
    "attribute": lambda output: (output.logits_per_image, output.logits_per_text),
    "key": lambda output: (output["logits_per_image"], output["logits_per_text"]),
    "index": lambda output: (output[1], output[2]),
    "slice": lambda output: output[1:3],
    "tuple": lambda output: output.to_tuple()[1:3],
    "items": lambda output: (dict(output.items())["logits_per_image"], dict(output.items())["logits_per_text"]),
    "values": lambda output: tuple(output.values())[1:3],
    "dict": lambda output: (dict(output)["logits_per_image"], dict(output)["logits_per_text"]),
    "unpacked": lambda output: ({**output}["logits_per_image"], {**output}["logits_per_text"]),
    "get": lambda output: (output.get("logits_per_image"), output.get("logits_per_text")),
    "pytree": lambda output: tuple(pytree.tree_leaves(output)[1:3]),
    "copied": lambda output: (copy.copy(output).logits_per_image, copy.copy(output).logits_per_text),
}


@pytest.mark.parametrize("reading", READINGS)
def test_logits_are_there_when_read(outputs, reading):
    theirs, ours = outputs
    for mine, wanted in zip(READINGS[reading](ours), READINGS["attribute"](theirs), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_pickled_output_holds_logits(outputs):
    theirs, ours = outputs
    detached = type(ours)(**{name: ours[name].detach() for name in ("loss", "logits_per_image", "logits_per_text")})
    loaded = pickle.loads(pickle.dumps(detached))
    assert type(loaded) is type(theirs)
    torch.testing.assert_close(loaded.logits_per_image, theirs.logits_per_image.detach())


@pytest.mark.parametrize("family", CONTRASTIVE, ids=lambda family: family.name)
@pytest.mark.parametrize("change", ["no loss", "tuple", "unequal batches"])
def test_other_calls_go_the_models_own_way(family, change):
    model, inputs = drawn(family.build()), family.inputs("right")
    if change == "tuple":
        inputs["return_dict"] = False
    else:
        inputs["return_loss"] = False
    if change == "unequal batches":
        inputs |= {name: inputs[name][:2] for name in ("input_ids", "attention_mask")}
    fast = copy.deepcopy(model)
    accelerate(fast, verbose=False)
    theirs, ours = model(**inputs), fast(**inputs)
    torch.testing.assert_close(ours[1 if change == "tuple" else 0], theirs[1 if change == "tuple" else 0])
    assert type(ours) is type(theirs)
