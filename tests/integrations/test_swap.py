"""What a swap is: the class of a module, and nothing else. Whatever becomes of a model, its parts say what they are."""

import copy
import pickle

import peft
import pytest
import torch
from families import FAMILIES, drawn
from torch import nn

from mmkernels import accelerate, restore
from mmkernels.integrations.swap import plain_class, swap_of

FAMILY = {family.name: family for family in FAMILIES}


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]


def model() -> nn.Module:
    return nn.ModuleDict({"visual": Visual(), "head": nn.Linear(32, 3)})


def swapped(module: nn.Module) -> list[str]:
    return [entry.path for entry in accelerate(module, verbose=False).swapped]


def test_a_part_of_an_accelerated_model():
    whole = model()
    assert swapped(whole) == ["visual.patches", "visual.attention"]
    assert swapped(whole["visual"]) == ["patches", "attention"]
    restore(whole["visual"])
    assert type(whole["visual"].patches) is nn.Conv2d
    with pytest.raises(ValueError, match="was not accelerated"):
        restore(whole)


def test_a_part_first():
    whole = model()
    assert swapped(whole["visual"].attention) == [""]
    assert swapped(whole) == ["visual.patches", "visual.attention"]
    restore(whole)
    assert not any(swap_of(module) for module in whole.modules())


def test_a_layer_made_anew_is_swapped_anew():
    whole = model()
    accelerate(whole, verbose=False)
    whole["visual"].patches = nn.Conv2d(3, 32, 4, 4)
    assert swapped(whole) == ["visual.patches", "visual.attention"]
    assert swap_of(whole["visual"].patches)


def test_a_module_in_two_places_is_one():
    layer = nn.MultiheadAttention(32, 4)
    whole = nn.ModuleDict({"first": layer, "second": layer})
    assert swapped(whole) == ["first"]
    restore(whole)
    assert type(layer) is nn.MultiheadAttention


def test_a_layer_moved_to_another_model_takes_it_along():
    whole, other = model(), model()
    accelerate(whole, verbose=False)
    other["visual"].attention = whole["visual"].attention
    assert plain_class(other["visual"].attention) is nn.MultiheadAttention
    restore(other)
    assert type(whole["visual"].attention) is nn.MultiheadAttention and swap_of(whole["visual"].patches)


def test_a_later_backend_is_for_all():
    whole = model()
    accelerate(whole, verbose=False)
    accelerate(whole, backend="reference", verbose=False)
    accelerate(whole, verbose=False)
    assert {vars(x).get("_mmkernels_backend") for x in whole.modules() if swap_of(x)} == {"reference"}


def test_is_of_the_class_it_was_and_says_what_it_is():
    whole = model()
    accelerate(whole, verbose=False)
    patches = whole["visual"].patches
    assert isinstance(patches, nn.Conv2d) and type(patches).__name__ == "Conv2d"
    assert str(type(patches)) == str(nn.Conv2d)  # by which transformers knows what a model can record
    assert "(patches): Conv2d[mmkernels](3, 32" in repr(whole)
    made = type(patches)(3, 5, 3)  # with a stride of 1: a plain layer
    assert type(made) is nn.Conv2d


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_and_copies(protocol):
    whole, images = model().eval(), torch.randn(2, 3, 16, 16)
    accelerate(whole, backend="reference", verbose=False)
    expected = whole["visual"](images)
    for twin in (pickle.loads(pickle.dumps(whole, protocol)), copy.deepcopy(whole), copy.copy(whole)):
        assert swapped(twin) == swapped(whole) and torch.equal(twin["visual"](images), expected)
    twin = copy.deepcopy(whole)
    restore(twin)
    assert swap_of(whole["visual"].patches)


def test_users_own_modules_of_mmkernels_are_not_undone():
    from mmkernels.nn import PatchConv2d

    own = PatchConv2d(3, 32, 4, stride=4)
    whole = nn.ModuleDict({"own": own, "visual": Visual()})
    assert swapped(whole) == ["visual.patches", "visual.attention"]
    restore(whole)
    assert type(own) is PatchConv2d


def test_set_input_size_of_timm():
    import timm

    vit = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2).eval()
    accelerate(vit, verbose=False)
    vit.set_input_size((16, 16), (4, 4))  # makes the convolution anew
    plain = restore(copy.deepcopy(vit))
    assert len(swapped(vit)) == 3
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(vit(images), plain(images))


