"""Say why a model cannot be imported: which feature, stated by which key, in which layers, and the needed change.

Only config.json and the names of tensors are read, so this works for families that neither this project nor the
installed transformers knows. Keys are those of transformers' configs and of the remote code of 2023 to 2026. Where
transformers has the family, the modules of its layers are looked at as well (`layer_structure.py`).
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pipeline.importing.layer_structure import describe_structure, list_layer_kinds
from pipeline.models.architectures import ARCHITECTURES, IMPORTED_AS

_TEXT_LEVELS = ("text_config", "llm_config", "language_config", "thinker_config")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")
# Modules of a layer that has the shape of Llama's.
_PLAIN = re.compile(
    r"(self_attn\.([qkvo]_proj|qkv_proj|[qk]_norm|rotary_emb)|mlp\.(gate|up|down|gate_up)_proj"
    r"|(input|post_attention|pre_feedforward|post_feedforward)_layernorm)\."
)
_EXPERT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "num_routed_experts")
_RECURRENT_TYPES = ("linear_attention", "recurrent", "mamba", "mamba2", "conv", "linear", "hybrid", "ssm", "kda")
_RECURRENT_KEYS = (
    *("linear_num_key_heads", "mamba_d_state", "mamba_num_heads", "ssm_state_size", "state_size", "conv_L_cache"),
    *(
        "hybrid_override_pattern",
        "block_types",
        "attn_type_list",
        "linear_attn_config",
        "lru_width",
        "layer_group_size",
    ),
)
_MULTIPLIERS = (
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale"),
    *("scale_emb", "scale_depth", "lm_head_multiplier"),
)
_WIDTH_KEYS = (("head_dim",), ("hidden_size", "n_embd", "d_model"), ("num_attention_heads", "n_head", "n_heads"))
# Features that no key of the config states.
_BY_FAMILY = {
    "bloom": "ALiBi in place of RoPE in all layers",
    "cohere": "RoPE that pairs channels 2i and 2i + 1 in all layers",
    "cohere2": "RoPE that pairs channels 2i and 2i + 1 in all layers",
    "rwkv": "layers with a recurrent state in place of attention",
    "rwkv7": "layers with a recurrent state in place of attention",
    "gemma4_text": "a factor on the output of each layer (layer_scalar), and a norm of values",
    "gemma4": "a factor on the output of each layer (layer_scalar), and a norm of values",
    "llama4_text": "complex RoPE with an L2 norm after it, and chunked attention",
    "bitnet": "norms inside attention and MLP, which prevent merging R2 and R4, in all layers",
}
# They have an RMSNorm, and call its eps that of a LayerNorm.
_RMS_FAMILIES = ("exaone", "mamba", "mamba2", "nemotron_h", "qwen")
# Features that decide by themselves; the modules of layers add nothing.
_DECISIVE = ("latent attention", "layers with a recurrent state", "experts", "several residual", "an encoder")
_PARALLEL = "attention and MLP in parallel"
# The beginning of an obstacle -> the change that would remove it.
_NEEDS = {
    "latent attention": "a prefix of latents and rotary keys, and quantizers for them",
    "layers with a recurrent state": "a prefix that holds the states after it as well, and quantizers in these layers",
    "an output gate after attention": "scales of values and R5 without R2",
    "an embedding per layer": "a walk that passes these embeddings to each layer",
    "keys and values shared": "caches that several layers read",
    "heads of another width": "a prefix with one shape per layer",
    "several residual streams": "a walk over all streams",
    "attention that selects": "keys of the indexer in the prefix",
    "cross-attention": "a copy without these layers",
    "attention sinks": "an entry with the kernel eager, as for gpt_oss (docs/new_family.md)",
    "attention within chunks": "a prefix at the start of each chunk",
    "clipped queries": "rotations and scales that leave the clipped values alone",
    "LayerNorm": "weights centred at import, and a bias of lm_head where the final norm has one",
    "an MLP without a gate": "an entry whose mlp_readers hold one linear, as for arcee",
    _PARALLEL: "a norm whose output both attention and MLP read",
    "q, k and v fused": "these linears split at import, as for phi3 (pipeline/importing/rewriting.py)",
    "learned positions": "a walk that adds their embeddings, and a prefix that takes up positions",
    "ALiBi": "attention functions with its bias",
    "no attention": "a state in place of the cache",
    "norms without weights": "a weight of ones, written at import",
    "a bias of lm_head": "a bias in LmHead (pipeline/models/lm_head.py)",
    "weights that": "a place for them in rotation and quantization",
    "a key norm after RoPE": "norms_follow_rope in its entry, as for hunyuan_v1_dense",
    "RoPE on a part": "q and k permuted at import, as for glm (pipeline/importing/rewriting.py)",
    "RoPE that pairs": "q and k permuted at import, as for helium (pipeline/importing/rewriting.py), or "
    "rope_neighbours in its entry, as for ernie4_5_moe",
    "multipliers": "multipliers folded at import, as for granite (pipeline/importing/rewriting.py)",
    "experts": "an entry with its router and experts, as for qwen3_moe (docs/new_family.md)",
}


def find_text_level(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the text model in a config.json of any family; settings of outer levels fill gaps."""
    values = dict(raw)
    for key in _TEXT_LEVELS:
        inner = values.get(key)
        if isinstance(inner, dict):
            return find_text_level({k: v for k, v in values.items() if k not in _TEXT_LEVELS} | inner)
    return values


