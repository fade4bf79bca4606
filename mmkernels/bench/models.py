"""Whole models, plain against accelerated: the towers people run, with random weights and real pictures.

Sizes are those of the published models; of towers that repeat one block, as many blocks are taken as show the mixture
of the whole, since they are all alike. `quick` builds the same classes small, to see that they run. Most of their time
goes to linear layers, which no kernel here touches: the report says how much could be gained at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """`run` returns what the model is for: features, or a loss. `trained`: also measured with its backward.
    `like_ours`: of a run in which plain computes more than ours has to, one in which it computes as much, to count."""

    name: str
    build: Callable[[bool], nn.Module]  # of `quick`, as inputs
    inputs: Callable[[bool], Inputs]
    run: Callable[[nn.Module, Inputs], Tensor]
    trained: bool = True
    like_ours: Callable[[nn.Module, Inputs], Tensor] | None = None


def pictures(count: int, size: int) -> Tensor:
    """Crops of scikit-learn's two photographs, (count, 3, size, size), normalised."""
    from sklearn.datasets import load_sample_images

    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    crops = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        height, width = photograph.shape[2:]
        edge = int(torch.randint(height // 2, height + 1, (), generator=generator))
        top = int(torch.randint(height - edge + 1, (), generator=generator))
        left = int(torch.randint(width - edge + 1, (), generator=generator))
        crop = photograph[:, :, top : top + edge, left : left + edge]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    return (torch.cat(crops) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# ---- CLIP ViT-B/16, its text tower, and the loss over 256 pairs

PAIRS = 256


def clip(quick: bool) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    depth = {"num_hidden_layers": 1 if quick else 12}
    vision = {"patch_size": 16, "hidden_size": 768, "num_attention_heads": 12, **depth}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=depth | {"vocab_size": 49408}))


def clip_inputs(quick: bool) -> Inputs:
    encoded = 2 if quick else 16
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 49000, (encoded, 77), generator=generator)
    tokens[:, -1] = 49407
    image, text = (torch.randn(PAIRS - encoded, 512, generator=generator) for _ in range(2))
    return {"images": pictures(encoded, 224), "tokens": tokens, "image_features": image, "text_features": text}


def clip_step(model: nn.Module, inputs: Inputs) -> Tensor:
    """A step as it is made where a batch does not fit into memory: of 256 pairs, 16 are encoded with gradients and the
    features of the others are there. The loss so weighs 16 times what it would if all were encoded, and is still a
    thousandth of the step, so that the figure says of the loss's batch only that it costs nothing; plain and
    accelerated, what is encoded is the same."""
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    from ..nn import ClipLoss

    image = torch.cat([model.get_image_features(inputs["images"]).pooler_output, inputs["image_features"]])
    text = torch.cat([model.get_text_features(inputs["tokens"]).pooler_output, inputs["text_features"]])
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    scale = model.logit_scale.exp()
    if accelerated(model):
        return ClipLoss()(image, text, scale)
    return image_text_contrastive_loss(scale * text @ image.T)


def accelerated(model: nn.Module) -> bool:
    from ..integrations.swap import served_kinds

    return any(served_kinds(module) for module in model.modules())


# ---- vision towers


def clip_vision(quick: bool) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(patch_size=16, num_hidden_layers=1 if quick else 12))


def clip_vision_inputs(quick: bool) -> Inputs:
    return {"images": pictures(1 if quick else 8, 224)}


def siglip_vision(quick: bool) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    so400m = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "patch_size": 14}
    size = {"image_size": 224, "num_hidden_layers": 1} if quick else {"image_size": 384, "num_hidden_layers": 4}
    return SiglipVisionModel(SiglipVisionConfig(**so400m, **size))


def siglip_inputs(quick: bool) -> Inputs:
    return {"images": pictures(1, 224) if quick else pictures(2, 384)}


def qwen_vision(quick: bool) -> nn.Module:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    # The published checkpoints' width; that of transformers' default config is their language model's.
    size = {"depth": 8, "fullatt_block_indexes": [7], "hidden_size": 1280, "intermediate_size": 3420}
    if quick:
        size = {"depth": 2, "fullatt_block_indexes": [1], "hidden_size": 320, "num_heads": 4, "intermediate_size": 640}
    config = Qwen2_5_VLVisionConfig(**size)
    return Qwen2_5_VisionTransformerPretrainedModel._from_config(config)


def qwen_inputs(quick: bool) -> Inputs:
    """1024 x 1024 pixels as the processor cuts them: 74 x 74 patches of 2 equal frames, in squares of 4."""
    merge, patch, side = 2, 14, 18 if quick else 74
    picture = pictures(1, side * patch)[0]
    cut = picture[None].expand(2, -1, -1, -1).view(2, 3, side // merge, merge, patch, side // merge, merge, patch)
    rows = cut.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(side * side, -1)
    return {"hidden_states": rows.contiguous(), "grid_thw": torch.tensor([[1, side, side]])}


# ---- cross-attention of Llama 3.2 Vision


def mllama_layer(quick: bool) -> nn.Module:
    from transformers import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

    small = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 1}
    config = MllamaTextConfig(**small if quick else {})
    config._attn_implementation = "sdpa"
    layer = MllamaCrossAttentionDecoderLayer(config, layer_idx=3)
    nn.init.constant_(layer.cross_attn_attn_gate, 0.5)
    nn.init.constant_(layer.cross_attn_mlp_gate, 0.5)
    return layer