@pytest.mark.parametrize("first", ["accelerate", "lora"])
def test_lora(first):
    """On projections inside swapped attention: a LoRA layer stands where the linear layer stood."""
    plain, inputs = drawn(FAMILY["llava"].build()), FAMILY["llava"].inputs("left")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    fast = copy.deepcopy(plain)
    if first == "accelerate":
        accelerate(fast, verbose=False)
    torch.manual_seed(0)
    fast = peft.get_peft_model(fast, config)
    accelerate(fast, verbose=False)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(plain, config)(**inputs).logits
    torch.testing.assert_close(fast(**inputs).logits, theirs, atol=1e-4, rtol=1e-4)
    assert not accelerate(fast, verbose=False).fallbacks
    restore(fast)
    assert torch.equal(fast(**inputs).logits, theirs)


@pytest.mark.parametrize("first", ["accelerate", "compile"])
def test_compiled_first_or_last(first):
    model, images = Visual().eval(), torch.randn(2, 3, 16, 16)
    expected = model(images)
    torch.compiler.reset()
    if first == "accelerate":
        accelerate(model, verbose=False)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(images)
    if first == "compile":
        assert swapped(compiled) == ["_orig_mod.patches", "_orig_mod.attention"]
    torch.testing.assert_close(compiled(images), expected)
    restore(compiled)
    torch.testing.assert_close(compiled(images), expected)
    assert type(model.patches) is nn.Conv2d


# ---- graphs drawn of an accelerated model


def test_fx_finds_the_modules_it_finds_of_the_plain_model():
    plain, images = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.LayerNorm(16)), torch.randn(2, 3, 16, 16)
    fast = copy.deepcopy(plain)
    accelerate(fast, verbose=False)
    graphs = [torch.fx.symbolic_trace(x) for x in (plain, fast)]
    assert [node.target for node in graphs[0].graph.nodes] == [node.target for node in graphs[1].graph.nodes]
    torch.testing.assert_close(graphs[1](images), plain(images))
    assert swap_of(graphs[1].get_submodule("0"))


def test_jit_traces_what_runs_without_mmkernels():
    plain, images = Visual().eval(), torch.randn(2, 3, 16, 16)
    fast = copy.deepcopy(plain)
    accelerate(fast, verbose=False)
    traced = torch.jit.trace(fast, images, check_trace=False)
    assert "mmkernels::" not in str(traced.inlined_graph)
    for batch in (images, images[:1]):
        torch.testing.assert_close(traced(batch), plain(batch))


# ---- transforms of torch.func


def vision_models():
    import timm
    import transformers as hf

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.CLIPVisionConfig(**sizes, image_size=16, patch_size=4)
    return {
        "torch": lambda: Visual().eval(),
        "timm": lambda: timm.models.VisionTransformer(
            img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3
        ).eval(),
        "transformers": lambda: hf.CLIPVisionModel(config).eval(),
    }


@pytest.mark.parametrize("name", ["torch", "timm", "transformers"])
def test_transforms_see_the_plain_model(name):
    """What a mask says cannot be read under vmap, and gradients of each sample are those of the plain model."""
    plain = vision_models()[name]()
    fast = copy.deepcopy(plain)
    accelerate(fast, verbose=False)
    images = torch.randn(3, 3, 16, 16)
    weights = {key: p.detach() for key, p in plain.named_parameters()}

    def loss(model, weights, image):
        out = torch.func.functional_call(model, weights, (image[None],))
        return (out if isinstance(out, torch.Tensor) else out.last_hidden_state).square().sum()

    for each in (False, True):
        found = []
        for model in (plain, fast):
            of = torch.func.grad(lambda weights, image, model=model: loss(model, weights, image))
            of = torch.func.vmap(of, (None, 0)) if each else of
            found.append(of(weights, images if each else images[0]))
        assert all(torch.equal(found[1][key], x) for key, x in found[0].items())


def test_maps_of_an_accelerated_convolution_are_channels_last():
    plain = nn.Sequential(nn.Conv2d(3, 8, 4, 4))
    accelerate(plain, verbose=False)
    assert plain(torch.randn(2, 3, 16, 16)).flatten(2).transpose(1, 2).is_contiguous()
