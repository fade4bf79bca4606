"""Code as a user writes it, over every public name, for type checkers: tests/test_typing.py."""

import torch
from torch import Tensor, nn

import mmkernels
from mmkernels import RowSpans


def ops(x: Tensor, weight: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    spans = RowSpans.packed(torch.tensor([0, 3, 7]), causal=True)
    out = mmkernels.span_attention(x, x, x, spans, sinks=scale)
    assert isinstance(out, Tensor)  # with return_lse it is a pair
    tokens = mmkernels.patch_embed(x, weight, layout="chw")
    turned = mmkernels.rotary_embed(x, x, x, interleaved=True)
    indices, quantised = mmkernels.nearest_code(x, x)
    turned = turned + quantised + mmkernels.max_similarity(indices, x, cu_texts=indices)
    clip: Tensor = mmkernels.clip_loss(x, x, scale, label_smoothing=0.1, direction="image_to_text")
    clip += mmkernels.clip_loss(x, x, scale, image_ids=ids, text_ids=ids, same="ignored")
    siglip: Tensor = mmkernels.siglip_loss(x, x, 10.0, -10.0)
    return out + tokens + turned + clip + siglip


def modules() -> list[nn.Module]:
    return [
        mmkernels.nn.PatchEmbed(3, 64, 16, num_patches=196),
        mmkernels.nn.SpanSelfAttention(64, 4),
        mmkernels.nn.SpanCrossAttention(64, 4),
        mmkernels.nn.GatedCrossAttentionBlock(64, 128, 4),
        mmkernels.nn.PatchConv2d(3, 64, 16, 16),
        mmkernels.nn.PatchConv3d(3, 64, (2, 14, 14), (2, 14, 14)),
        mmkernels.nn.PerceiverResampler(64, 2, 4, 16, 8),
        mmkernels.nn.ClipLoss(),
        mmkernels.nn.SigLipLoss(),
    ]


def models(model: nn.Module, x: Tensor) -> nn.Module:
    report = mmkernels.accelerate(model, only=["attention"], verbose=False)
    print(report.swapped[0].path, report.left, mmkernels.compare(model, x).ok, mmkernels.__version__)
    with mmkernels.use_backend("cpu"):
        print(mmkernels.explain(mmkernels.rotary_embed, x, x, x))
    try:
        return mmkernels.restore(model)
    except (mmkernels.BackendUnavailable, mmkernels.DistributedError) as error:
        raise SystemExit(str(error)) from error
