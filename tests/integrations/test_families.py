"""accelerate on every family: same outputs, same gradients, same words, and the way back."""

import copy

import pytest
import torch
from agreement import assert_agrees, assert_restored, in_float64, misses
from families import FAMILIES, drawn
from torch.utils._pytree import tree_map

from mmkernels import accelerate


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.mark.parametrize("side", ["right", "left"])
def test_outputs_and_gradients_agree(family, side):
    model = drawn(family.build())
    inputs = family.inputs(side)
    fast = assert_agrees(model, inputs)
    report = accelerate(fast, verbose=False)
    assert {entry.what for entry in report.swapped} >= set(family.swapped)
    assert len({entry.path for entry in report.swapped}) == len(report.swapped)
    assert not report.fallbacks, report
    assert_restored(model, fast, inputs)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.generates], ids=lambda f: f.name)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_the_same(family, cache):
    model = drawn(family.build())
    inputs = family.inputs("left")
    fast = copy.deepcopy(model)
    accelerate(fast, verbose=False)
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": None}
    theirs, ours = (x.generate(**inputs, **options) for x in (model, fast))
    truth = copy.deepcopy(model).double().generate(**tree_map(in_float64, inputs), **options)
    assert torch.equal(theirs.sequences, truth.sequences) and torch.equal(ours.sequences, truth.sequences)
    logits = ({f"output {i}": step for i, step in enumerate(x.logits)} for x in (truth, theirs, ours))
    found = misses(*logits, len(accelerate(fast, verbose=False).swapped))
    assert not found, "\n".join(found)