def find_obstacles(raw: Mapping[str, Any], names: Collection[str] = ()) -> list[str]:
    """Return the features of a model that this project cannot handle, each with its key and its layers.

    Args:
        raw: content of config.json.
        names: names of the tensors; may be empty.
    """
    values = find_text_level(raw)
    if not values.get("layer_types") and len(set(kinds := list_layer_kinds(values))) > 1:
        values["layer_types"] = kinds
    obstacles = [text for rule in _RULES if (text := rule(values, names)) is not None]
    if not any(text.startswith(_DECISIVE) for text in obstacles):
        structure = describe_structure(values)
        if structure is not None:
            obstacles = [text for text in obstacles if not text.startswith("LayerNorm")]
            parallel = any(text.startswith(_PARALLEL) for text in obstacles)
            obstacles += [text for text in structure if not (parallel and text.startswith(_PARALLEL))]
    family = _BY_FAMILY.get(str(values.get("model_type")))
    if family is not None:
        obstacles.append(family)
    elif any(name.endswith(".sinks") for name in names):
        obstacles.append(f"attention sinks (a learned logit per head) {_find_layers(names, '.sinks')}")
    if not obstacles:
        obstacles += _find_unknown_modules(names)
    return obstacles


def explain_obstacles(raw: Mapping[str, Any], names: Collection[str] = ()) -> str:
    """Return a sentence that says why a model is not supported, and one that names the change that it would need."""
    values = find_text_level(raw)
    outer, family = raw.get("model_type"), values.get("model_type")
    if not isinstance(outer, str):
        return (
            f"model_type={outer!r} is not supported: config.json names no family. Get the config.json of a checkpoint "
            "in the format of transformers."
        )
    title = f"model_type={outer!r}" if family in (None, outer) else f"model_type={outer!r} (text model {family!r})"
    obstacles = find_obstacles(raw, names)
    if obstacles:
        needs = [need for obstacle in obstacles for start, need in _NEEDS.items() if obstacle.startswith(start)]
        needed = f" It would need {'; '.join(dict.fromkeys(needs))}." if needs else ""
        return f"{title} is not supported, because it has {'; '.join(obstacles)}.{needed}"
    if family != outer and _is_supported(family):
        return (
            f"{title} is not supported: its text model is, but the names of the parts around it are not listed "
            "(WRAPPERS in pipeline/importing/wrappers.py). Save the text model alone with transformers, and import it."
        )
    if raw.get("auto_map"):
        return f"{title} is not supported: its classes are code from the hub (auto_map), which is never run."
    return (
        f"{title} is not supported: no feature in its config forbids it, but nobody has listed and tested this family. "
        "See docs/new_family.md."
    )


def _is_supported(family: Any) -> bool:
    return family in ARCHITECTURES or family in IMPORTED_AS


Rule = Callable[[Mapping[str, Any], Collection[str]], str | None]


def _find_layers(names: Collection[str], part: str) -> str:
    """Return the layers whose tensor names hold `part`, as text; "in all layers" where names are unknown."""
    matches = [(_LAYER.search(name), part in name) for name in names]
    layers = {int(match.group(1)) for match, _ in matches if match}
    chosen = sorted({int(match.group(1)) for match, is_part in matches if match and is_part})
    if not chosen or set(chosen) == layers:
        return "in all layers"
    return f"in {len(chosen)} of {len(layers)} layers, first in layer {chosen[0]}"


