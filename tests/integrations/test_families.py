"""accelerate on every family: same outputs, same gradients, same words, and the way back."""

import copy
import re
from collections import Counter

import pytest
import torch
from agreement import assert_agrees, assert_agrees_over_draws, assert_restored, in_float64, misses
from families import FAMILIES, drawn, gemma4_inputs, gemma4_of_real_heads
from torch.utils._pytree import tree_map

from mmkernels import accelerate

# What the report names, by class: the hot paths that transformers' models have, and how often the tiny ones have them.
CLIP_TOWER, SIGLIP_TOWER = "Conv2d 1, CLIPAttention 2", "Conv2d 1, SiglipAttention 2, MultiheadAttention 1"
REPORTED = {
    "clip": "CLIPModel 1, Conv2d 1, CLIPAttention 4",
    "siglip": "SiglipModel 1, Conv2d 1, SiglipAttention 4, MultiheadAttention 1",
    "siglip2": "Siglip2Model 1, Siglip2Attention 4, MultiheadAttention 1",
    "blip_2": "Conv2d 1, Blip2Attention 2, Blip2QFormerMultiHeadAttention 4, OPTAttention 2",
    "blip_2 itc": "Conv2d 1, Blip2Attention 2, Blip2QFormerMultiHeadAttention 4",
    "blip_2 itm": "Conv2d 1, Blip2Attention 2, Blip2QFormerMultiHeadAttention 4",
    "blip_2 qformer": "Blip2QFormerMultiHeadAttention 4",
    "llava": f"{CLIP_TOWER}, LlamaAttention 2",
    "llava_next": f"{CLIP_TOWER}, LlamaAttention 2",
    "idefics": "Conv2d 1, IdeficsVisionAttention 2, IdeficsAttention 4",
    "idefics, resampler": "Conv2d 1, IdeficsVisionAttention 2, IdeficsPerceiverAttention 2, IdeficsAttention 4",
    "idefics2": "Conv2d 1, Idefics2VisionAttention 2, Idefics2PerceiverAttention 2, MistralAttention 2",
    "idefics3": "Conv2d 1, Idefics3VisionAttention 2, LlamaAttention 2",
    "mllama": "Conv2d 1, MllamaVisionAttention 3, MllamaTextSelfAttention 2, MllamaTextCrossAttention 1",
    "qwen2_vl": "Conv3d 1, VisionAttention 2, Qwen2VLAttention 2",
    "qwen2_5_vl": "Conv3d 1, Qwen2_5_VLVisionAttention 2, Qwen2_5_VLAttention 2",
    "qwen3_vl": "Conv3d 1, Qwen3VLVisionAttention 2, Qwen3VLTextAttention 2",
    "pixtral": "Conv2d 1, PixtralAttention 2, MistralAttention 2",
    "fuyu": "PersimmonAttention 2",
    "aria": "Conv2d 1, Idefics3VisionAttention 2, MultiheadAttention 1, AriaTextAttention 2",
    "emu3": "Emu3Attention 2, Emu3VQVAEAttentionBlock 5",
    "janus": "Conv2d 1, JanusVisionAttention 2, LlamaAttention 2",
    "chameleon": "ChameleonAttention 2",
    "gemma3": f"{SIGLIP_TOWER}, Gemma3Attention 2",
    "gemma4": "Gemma4VisionAttention 2, Gemma4TextAttention 2",
    "paligemma": f"{SIGLIP_TOWER}, GemmaAttention 2",
    "internvl": "Conv2d 1, InternVLVisionAttention 2, Qwen2Attention 2",
    "molmo2": "Molmo2VisionAttention 3, Molmo2Attention 2",
    "llama4": "Llama4UnfoldConvolution 1, Llama4VisionAttention 2, Llama4TextAttention 4",
    "perceiver": "PerceiverSelfAttention 4",
}
LEFT = {
    "siglip2": "Linear 1",
    "janus": "JanusVQVAEAttnBlock 5",
    "chameleon": "ChameleonVQVAEEncoderAttnBlock 2",
    "molmo2": "Linear 1",
}


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


def test_gemma4_of_real_heads():
    """256 and 512 numbers; images are seen both ways, and no further than the window in its sliding layer."""
    fast = assert_agrees_over_draws(lambda: (gemma4_of_real_heads(), gemma4_inputs("left")))
    assert not accelerate(fast, verbose=False).fallbacks


def test_transforms_of_torch_func_see_the_plain_model(family):
    """Where they see one: what a mask says cannot be read under a transform, nor by some plain models."""
    model, inputs = drawn(family.build()), family.inputs("left")
    fast = copy.deepcopy(model)
    accelerate(fast, verbose=False)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def gradients(model):
        def loss(weights):
            output = torch.func.functional_call(model, weights, (), copy.deepcopy(inputs))
            return sum(x.sum() for x in output.values() if isinstance(x, torch.Tensor) and x.is_floating_point())

        return torch.func.grad(loss)(weights)

    try:
        theirs = gradients(model)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
            gradients(fast)
        return
    ours = gradients(fast)
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())


def counted(entries) -> dict[str, int]:
    return dict(Counter(entry.cls for entry in entries))


def listed(text: str) -> dict[str, int]:
    pairs = (item.rsplit(" ", 1) for item in text.split(", ") if item)
    return {cls: int(count) for cls, count in pairs}


def test_report_names_every_hot_path(family):
    model = family.build()
    report = accelerate(model, verbose=False)
    assert counted(report.swapped) == listed(REPORTED[family.name])
    assert counted(report.left) == listed(LEFT.get(family.name, ""))
    modules = dict(model.named_modules())
    assert all(entry.path in modules for entry in [*report.swapped, *report.left])


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
