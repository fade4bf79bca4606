"""PerceiverResampler, and the resamplers of idefics and idefics2 that it stands for."""

import io

import pytest
import torch
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverAttention, IdeficsPerceiverResampler
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

from mmkernels import RowSpans
from mmkernels.nn import PerceiverResampler

DTYPES = [torch.float32, torch.bfloat16]
WIDTH, LATENTS, TOKENS = 40, 3, 9


def idefics(qk_norm: bool = True) -> IdeficsPerceiverResampler:
    config = IdeficsConfig(
        vision_config={"embed_dim": WIDTH},
        perceiver_config={"qk_layer_norms_perceiver": qk_norm, "use_resampler": True},
    )
    return IdeficsPerceiverResampler(config, WIDTH, 2, 4, 16, LATENTS)


def by_torchs_attention(resampler: IdeficsPerceiverResampler, context: Tensor) -> Tensor:
    """idefics' resampler without its own softmax in bfloat16: torch's rounds elsewhere, above all in the gradients."""

    def attend(self, context, latents):
        context, latents = self.context_layer_norm(context), self.latents_layer_norm(latents)
        both = torch.cat((context, latents), -2)
        q, k, v = self.q_proj(latents), self.k_proj(both), self.v_proj(both)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.qk_layer_norms:
            q, k = self.q_layer_norm(q), self.k_layer_norm(k)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.output_proj(out.transpose(1, 2).flatten(-2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IdeficsPerceiverAttention, "forward", attend)
        return resampler(context)


def idefics2(**options) -> Idefics2PerceiverResampler:
    config = Idefics2PerceiverConfig(
        hidden_size=WIDTH,
        resampler_n_latents=LATENTS,
        resampler_depth=2,
        resampler_n_heads=4,
        resampler_head_dim=16,
        num_key_value_heads=2,
        **options,
    )
    config._attn_implementation = "sdpa"
    return Idefics2PerceiverResampler(config)


def images(batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, TOKENS, WIDTH),)


# Tokens of three images, the last of them without any, padded on either side.
PRESENT = torch.tensor([[letter == "x" for letter in row] for row in ("..xxxxxxx", "xxxx.....", ".........")])


def padded_spans() -> RowSpans:
    first, last = torch.tensor([2, 0, 0]), torch.tensor([9, 4, 0])
    lo, hi = (x.int()[:, None, None].expand(-1, 1, LATENTS) for x in (first, last))
    return RowSpans(lo, hi, TOKENS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("qk_norm", [True, False])
def test_idefics(agrees, served, qk_norm, dtype):
    agrees(
        idefics(qk_norm),
        PerceiverResampler.from_transformers,
        lambda resampler, context: resampler(context),
        lambda resampler, context: resampler(context),
        images,
        dtype,
        also=[by_torchs_attention],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["from_transformers", "state_dict"])
def test_idefics2(agrees, loads_state, served, path, dtype):
    """GQA; images with padding, and one that is nothing else: its latents see each other only."""
    own, spans = PerceiverResampler(WIDTH, 2, 4, 16, LATENTS, num_kv_heads=2), padded_spans()
    agrees(
        idefics2(),
        PerceiverResampler.from_transformers if path == "from_transformers" else loads_state(own),
        lambda resampler, context: resampler(context, PRESENT.long()),
        lambda resampler, context: resampler(context, spans),
        lambda: images(3),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_images(agrees, served, dtype):
    """Images of all lengths back to back, without padding, against the padded original."""
    cu_seqlens = torch.tensor([0, 7, 11, 11])
    spans = RowSpans.packed(torch.arange(4) * LATENTS, cu_seqlens)
    agrees(
        idefics2(),
        PerceiverResampler.from_transformers,
        lambda resampler, context: resampler(context, PRESENT.long()).flatten(0, 1),
        lambda resampler, context: resampler(context[PRESENT], spans),
        lambda: images(3),
        dtype,
    )


def test_tokens_chosen_at_will(agrees, served):
    """Holes in an image: several runs a latent."""
    present = torch.tensor([[True, False] * 4 + [True], [False, True, True] * 3])
    spans = RowSpans.from_dense(present[:, None].expand(-1, LATENTS, -1))
    assert spans.runs == 5
    agrees(
        idefics2(),
        PerceiverResampler.from_transformers,
        lambda resampler, context: resampler(context, present.long()),
        lambda resampler, context: resampler(context, spans),
        images,
        torch.float32,
    )


def test_autocast(agrees, served):
    spans = padded_spans()
    agrees(
        idefics2(),
        PerceiverResampler.from_transformers,
        lambda resampler, context: resampler(context, PRESENT.long()),
        lambda resampler, context: resampler(context, spans),
        lambda: images(3),
        torch.float32,
        autocast=True,
    )


def make(redrawn, form: str, **options) -> PerceiverResampler:
    return redrawn(PerceiverResampler(WIDTH, 2, 4, 16, LATENTS, form=form, qk_norm=True, **options))


@pytest.mark.parametrize("form", ["idefics", "idefics2"])
def test_autocast_with_norms_of_our_own(redrawn, served, form):
    """The dtypes fit together; the numbers are those of test_autocast."""
    resampler, (context,) = make(redrawn, form), images()
    with torch.autocast("cpu", torch.bfloat16):
        out = resampler(context)
    assert out.isfinite().all()
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.sum(), list(resampler.parameters())))


