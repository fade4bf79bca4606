"""The families that CI runs: those of the field, and the language models that they are built on. Of each, the classes
whose forwards differ."""

from __future__ import annotations

from collections.abc import Collection

from .cases import Case

TRANSFORMERS = {
    # pictures and text, one embedding each
    "clip": ("CLIPModel",),
    "siglip": ("SiglipModel",),
    "siglip2": ("Siglip2Model",),
    "altclip": ("AltCLIPModel",),
    "chinese_clip": ("ChineseCLIPModel",),
    "clipseg": ("CLIPSegModel", "CLIPSegForImageSegmentation"),
    "x_clip": ("XCLIPModel",),
    "align": ("AlignModel",),
    "clap": ("ClapModel",),
    "groupvit": ("GroupViTModel",),
    "owlvit": ("OwlViTModel", "OwlViTForObjectDetection"),
    "metaclip_2": ("MetaClip2Model",),
    "vision_text_dual_encoder": ("VisionTextDualEncoderModel",),
    # pictures in the text of a language model
    "blip": ("BlipModel", "BlipForConditionalGeneration", "BlipForImageTextRetrieval"),
    "blip_2": ("Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval"),
    "instructblip": ("InstructBlipForConditionalGeneration",),
    "llava": ("LlavaForConditionalGeneration",),
    "llava_next": ("LlavaNextForConditionalGeneration",),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration",),
    "idefics": ("IdeficsForVisionText2Text",),
    "idefics2": ("Idefics2ForConditionalGeneration",),
    "idefics3": ("Idefics3ForConditionalGeneration",),
    "smolvlm": ("SmolVLMForConditionalGeneration",),
    "mllama": ("MllamaForConditionalGeneration",),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration",),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration",),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration",),
    "pixtral": ("PixtralVisionModel",),
    "mistral3": ("Mistral3ForConditionalGeneration",),
    "molmo2": ("Molmo2ForConditionalGeneration",),
    "aria": ("AriaForConditionalGeneration",),
    "fuyu": ("FuyuForCausalLM",),
    "emu3": ("Emu3ForConditionalGeneration",),
    "janus": ("JanusForConditionalGeneration",),
    "chameleon": ("ChameleonForConditionalGeneration",),
    "gemma3": ("Gemma3ForConditionalGeneration",),
    "gemma4": ("Gemma4ForConditionalGeneration",),
    "paligemma": ("PaliGemmaForConditionalGeneration",),
    "internvl": ("InternVLForConditionalGeneration",),
    "llama4": ("Llama4ForConditionalGeneration",),
    "glm4v": ("Glm4vForConditionalGeneration",),
    "ovis2": ("Ovis2ForConditionalGeneration",),
    "git": ("GitForCausalLM",),
    "phi4_multimodal": ("Phi4MultimodalVisionModel",),
    "kosmos2": ("Kosmos2ForConditionalGeneration",),
    "florence2": ("Florence2ForConditionalGeneration",),
    # pictures and text, attending to each other
    "bridgetower": ("BridgeTowerModel",),
    "vilt": ("ViltModel",),
    "perceiver": ("PerceiverForMaskedLM",),
    # towers and language models
    "vit": ("ViTModel",),
    "dinov2": ("Dinov2Model",),
    "bert": ("BertForMaskedLM", "BertLMHeadModel"),
    "modernbert": ("ModernBertForMaskedLM",),
    "t5": ("T5ForConditionalGeneration",),
    "nemotron3_diarization": ("Nemotron3DiarizationModel",),
    "whisper": ("WhisperForConditionalGeneration",),
    "gpt2": ("GPT2LMHeadModel",),
    "gpt_oss": ("GptOssForCausalLM",),
    "deepseek_v3": ("DeepseekV3ForCausalLM",),
    "deepseek_v32": ("DeepseekV32ForCausalLM",),
    "doge": ("DogeForCausalLM",),
    "llama": ("LlamaForCausalLM",),
    "mistral": ("MistralForCausalLM",),
    "gemma2": ("Gemma2ForCausalLM",),
    "phi": ("PhiForCausalLM",),
}
TIMM = {
    "vision_transformer": ("test_vit", "vit_tiny_patch16_224"),
    "eva": ("eva02_tiny_patch14_224",),
    "swin_transformer": ("swin_tiny_patch4_window7_224",),
    "naflexvit": ("naflexvit_base_patch16_gap",),
    "convnext": ("convnext_atto",),
}
OPEN_CLIP = {"clip": ("ViT-B-16",), "coca": ("coca_base",), "siglip": ("ViT-B-16-SigLIP",)}
OF = {"transformers": TRANSFORMERS, "timm": TIMM, "open_clip": OPEN_CLIP}


def cases(library: str, families: Collection[str] = ()) -> list[Case]:
    wanted = {family: names for family, names in OF[library].items() if not families or family in families}
    return [Case(library, family, name) for family, names in wanted.items() for name in names]
