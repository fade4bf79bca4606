"""A tiny configuration of any transformers model, from its default one.

The default configuration is walked with all its sub-configurations, and every size is shrunk by its name: widths become
32, heads 4 with 2 for keys and values, layers as few as show each kind of layer once. Numbers that mean something else
(kernel sizes, strides, ratios, group counts) stay. What names cannot tell is in overrides.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

WIDTH, HEADS, KV_HEADS, HEAD, FFN, VOCABULARY = 32, 4, 2, 8, 48, 128
IMAGE, PATCH, POSITIONS, FRAMES = 32, 8, 256, 4
FIRST_SPECIAL = 100  # token ids from here on are the special ones of a configuration; text is drawn below

Config = dict[str, Any]
Rule = Any  # a number, or a function of the value


def at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def if_any(size: int) -> Callable[[int], int]:
    """Sizes that switch something off where they are 0."""
    return lambda value: size if value > 0 else value


def groups(value: int) -> int:
    return min(value, 2)


def window(value: int) -> int:
    """In pixels where it is large (Qwen2.5-VL), in patches or tokens where it is not."""
    return 32 if value >= 64 else min(value, 4)


# The first whose pattern matches the whole name decides.
SCALARS: tuple[tuple[str, Rule], ...] = (
    (r"chunk_size_feed_forward|pretraining_tp|num_labels|num_nextn_predict_layers|num_mtp_modules", lambda v: v),
    (r".*(_rate|_ratio|_prob|_eps|_epsilon|_coef|_factor|dropout|theta|_std|_range|_cost|_index|_id)", lambda v: v),
    (r".*(kernel_size|stride|padding|dilation|conv_kernel|d_conv|expand|temporal_patch_size|merge_size)", lambda v: v),
    (
        r"(num_mel_bins|n_mels|sampling_rate|sample_rate|hop_length|audio_channels|num_channels|in_chans|fps)",
        lambda v: v,
    ),
    (r".*vocab_size(_per_layer_input)?|vocab_size.*|codebook_size|.*num_embeddings|n_codes", at_most(VOCABULARY)),
    (r"type_vocab_size|num_labels|num_classes", lambda v: v),
    # attention
    (r"(num_)?(.*_)?(attention_|attn_)?kv_heads|.*key_value_heads|n_kv_heads?|num_kv", at_most(KV_HEADS)),
    (r"linear_num_value_heads|mamba_n_heads|mamba_num_heads|n_mamba_heads", at_most(HEADS)),
    (r"linear_num_key_heads|index_n_heads|indexer_n_heads|index_num_heads", at_most(KV_HEADS)),
    (r"(num_|n_)?(.*_)?(num_)?(attention_|self_attention_|cross_attention_|attn_)?heads?", at_most(HEADS)),
    (r"qk_rope_head_dim|.*rope_head_dim", if_any(4)),
    (r"qk_head_dim", if_any(HEAD + 4)),
    (r"index_head_dim", if_any(HEAD)),
    (r"index_topk", at_most(4)),
    (r".*head_dims?|.*head_size|d_kv|head_width|.*_d_head|kv_channels|dim_head", if_any(HEAD)),
    (r".*lora_rank.*|.*_rank|.*low_rank_dim", at_most(16)),
    (r"upsample_groups", at_most(WIDTH)),
    (r"rotary_dim", at_most(HEAD)),
    (r"sliding_window.*|attention_window|local_attention|attention_chunk_size|window_attn.*", at_most(6)),
    (r"window_size|window", window),
    # experts
    (r"(num_experts_per_tok|.*top_?k|num_selected_experts|num_experts_per_token|topk_num.*)", at_most(2)),
    (r"topk_group", lambda v: 1),
    (r"n_group|num_expert_group|num_groups", groups),
    (r".*shared_experts", groups),
    (r".*experts", at_most(4)),
    (r"(expert_|.*_expert_|moe_|.*moe.*_)(intermediate_size|ffn_.*size|hidden_size|ffn_dim)", at_most(FFN)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|n_dense_layers|first_dense_layers", at_most(1)),
    # state spaces
    (r".*(d_state|state_size|state_dim|ssm_state.*)|time_step_rank|mamba_dt_rank|dt_rank", at_most(8)),
    (r"(mamba_)?n_groups", groups),
    (r"(mamba_)?chunk_size", at_most(8)),
    # how long things are
    (
        r"max_.*position_embeddings|max_position.*|n_positions|n_ctx|max_seq_len.*|seq_length|max_seq_length",
        at_most(POSITIONS),
    ),
    (r"max_source_positions|max_target_positions|max_2d_position_embeddings", at_most(POSITIONS)),
    (r"original_max_position_embeddings", at_most(POSITIONS // 2)),
    (r"num_frames|.*_num_frames|frames_per_clip|max_temporal.*|num_image_with_embedding", at_most(FRAMES)),
    (
        r".*num_latents|.*n_latents|num_query_tokens|.*num_queries|num_query.*|query_length|num_slots|latent_query_num",
        at_most(5),
    ),
    (r"mm_tokens_per_image", at_most(4)),
    (r"num_position_embeddings", at_most(16)),
    (r"num_register_tokens|num_memory_tokens", groups),
    # widths
    (
        r".*(intermediate|ffn|feed_?forward|inner|mlp|ff)_?(dim|size|hidden.*)?|d_ff|n_inner|.*_ffn_dim|mlp_dim",
        at_most(FFN),
    ),
    (r"image_size|img_size|input_size|resolution|input_resolution|pretrain_img_size", at_most(IMAGE)),
    (r"patch_size", at_most(PATCH)),
    (r"(.*_)?(layers?|depth|blocks?|num_hidden_layers|num_layers)|n_layers?", at_most(2)),
    (r".*(hidden|embed|embd|model|width|project|dim|size|channels|features).*", at_most(WIDTH)),
)
PATTERNS = tuple((re.compile(pattern), rule) for pattern, rule in SCALARS)

# What configurations leave open, and code needs.
WHERE_NONE = {"head_dim": HEAD, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "pad_token_id": 0}
WHERE_NONE |= {
    "image_token_id": 126,
    "image_token_index": 126,
    "video_token_id": 125,
    "video_token_index": 125,
    "audio_token_id": 124,
    "num_experts_per_tok": 2,
}

# Lists of the numbers of layers; lists of one number a stage.
INDICES = re.compile(r".*(index|indices|indexes|idx|layer_ids?|_layers|layer_idx.*)")
PER_STAGE_HEADS = re.compile(r"(num_|n_)?(attention_)?heads|num_attention_heads")
PER_STAGE_WIDTHS = re.compile(
    r".*(hidden_sizes|embed_dims?|dims|channels|hidden_size|widths|embedding_size|sizes|filters).*"
)
PER_STAGE_LAYERS = re.compile(r".*(depths?|layers|num_blocks|repeats|blocks)")
LISTS = {"image_grid_pinpoints": [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE]]}
# Made from the numbers of layers by the configuration's own code.
DERIVED = ("stage_names", "out_features", "num_feat_extract_layers")
FORGOTTEN = ("transformers_version", "architectures", "_name_or_path", "_attn_implementation_autoset", "dtype")


def shrunk(config: Config) -> Config:
    """A copy with every size small, and ids of special tokens inside the small vocabulary."""
    return renumbered(_small(config))


def fewer_layers(config: Config) -> Config:
    """A gentler cut, for models whose widths hang together in ways that names do not tell: vocabulary and layers."""
    return renumbered(_small(config, keep_widths=True))


def _small(config: Config, keep_widths: bool = False) -> Config:
    small: Config = {}
    chosen = _layers_to_keep(config)
    for name, value in config.items():
        if name in FORGOTTEN or name in DERIVED:
            continue
        if name in chosen:
            small[name] = chosen[name]
        elif isinstance(value, dict):
            small[name] = (
                _small(value, keep_widths) if "model_type" in value or name.endswith("config") else dict(value)
            )
        elif isinstance(value, (list, tuple)):
            small[name] = _small_list(name, list(value), config, keep_widths)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = value if keep_widths and not _is_cut_gently(name) else _small_number(name, value)
        else:
            small[name] = value
    _fit_together(small)
    return small


def _small_number(name: str, value: int) -> int:
    for pattern, rule in PATTERNS:
        if pattern.fullmatch(name):
            return rule(value) if callable(rule) else rule
    return value


def _is_cut_gently(name: str) -> bool:
    return bool(re.fullmatch(r".*vocab_size.*|(.*_)?(layers?|depth)|n_layers?|max_position_embeddings|.*experts", name))


# ---- layers of several kinds


def _layers_to_keep(config: Config) -> Config:
    """The number of layers and every list with one entry a layer, cut to the first layer of each kind, at least two."""
    counts = [n for n in ("num_hidden_layers", "num_layers", "n_layers", "n_layer") if isinstance(config.get(n), int)]
    if not counts or config[counts[0]] < 2 or "depths" in config:
        return {}
    total = config[counts[0]]
    names = [
        n for n, x in config.items() if isinstance(x, (list, tuple)) and len(x) == total and not INDICES.fullmatch(n)
    ]
    own = {int(i): x for i, x in (config.get("per_layer_config") or {}).items()}
    kinds = [(*(repr(config[name][i]) for name in names), repr(own.get(i))) for i in range(total)]
    names += ["per_layer_config"] if own else []
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values()) if names else []
    first = first[:6]
    taken = first + [i for i in range(total) if i not in first][: max(0, 2 - len(first))]
    taken = sorted(taken)
    stages = len(config.get("out_indices") or config.get("_out_indices") or ())
    taken += [i for i in range(total) if i not in taken][: max(0, stages - len(taken))]
    taken.sort()
    small = {name: [config[name][i] for i in taken] for name in names if name != "per_layer_config"}
    if own:
        cut = {name: _small(x) for name, x in own.items()}
        small["per_layer_config"] = {taken.index(i): x for i, x in cut.items() if i in taken}
    return small | {name: len(taken) for name in counts if config[name] == total}


def _small_list(name: str, value: list, config: Config, keep_widths: bool) -> list:
    if name in LISTS:
        return LISTS[name]
    if not value or not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        return value
    if name in ("out_indices", "_out_indices"):
        return _out_indices(value, config)
    if name in ("image_size", "img_size", "patch_size", "input_size"):
        return value if keep_widths else [_small_number(name, x) for x in value]
    if INDICES.fullmatch(name) and value == sorted(set(value)):
        return [1] if max(value) > 1 else value
    if PER_STAGE_LAYERS.fullmatch(name):
        return [min(x, 2) for x in value]
    if keep_widths:
        return value
    if PER_STAGE_HEADS.fullmatch(name):
        return [max(1, x * 2 // value[0]) if value[0] > 1 else x for x in value]
    if len(set(value)) == 1 and value[0] in (x for x in config.values() if isinstance(x, int)):
        return [_small_number("hidden_size", x) for x in value]  # as the one width it repeats
    if PER_STAGE_WIDTHS.fullmatch(name):
        return [_quarter(x) for x in value]
    return value


def _quarter(width: int) -> int:
    """Stages are of many widths, which several lists name: each is cut the same, wherever it stands."""
    return width if width < 32 else math.ceil(width / 32) * 8


def _out_indices(value: list[int], config: Config) -> list[int]:
    """The last stages, as many as were asked for: a tower has as few layers as that."""
    depths = config.get("depths") or config.get("hidden_sizes")
    return value if depths else list(range(1, len(value) + 1))


def _fit_together(config: Config) -> None:
    """What the code of many models takes for granted between two sizes."""
    for name, usual in WHERE_NONE.items():
        if name in config and config[name] is None:
            config[name] = usual
    heads = config.get("num_attention_heads")
    kv = config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(kv, int) and heads % kv:
        config["num_key_value_heads"] = heads
    if config.get("kv_lora_rank") and config.get("qk_rope_head_dim"):  # latent attention: one key a head, after all
        config["num_key_value_heads"] = heads
        config["head_dim"] = config["qk_rope_head_dim"]
    experts, group = config.get("n_routed_experts"), config.get("n_group")
    if isinstance(experts, int) and isinstance(group, int) and group > 1:
        config["topk_group"] = 1
    if "conv_dim" in config and isinstance(config["conv_dim"], (list, tuple)):
        config["conv_dim"] = [WIDTH] * len(config["conv_dim"])
    if isinstance(config.get("depths"), (list, tuple)) and config.get("image_size") == IMAGE:
        config["image_size"] = 2 * IMAGE  # which is halved at each stage
    if "encoder_stride" in config and isinstance(config.get("patch_size"), int):
        config["encoder_stride"] = config["patch_size"]
    width, expand = config.get("hidden_size"), config.get("mamba_expand")
    if isinstance(expand, int) and "mamba_n_heads" in config:
        config["mamba_n_heads"], config["mamba_d_head"] = HEADS, expand * width // HEADS
        if "mamba_d_ssm" in config:
            config["mamba_d_ssm"] = expand * width
    rope = config.get("rope_parameters")
    for parameters in rope_dicts(rope):
        if "original_max_position_embeddings" in parameters:
            parameters["original_max_position_embeddings"] = 64
        for name in ("short_factor", "long_factor"):
            if name in parameters:
                parameters[name] = parameters[name][: HEAD // 2]


def rope_dicts(rope: Any) -> Iterator[Config]:
    if isinstance(rope, dict):
        yield rope
        for inner in rope.values():
            if isinstance(inner, dict):
                yield inner


# ---- ids of special tokens

ID = re.compile(r".*(token_id|token_index|token_ids|_id|_token)")


def renumbered(config: Config) -> Config:
    """Every special token that lies outside the small vocabulary gets a number of its own inside, the same number for
    the same name wherever it stands."""
    numbers: dict[str, int] = {}

    def walk(part: Config) -> Config:
        return {name: walk(x) if isinstance(x, dict) else renumber(name, x) for name, x in part.items()}

    def renumber(name: Any, value: Any) -> Any:
        if not isinstance(name, str) or not ID.fullmatch(name):
            return value
        if isinstance(value, list):
            return [min(x, 2) if isinstance(x, int) else x for x in value]
        if not isinstance(value, int) or isinstance(value, bool) or value < 50:
            return value
        common = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        name = name.replace("token_index", "token_id")
        if name in common:
            return common[name]
        return numbers.setdefault(name, FIRST_SPECIAL + len(numbers) % 27)

    return walk(config)
