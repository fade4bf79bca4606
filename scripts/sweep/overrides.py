"""What the names in a configuration do not tell, by family: sizes that must agree, and what has no default."""

from __future__ import annotations

from typing import Any

OUT = object()  # takes the entry out

# Default configurations that do not exist without these.
FIRST: dict[str, dict[str, Any]] = {
    "AutoformerConfig": {"prediction_length": 6, "context_length": 12, "lags_sequence": [1, 2, 3]},
    "InformerConfig": {"prediction_length": 6, "context_length": 12, "lags_sequence": [1, 2, 3]},
    "TimeSeriesTransformerConfig": {"prediction_length": 6, "context_length": 12, "lags_sequence": [1, 2, 3]},
    "Gemma4AssistantConfig": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}},
    "TimmBackboneConfig": {"backbone": "resnet18", "out_indices": [1, 2]},
}

_IMAGE_WORDS = {f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 20 + i for i in range(16)}
_VISUAL_WORDS = {f"<|visual token {i:06}|>": 20 + i for i in range(16)}

_EFFICIENTNET = {"width_coefficient": 0.3, "depth_coefficient": 0.3, "in_channels": [32, 16, 24, 40, 80, 112, 192]}
_EFFICIENTNET |= {"out_channels": [16, 24, 40, 80, 112, 192, 320]}

# family -> sizes of inputs that its configuration does not tell.
INPUTS: dict[str, dict[str, Any]] = {
    "emu3": {"image": 16},
    "depth_pro": {"image": 64},
    "gemma4": {"mels": 128},
    # codebooks: tokens of (rows, length, codebooks)
    "BarkFineModel": {"codebooks": 8},
    "CsmBackboneModel": {"codebooks": 32},
    "CsmForConditionalGeneration": {"codebooks": 32},
    "dia": {"decoder_codebooks": 9},
    "chameleon": {"image": 16},
    "JanusVQVAE": {"image": 8},
    "Florence2VisionBackbone": {"image_name": "hidden_states"},  # by class
}