def test_padding_and_other_images_may_hold_nan(redrawn, served):
    resampler, spans = (
        make(redrawn, "idefics2"),
        RowSpans.packed(torch.arange(4) * LATENTS, torch.tensor([0, 5, 5, 9]), num_keys=11),
    )
    clean = torch.randn(11, WIDTH)
    other, padding = clean.clone(), clean.clone()
    other[:5], padding[9:] = torch.nan, torch.nan
    assert torch.equal(resampler(other, spans)[LATENTS:], resampler(clean, spans)[LATENTS:])
    results = []
    for context in (clean.requires_grad_(), padding.requires_grad_()):
        out = resampler(context, spans)
        results.append((out, torch.autograd.grad(out.square().sum(), context)[0][:9]))
    assert all(map(torch.equal, *results))


def test_padding_of_a_batch_may_hold_nan(redrawn, served):
    resampler, spans, (context,) = make(redrawn, "idefics2"), padded_spans(), images(3)
    spoilt = context.masked_fill(~PRESENT[..., None], torch.nan)
    assert torch.equal(resampler(spoilt, spans), resampler(context, spans))


def test_spans_beyond_the_last_token_show_no_latents(redrawn, served):
    """Behind the tokens of all images stand the latents of all images."""
    resampler, context = make(redrawn, "idefics2"), torch.randn(TOKENS, WIDTH)
    lo, hi = torch.tensor([[-5, 4]]).int(), torch.tensor([[4, 2**31 - 1]]).int()
    beyond, within = (
        RowSpans(*(x.repeat_interleave(LATENTS, -1) for x in bounds), TOKENS)
        for bounds in ((lo, hi), (lo.clamp(min=0), hi.clamp(max=TOKENS)))
    )
    assert torch.equal(resampler(context, beyond), resampler(context, within))


def test_one_image_without_a_batch_axis(redrawn, served):
    resampler, (context,) = make(redrawn, "idefics"), images(1)
    torch.testing.assert_close(resampler(context[0]), resampler(context)[0])


@pytest.mark.parametrize("packed", [True, False])
def test_compiles_whole_and_once_whatever_the_lengths(redrawn, compiles_once, packed):
    def draw(*lengths):
        if not packed:
            return (torch.randn(len(lengths), sum(lengths), WIDTH),)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        spans = RowSpans.packed(torch.arange(len(cu_seqlens)) * LATENTS, cu_seqlens)
        return torch.randn(sum(lengths), WIDTH), spans

    resampler = redrawn(PerceiverResampler(WIDTH, 1, 4, 16, LATENTS))
    compiles_once(resampler, (draw(*lengths) for lengths in ((5, 4), (2, 6, 9), (3, 0, 7, 1))))


@pytest.mark.parametrize("form", ["idefics", "idefics2"])
def test_state_round_trip(redrawn, form):
    resampler, fresh = make(redrawn, form), make(lambda x: x, form)
    fresh.load_state_dict(resampler.state_dict())
    file = io.BytesIO()
    torch.save(resampler, file)
    file.seek(0)
    (context,) = images()
    for other in (fresh, torch.load(file, weights_only=False)):
        assert torch.equal(other(context), resampler(context))


def test_a_resampler_taken_over_keeps_its_parameters(redrawn):
    for source in (idefics(), idefics2()):
        resampler = PerceiverResampler.from_transformers(redrawn(source).train())
        assert {id(p) for p in resampler.parameters()} == {id(p) for p in source.parameters()}
        assert resampler.training
    assert resampler.state_dict().keys() == source.state_dict().keys()  # idefics2's
    own = make(redrawn, "idefics")
    own.load_state_dict(PerceiverResampler.from_transformers(idefics()).state_dict())


def test_device_dtype_and_first_values():
    resampler = PerceiverResampler(WIDTH, 2, 4, 16, LATENTS, qk_norm=True, device="meta", dtype=torch.half)
    assert {(p.device.type, p.dtype) for p in resampler.parameters()} == {("meta", torch.half)}
    resampler.to_empty(device="cpu").reset_parameters()
    assert 0.5 < resampler.latents.std() < 1.5
    assert repr(resampler).startswith("PerceiverResampler(\n  num_latents=3, embed_dim=40")


def test_refused_resamplers():
    with pytest.raises(ValueError, match=r"attention_dropout of Idefics2PerceiverAttention is 0.1"):
        PerceiverResampler.from_transformers(idefics2(attention_dropout=0.1))
    with pytest.raises(TypeError, match="PerceiverResampler: Linear has no latents; its form is unknown"):
        PerceiverResampler.from_transformers(nn.Linear(2, 2))
    source = idefics()
    source.blocks[1][1].extra = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"PerceiverResampler: it has no place for blocks.1.1.extra.weight of Idefics"):
        PerceiverResampler.from_transformers(source)


def test_errors():
    with pytest.raises(ValueError, match="PerceiverResampler: form is 'blip'; accepted are 'idefics' and 'idefics2'"):
        PerceiverResampler(WIDTH, 1, 4, 16, LATENTS, form="blip")
    resampler, (context,) = PerceiverResampler(WIDTH, 1, 4, 16, LATENTS), images()
    for bad in (context[..., :7], context[None], context[0, 0]):
        with pytest.raises(ValueError, match=r"context has shape .* packed, \(tokens, 40\), or \(batch, tokens, 40\)"):
            resampler(bad)
    for queries, keys in ((LATENTS + 1, TOKENS), (2 * LATENTS, TOKENS), (LATENTS, TOKENS + 1)):
        with pytest.raises(ValueError, match=rf"are for {queries} queries and {keys} keys; .* be for 3 and 9$"):
            resampler(context, RowSpans.full(queries, keys))
    with pytest.raises(ValueError, match="they must be for a multiple of 3 and 9"):
        resampler(context[0], RowSpans.full(4, TOKENS))
