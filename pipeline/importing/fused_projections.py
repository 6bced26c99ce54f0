"""Families with fused projections, taken apart at import: what is imported is the plain family that computes the same.

Phi-3 is Mistral with two pairs of linears stored as one, rows below each other:

    self_attn.qkv_proj.weight  [(heads + 2 kv_heads) d, D]  ->  q_proj, k_proj, v_proj
    mlp.gate_up_proj.weight    [2 I, D]                     ->  gate_proj, up_proj

Every later stage sees q_proj, k_proj, … as of any other family, each with scales of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import MistralConfig

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
Read = Callable[[str], torch.Tensor]


def take_apart(config: Any, names: set[str], read: Read) -> tuple[Any, set[str], Read]:
    """Config, tensor names and reader of a checkpoint with its fused linears taken apart; others are returned as given.

    Raises:
        UnsupportedModelError: it computes something that the plain family does not.
    """
    if config.model_type != "phi3":
        return config, names, read
    partial = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise UnsupportedModelError(
            f"model_type='phi3' with partial_rotary_factor={partial} is not supported: only a part of each head is "
            "turned by RoPE; supported is 1.0 (Phi-3, Phi-3.5)"
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
    where: dict[str, tuple[str, slice] | None] = {}
    for name in names:
        fused = next((fused for fused in parts if f".{fused}." in name), None)
        if fused is None:
            where[name] = None
            continue
        start = 0
        for part, rows in parts[fused].items():
            where[name.replace(fused, part)] = name, slice(start, start + rows)
            start += rows

    def read_part(name: str) -> torch.Tensor:
        if where[name] is None:
            return read(name)
        fused, rows = where[name]
        return read(fused)[rows].clone()

    values = {key: getattr(config, key) for key in _COPIED if hasattr(config, key)}
    plain = MistralConfig(**values, architectures=["MistralForCausalLM"], head_dim=width, dtype=config.dtype)
    return plain, set(where), read_part