# family -> dotted path in its configuration -> value, after the generic rules. "Class:path" is for that class, of the
# model or of its configuration, alone.
SIZES: dict[str, dict[str, Any]] = {
    "align": {f"{path}{name}": value for path in ("", "vision_config.") for name, value in _EFFICIENTNET.items()}
    | {"projection_dim": 96},
    "aria": {"projector_patch_to_query_dict": {"16": 5}},
    "bamba": {"attn_layer_indices": [1]},
    "bros": {"dim_bbox_sinusoid_emb_2d": OUT, "dim_bbox_sinusoid_emb_1d": OUT, "dim_bbox_projection": OUT},
    "beit": {
        "BeitForSemanticSegmentation:num_hidden_layers": 4,
        "BeitForSemanticSegmentation:out_indices": [1, 2, 3, 4],
    },
    "blt": {"num_hidden_layers": 2, "encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "blip_2": {"qformer_config.use_qformer_text_input": False}
    | {
        f"{cls}:{path}use_qformer_text_input": True
        for cls in ("Blip2ForImageTextRetrieval", "Blip2TextModelWithProjection")
        for path in ("", "qformer_config.")
    },
    "bridgetower": {"hidden_size": 128, "text_config.hidden_size": 128, "vision_config.hidden_size": 128}
    | {"contrastive_hidden_size": 32, "logit_scale_init_value": 2.6592},
    "chameleon": {
        "vocabulary_map": {"<image>": 101, **_IMAGE_WORDS},
        "vq_config.num_embeddings": 16,
        "vq_config.resolution": 16,
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 2],
        "vq_config.attn_resolutions": [8],
        "vq_config.embed_dim": 32,
        "vq_config.latent_channels": 32,
    },
    "clap": {
        f"{path}{name}": value
        for path in ("audio_config.", "ClapAudioConfig:")
        for name, value in {
            "num_mel_bins": 16,
            "spec_size": 64,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "window_size": 4,
            "patch_embeds_hidden_size": 32,
            "depths": [2, 2],
            "num_attention_heads": [2, 2],
            "hidden_size": 64,
        }.items()
    },
    "clvp": {"text_config.hidden_size": 128, "speech_config.hidden_size": 128, "ClvpEncoderConfig:hidden_size": 128},
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "CohereCompassTextConfig:rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "conditional_detr": {"d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "cosmos3_edge": {
        "text_config.rope_parameters.mrope_section": [2, 1, 1],
        "rope_parameters.mrope_section": [2, 1, 1],
    },
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "detr": {"d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"], "mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "efficientnet": _EFFICIENTNET,
    "efficientloftr": {"hidden_size": 64, "out_features": [32, 32, 48, 64], "stage_in_channels": [1, 32, 32, 48]},
    "emu3": {
        "vocabulary_map": {"<image>": 101, **_VISUAL_WORDS, "<|extra_200|>": 40},
        "vq_config.codebook_size": 16,
        "vq_config.embed_dim": 8,
        "vq_config.latent_channels": 8,
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.num_res_blocks": 1,
        "vq_config.hidden_size": 32,
        "vq_config.attn_resolutions": [1],
    },
    "ernie4_5_vl_moe": {"text_config.head_dim": 16, "head_dim": 16},
    "esmc": {"num_key_value_heads": 4},
    "esmfold2": {"esmc_config.num_key_value_heads": 4},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "gemma4": {"audio_config.subsampling_conv_channels": [128, 32], "subsampling_conv_channels": [128, 32]},
    "embedding_gemma2": {"audio_config.subsampling_conv_channels": [128, 32]},
    "diffusion_gemma": {
        f"{path}{name}": value
        for path in ("text_config.", "DiffusionGemmaTextConfig:")
        for name, value in {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}.items()
    },
    "glm5_next": {"num_key_value_heads": 4, "text_config.num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granite4_vision": {"deepstack_layer_map": [[1, 0]], "downsample_rate": "2/4"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"], "num_hidden_layers": 3},
    "janus": {
        "vq_config.num_patches": 4,
        "vq_config.latent_channels": 32,
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.num_res_blocks": 1,
        "vq_config.num_embeddings": 16,
        "vq_config.embed_dim": 8,
        "JanusVQVAE:num_patches": 4,
        "JanusVQVAE:channel_multiplier": [1, 1],
    },
    "llama4": {
        f"{path}{name}": value
        for path in ("vision_config.", "Llama4VisionConfig:")
        for name, value in {
            "image_size": 16,
            "patch_size": 4,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "intermediate_size": 128,
        }.items()
    },
    "lw_detr": {"backbone_config.image_size": 64, "image_size": 64},
    "mamba2": {"num_heads": 8},
    "mistral_large4": {"kv_source_layers": OUT, "text_config.kv_source_layers": OUT},
    "mllama": {"vision_config.vision_output_dim": 64, "MllamaVisionConfig:vision_output_dim": 64},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0], "text_config.additional_vocab_size": 8},
    "moonshine_streaming": {"encoder_config.num_key_value_heads": 4},
    "muse_spark": {"num_hidden_layers": 4, "audio_config.num_hidden_layers": 4},
    "neomme": {"head_dim": 16},
    "perceiver": {
        "num_self_attention_heads": 4,
        "PerceiverForMaskedLM:max_position_embeddings": 13,  # it decodes as many words as there may be
        "PerceiverForImageClassificationConvProcessing:num_cross_attention_heads": 1,
        "PerceiverForImageClassificationConvProcessing:num_self_attention_heads": 1,
        "PerceiverForImageClassificationFourier:num_cross_attention_heads": 1,
        "PerceiverForOpticalFlow:num_cross_attention_heads": 1,
        "PerceiverForOpticalFlow:num_self_attention_heads": 1,
        "PerceiverForMultimodalAutoencoding:num_cross_attention_heads": 1,
        "PerceiverForMultimodalAutoencoding:num_self_attention_heads": 1,
    },
    "qwen3_omni_moe": {"text_config.shared_expert_intermediate_size": 32},
    "qwen4_exp": {
        f"{prefix}{name}": value
        for prefix in ("", "text_config.")
        for name, value in {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }.items()
    },
    "reformer": {"axial_pos_shape": [4, 8], "axial_pos_embds_dim": [16, 16], "ReformerModelWithLMHead:is_decoder": True}
    | {"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "attn_layers": ["local", "lsh"]}
    | {"ReformerForQuestionAnswering:is_decoder": False, "ReformerForMaskedLM:is_decoder": False, "num_buckets": 4},
    "seggpt": {"merge_index": 0},
    "t5gemma": {"T5GemmaEncoderModel:is_encoder_decoder": False},
    "tvp": {"visual_prompt_size": 4, "max_img_size": 64},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "vilt": {"ViltForImagesAndTextClassification:num_images": 2},
    "wav2vec2_bert": {"vocab_size": 32},
    "wav2vec2_conformer": {"vocab_size": 32},
    "xlnet": {"d_head": 8},
}
