"""Tiny models of every family whose contrastive loss accelerate swaps, and inputs, beside those of `families`."""

from __future__ import annotations

import torch
import transformers as hf
from families import FAMILIES, TEXT, TOWER, VISION, Family, Inputs, contrastive, drawn, pictures, text
from torch import nn

WORDS = {**TEXT, "num_key_value_heads": None}
PROJECTED = {"projection_dim": 16}


def metaclip_2() -> nn.Module:
    return hf.MetaClip2Model(hf.MetaClip2Config(text_config=WORDS, vision_config=TOWER, **PROJECTED))


def altclip() -> nn.Module:
    words = {**WORDS, "pad_token_id": 0, "project_dim": 32}
    return hf.AltCLIPModel(hf.AltCLIPConfig(text_config=words, vision_config=TOWER, **PROJECTED))


def chinese_clip() -> nn.Module:
    return hf.ChineseCLIPModel(hf.ChineseCLIPConfig(text_config=WORDS, vision_config=TOWER, **PROJECTED))


def clipseg() -> nn.Module:
    return hf.CLIPSegModel(hf.CLIPSegConfig(text_config=WORDS, vision_config=TOWER, **PROJECTED))


def align() -> nn.Module:
    blocks = {"kernel_sizes": [3, 3], "in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2]}
    blocks |= {"num_block_repeats": [1, 1], "expand_ratios": [1, 2], "hidden_dim": 16, "image_size": 32}
    blocks |= {"width_coefficient": 1.0, "depth_coefficient": 1.0}
    return hf.AlignModel(hf.AlignConfig(text_config=WORDS, vision_config=blocks, projection_dim=24))


def blip() -> nn.Module:
    return hf.BlipModel(
        hf.BlipConfig(text_config={**WORDS, "encoder_hidden_size": 32}, vision_config=TOWER, **PROJECTED)
    )


def owlvit() -> nn.Module:
    return hf.OwlViTModel(hf.OwlViTConfig(text_config=WORDS, vision_config=TOWER, **PROJECTED))


def owlv2() -> nn.Module:
    return hf.Owlv2Model(hf.Owlv2Config(text_config=WORDS, vision_config=TOWER, **PROJECTED))


def groupvit() -> nn.Module:
    stages = {"depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 2]}
    config = hf.GroupViTConfig(
        text_config=WORDS, vision_config={**TOWER, **stages}, projection_intermediate_dim=24, **PROJECTED
    )
    return hf.GroupViTModel(config)


def vision_text_dual_encoder() -> nn.Module:
    words = {**WORDS, "model_type": "bert"}
    tower = {**TOWER, "model_type": "vit"}
    return hf.VisionTextDualEncoderModel(
        hf.VisionTextDualEncoderConfig(text_config=words, vision_config=tower, **PROJECTED)
    )


def tipsv2() -> nn.Module:
    config = hf.Tipsv2Config(text_config=WORDS, vision_config={**TOWER, "mlp_ratio": 2}, temperature_init_value=0.1)
    return hf.Tipsv2Model(config)


def clvp() -> nn.Module:
    encoder = {
        **VISION,
        "hidden_size": 64,
        "vocab_size": 120,
        "projection_dim": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    decoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 110, "n_inner": 48}
    decoder |= {"max_position_embeddings": 64, "max_text_tokens": 64, "num_mel_attn_blocks": 1, "feature_size": 8}
    decoder |= {"bos_token_id": 108, "eos_token_id": 109, "decoder_fixing_codes": [83, 45, 45, 48]}
    config = hf.ClvpConfig(text_config=encoder, speech_config=encoder, decoder_config=decoder, **PROJECTED)
    return hf.ClvpModelForConditionalGeneration(config)


def clvp_inputs(side: str) -> Inputs:
    return {**text(side, rows=3), "input_features": pictures(3, 8, 11), "return_loss": True}


def built(family: Family) -> tuple[nn.Module, Inputs]:
    """A model with weights drawn anew, and inputs that it tells apart: large weights, small biases, pictures of unlike
    brightness. Where all embeds are alike, little but rounding is left of the gradients of a loss."""
    model, inputs = drawn(family.build()), family.inputs("right")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 0.1 if name.endswith("bias") else 1.0)
        for name, value in (("logit_scale", 1.0), ("logit_bias", -1.0), ("temperature", 0.4)):
            if hasattr(model, name):
                getattr(model, name).fill_(value)
    for name in inputs.keys() & {"pixel_values", "input_features"}:
        inputs[name] += 2 * torch.randn(len(inputs[name]), *(1,) * (inputs[name].dim() - 1))
    return model, inputs


CONTRASTIVE = [family for family in FAMILIES if "loss" in family.swapped] + [
    Family("metaclip_2", metaclip_2, contrastive),
    Family("altclip", altclip, contrastive),
    Family("chinese_clip", chinese_clip, contrastive),
    Family("clipseg", clipseg, contrastive),
    Family("align", align, contrastive),
    Family("blip", blip, contrastive),
    Family("owlvit", owlvit, contrastive),
    Family("owlv2", owlv2, contrastive),
    Family("groupvit", groupvit, contrastive),
    Family("vision_text_dual_encoder", vision_text_dual_encoder, contrastive),
    Family("tipsv2", tipsv2, contrastive),
    Family("clvp", clvp, clvp_inputs),
]
