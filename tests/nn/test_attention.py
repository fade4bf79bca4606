"""SpanSelfAttention and SpanCrossAttention, and the attention layers of transformers that they stand for."""

import io

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, Gemma2Config, GptOssConfig, LlamaConfig, Olmo2Config, Qwen3Config
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from mmkernels import RowSpans
from mmkernels.nn import SpanCrossAttention, SpanSelfAttention

DTYPES = [torch.float32, torch.bfloat16]
SIZES = {
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
    "vocab_size": 8,
    "intermediate_size": 8,
}


def layer_of(layer: type, config: type, *arguments, implementation: str = "sdpa", **options) -> nn.Module:
    config = config(**SIZES | options)
    config._attn_implementation = implementation
    return layer(config, *arguments)


def clip(**options) -> nn.Module:
    return layer_of(CLIPAttention, CLIPVisionConfig, **options)


def llama(**options) -> nn.Module:
    return layer_of(LlamaAttention, LlamaConfig, 0, **options)


def qwen3() -> nn.Module:
    return layer_of(Qwen3Attention, Qwen3Config, 0)


def gemma2() -> nn.Module:
    """Its eager code, which alone has the bound on the scores."""
    return layer_of(Gemma2Attention, Gemma2Config, 0, implementation="eager", attn_logit_softcapping=2.0)


def mllama() -> MllamaTextCrossAttention:
    config = MllamaTextConfig(
        hidden_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = "sdpa"
    return MllamaTextCrossAttention(config, 0)


# Three documents of text "." and images (a digit a run), one of them empty, and padding behind them.
DOCUMENTS = ("..00..1", "", "2", "...3333..")
REAL, TOKENS = sum(map(len, DOCUMENTS)), sum(map(len, DOCUMENTS)) + 3
CU_SEQLENS = torch.tensor([0, 7, 7, 8, REAL])
IMAGE_ID = torch.tensor([-1 if letter == "." else int(letter) for letter in "".join(DOCUMENTS)] + [-1] * 3)
WINDOW = 3
SPANS = {
    "full": RowSpans.packed(CU_SEQLENS, num_queries=TOKENS),
    "causal": RowSpans.packed(CU_SEQLENS, num_queries=TOKENS, causal=True),
    "window": RowSpans.packed(CU_SEQLENS, num_queries=TOKENS, causal=True, window=WINDOW),
    "images": RowSpans.image_text(CU_SEQLENS, IMAGE_ID),
}


def mask_of(document: slice, kind: str) -> Tensor:
    """(T, T), True where a token of the document sees another: written down once more, without spans."""
    i = torch.arange(document.stop - document.start)
    back = i[:, None] - i
    image = IMAGE_ID[document]
    return {
        "full": back == back,
        "causal": back >= 0,
        "window": (back >= 0) & (back < WINDOW),
        "images": (back >= 0) | ((image[:, None] == image) & (image >= 0)),
    }[kind]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def self_attention_by_document(layer: nn.Module, kind: str, hidden: Tensor, *tables: Tensor) -> Tensor:
    """The layer of transformers on each document alone."""
    rows = []
    for document in (slice(a, b) for a, b in zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), strict=True)):
        if document.start == document.stop:
            continue
        mask = additive(mask_of(document, kind), hidden.dtype)[None, None]
        rotary = {"position_embeddings": tuple(x[None, document] for x in tables)} if tables else {}
        rows.append(layer(hidden[None, document], attention_mask=mask, **rotary)[0][0])
    return torch.cat(rows)


def packed_inputs(rotary: bool = True) -> tuple[Tensor, ...]:
    """Tokens, and cos and sin of angles whose halves are equal, as every rotary embedding makes them."""
    angles = torch.randn(TOKENS, 8).repeat(1, 2)
    return torch.randn(TOKENS, 40), *((angles.cos(), angles.sin()) if rotary else ())


def run_packed(kind: str):
    def run(module: SpanSelfAttention, hidden: Tensor, *tables: Tensor) -> Tensor:
        return module(hidden, SPANS[kind], tables or None)[:REAL]

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("source", "kind"), [(clip, "full"), (llama, "causal"), (qwen3, "images"), (gemma2, "window")])
def test_self_attention(agrees, served, source, kind, dtype):
    """Biases (CLIP), GQA (Llama), norms of queries and keys (Qwen3), bounded scores and their scale (Gemma 2)."""
    agrees(
        source(),
        SpanSelfAttention.from_transformers,
        lambda layer, *inputs: self_attention_by_document(layer, kind, *inputs),
        run_packed(kind),
        lambda: packed_inputs(rotary=source is not clip),
        dtype,
    )


