"""GatedCrossAttentionBlock, and the layers of idefics and mllama that it stands for."""

import io

import pytest
import torch
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer, _prepare_cross_attention_mask

import mmkernels
from mmkernels import RowSpans
from mmkernels.nn import GatedCrossAttentionBlock

DTYPES = [torch.float32, torch.bfloat16]


def idefics(alpha_type: str = "float", **options) -> IdeficsGatedCrossAttentionLayer:
    config = IdeficsConfig(
        hidden_size=48,
        intermediate_size=56,
        num_attention_heads=3,
        alpha_type=alpha_type,
        vision_config={"embed_dim": 40},
        **options,
    )
    config._attn_implementation = "sdpa"
    return IdeficsGatedCrossAttentionLayer(config, 0)


def mllama() -> MllamaCrossAttentionDecoderLayer:
    config = MllamaTextConfig(
        hidden_size=64,
        intermediate_size=56,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = "sdpa"
    return MllamaCrossAttentionDecoderLayer(config, 0)


def idefics_call(images_seen: torch.Tensor, image_tokens: int):
    """What IdeficsModel makes of its image_attention_mask, (B, T, images), and hands to the layer."""
    seen = images_seen.repeat_interleave(image_tokens, 2)[:, None]

    def call(layer, hidden, context):
        mask = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        return layer(hidden, None, context, image_attention_mask=mask, cross_attention_gate=seen.any(-1)[:, 0])

    return call


def mllama_call(tiles_seen: torch.Tensor, tile_tokens: int):
    """What MllamaModel makes of its cross_attention_mask, (B, T, images, tiles), and hands to the layer."""

    def call(layer, hidden, context):
        mask, rows = _prepare_cross_attention_mask(tiles_seen.to(hidden.dtype), tile_tokens, hidden.dtype)
        return layer(hidden, context, mask, None, rows)

    return call


# Rows of text: a digit is an image, "a" the text after it, "." text before any, "_" padding.
ROWS = ("__..0aaa1aa2a", "0aaaaaa1a____")
IMAGES, TOKENS = 3, 5
REAL = torch.tensor([[letter != "_" for letter in row] for row in ROWS])
LOCATIONS = torch.tensor([[letter.isdigit() for letter in row] for row in ROWS])
LAST_IMAGE = ((LOCATIONS.cumsum(1) - 1)[..., None] == torch.arange(IMAGES)) & REAL[..., None]  # (B, T, images)
CU_SEQLENS = torch.tensor([0, 11, 20], dtype=torch.int32)  # of the text without padding


def pack_images(context: torch.Tensor, used=(3, 2)) -> torch.Tensor:
    """(B, images * tokens, C) -> (tokens of the images that are there, C)"""
    return torch.cat([row[: n * TOKENS] for row, n in zip(context, used, strict=True)])


def idefics_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*REAL.shape, 48), torch.randn(len(ROWS), IMAGES * TOKENS, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha_type", ["float", "vector"])
def test_idefics(agrees, served, alpha_type, dtype):
    """One image a token, or none, padding on either side; with and without norms of queries and keys."""
    spans = RowSpans.from_dense(LAST_IMAGE.repeat_interleave(TOKENS, 2), max_runs=1)
    agrees(
        idefics(alpha_type, qk_layer_norms=alpha_type == "float"),
        GatedCrossAttentionBlock.from_transformers,
        idefics_call(LAST_IMAGE, TOKENS),
        lambda block, hidden, context: block(hidden, context, spans),
        idefics_inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_idefics_packed(agrees, served, dtype):
    """Text and images without padding, documents told apart by their offsets, against the padded original."""
    spans = RowSpans.media(LOCATIONS[REAL], TOKENS, num_keys=5 * TOKENS, cu_seqlens=CU_SEQLENS)
    call = idefics_call(LAST_IMAGE, TOKENS)
    agrees(
        idefics("vector"),
        GatedCrossAttentionBlock.from_transformers,
        lambda layer, hidden, context: call(layer, hidden, context)[REAL],
        lambda block, hidden, context: block(hidden[REAL], pack_images(context), spans),
        idefics_inputs,
        dtype,
    )


def test_idefics_images_in_any_order(agrees, served):
    """idefics takes any mask: several runs a token."""
    seen = torch.rand(2, 13, 4) < 0.5
    spans = RowSpans.from_dense(seen.repeat_interleave(3, 2))
    assert spans.runs == 2
    agrees(
        idefics(),
        GatedCrossAttentionBlock.from_transformers,
        idefics_call(seen, 3),
        lambda block, hidden, context: block(hidden, context, spans),
        lambda: (torch.randn(2, 13, 48), torch.randn(2, 12, 40)),
        torch.float32,
    )


# mllama: images of one to four tiles, padded to four; text sees the last group of images that stand side by side.
MLLAMA_ROWS = ("____.01aaa2aa", "0aaaaa__.....")  # row 1: padded, and then a document that sees no image
TILES = torch.tensor([[2, 4, 1], [3, 0, 0]])
GROUPS = ("0" * 5 + "1334444555", "1" * 6 + "0" * 7)


def mllama_tiles_seen() -> torch.Tensor:
    """(B, T, images, tiles), as MllamaProcessor makes it."""
    seen = torch.zeros(2, 13, 3, 4, dtype=torch.bool)
    valid = torch.arange(4) < TILES[..., None]
    seen[0, 5:10, 0], seen[0, 6:10, 1], seen[0, 10:, 2] = valid[0, 0], valid[0, 1], valid[0, 2]
    seen[1, :6, 0] = valid[1, 0]
    return seen


def mllama_inputs(tile_tokens: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 13, 64), torch.randn(2, 12 * tile_tokens, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["from_transformers", "state_dict"])
def test_mllama(agrees, loads_state, served, path, dtype):
    """Tokens that see no tile attend to all of them, padding too, and have no MLP: transformers' rule."""
    seen = mllama_tiles_seen()
    any_seen = seen.flatten(2).any(2)
    dense = seen.flatten(2).repeat_interleave(3, 2) | ~any_seen[..., None]
    spans = RowSpans.from_dense(dense)
    assert spans.runs == 2 and not any_seen.all()  # padding tiles are gaps
    own = GatedCrossAttentionBlock(64, 56, 4, num_kv_heads=2, eps=1e-5)
    agrees(
        mllama(),
        GatedCrossAttentionBlock.from_transformers if path == "from_transformers" else loads_state(own),
        mllama_call(seen, 3),
        lambda block, hidden, context: block(hidden, context, spans, mlp_mask=any_seen),
        mllama_inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mllama_packed(agrees, served, dtype):
    """Text without padding and without padding tiles: images of several lengths back to back, one run a token."""
    seen = mllama_tiles_seen()
    text = seen.flatten(2).any(2)  # a document's text from its first image on
    locations = torch.tensor([[letter.isdigit() for letter in row] for row in MLLAMA_ROWS])
    spans = RowSpans.media(
        locations[text],
        TILES[TILES > 0] * 3,
        cu_seqlens=torch.tensor([0, 8, 14]),
        attend="group",
    )
    kept = (torch.arange(4) < TILES[..., None]).flatten(1).repeat_interleave(3, 1)
    call = mllama_call(seen, 3)
    agrees(
        mllama(),
        GatedCrossAttentionBlock.from_transformers,
        lambda layer, hidden, context: call(layer, hidden, context)[text],
        lambda block, hidden, context: block(hidden[text], context[kept], spans),
        mllama_inputs,
        dtype,
    )


def test_the_builders_rule_for_empty_rows_is_mllamas(agrees, served):
    locations = torch.tensor([[letter.isdigit() for letter in row] for row in ("..0aa1a", ".......")])
    seen = (locations.cumsum(1) - 1)[..., None] == torch.arange(2)  # images far apart are no group
    spans = RowSpans.media(locations, 8, num_keys=16, attend="group", empty_rows="all")
    agrees(
        mllama(),
        GatedCrossAttentionBlock.from_transformers,
        mllama_call(seen[..., None].expand(-1, -1, -1, 4), 2),
        lambda block, hidden, context: block(hidden, context, spans, mlp_mask=seen.any(-1)),
        lambda: (torch.randn(2, 7, 64), torch.randn(2, 16, 64)),
        torch.float32,
    )


@pytest.mark.parametrize("source", [idefics, mllama])
def test_autocast(agrees, served, source):
    layer = source()
    width = 48 if source is idefics else 64
    call = idefics_call(LAST_IMAGE, TOKENS) if source is idefics else mllama_call(LAST_IMAGE[..., None], TOKENS)
    seen = LAST_IMAGE.repeat_interleave(TOKENS, 2)
    spans = RowSpans.from_dense(seen if source is idefics else seen | ~seen.any(-1, keepdim=True))
    mask = None if source is idefics else seen.any(-1)
    agrees(
        layer,
        GatedCrossAttentionBlock.from_transformers,
        call,
        lambda block, hidden, context: block(hidden, context, spans, mlp_mask=mask),
        lambda: (torch.randn(2, 13, width), torch.randn(2, 15, layer.cross_attn.k_proj.in_features)),
        torch.float32,
        autocast=True,
    )


def make(redrawn, **options) -> GatedCrossAttentionBlock:
    return redrawn(GatedCrossAttentionBlock(32, 40, 4, kv_dim=24, num_kv_heads=2, **options))


def test_a_new_block_does_nothing():
    block, hidden = GatedCrossAttentionBlock(32, 40, 4, kv_dim=24), torch.randn(3, 7, 32)
    assert torch.equal(block(hidden, torch.randn(3, 5, 24), RowSpans.full(7, 5)), hidden)


def test_what_no_token_sees_may_hold_nan(redrawn, served):
    block, hidden, context = make(redrawn), torch.randn(6, 32), torch.randn(9, 24)
    spans = RowSpans(torch.tensor([0, 0, 0, 2, 2, 7], dtype=torch.int32), torch.tensor([0, 3, 3, 6, 5, 9]).int(), 9)
    out = block(hidden, context, spans)
    context[6] = torch.nan
    assert torch.equal(block(hidden, context, spans), out)


def test_decoding_projects_the_images_once(redrawn, served):
    block, hidden, context = make(redrawn).eval(), torch.randn(2, 5, 32), torch.randn(2, 9, 24)
    spans = RowSpans(torch.zeros(5, dtype=torch.int32), torch.tensor([0, 4, 4, 9, 9], dtype=torch.int32), 9)
    whole = block(hidden, context, spans)
    cached = block.cross_attn.keys_values(context)
    for t in range(5):
        one = RowSpans(spans.lo[t : t + 1], spans.hi[t : t + 1], 9)
        torch.testing.assert_close(block(hidden[:, t : t + 1], cached, one), whole[:, t : t + 1])


def test_float64(redrawn):
    """The reference serves it."""
    block = make(redrawn, per_channel_gates=True).double()
    hidden, context = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 32), (6, 24)))
    spans = RowSpans(torch.tensor([0, 1, 0, 2]).int(), torch.tensor([0, 4, 6, 2]).int(), 6)

    def run(hidden, context):
        with mmkernels.use_backend("reference"):
            return block(hidden, context, spans)

    assert torch.autograd.gradcheck(run, (hidden, context), fast_mode=True)


