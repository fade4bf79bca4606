"""Nothing is set that other models see: two models of one config do not know of each other."""

import copy
import pickle

import pytest
import torch
import transformers as hf
from agreement import assert_restored
from families import FAMILIES, TEXT, TOWER, drawn, text

import mmkernels
from mmkernels import accelerate, backends, restore

FAMILY = {family.name: family for family in FAMILIES}


def config_of(name: str) -> hf.PreTrainedConfig:
    if name == "tower":
        return hf.CLIPVisionConfig(**TOWER)
    return FAMILY[name].build().config


MODELS = {
    "tower": hf.CLIPVisionModel,
    "llava": hf.LlavaForConditionalGeneration,
    "qwen2_vl": hf.Qwen2VLForConditionalGeneration,
}


def names(config: hf.PreTrainedConfig) -> list[str]:
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    return [part._attn_implementation for part in parts]


def attends_by_spans(model, inputs) -> bool:
    asked = []
    select = backends.select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "select", lambda op, *call: asked.append(op) or select(op, *call))
        model(**inputs)
    return "span_attention" in asked


def inputs_of(name: str) -> dict:
    return {"pixel_values": torch.randn(2, 3, 32, 32)} if name == "tower" else FAMILY[name].inputs("left")


@pytest.mark.parametrize("name", MODELS)
def test_another_model_of_the_config_is_as_it_was(name):
    config, inputs = config_of(name), inputs_of(name)
    one, other = (drawn(MODELS[name](config)) for _ in range(2))
    expected, before = other(**inputs)[0], (copy.deepcopy(config.__dict__), names(config))
    accelerate(one, verbose=False)
    later = drawn(MODELS[name](config))
    for model in (other, later):
        assert names(model.config) == before[1] and not attends_by_spans(model, inputs)
    assert torch.equal(other(**inputs)[0], expected)
    assert attends_by_spans(one, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_restoring_one_leaves_another(name):
    config, inputs = config_of(name), inputs_of(name)
    one, other = (drawn(MODELS[name](config)) for _ in range(2))
    accelerate(one, verbose=False)
    report = accelerate(other, backend="reference", verbose=False)
    attention = [entry.path for entry in report.swapped if entry.what == "attention"]
    assert attention and all(backends.of_module(other.get_submodule(path)) == "reference" for path in attention)
    restore(one)
    assert attends_by_spans(other, inputs) and not attends_by_spans(one, inputs)
    assert "mmkernels" not in names(one.config) and "mmkernels" in names(other.config)


@pytest.mark.parametrize("name", MODELS)
def test_config_says_what_attends_and_makes_models(name):
    fast = drawn(MODELS[name](config_of(name)))
    accelerate(fast, verbose=False)
    assert "mmkernels" in names(fast.config)
    twin = MODELS[name](fast.config)
    twin.load_state_dict(fast.state_dict())
    assert (
        type(twin) is MODELS[name]
        and accelerate(twin, verbose=False).swapped == accelerate(fast, verbose=False).swapped
    )
    assert type(type(fast)(fast.config)) is MODELS[name]
    hf.AutoModel.from_config(fast.config)
    fast.set_attn_implementation("sdpa")


def test_what_is_set_on_the_config_is_read():
    """By the model's own modules, and after restore."""
    fast = drawn(hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)))
    accelerate(fast, verbose=False)
    fast.config.use_cache = False
    assert fast.model.config is fast.config and fast.model.layers[0].self_attn.config is fast.config
    assert fast(**text("left")).past_key_values is None
    restore(fast)
    assert fast.config.use_cache is False and fast.config._attn_implementation == "sdpa"


def test_eager_stays_eager():
    """By that name transformers asks whether a model can return attention weights."""
    model = drawn(hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**TEXT), attn_implementation="eager"))
    fast, inputs = copy.deepcopy(model), text("left")
    accelerate(fast, verbose=False)
    assert attends_by_spans(fast, inputs)
    for x in (model, fast):
        x.config.output_attentions = True
    theirs, ours = (x(**inputs).attentions for x in (model, fast))
    assert len(ours) == len(theirs) == 2
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["tower", "llava"])
def test_saved_and_pickled_and_restored_without_a_trace(name, tmp_path):
    model, inputs = drawn(MODELS[name](config_of(name))), inputs_of(name)
    fast = copy.deepcopy(model)
    accelerate(fast, verbose=False)
    fast.save_pretrained(tmp_path)
    assert b"mmkernels" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    loaded = MODELS[name].from_pretrained(tmp_path)
    assert "mmkernels" not in names(loaded.config) and type(loaded) is MODELS[name]
    twin = pickle.loads(pickle.dumps(fast))
    assert accelerate(twin, verbose=False).swapped == accelerate(fast, verbose=False).swapped
    for x in (copy.deepcopy(fast), twin, fast):
        pickled = pickle.dumps(restore(copy.deepcopy(x)))
        assert b"mmkernels" not in pickled
        assert_restored(model, x, inputs)


def test_by_name_then_accelerated_then_restored():
    model = drawn(hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**TEXT), attn_implementation="mmkernels"))
    inputs = text("left")
    expected = model(**inputs).logits
    report = mmkernels.accelerate(model, verbose=False)
    assert [entry.what for entry in report.swapped] == ["attention"] * 2
    assert torch.equal(model(**inputs).logits, expected)
    restore(model)
    assert model.config._attn_implementation == "mmkernels"
    assert torch.equal(model(**inputs).logits, expected)