@pytest.mark.parametrize(
    ("source", "kind", "options"),
    [
        (llama, "causal", {}),
        (qwen3, "images", {"qk_norm": "rms"}),
        (gemma2, "causal", {"scale": 256**-0.5, "softcap": 2.0}),
    ],
)
def test_self_attention_by_state_dict(agrees, loads_state, served, source, kind, options):
    agrees(
        source(),
        loads_state(SpanSelfAttention(40, 4, num_kv_heads=2, head_dim=16, **options)),
        lambda layer, *inputs: self_attention_by_document(layer, kind, *inputs),
        run_packed(kind),
        packed_inputs,
        torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_with_padding_on_either_side(agrees, served, dtype):
    first, last = torch.tensor([3, 0]), torch.tensor([9, 5])  # of the tokens of each row
    i = torch.arange(9)
    real = (i >= first[:, None]) & (i < last[:, None])
    lo = torch.where(real, first[:, None], 0).int()
    hi = torch.where(real, i + 1, 0).int()
    spans = RowSpans(lo[:, None], hi[:, None], 9)
    seen = (i[:, None] >= i) & real[:, None, :]

    def theirs(layer, hidden, cos, sin):
        mask = additive(seen, hidden.dtype)[:, None]
        return layer(hidden, attention_mask=mask, position_embeddings=(cos, sin))[0][real]

    def inputs():
        angles = torch.randn(2, 9, 8).repeat(1, 1, 2)
        return torch.randn(2, 9, 40), angles.cos(), angles.sin()

    agrees(
        qwen3(),
        SpanSelfAttention.from_transformers,
        theirs,
        lambda module, hidden, *tables: module(hidden, spans, tables)[real],
        inputs,
        dtype,
    )


CU_SEQLENS_Q, CU_SEQLENS_K = torch.tensor([0, 5, 6, 6, 13]), torch.tensor([0, 7, 9, 13, 24])


def cross_attention_by_document(layer: nn.Module, hidden: Tensor, context: Tensor) -> Tensor:
    bounds = [zip(x[:-1].tolist(), x[1:].tolist(), strict=True) for x in (CU_SEQLENS_Q, CU_SEQLENS_K)]
    rows = [layer(hidden[None, a:b], context[None, c:d])[0][0] for (a, b), (c, d) in zip(*bounds, strict=True) if a < b]
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["from_transformers", "state_dict"])
def test_cross_attention(agrees, loads_state, served, path, dtype):
    own = SpanCrossAttention(40, 4, num_kv_heads=2, qk_norm="rms", eps=1e-5)
    source, spans = mllama(), RowSpans.packed(CU_SEQLENS_Q, CU_SEQLENS_K)
    source.is_causal = False  # transformers' SDPA path takes a missing mask and attribute for causal attention
    agrees(
        source,
        SpanCrossAttention.from_transformers if path == "from_transformers" else loads_state(own),
        cross_attention_by_document,
        lambda module, hidden, context: module(hidden, context, spans),
        lambda: (torch.randn(13, 40), torch.randn(24, 40)),
        dtype,
    )


@pytest.mark.parametrize("source", [qwen3, mllama])
def test_autocast(agrees, served, source):
    """Activations of bfloat16 between parameters of float32: norms take both."""
    layer, spans = source(), RowSpans.packed(CU_SEQLENS_Q, CU_SEQLENS_K)
    layer.is_causal = False
    own = source is qwen3
    agrees(
        layer,
        (SpanSelfAttention if own else SpanCrossAttention).from_transformers,
        (lambda x, *inputs: self_attention_by_document(x, "images", *inputs)) if own else cross_attention_by_document,
        run_packed("images") if own else lambda module, hidden, context: module(hidden, context, spans),
        packed_inputs if own else lambda: (torch.randn(13, 40), torch.randn(24, 40)),
        torch.float32,
        autocast=True,
    )


