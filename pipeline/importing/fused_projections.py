"""Split the fused projections of a family at import, so that the plain family that computes the same is imported.

Phi-3 is Mistral with several linears stored as one, their rows below each other:

    self_attn.qkv_proj.weight  [(heads + 2 kv_heads) d, D]  ->  q_proj, k_proj, v_proj
    mlp.gate_up_proj.weight    [2 F, D]                     ->  gate_proj, up_proj

Every later stage gets q_proj, k_proj, … as in any other family, each with its own scales.
"""

from typing import Any

import torch
from transformers import MistralConfig, PreTrainedConfig

from pipeline.importing.source import Read
from pipeline.models.architectures import UnsupportedModelError

_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "sliding_window",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def split_fused_projections(config: PreTrainedConfig, names: set[str], read: Read) -> tuple[Any, set[str], Read]:
    """Return config, tensor names and reader of a checkpoint with its fused linears split.

    Checkpoints of families without fused linears are returned unchanged.

    Raises:
        UnsupportedModelError: the model computes something that the plain family does not.
    """
    if config.model_type != "phi3":
        return config, names, read
    partial = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise UnsupportedModelError(
            f"model_type='phi3' with partial_rotary_factor={partial} is not supported: RoPE turns only a part of "
            "each head. Supported is 1.0 (Phi-3, Phi-3.5)"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    parts = {
        "self_attn.qkv_proj": {
            "self_attn.q_proj": heads * width,
            "self_attn.k_proj": kv_heads * width,
            "self_attn.v_proj": kv_heads * width,
        },
        "mlp.gate_up_proj": {
            "mlp.gate_proj": config.intermediate_size,
            "mlp.up_proj": config.intermediate_size,
        },
    }
    places: dict[str, tuple[str, slice] | None] = {}  # of each plain tensor: the fused one and its rows
    for name in names:
        fused = next((fused for fused in parts if f".{fused}." in name), None)
        if fused is None:
            places[name] = None
            continue
        start = 0
        for part, rows in parts[fused].items():
            places[name.replace(fused, part)] = name, slice(start, start + rows)
            start += rows

    def read_part(name: str) -> torch.Tensor:
        place = places[name]
        if place is None:
            return read(name)
        fused_name, rows = place
        return read(fused_name)[rows].clone()

    values = {key: getattr(config, key) for key in _COPIED if hasattr(config, key)}
    plain = MistralConfig(**values, architectures=["MistralForCausalLM"], head_dim=width, dtype=config.dtype)
    return plain, set(places), read_part
