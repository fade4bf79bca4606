"""accelerate and restore: what they promise of any model, and what they refuse."""

import copy
import io
import pickle

import pytest
import timm
import torch
import transformers as hf
from agreement import assert_agrees, assert_restored, disagreements, in_float64, misses, values
from families import FAMILIES, drawn, text
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_leaves, tree_map

import mmkernels
from mmkernels import accelerate, restore
from mmkernels.integrations import torch_modules

FAMILY = {family.name: family for family in FAMILIES}


def model_of(name: str) -> tuple[nn.Module, dict]:
    return drawn(FAMILY[name].build()), FAMILY[name].inputs("left")


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gradients(model: nn.Module) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- what it promises


def test_report_names_what_was_swapped(capsys):
    model, _ = model_of("qwen2_5_vl")
    report = accelerate(model)
    printed = capsys.readouterr().out
    assert "swapped: 1 x Conv3d: patch embedding (model.visual.patch_embed.proj)" in printed
    assert "swapped: 2 x Qwen2_5_VLAttention: attention (model.language_model.layers.0.self_attn and 1 more)" in printed
    assert str(report) + "\n" == printed


def test_report_names_what_was_left():
    report = accelerate(model_of("siglip2")[0], verbose=False)
    assert any(entry.path == "vision_model.embeddings.patch_embedding" for entry in report.left)
    report = accelerate(model_of("chameleon")[0], verbose=False)
    assert any("AttnBlock" in entry.cls and "written out" in entry.what for entry in report.left)


def test_twice_changes_nothing_more():
    model, inputs = model_of("llava")
    first = accelerate(model, verbose=False)
    before = values(model, inputs)
    second = accelerate(model, verbose=False)
    assert str(first) == str(second)
    assert equal(before, values(model, inputs))
    restore(model)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration was not accelerated"):
        restore(model)


@pytest.mark.parametrize("name", ["clip", "qwen2_vl", "idefics, resampler"])
def test_copies_and_pickles_are_accelerated_and_restorable(name):
    model, inputs = model_of(name)
    fast = copy.deepcopy(model)
    accelerate(fast, verbose=False)
    expected = values(copy.deepcopy(fast), inputs, gradients=False)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert equal(values(twin, inputs, gradients=False), expected)
        assert_restored(model, twin, inputs)


def test_state_dict_goes_between_plain_and_accelerated():
    model, inputs = model_of("clip")
    other = FAMILY["clip"].build().eval()
    accelerate(other, verbose=False)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    other.load_state_dict(torch.load(saved))
    torch.testing.assert_close(other(**inputs).loss, model(**inputs).loss)


def test_saves_as_the_plain_model(tmp_path):
    model, inputs = model_of("clip")
    fast = copy.deepcopy(model)
    accelerate(fast, verbose=False)
    fast.save_pretrained(tmp_path)
    loaded = hf.CLIPModel.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["CLIPModel"] and type(loaded) is hf.CLIPModel
    torch.testing.assert_close(loaded(**inputs).loss, model(**inputs).loss)


def test_hooks_still_run():
    model, inputs = model_of("clip")
    seen = []
    embedding = model.vision_model.embeddings.patch_embedding
    embedding.register_forward_hook(lambda module, _, output: seen.append(output.shape))
    accelerate(model, verbose=False)
    model(**inputs)
    restore(model)
    model(**inputs)
    assert len(seen) == 2 and seen[0] == seen[1]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llava", "mllama", "idefics2", "qwen2_5_vl", "gemma3"])
def test_gradient_checkpointing(name, reentrant):
    model, inputs = model_of(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_agrees(model.train(), inputs)


@pytest.mark.parametrize("name", ["llava", "idefics2", "gemma3", "qwen2_vl"])
def test_bfloat16(name):
    model, inputs = model_of(name)
    model = model.bfloat16()
    inputs = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()}
    assert_agrees(model, inputs)


def test_backend_serves_all_that_was_swapped(monkeypatch):
    model, inputs = model_of("siglip")
    accelerate(model, backend="reference", verbose=False)
    asked = []
    select = mmkernels.backends.select
    monkeypatch.setattr(mmkernels.backends, "select", lambda op, *x: asked.append((op, x[0])) or select(op, *x))
    model(**inputs).loss.backward()
    assert {op for op, _ in asked} == {"span_attention", "patch_embed", "contrastive"}
    assert {backend for _, backend in asked} == {"reference"}


def test_only_some_kinds():
    model, _ = model_of("clip")
    report = accelerate(model, only=["patch embedding"], verbose=False)
    assert {entry.what for entry in report.swapped} == {"patch embedding"}
    report = accelerate(model, only="loss", verbose=False)  # later, more
    assert {entry.what for entry in report.swapped} == {"patch embedding", "loss"}


