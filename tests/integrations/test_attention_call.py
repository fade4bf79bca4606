"""The attention call of transformers' models: what it is handed is known, goes the model's own way, or is refused."""

import copy
import functools

import pytest
import torch
import transformers as hf
from agreement import disagreements
from families import TEXT, drawn, text
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bridgetower import modeling_bridgetower  # noqa: F401 (which says what it supports)
from transformers.models.llama.modeling_llama import eager_attention_forward

from mmkernels import accelerate
from mmkernels.integrations import _attend
from mmkernels.integrations.transformers.attention import Interface, span_attention_forward
from mmkernels.integrations.transformers.span_mask import SpanMask

LEAST = torch.finfo(torch.float32).min


def layer(**attributes) -> nn.Module:
    module = nn.Module()
    vars(module).update({"num_key_value_groups": 1} | attributes)
    return module


def by_name(*call, **options):
    return span_attention_forward(*call, **options)[0]


def in_place_of(name: str, default=eager_attention_forward):
    """What an accelerated module attends by, where its model would attend by this name."""
    return lambda *call, **options: Interface(AttentionInterface()).get_interface(name, default)(*call, **options)[0]


def tensors(*shape: int, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=dtype) for _ in range(3)]


def fallbacks(module: nn.Module) -> dict:
    return vars(module).get("_mmkernels_fallbacks", {})


# ---- keywords


def test_a_keyword_that_is_not_known_is_refused_by_name():
    """As of models that choose their keys by an indexer and hand the choice to whoever knows it."""
    with pytest.raises(ValueError, match=r'attn_implementation="mmkernels" does not know indices, which Module hands'):
        by_name(layer(), *tensors(2, 4, 5, 8), None, indices=torch.zeros(2, 5, 3))
    by_name(layer(), *tensors(2, 4, 5, 8), None, indices=None, position_ids=torch.arange(5), num_items_in_batch=3)


def test_what_a_layer_only_hands_on_is_not_refused():
    """InternVL's language layers get the image_sizes of its caller, which sdpa and eager code ignore."""
    model, inputs = llama()
    model.set_attn_implementation("mmkernels")
    expected = model(**inputs).logits
    assert torch.equal(model(**inputs, image_sizes=torch.zeros(2)).logits, expected)
    with pytest.raises(ValueError, match="does not know indices"):
        drawn(indexed())(**inputs)


def indexed() -> nn.Module:
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes |= {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "n_routed_experts": 2, "n_group": 1}
    sizes |= {"topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    config = hf.DeepseekV32Config(
        **{k: v for k, v in TEXT.items() if k not in ("head_dim", "num_key_value_heads")}, **sizes
    )
    return hf.DeepseekV32ForCausalLM._from_config(config, attn_implementation="mmkernels")


def with_indices(module, query, key, value, attention_mask, scaling=None, dropout=0.0, indices=None, **kwargs):
    """An attention function that takes a keyword of its own."""
    return value.transpose(1, 2) * (0 if indices is None else 1), None


def test_what_the_models_function_takes_goes_its_way():
    module, (q, k, v) = layer(), tensors(2, 4, 5, 8)
    attend = in_place_of("eager", with_indices)
    assert torch.equal(attend(module, q, k, v, None, indices=torch.zeros(3)), v.transpose(1, 2))
    assert fallbacks(module) == {"indices is given": 1}
    torch.testing.assert_close(
        attend(module, q, k, v, None, other=torch.zeros(3)), scaled_dot_product_attention(q, k, v).transpose(1, 2)
    )  # which it does not take: it means nothing to the model


def test_a_users_own_attention_is_his():
    AttentionInterface.register("of a user", with_indices)
    assert Interface(AttentionInterface()).get_interface("of a user", None) is with_indices
    model = drawn(hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**TEXT), attn_implementation="of a user"))
    with pytest.warns(UserWarning, match="nothing to swap.*the model attends by 'of a user', as it was asked to"):
        assert not accelerate(model, verbose=False).swapped


def test_reads_is_causal_as_the_models_function_does():
    """sdpa without a mask is causal by keyword, else by its module, else at all; eager code by masks alone."""
    q, k, v = tensors(2, 4, 5, 8)
    causal, full = (scaled_dot_product_attention(q, k, v, is_causal=x).transpose(1, 2) for x in (True, False))
    for attend in (in_place_of("sdpa"), by_name):
        torch.testing.assert_close(attend(layer(), q, k, v, None), causal)
        torch.testing.assert_close(attend(layer(is_causal=False), q, k, v, None), full)
        torch.testing.assert_close(attend(layer(is_causal=False), q, k, v, None, is_causal=True), causal)
    torch.testing.assert_close(in_place_of("eager")(layer(), q, k, v, None, scaling=8**-0.5, is_causal=True), full)