def test_compiles_whole_and_once_whatever_the_lengths(redrawn, compiles_once):
    def draw(queries, keys):
        spans = RowSpans(torch.zeros(queries).int(), torch.randint(0, keys, (queries,)).int(), keys)
        return torch.randn(queries, 32), torch.randn(keys, 24), spans, spans.hi > 0

    compiles_once(make(redrawn), (draw(*sizes) for sizes in ((7, 12), (9, 20), (16, 5))))


def test_state_round_trip(redrawn):
    block, hidden, context = make(redrawn, dtype=torch.float32), torch.randn(7, 32), torch.randn(5, 24)
    fresh = make(lambda x: x)
    fresh.load_state_dict(block.state_dict())
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    spans = RowSpans.full(7, 5)
    for other in (fresh, torch.load(file, weights_only=False)):
        assert torch.equal(other(hidden, context, spans), block(hidden, context, spans))


def test_a_layer_taken_over_keeps_its_parameters():
    for layer in (idefics(qk_layer_norms=True), mllama()):
        block = GatedCrossAttentionBlock.from_transformers(layer)
        assert {id(p) for p in block.parameters()} == {id(p) for p in layer.parameters()}
        assert block.training == layer.training
        assert block.cross_attn.q_norm.weight is not None
    assert block.state_dict().keys() == layer.state_dict().keys()  # mllama's