def mllama_inputs(quick: bool) -> Inputs:
    """512 tokens of text, an image of 4 tiles at token 20 and one of 2 at token 200; as the model prepares it, a row
    that sees no tile sees everything, and its MLP is masked."""
    generator = torch.Generator().manual_seed(0)
    tokens, tile, width = 512, *((65, 512) if quick else (1601, 4096))
    mask = torch.full((1, 1, tokens, 8 * tile), torch.finfo(torch.bfloat16).min)
    mask[:, :, :20] = 0
    mask[:, :, 20:200, : 4 * tile] = 0
    mask[:, :, 200:, 4 * tile : 6 * tile] = 0
    return {
        "hidden_states": torch.randn(1, tokens, width, generator=generator),
        "cross_attention_states": torch.randn(1, 8 * tile, width, generator=generator),
        "cross_attention_mask": mask,
        "full_text_row_masked_out_mask": (torch.arange(tokens) >= 20).float().view(1, 1, tokens, 1),
    }


def mllama_run(layer: nn.Module, inputs: Inputs) -> Tensor:
    # A mask of its own for every call, as in a model's forward, which makes it anew: its spans are found anew too.
    mask = inputs["cross_attention_mask"].clone()
    return layer(**inputs | {"cross_attention_mask": mask}, attention_mask=None)


# ---- LLaVA on documents of unlike lengths, a training step


def llava(quick: bool) -> nn.Module:
    """The widths of CLIP ViT-B/16 and SmolLM2-135M, 2 of 12 and 4 of 30 layers; a vocabulary of 4096, since logits of
    the whole one would take most of the step."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 2}
    text = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    text |= {"num_hidden_layers": 4, "head_dim": 64}
    if quick:
        vision |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1}
        text |= {"hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 3, "num_key_value_heads": 1}
        text |= {"num_hidden_layers": 1}
    vision |= {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 16}
    text |= {"model_type": "llama", "vocab_size": 4096, "max_position_embeddings": 8192}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=PICTURE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


PICTURE = 4095  # the token that stands for each of a picture's 196


def llava_pack(quick: bool) -> Inputs:
    """8 documents, a Trainer's usual batch, as one row: none to two pictures, and text of log-normal length."""
    from ..packing import Collator

    chance, generator = random.Random(0), torch.Generator().manual_seed(0)
    documents = []
    for _ in range(3 if quick else 8):
        count, text = chance.choice([0, 1, 1, 1, 2]), int(chance.lognormvariate(3 if quick else 5.3, 0.9))
        words = torch.randint(3, PICTURE, (1, 8 + text), generator=generator)
        ids = torch.cat([torch.full((1, 196 * count), PICTURE), words], 1)
        document = {"input_ids": ids, "labels": ids.masked_fill(ids == PICTURE, -100)}
        documents.append(document | ({"pixel_values": pictures(count, 224)} if count else {}))
    return {name: x for name, x in Collator("llava")(documents).items() if isinstance(x, Tensor)}


def packed_step(model: nn.Module, pack: Inputs) -> Tensor:
    """The loss of every token. Plain transformers makes a dense mask, from positions that begin anew."""
    inputs = {name: pack[name] for name in ("input_ids", "pixel_values", "position_ids")}
    if accelerated(model):
        inputs |= {name: pack[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    return _token_losses(model(**inputs, use_cache=False).logits[0], pack)


def packed_or_padded_step(model: nn.Module, pack: Inputs) -> Tensor:
    """The same; plain, the documents are a batch, padded to the longest as trainers do."""
    if accelerated(model):
        return packed_step(model, pack)
    documents = pack["input_ids"][0].split(pack["cu_seq_lens_q"].diff().tolist())
    ids = pad_sequence(documents, batch_first=True)
    mask = pad_sequence([torch.ones_like(document) for document in documents], batch_first=True)
    out = model(input_ids=ids, attention_mask=mask, pixel_values=pack["pixel_values"], use_cache=False)
    return _token_losses(out.logits[mask.bool()], pack)


def _token_losses(logits: Tensor, pack: Inputs) -> Tensor:
    following = F.pad(pack["labels"][0, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.float(), following, reduction="none")


MODELS = (
    Model("clip-vit-b-16", clip_vision, clip_vision_inputs, lambda m, x: m(x["images"])[0]),
    Model("clip-vit-b-16-step-256", clip, clip_inputs, clip_step),
    Model("siglip-so400m", siglip_vision, siglip_inputs, lambda m, x: m(x["images"])[0]),
    Model("qwen2.5-vl-1024", qwen_vision, qwen_inputs, lambda m, x: m(**x).last_hidden_state, trained=False),
    Model("mllama-cross-attention", mllama_layer, mllama_inputs, mllama_run, trained=False),
    Model("llava-packed-or-padded", llava, llava_pack, packed_or_padded_step, like_ours=packed_step),
    Model("llava-packed-or-masked", llava, llava_pack, packed_step),
)