def test_by_name_a_family_without_sdpa_is_causal_by_masks_alone():
    """BridgeTower's attention layers say that they are causal, and are called without a mask."""
    q, k, v = tensors(2, 4, 5, 8)
    module = layer(is_causal=True, config=hf.BridgeTowerConfig())
    full = scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(by_name(module, q, k, v, None), full)
    torch.testing.assert_close(by_name(module, *(x.double() for x in (q, k, v)), None).float(), full)


SINKS = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5}


@pytest.mark.parametrize("by", ["accelerate", "name"])
def test_sinks_of_gpt_oss(by):
    """A logit a head beside the keys, of sliding layers and full ones."""
    model = drawn(hf.GptOssForCausalLM._from_config(hf.GptOssConfig(**TEXT | SINKS), attn_implementation="eager"))
    inputs = text("left")
    fast = copy.deepcopy(model)
    if by == "name":
        fast.set_attn_implementation("mmkernels")
        found = disagreements(model, fast, 2, inputs)
    else:
        assert len(accelerate(fast, verbose=False).swapped) == 2
        found = disagreements(model, fast, 2, inputs)
    assert not found, "\n".join(found)
    assert not any(map(fallbacks, fast.modules()))
    fast(**inputs).logits.sum().backward()
    sinks = fast.model.layers[0].self_attn.sinks
    assert sinks.grad is not None and sinks.grad.norm() > 0


# ---- masks


def seen(*shape: int) -> torch.Tensor:
    mask = torch.rand(*shape) < 0.7
    mask[..., 0] = True
    return mask


SHAPES = [(2, 1, 1, 6), (1, 1, 1, 6), (1, 1, 5, 6), (2, 1, 5, 6), (2, 4, 5, 6), (1, 4, 1, 6), (2, 1, 5, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # which no kernel serves
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_that_broadcast(shape, additive, dtype):
    q, k, v = torch.randn(2, 4, 5, 8, dtype=dtype), *(torch.randn(2, 4, 6, 8, dtype=dtype) for _ in range(2))
    mask = seen(*shape)
    if additive:
        mask = torch.zeros(shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    for attend in (by_name, in_place_of("sdpa")):
        torch.testing.assert_close(attend(layer(), q, k, v, mask), expected)


@pytest.mark.parametrize("attend", [by_name, in_place_of("sdpa")])
def test_what_sdpa_broadcasts_goes_its_way(attend):
    """Nemotron 3's audio layers give two heads of keys beside four of values."""
    module, q = layer(num_key_value_groups=2, is_causal=False), torch.randn(2, 4, 5, 8)
    k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 4, 5, 8)
    expected = sdpa_attention_forward(module, q, k, v, None, is_causal=False)[0]
    torch.testing.assert_close(attend(module, q, k, v, None, is_causal=False), expected)
    assert list(fallbacks(module)) == ["queries, keys and values that do not go together head by head"]


@pytest.mark.parametrize("name", ["sdpa", "eager", None])
@pytest.mark.parametrize("runs", [2, 4, 6, 9])
@pytest.mark.parametrize("dtype, width", [(torch.float32, 32), (torch.float64, 32), (torch.float32, 264)])
def test_keys_in_several_runs(name, runs, dtype, width):
    """Kernels see them brought together; the model's own code must see them, and its mask, as they were."""
    q, k, v = tensors(2, 2, 4 * runs, width, dtype=dtype)
    keys = (torch.arange(4 * runs) % 4 != 3).expand(2, -1).clone()
    keys[1, -4:] = False
    expected = scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None]).transpose(1, 2)
    kind = dtype if name == "eager" else torch.bool
    attend = by_name if name is None else in_place_of(name)
    given = [x.clone() for x in (q, k, v)]
    for mask in (SpanMask(None, keys, 4 * runs, 4 * runs, kind), keys[:, None, None].expand(-1, 1, 4 * runs, -1)):
        if name == "eager" and mask.dtype == torch.bool:
            continue  # eager code adds its masks
        out = attend(layer(), q, k, v, mask, scaling=width**-0.5)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)  # eager code's softmax is of float32
    assert all(map(torch.equal, given, (q, k, v)))


@pytest.mark.parametrize("write", ["in place", "in inference mode", "through data", "through numpy"])
def test_a_mask_that_is_written_to_counts_as_it_stands(write):
    """A serving loop's preallocated mask. Its version tells of the first of these alone."""
    q, k, v = tensors(2, 4, 5, 8)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    attend = in_place_of("sdpa")
    with torch.no_grad():
        attend(layer(), q, k, v, mask)
    if write == "in inference mode":
        with torch.inference_mode():
            mask.fill_(True)
    else:
        {"in place": mask, "through data": mask.data, "through numpy": torch.from_numpy(mask.numpy())}[write].fill_(
            True
        )
    torch.testing.assert_close(attend(layer(), q, k, v, mask), scaled_dot_product_attention(q, k, v).transpose(1, 2))
    assert not [name for name in vars(mask) if "mmkernels" in name]


