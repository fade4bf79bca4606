"""Tiny models of every family that accelerate knows, with inputs that reach their quirks: grouped heads, images of
unequal size and number, padding on either side; all weights drawn anew, since zeroed gates would hide what they gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn

Inputs = dict[str, Tensor]

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**VISION, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 120, "head_dim": 8}
TEXT |= {"max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWER = {**VISION, "image_size": 32, "patch_size": 8}
IMAGE = 101  # the token that stands for an image, or for each of its patches


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[str], Inputs]  # of a side of padding, "left" or "right"
    generates: bool = False
    swapped: tuple[str, ...] = ("patch embedding", "attention")  # kinds of hot path that are found


def text(side: str, length: int = 13, rows: int = 2, start: tuple[int, ...] = ()) -> Inputs:
    """Tokens 3 to 99, the last row shorter by 4; `start` comes first in each row's own text."""
    ids = torch.randint(3, 100, (rows, length))
    mask = torch.ones_like(ids)
    for row, missing in enumerate([0] * (rows - 1) + [4]):
        begin = missing if side == "left" else 0
        ids[row, begin : begin + len(start)] = torch.tensor(start, dtype=torch.long)
        if missing:
            padding = slice(0, missing) if side == "left" else slice(-missing, None)
            ids[row, padding], mask[row, padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def pictures(*shape: int) -> Tensor:
    return torch.randn(*shape)


def drawn(model: nn.Module) -> nn.Module:
    """With all weights anew, none of them zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name else 0.0))
            else:
                parameter.normal_(std=0.15)
    for module in model.modules():
        for name in ("freeze_lm_head", "freeze_text_layers"):
            if hasattr(module, name):
                setattr(module, name, False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped matrix products know no float64
    return model.requires_grad_(True).eval()


# ---- contrastive


def clip() -> nn.Module:
    config = hf.CLIPConfig(text_config={**TEXT, "num_key_value_heads": None}, vision_config=TOWER, projection_dim=16)
    return hf.CLIPModel(config)


def contrastive(side: str) -> Inputs:
    inputs = text(side, rows=3)
    inputs["input_ids"][torch.arange(3), -1] = 2
    return {**inputs, "pixel_values": pictures(3, 3, 32, 32), "return_loss": True}


def siglip() -> nn.Module:
    config = hf.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=TOWER)
    return hf.SiglipModel(config)


def siglip2() -> nn.Module:
    vision = {**VISION, "patch_size": 4, "num_patches": 16}
    return hf.Siglip2Model(hf.Siglip2Config(text_config={**TEXT, "projection_size": 32}, vision_config=vision))


def siglip2_inputs(side: str) -> Inputs:
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 12:] = 0
    shapes = torch.tensor([[4, 5], [3, 4], [5, 4]])
    images = {"pixel_values": pictures(3, 20, 48), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {**text(side, rows=3), **images, "return_loss": True}


# ---- BLIP-2


def blip2_config(**more) -> hf.Blip2Config:
    qformer = {**VISION, "encoder_hidden_size": 32, "vocab_size": 120, "cross_attention_frequency": 1}
    qformer |= {"use_qformer_text_input": more.pop("reads_text", False)}
    language = {**TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
    return hf.Blip2Config(
        vision_config=TOWER,
        qformer_config=qformer,
        text_config=language,
        num_query_tokens=5,
        image_text_hidden_size=16,
        image_token_index=IMAGE,
        **more,
    )


def blip2_inputs(side: str) -> Inputs:
    return {**text(side, length=18, start=(IMAGE,) * 5), "pixel_values": pictures(2, 3, 32, 32)}


def blip2_retrieval(matching: bool) -> Callable[[str], Inputs]:
    def inputs(side: str) -> Inputs:
        return {**text(side), "pixel_values": pictures(2, 3, 32, 32), "use_image_text_matching_head": matching}

    return inputs


# ---- images as tokens of a language model


def llama(**more) -> dict:
    return {**TEXT, "model_type": "llama", **more}


def image_tokens(count: int, *, token: int = IMAGE, pixels: Callable[[], Inputs], length: int = 0):
    def inputs(side: str) -> Inputs:
        given = text(side, length=(length or count + 11), start=(5, *(token,) * count))
        return {**given, **pixels()}

    return inputs


def llava() -> nn.Module:
    vision = {**TOWER, "model_type": "clip_vision_model"}
    config = hf.LlavaConfig(vision_config=vision, text_config=llama(), image_token_index=IMAGE, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config)


def llava_next() -> nn.Module:
    vision = {**TOWER, "model_type": "clip_vision_model"}
    grid = [[32, 64], [64, 32], [64, 64]]
    config = hf.LlavaNextConfig(
        vision_config=vision,
        text_config=llama(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=grid,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def llava_next_pixels() -> Inputs:
    return {"pixel_values": pictures(2, 3, 3, 32, 32), "image_sizes": torch.tensor([[64, 32], [64, 32]])}


def idefics(resampler: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        vision = {"embed_dim": 32, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2}
        vision |= {"num_attention_heads": 2, "intermediate_size": 48}
        perceiver = {"use_resampler": resampler, "resampler_n_latents": 5, "resampler_depth": 2}
        perceiver |= {"resampler_n_heads": 2, "resampler_head_dim": 16}
        config = hf.IdeficsConfig(
            **{**TEXT, "num_key_value_heads": None},
            cross_layer_interval=1,
            qk_layer_norms=True,
            additional_vocab_size=0,
            vision_config=vision,
            perceiver_config={**perceiver, "qk_layer_norms_perceiver": True},
            use_resampler=resampler,
        )
        return hf.IdeficsForVisionText2Text(config)

    return build


def idefics_inputs(side: str) -> Inputs:
    given = text(side)
    mask = torch.zeros(2, 13, 2, dtype=torch.long)
    mask[0, 2:7, 0], mask[0, 7:, 1], mask[1, 5:, 0] = 1, 1, 1
    return {**given, "pixel_values": pictures(2, 2, 3, 32, 32), "image_attention_mask": mask}


def idefics2() -> nn.Module:
    perceiver = {"hidden_size": 32, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4}
    perceiver |= {"resampler_head_dim": 8, "num_key_value_heads": 2}
    config = hf.Idefics2Config(
        vision_config=TOWER,
        perceiver_config=perceiver,
        text_config={**TEXT, "model_type": "mistral", "sliding_window": 6},
        image_token_id=IMAGE,
    )
    return hf.Idefics2ForConditionalGeneration(config)


def idefics3() -> nn.Module:
    config = hf.Idefics3Config(vision_config=TOWER, text_config=llama(), scale_factor=2, image_token_id=IMAGE)
    return hf.Idefics3ForConditionalGeneration(config)


def padded_pictures(images: int) -> Callable[[], Inputs]:
    """The first with fewer rows, the second with fewer columns of patches."""

    def pixels() -> Inputs:
        mask = torch.ones(2, images, 32, 32, dtype=torch.bool)
        mask[0, 0, 16:], mask[1, 0, :, 24:] = False, False
        return {"pixel_values": pictures(2, images, 3, 32, 32), "pixel_attention_mask": mask}

    return pixels


def mllama() -> nn.Module:
    vision = {**VISION, "attention_heads": 2, "num_global_layers": 1, "image_size": 16, "patch_size": 8}
    vision |= {"max_num_tiles": 2, "vision_output_dim": 64, "intermediate_layers_indices": [0]}
    vision |= {"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    language = {
        **TEXT,
        "cross_attention_layers": [1],
        "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    return hf.MllamaForConditionalGeneration(
        hf.MllamaConfig(vision_config=vision, text_config=language, image_token_index=IMAGE)
    )


def mllama_inputs(side: str) -> Inputs:
    mask = torch.zeros(2, 13, 2, 2, dtype=torch.long)
    mask[0, 3:, 0], mask[0, 8:, 1, 0], mask[1, 6:, 0, 0] = 1, 1, 1
    tiles = {"aspect_ratio_ids": torch.tensor([[2, 1], [1, 1]])}
    tiles["aspect_ratio_mask"] = torch.tensor([[[1, 1], [1, 0]], [[1, 0], [1, 0]]])
    return {**text(side), "pixel_values": pictures(2, 2, 2, 3, 16, 16), "cross_attention_mask": mask, **tiles}


def qwen(cls: str, config: str, **vision) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        tower = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        language = {**TEXT, "rope_parameters": rope}
        tokens = {
            "image_token_id": IMAGE,
            "video_token_id": 102,
            "vision_start_token_id": 103,
            "vision_end_token_id": 104,
        }
        return getattr(hf, cls)(getattr(hf, config)(text_config=language, vision_config={**tower, **vision}, **tokens))

    return build


def qwen_inputs(side: str) -> Inputs:
    """A picture of 4 x 6 patches and one of 2 x 4: 6 and 2 tokens."""
    given = text(side, length=20)
    first, second = (0, 4) if side == "left" else (0, 0)
    for row, begin, count in ((0, first, 6), (1, second, 2)):
        ids = given["input_ids"][row]
        ids[begin + 1], ids[begin + 2 : begin + 2 + count], ids[begin + 2 + count] = 103, IMAGE, 104
    grids = torch.tensor([[1, 4, 6], [1, 2, 4]])
    given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    return {**given, "pixel_values": pictures(32, 3 * 2 * 4 * 4), "image_grid_thw": grids}


def pixtral() -> nn.Module:
    vision = {**VISION, "model_type": "pixtral", "image_size": 32, "patch_size": 8}
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config={**TEXT, "model_type": "mistral"},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return hf.LlavaForConditionalGeneration(config)


def pixtral_inputs(side: str) -> Inputs:
    """Pictures of 4 x 4 and 2 x 3 patches."""
    given = text(side, length=26)
    begin = 4 if side == "left" else 0
    given["input_ids"][0, 1:17], given["input_ids"][1, begin + 1 : begin + 7] = IMAGE, IMAGE
    return {**given, "pixel_values": pictures(2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32], [16, 24]])}


def fuyu() -> nn.Module:
    config = hf.FuyuConfig(
        **{**TEXT, "num_key_value_heads": None},
        image_size=32,
        patch_size=8,
        image_token_id=IMAGE,
        text_config={**TEXT, "model_type": "persimmon"},
    )
    return hf.FuyuForCausalLM(config)


def aria() -> nn.Module:
    vision = {**TOWER, "model_type": "idefics3_vision"}
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    config = hf.AriaConfig(
        vision_config=vision,
        text_config={**TEXT, "model_type": "aria_text", **experts},
        image_token_index=IMAGE,
        projector_patch_to_query_dict={"16": 5},
        vision_feature_layer=-1,
    )
    return hf.AriaForConditionalGeneration(config)


def aria_pixels() -> Inputs:
    mask = torch.ones(2, 32, 32, dtype=torch.bool)
    mask[1, 24:] = False
    return {"pixel_values": pictures(2, 3, 32, 32), "pixel_mask": mask}


def emu3() -> nn.Module:
    vq = {"codebook_size": 16, "embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1]}
    vq |= {"num_res_blocks": 1, "hidden_size": 32, "attn_resolutions": [1]}
    vocabulary = {"<image>": IMAGE, **{f"<|visual token {i:06}|>": 20 + i for i in range(16)}, "<|extra_200|>": 40}
    config = hf.Emu3Config(vq_config=vq, text_config={**TEXT, "attention_dropout": 0.0}, vocabulary_map=vocabulary)
    return hf.Emu3ForConditionalGeneration(config)


def janus() -> nn.Module:
    vision = {**TOWER, "projection_dim": 32, "num_image_tokens": 16}
    vq = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32, "num_patches": 4}
    vq |= {"channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32}
    config = hf.JanusConfig(text_config=llama(), vision_config=vision, vq_config=vq, image_token_id=IMAGE)
    return hf.JanusForConditionalGeneration(config)


def chameleon() -> nn.Module:
    vq = {"embed_dim": 32, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32, "resolution": 16}
    vq |= {"channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8]}
    vocabulary = {
        "<image>": IMAGE,
        **{f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 20 + i for i in range(16)},
    }
    config = hf.ChameleonConfig(**TEXT, vq_config=vq, vocabulary_map=vocabulary)
    return hf.ChameleonForConditionalGeneration(config)


def gemma3() -> nn.Module:
    language = {**TEXT, "sliding_window": 6, "query_pre_attn_scalar": 8, "num_hidden_layers": 2}
    language |= {"layer_types": ["sliding_attention", "full_attention"]}
    config = hf.Gemma3Config(
        text_config=language, vision_config={**TOWER}, mm_tokens_per_image=4, image_token_index=IMAGE
    )
    return hf.Gemma3ForConditionalGeneration(config)


def two_images(per_image: int, length: int):
    """Images in the middle of the text, for token_type_ids' sake."""

    def inputs(side: str) -> Inputs:
        given = text(side, length=length)
        begin = 4 if side == "left" else 0
        for row, first in ((0, 3), (1, begin + 2)):
            given["input_ids"][row, first : first + per_image] = IMAGE
        given["token_type_ids"] = (given["input_ids"] == IMAGE).long()
        return {**given, "pixel_values": pictures(2, 3, 32, 32)}

    return inputs


def paligemma() -> nn.Module:
    config = hf.PaliGemmaConfig(
        vision_config={**TOWER, "projection_dim": 32},
        text_config={**TEXT, "model_type": "gemma"},
        projection_dim=32,
        hidden_size=32,
        image_token_index=IMAGE,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def paligemma_inputs(side: str) -> Inputs:
    given = text(side, length=27)
    begin = 4 if side == "left" else 0
    given["input_ids"][0, :16], given["input_ids"][1, begin : begin + 16] = IMAGE, IMAGE
    kinds = torch.zeros(2, 27, dtype=torch.long)
    kinds[0, 20:], kinds[1, begin + 19 :] = 1, 1
    return {**given, "token_type_ids": kinds, "pixel_values": pictures(2, 3, 32, 32)}


def internvl() -> nn.Module:
    vision = {**VISION, "image_size": [32, 32], "patch_size": [8, 8], "use_qk_norm": True}
    config = hf.InternVLConfig(
        vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, image_token_id=IMAGE, image_seq_length=4
    )
    return hf.InternVLForConditionalGeneration(config)


def molmo2() -> nn.Module:
    tower = {**VISION, "num_key_value_heads": 2, "head_dim": 16, "image_size": [16, 16], "patch_size": 4}
    adapter = {
        **VISION,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vision_feature_layer": [0, 1],
        "text_hidden_size": 32,
    }
    adapter.pop("num_hidden_layers")
    config = hf.Molmo2Config(
        vision_config=tower,
        adapter_config=adapter,
        text_config={**TEXT, "additional_vocab_size": 8},
        image_patch_id=IMAGE,
    )
    return hf.Molmo2ForConditionalGeneration(config)


def molmo2_inputs(side: str) -> Inputs:
    """A crop an image, 2 x 2 tokens of 2 x 2 patches each; and no low-resolution copy."""
    given = image_tokens(4, pixels=dict)(side)
    given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    places = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    pooling = torch.cat([places, places + 16])
    pooling[2, 3] = -1
    grids = torch.tensor([[2, 2, 0, 0]] * 2)
    crops = {"image_num_crops": torch.ones(2, dtype=torch.long), "image_token_pooling": pooling, "image_grids": grids}
    return {**given, "pixel_values": pictures(2, 16, 48), **crops}


def llama4() -> nn.Module:
    vision = {**VISION, "image_size": 16, "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16}
    vision |= {
        "projector_output_dim": 16,
        "intermediate_size": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    language = {
        **TEXT,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": 8,
        "num_hidden_layers": 4,
    }
    config = hf.Llama4Config(vision_config=vision, text_config=language, image_token_index=IMAGE)
    return hf.Llama4ForConditionalGeneration(config)


def perceiver() -> nn.Module:
    config = hf.PerceiverConfig(
        num_latents=6,
        d_latents=32,
        d_model=32,
        num_self_attends_per_block=2,
        vocab_size=120,
        num_self_attention_heads=4,
        num_cross_attention_heads=2,
        max_position_embeddings=32,
        attention_probs_dropout_prob=0.0,
    )
    return hf.PerceiverForMaskedLM(config)


def perceiver_inputs(side: str) -> Inputs:
    return {"inputs": torch.randint(3, 100, (2, 32)), "attention_mask": text(side, length=32)["attention_mask"]}


def square_pixels(size: int, key: str = "pixel_values", **more: Tensor) -> Callable[[], Inputs]:
    return lambda: {key: pictures(2, 3, size, size), **more}


FAMILIES = [
    Family("clip", clip, contrastive, swapped=("patch embedding", "attention", "loss")),
    Family("siglip", siglip, contrastive, swapped=("patch embedding", "attention", "loss")),
    Family("siglip2", siglip2, siglip2_inputs, swapped=("attention", "loss")),
    Family("blip_2", lambda: hf.Blip2ForConditionalGeneration(blip2_config()), blip2_inputs, generates=True),
    Family("blip_2 itc", lambda: hf.Blip2ForImageTextRetrieval(blip2_config(reads_text=True)), blip2_retrieval(False)),
    Family("blip_2 itm", lambda: hf.Blip2ForImageTextRetrieval(blip2_config(reads_text=True)), blip2_retrieval(True)),
    Family("llava", llava, image_tokens(16, pixels=square_pixels(32)), generates=True),
    Family("llava_next", llava_next, image_tokens(56, pixels=llava_next_pixels), generates=True),
    Family("idefics", idefics(False), idefics_inputs, generates=True),
    Family("idefics, resampler", idefics(True), idefics_inputs, generates=True),
    Family("idefics2", idefics2, image_tokens(10, pixels=padded_pictures(2)), generates=True),
    Family("idefics3", idefics3, image_tokens(8, pixels=padded_pictures(2)), generates=True),
    Family("mllama", mllama, mllama_inputs, generates=True),
    Family(
        "qwen2_vl",
        qwen("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", embed_dim=32, hidden_size=32),
        qwen_inputs,
        generates=True,
    ),
    Family(
        "qwen2_5_vl",
        qwen(
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            hidden_size=32,
            out_hidden_size=32,
            intermediate_size=48,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        qwen_inputs,
        generates=True,
    ),
    Family(
        "qwen3_vl",
        qwen(
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLConfig",
            hidden_size=32,
            out_hidden_size=32,
            intermediate_size=48,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        qwen_inputs,
        generates=True,
    ),
    Family("pixtral", pixtral, pixtral_inputs, generates=True),
    Family(
        "fuyu",
        fuyu,
        image_tokens(6, pixels=lambda: {"image_patches": pictures(2, 6, 192)}),
        generates=True,
        swapped=("attention",),
    ),
    Family("aria", aria, image_tokens(5, pixels=aria_pixels), generates=True),
    Family(
        "emu3",
        emu3,
        image_tokens(72, pixels=square_pixels(16, image_sizes=torch.tensor([[16, 16]] * 2))),
        generates=True,
        swapped=("attention",),
    ),
    Family("janus", janus, image_tokens(16, pixels=square_pixels(32)), generates=True),
    Family("chameleon", chameleon, image_tokens(64, pixels=square_pixels(16)), generates=True, swapped=("attention",)),
    Family("gemma3", gemma3, two_images(4, 15), generates=True),
    Family("paligemma", paligemma, paligemma_inputs, generates=True),
    Family("internvl", internvl, image_tokens(4, pixels=square_pixels(32)), generates=True),
    Family("molmo2", molmo2, molmo2_inputs, generates=True, swapped=("attention",)),
    Family("llama4", llama4, image_tokens(4, pixels=square_pixels(16)), generates=True),
    Family("perceiver", perceiver, perceiver_inputs, swapped=("attention",)),
]