def output_dtypes(model: nn.Module) -> dict[str, list[torch.dtype]]:
    """Of what each module returned last, filled in as the model runs."""
    found = {}

    def record(path: str, output) -> None:
        found[path] = [x.dtype for x in tree_leaves(output) if isinstance(x, torch.Tensor)]

    for path, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, path=path: record(path, output))
    return found


def test_autocast():
    """The convolution and the attention that were swapped run in the region's dtype, as torch's own do."""
    model, inputs = model_of("llava")
    fast = copy.deepcopy(model)
    swapped = len(accelerate(fast, verbose=False).swapped)
    truth = values(copy.deepcopy(model).double(), tree_map(in_float64, inputs))
    dtypes = [output_dtypes(x) for x in (model, fast)]
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (values(x, inputs) for x in (model, fast))
    assert dtypes[0] == dtypes[1] and [torch.bfloat16] in dtypes[0].values()
    found = misses(truth, theirs, ours, swapped, torch.bfloat16)
    assert not found, "\n".join(found)
    assert not accelerate(fast, verbose=False).fallbacks


def test_restore_leaves_what_fsdp_made(tmp_path):
    """FSDP changes the classes of modules: to put back older ones would undo half of it."""
    model, _ = model_of("llava")
    patches = model.model.vision_tower.embeddings.patch_embedding
    accelerate(model, verbose=False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(patches, mesh=init_device_mesh("cpu", (1,)))
        sharded = type(patches)
        with pytest.raises(ValueError, match=r"patch_embedding has become a FSDP.* since it was accelerated"):
            restore(model)
        assert type(patches) is sharded and len(accelerate(model, verbose=False).swapped) == 5
    finally:
        torch.distributed.destroy_process_group()


# ---- by name, without accelerate


def test_attention_by_name():
    import mmkernels.integrations.transformers  # noqa: F401

    model, inputs = model_of("llava")
    named = copy.deepcopy(model)
    named.set_attn_implementation("mmkernels")
    assert not disagreements(model, named, 4, inputs)
    built = hf.LlavaForConditionalGeneration._from_config(model.config, attn_implementation="mmkernels")
    assert built.model.language_model.config._attn_implementation == "mmkernels"


def test_name_is_refused_where_it_does_not_reach():
    """Perceiver takes any name, calls nothing, and would add our mask to its scores."""
    import mmkernels.integrations.transformers  # noqa: F401

    config = hf.PerceiverConfig(num_latents=6, d_latents=32, d_model=32, num_self_attends_per_block=1, vocab_size=120)
    model = hf.PerceiverForMaskedLM._from_config(config, attn_implementation="mmkernels")
    with pytest.raises(ValueError, match=r"perceiver models compute attention themselves.*accelerate\(model\)"):
        model(**FAMILY["perceiver"].inputs("left"))


# ---- what it refuses, or leaves to the model


def test_nothing_to_swap():
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 4, 3, padding=1))
    with pytest.raises(ValueError, match=r"nothing to swap in Sequential: it has no patch embedding, no attention"):
        accelerate(model)
    model = nn.ModuleDict({"patch_embed": nn.Conv2d(3, 8, 7, stride=4, padding=3)})
    with pytest.raises(ValueError, match="Conv2d: a convolution, and its stride is not its kernel"):
        accelerate(model)


def test_arguments_are_checked():
    model, _ = model_of("clip")
    with pytest.raises(ValueError, match="backend must be"):
        accelerate(model, backend="metal")
    with pytest.raises(ValueError, match="only has 'rotary'; accepted are 'patch embedding', 'attention', 'loss'"):
        accelerate(model, only=["rotary"])


def test_a_forward_of_the_instance_is_left():
    model, _ = model_of("clip")
    embedding = model.vision_model.embeddings.patch_embedding
    embedding.forward = embedding.forward
    report = accelerate(model, verbose=False)
    assert any("a forward of its own" in entry.what for entry in report.left)


def test_output_attentions_goes_the_models_own_way():
    model, inputs = drawn(FAMILY["llava"].build()), FAMILY["llava"].inputs("right")
    model.set_attn_implementation("eager")
    fast = copy.deepcopy(model)
    accelerate(fast, only="attention", verbose=False)
    exact = copy.deepcopy(model).double()
    runs = [(exact, tree_map(in_float64, inputs)), (model, inputs), (fast, inputs)]
    weights = [x(**given, output_attentions=True).attentions for x, given in runs]
    assert len(weights[0]) == 2
    words = inputs["attention_mask"].bool()  # padding sees what it likes
    rows = ({f"output {i}": layer.transpose(1, 2)[words] for i, layer in enumerate(x)} for x in weights)
    found = misses(*rows, swapped=4)
    assert not found, "\n".join(found)
    assert any("weights are asked for" in entry.what for entry in accelerate(fast, verbose=False).fallbacks)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "pixtral"])