def test_what_was_made_of_a_mask_goes_with_it():
    q, k, v = tensors(2, 4, 5, 8)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    in_place_of("sdpa")(layer(), q, k, v, mask)
    assert id(mask) in _attend._kept.entries
    at = id(mask)
    del mask
    assert at not in _attend._kept.entries


def test_spans_of_a_mask_are_made_once(monkeypatch):
    q, k, v = tensors(2, 4, 5, 8)
    mask, made = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril(), []
    original = _attend.spans_of
    monkeypatch.setattr(_attend, "spans_of", lambda x: made.append(1) or original(x))
    for _ in range(3):
        in_place_of("sdpa")(layer(), q, k, v, mask)
    assert len(made) == 1


def test_segments_hold_whoever_attends():
    """cu_seq_lens, which sdpa and eager code do not read: with dropout, in float64, as with a kernel."""
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    document = torch.tensor([0, 0, 1, 1, 1])
    mask = (document[:, None] == document) & torch.ones(5, 5, dtype=torch.bool).tril()
    for dtype in (torch.float32, torch.float64):
        q, k, v = tensors(1, 4, 5, 8, dtype=dtype)
        expected = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        causal = SpanMask(((torch.arange(5) + 1)[None, None]), None, 5, 5)
        for attend in (by_name, in_place_of("sdpa")):
            for given in (None, causal, torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()):
                out = attend(layer(), q, k, v, given, scaling=8**-0.5, cu_seq_lens_q=cu_seqlens)
                torch.testing.assert_close(out, expected)
        additive = SpanMask(causal.code, None, 5, 5, dtype)
        out = in_place_of("eager")(layer(), q, k, v, additive, scaling=8**-0.5, cu_seq_lens_q=cu_seqlens)
        torch.testing.assert_close(out, expected)


# ---- what the model was asked for


def llama(**more) -> tuple[nn.Module, dict]:
    config = hf.LlamaConfig(**TEXT, **more)
    return drawn(hf.LlamaForCausalLM._from_config(config, attn_implementation="eager")), text("left")


ASKED = {
    "keyword": lambda model: functools.partial(model, output_attentions=True),
    "config": lambda model: setattr(model.config, "output_attentions", True) or model,
}


@pytest.mark.parametrize("asked", ASKED)
def test_weights_come_as_of_the_plain_model(asked):
    model, inputs = llama()
    fast = copy.deepcopy(model)
    accelerate(fast, verbose=False)
    theirs, ours = (ASKED[asked](x)(**inputs).attentions for x in (model, fast))
    assert len(theirs) == len(ours) == 2
    torch.testing.assert_close(ours, theirs)
    assert "attention weights are asked for" in accelerate(fast, verbose=False).fallbacks[0].what


def test_a_hook_on_an_attention_layer_gets_its_weights():
    model, inputs = llama()
    fast = copy.deepcopy(model)
    accelerate(fast, verbose=False)
    found = []
    for x in (model, fast):
        x.model.layers[1].self_attn.register_forward_hook(lambda _, __, output: found.append(output[1]))
        x(**inputs)
    torch.testing.assert_close(found[1], found[0])
    assert len(accelerate(fast, verbose=False).fallbacks) == 1  # the other layer attends by spans


def test_the_recorders_hooks_alone_ask_for_nothing():
    """transformers leaves them on the layers once weights were asked for."""
    model, inputs = llama()
    accelerate(model, verbose=False)
    model(**inputs, output_attentions=True)
    before = str(accelerate(model, verbose=False).fallbacks)
    assert model(**inputs).attentions is None
    assert str(accelerate(model, verbose=False).fallbacks) == before


def test_dropout_on_the_weights_is_the_models_own():
    torch.manual_seed(0)
    model, inputs = llama(attention_dropout=0.5)
    fast = copy.deepcopy(model)
    accelerate(fast, verbose=False)
    outputs = []
    for x in (model, fast):
        torch.manual_seed(1)
        outputs.append(x.train()(**inputs).logits)
    torch.testing.assert_close(*outputs)


def test_proxies_of_a_tracer_go_to_the_models_function():
    calls = []

    def function(*call, **options):
        calls.append(call)
        return call[1], None

    Interface(AttentionInterface()).get_interface("eager", function)(layer(), "proxy", None, None, None)
    assert len(calls) == 1


def test_sdpa_is_what_sdpa_is():
    """The tests above take sdpa for the truth: it is what an accelerated model falls back to."""
    q, k, v = tensors(2, 4, 5, 8)
    mask = torch.zeros(2, 1, 5, 5).masked_fill(~seen(2, 1, 5, 5), LEAST)
    theirs = sdpa_attention_forward(layer(), q, k, v, mask)[0]
    torch.testing.assert_close(theirs, scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2))