def test_refused_layers():
    layer = idefics()
    layer.cross_attn.dropout = 0.1
    with pytest.raises(ValueError, match=r"SpanCrossAttention: dropout of IdeficsAttention is 0.1, .* set it to 0.0"):
        GatedCrossAttentionBlock.from_transformers(layer)
    layer.cross_attn.dropout, layer.config = 0.0, 0.1
    with pytest.raises(ValueError, match=r"GatedCrossAttentionBlock: config of Idefics.* is 0.1, a rate of dropout"):
        GatedCrossAttentionBlock.from_transformers(layer)
    layer = mllama()
    layer.extra_gate = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="GatedCrossAttentionBlock: it has no place for extra_gate of Mllama"):
        GatedCrossAttentionBlock.from_transformers(layer)
    with pytest.raises(TypeError, match="GatedCrossAttentionBlock: Linear has no cross_attn"):
        GatedCrossAttentionBlock.from_transformers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("mask", [torch.ones(7), torch.ones(1, 7, dtype=torch.bool), torch.ones(6, dtype=torch.bool)])
def test_mlp_mask_errors(mask):
    block = GatedCrossAttentionBlock(32, 40, 4)
    with pytest.raises(ValueError, match=r"mlp_mask is .* it must be bool of shape \(7,\)"):
        block(torch.randn(7, 32), torch.randn(5, 32), RowSpans.full(7, 5), mask)