@pytest.mark.parametrize("qk_norm", ["rms", "layer", None])
def test_autocast_with_norms_of_our_own(redrawn, served, qk_norm):
    """The dtypes fit together; the numbers are those of test_autocast."""
    module = redrawn(SpanSelfAttention(40, 4, num_kv_heads=2, qk_norm=qk_norm))
    hidden, spans = torch.randn(TOKENS, 40, requires_grad=True), SPANS["images"]
    with torch.autocast("cpu", torch.bfloat16):
        out = module(hidden, spans)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), [hidden, *module.parameters()]))


def make(redrawn, **options) -> SpanSelfAttention:
    return redrawn(SpanSelfAttention(32, 4, num_kv_heads=2, qk_norm="rms", **options))


def test_padding_and_other_documents_may_hold_nan(redrawn, served):
    """Neither a result nor a gradient of one document depends on another's."""
    module, spans = make(redrawn), SPANS["images"]
    clean = torch.randn(TOKENS, 32)
    spoilt = clean.clone()
    spoilt[:8], spoilt[REAL:] = torch.nan, torch.inf
    results = []
    for hidden in (clean.requires_grad_(), spoilt.requires_grad_()):
        out = module(hidden, spans)[8:REAL]
        results.append((out, torch.autograd.grad(out.square().sum(), hidden)[0][8:REAL]))
    assert all(map(torch.equal, *results))


def test_a_token_that_sees_nothing_gets_the_bias(redrawn, served):
    module = make(redrawn, out_bias=True)
    spans = RowSpans(torch.tensor([0, 2, 1]).int(), torch.tensor([3, 2, 0]).int(), 3)
    out = module(torch.randn(3, 32), spans)
    assert torch.equal(out[1:], module.o_proj.bias.expand(2, -1)) and not torch.equal(out[0], module.o_proj.bias)


def test_float32_tables_rotate_in_float32(redrawn):
    module = make(redrawn, dtype=torch.bfloat16)
    hidden, spans = torch.randn(5, 32, dtype=torch.bfloat16), RowSpans.full(5, 5)
    tables = [x[:5] for x in packed_inputs()[1:]]
    tables = [x[:, :8] for x in tables]
    assert module(hidden, spans, tuple(tables)).dtype == torch.bfloat16
    # A turn by nothing in float32 is exact.
    none = torch.ones(5, 8), torch.zeros(5, 8)
    assert torch.equal(module(hidden, spans, none), module(hidden, spans))


def test_decoding_projects_the_context_once(redrawn, served):
    module = redrawn(SpanCrossAttention(32, 4, kv_dim=24, num_kv_heads=2, qk_norm="layer"))
    hidden, context, spans = torch.randn(2, 5, 32), torch.randn(2, 9, 24), RowSpans.full(5, 9)
    assert torch.equal(module(hidden, module.keys_values(context), spans), module(hidden, context, spans))


def test_compiles_whole_and_once_whatever_the_lengths(redrawn, compiles_once):
    def draw(*lengths):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        tokens = sum(lengths) + 1
        spans = RowSpans.packed(cu_seqlens, num_queries=tokens, causal=True)
        return torch.randn(tokens, 32), spans, tuple(torch.randn(tokens, 8) for _ in range(2))

    compiles_once(make(redrawn), (draw(*lengths) for lengths in ((5, 4), (2, 6, 9), (13,))))


def test_state_round_trip(redrawn):
    module, fresh = make(redrawn), SpanSelfAttention(32, 4, num_kv_heads=2, qk_norm="rms")
    fresh.load_state_dict(module.state_dict())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    hidden, spans = torch.randn(TOKENS, 32), SPANS["causal"]
    for other in (fresh, torch.load(file, weights_only=False)):
        assert torch.equal(other(hidden, spans), module(hidden, spans))


def test_device_and_dtype_reach_every_parameter():
    for qk_norm in ("rms", "layer"):
        module = SpanSelfAttention(
            32, 4, qk_norm=qk_norm, qkv_bias=True, out_bias=True, device="meta", dtype=torch.half
        )
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.half)}
        assert len(list(module.parameters())) == (10 if qk_norm == "rms" else 12)