def _state_experts(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    nested = values.get("ffn_config")
    values = {**nested, **values} if isinstance(nested, dict) else values
    key = next((key for key in _EXPERT_KEYS if _is_more_than(values.get(key), 1)), None)
    if key is None or values.get("enable_moe_block") is False:
        return None
    first = values.get("first_k_dense_replace")
    if names:
        place = _find_layers(names, ".experts.")
    elif isinstance(first, int) and first > 0:
        place = f"from layer {first} on"
    else:
        place = "in its layers"
    return f"experts ({key}={values[key]}) {place}"


def _is_more_than(value: Any, least: int) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return any(isinstance(number, int) and not isinstance(number, bool) and number > least for number in numbers)


def _state_latent(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    if not values.get("kv_lora_rank"):
        return None
    return (
        f"latent attention (MLA, kv_lora_rank={values['kv_lora_rank']}) {_find_layers(names, 'kv_a_proj')}: its cache "
        "holds latents, and a prefix of keys and values does not fit"
    )


def _state_recurrence(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    kinds = values.get("layer_types") or values.get("layers_block_type") or []
    if isinstance(kinds, list):
        layers = [index for index, kind in enumerate(kinds) if kind in _RECURRENT_TYPES]
        if layers:
            return (
                f"layers with a recurrent state ({kinds[layers[0]]!r}, {len(layers)} of {len(kinds)} layers, first "
                f"layer {layers[0]}), which a prefix of keys and values does not hold"
            )
        if kinds:  # configs of dense models of such families have sizes of states as well
            return None
    key = next((key for key in _RECURRENT_KEYS if values.get(key)), None)
    if key is None:
        return None
    return f"layers with a recurrent state ({key}), which a prefix of keys and values does not hold"


def _state_layer_inputs(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    size = values.get("hidden_size_per_layer_input")
    return f"an embedding per layer (hidden_size_per_layer_input={size}) in all layers" if size else None


def _state_shared_kv(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    shared = values.get("num_kv_shared_layers")
    if not shared:
        return None
    return f"keys and values shared by layers (num_kv_shared_layers={shared}, the last {shared} layers)"


def _state_head_widths(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    width = values.get("global_head_dim")
    if not width or width == values.get("head_dim"):
        return None
    return (
        f"heads of another width in layers with full attention (global_head_dim={width}, "
        f"head_dim={values.get('head_dim')})"
    )


def _state_partial_rope(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    rope = values.get("rope_parameters")
    levels = [values, rope if isinstance(rope, dict) else {}]
    for level in levels:
        for key in ("partial_rotary_factor", "rotary_pct", "rope_pct"):
            share = level.get(key)
            if isinstance(share, int | float) and share != 1:
                return f"RoPE on a part of each head ({key}={share}) in all layers"
    turned, width = values.get("rotary_dim"), _find_head_width(values)
    if isinstance(turned, int) and width is not None and turned < width:
        return f"RoPE on a part of each head (rotary_dim={turned}, of {width} channels) in all layers"
    return None


def _find_head_width(values: Mapping[str, Any]) -> int | None:
    sizes = [next((values[key] for key in keys if isinstance(values.get(key), int)), 0) for keys in _WIDTH_KEYS]
    head_dim, hidden, heads = sizes
    return head_dim or (hidden // heads if heads else None)


def _state_multipliers(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    factors = [f"{key}={values[key]}" for key in _MULTIPLIERS if values.get(key) not in (None, 1, 1.0)]
    return f"multipliers ({', '.join(factors)})" if factors else None


def _state_layer_norm(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    key = next((key for key in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon") if key in values), None)
    if key is None or "rms_norm_eps" in values or values.get("model_type") in _RMS_FAMILIES:
        return None
    return f"LayerNorm instead of RMSNorm ({key}) in all layers"


def _state_encoder(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    if not isinstance(values.get("model_type"), str) or values["model_type"] not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return None
    return "an encoder, whose attention reads later positions; only decoders are imported"


def _state_alibi(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    attention = values.get("attn_config")
    nested = isinstance(attention, dict) and attention.get("alibi")
    return "ALiBi in place of RoPE (alibi=True) in all layers" if values.get("alibi") is True or nested else None


def _state_parallel(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    keys = ("parallel_attn", "use_parallel_residual", "use_parallel_block", "parallel_residual")
    key = next((key for key in keys if values.get(key) is True), None)
    return None if key is None else f"{_PARALLEL} ({key}=True) in all layers"


def _make_key_rule(text: str, *keys: str) -> Rule:
    def state(values: Mapping[str, Any], names: Collection[str]) -> str | None:
        key = next((key for key in keys if values.get(key)), None)
        return None if key is None else text.format(setting=f"{key}={_shorten(values[key])}")

    return state


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


_RULES: tuple[Rule, ...] = (
    _state_encoder,
    _make_key_rule("an encoder ({setting}); only decoders are imported", "is_encoder_decoder"),
    _make_key_rule("attention that selects tokens with an indexer ({setting})", "index_topk", "index_n_heads"),
    _make_key_rule("several residual streams ({setting}) between all layers", "hc_mult", "altup_num_inputs"),
    _state_latent,
    _state_recurrence,
    _make_key_rule("an output gate after attention ({setting}), which forbids R2", "attn_output_gate"),
    _make_key_rule("cross-attention to images in layers of its own ({setting})", "cross_attention_layers"),
    _state_layer_inputs,
    _state_shared_kv,
    _state_head_widths,
    _state_experts,
    _make_key_rule("attention sinks ({setting})", "add_swa_attention_sink_bias", "add_full_attention_sink_bias"),
    _make_key_rule("attention within chunks of text ({setting})", "attention_chunk_size"),
    _make_key_rule("clipped queries, keys and values ({setting}) in all layers", "clip_qkv"),
    _state_alibi,
    _state_parallel,
    _state_partial_rope,
    _state_multipliers,
    _state_layer_norm,
)


def _find_unknown_modules(names: Collection[str]) -> list[str]:
    """Return the first module that a layer of Llama's shape does not have, with its layer."""
    unknown = []
    for name in sorted(names):
        match = _LAYER.search(name)
        if match and not _PLAIN.match(match.group(2)):
            unknown.append((int(match.group(1)), match.group(2)))
    if not unknown:
        return []
    layer, module = min(unknown)
    return [f"modules that Llama's layers do not have ({module} in layer {layer})"]