@pytest.mark.parametrize("why", ["output_attentions", "no kernel"])
@pytest.mark.filterwarnings("ignore:mmkernels. patch_embed")
def test_pictures_packed_in_one_call_see_their_own_alone_whoever_attends(name, why):
    model, inputs = drawn(FAMILY[name].build()), FAMILY[name].inputs("left")
    exact, exact_inputs = copy.deepcopy(model).double(), tree_map(in_float64, inputs)
    if why == "no kernel":
        model, inputs = copy.deepcopy(exact), exact_inputs
    else:
        inputs = inputs | {"output_attentions": True}
    fast = copy.deepcopy(model)
    swapped = len(accelerate(fast, verbose=False).swapped)
    words = inputs["attention_mask"].bool()
    runs = [(exact, exact_inputs), (model, inputs), (fast, inputs)]
    found = misses(*({"output": x(**given).logits[words].detach()} for x, given in runs), swapped)
    assert not found, "\n".join(found)
    fallbacks = accelerate(fast, verbose=False).fallbacks
    assert any(why in entry.what and "vis" in entry.path for entry in fallbacks) or name == "pixtral"


def set_dropout(model: nn.Module, rate: float) -> None:
    """Everywhere, on the attention weights too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rate)


@pytest.mark.parametrize("name", ["idefics3", "perceiver", "siglip", "timm"])
def test_dropout_in_training_goes_the_models_own_way(seed, name):
    """The very numbers of the plain model: it drops the same weights, drawn from the same seed."""
    if name == "timm":
        model = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        model, inputs = drawn(model), {"x": torch.randn(2, 3, 16, 16)}
    else:
        model, inputs = model_of(name)
    set_dropout(model.train(), 0.5)
    fast = copy.deepcopy(model)
    accelerate(fast, only="attention", verbose=False)
    torch.manual_seed(seed)
    expected = values(model, inputs)
    torch.manual_seed(seed)
    assert equal(values(fast, inputs), expected)
    torch.manual_seed(seed + 1)
    assert not equal(values(fast, inputs), expected)
    fallbacks = accelerate(fast, verbose=False).fallbacks
    assert any("dropout on the attention weights" in entry.what for entry in fallbacks)


def test_masks_that_differ_between_heads_go_the_models_own_way():
    """A language model takes a mask of four axes as it is."""
    model, inputs = drawn(FAMILY["llava"].build().model.language_model), text("left")
    rows = inputs["input_ids"].shape[1]
    mask = torch.rand(2, 4, rows, rows) < 0.5
    mask |= torch.eye(rows, dtype=torch.bool)
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    fast = assert_agrees(model, inputs)
    assert all("differs between heads" in entry.what for entry in accelerate(fast, verbose=False).fallbacks)
    assert len(accelerate(fast, verbose=False).fallbacks) == 2


def test_masks_that_differ_between_heads_go_torchs_own_way():
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    model = nn.ModuleDict({"attention": attention})
    x = torch.randn(2, 6, 32)
    mask = torch.rand(8, 6, 6) < 0.3
    mask[:, :, 0] = False
    expected = attention(x, x, x, attn_mask=mask, need_weights=False)[0]
    report = accelerate(model, verbose=False)
    assert isinstance(attention, torch_modules.SpanMultiheadAttention) and len(report.swapped) == 1
    torch.testing.assert_close(attention(x, x, x, attn_mask=mask, need_weights=False)[0], expected)
    assert "differs between heads" in accelerate(model, verbose=False).fallbacks[0].what


def test_masks_that_add_other_values_go_the_models_own_way():
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    model, x, bias = nn.ModuleDict({"attention": attention}), torch.randn(2, 6, 32), torch.randn(6, 6)
    expected = attention(x, x, x, attn_mask=bias, need_weights=False)[0]
    accelerate(model, verbose=False)
    torch.testing.assert_close(attention(x, x, x, attn_mask=bias, need_weights=False)[0], expected)
    assert "values other than 0" in accelerate(model, verbose=False).fallbacks[0].what


def test_weights_that_are_asked_for_are_there():
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 6, 32)
    expected = attention(x, x, x)
    accelerate(nn.ModuleDict({"attention": attention}), verbose=False)
    torch.testing.assert_close(attention(x, x, x), expected)


# ---- compiled


def test_compiles_with_the_breaks_of_the_plain_model():
    """Qwen's tower asks for the sizes of its pictures, which breaks the graph of the plain model as well."""
    model, inputs = model_of("qwen2_5_vl")
    fast = copy.deepcopy(model)
    swapped = len(accelerate(fast, verbose=False).swapped)
    fast(**inputs)
    torch.compiler.reset()
    found = disagreements(model, torch.compile(fast, backend="aot_eager"), swapped, inputs)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["clip", "siglip", "llava", "idefics2", "gemma3"])
def test_compiles_whole(name):
    model, inputs = model_of(name)
    fast = copy.deepcopy(model)
    swapped = len(accelerate(fast, verbose=False).swapped)
    fast(**inputs)  # transformers installs hooks in a first forward that compile does not follow
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    found = disagreements(model, compiled, swapped, inputs)
    assert not found, "\n".join(found)