def test_a_layer_taken_over_keeps_parameters_hooks_and_mode(redrawn):
    layer = redrawn(qwen3()).train()
    module = SpanSelfAttention.from_transformers(layer)
    assert {id(p) for p in module.parameters()} == {id(p) for p in layer.parameters()} and module.training
    assert module.state_dict().keys() == layer.state_dict().keys()
    hidden, before = torch.randn(TOKENS, 40), module(torch.ones(TOKENS, 40), SPANS["full"])
    layer.v_proj.register_forward_hook(lambda _, __, out: out * 2)
    torch.testing.assert_close(module(torch.ones(TOKENS, 40), SPANS["full"]), 2 * before)
    assert module(hidden, SPANS["full"]).shape == hidden.shape


def test_repr_says_what_the_layers_do_not():
    module = SpanSelfAttention(32, 4, num_kv_heads=2, softcap=50.0)
    assert module.extra_repr() == "num_heads=4, num_kv_heads=2, head_dim=8, softcap=50"
    assert SpanCrossAttention(32, 4, scale=0.5).extra_repr() == "num_heads=4, num_kv_heads=4, head_dim=8, scale=0.5"


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (lambda: clip(attention_dropout=0.1), ValueError, "dropout of CLIPAttention is 0.1, .* set it to 0.0"),
        (lambda: llama(attention_dropout=0.1), ValueError, "attention_dropout of LlamaAttention is 0.1"),
        (lambda: nn.MultiheadAttention(8, 2), TypeError, "MultiheadAttention has no q_proj; its form is unknown"),
        (
            lambda: layer_of(Olmo2Attention, Olmo2Config, 0),
            ValueError,
            r"Olmo2Attention normalises queries with a parameter of shape \(64,\); served are .* one head, \(16,\)",
        ),
        (lambda: layer_of(GptOssAttention, GptOssConfig, 0), ValueError, "has no place for sinks of GptOssAttention"),
    ],
)
def test_refused_layers(layer, error, message):
    with pytest.raises(error, match=f"SpanSelfAttention: .*{message}"):
        SpanSelfAttention.from_transformers(layer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "embed_dim 32 is no multiple of num_heads 5; give head_dim"),
        ({"num_kv_heads": 3}, "num_heads 4 is no multiple of num_kv_heads 3"),
        ({"qk_norm": "l2"}, "qk_norm is 'l2'; accepted are 'rms', 'layer' and None"),
    ],
)
def test_errors_of_the_constructor(options, message):
    for kind in (SpanSelfAttention, SpanCrossAttention):
        with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
            kind(**{"embed_dim": 32, "num_heads": 4} | options)


def test_errors_of_self_attention():
    module, spans = SpanSelfAttention(32, 4), RowSpans.full(7, 7)
    hidden, cos = torch.randn(7, 32), torch.randn(7, 8)
    for bad in (torch.randn(7, 31), torch.randn(32), torch.randn(1, 1, 7, 32)):
        with pytest.raises(ValueError, match=r"SpanSelfAttention: hidden has shape .* packed, \(tokens, 32\), or"):
            module(bad, spans)
    for tables in ((cos[:, :4], cos), (cos, cos[:6]), (cos[None], cos)):
        name = "sin" if tables[0].shape == (7, 8) else "cos"
        with pytest.raises(ValueError, match=rf"{name} of position_embeddings has shape .* it must be \(7, 8\)$"):
            module(hidden, spans, tables)
    with pytest.raises(ValueError, match=r"it must be \(7, 8\), the batch axis before it or not"):
        module(hidden[None], spans, (cos[:, :4], cos))
    with pytest.raises(ValueError, match="spans are for 7 queries, q has 6"):
        module(hidden[:6], spans)


def test_errors_of_cross_attention():
    module, spans = SpanCrossAttention(32, 4, kv_dim=24), RowSpans.full(7, 5)
    hidden, context = torch.randn(7, 32), torch.randn(5, 24)
    with pytest.raises(ValueError, match=r"SpanCrossAttention: hidden has shape \(7, 31\)"):
        module(hidden[:, 1:], context, spans)
    with pytest.raises(ValueError, match=r"SpanCrossAttention: context has shape \(7, 32\); it must be .* 24"):
        module(hidden, hidden, spans)
    for bad in (context[None], context.expand(3, -1, -1)):
        with pytest.raises(ValueError, match=r"SpanCrossAttention: context has shape .* the same batch axis"):
            module(hidden[None].expand(2, -1, -1) if len(bad) == 3 else hidden, bad, spans)
