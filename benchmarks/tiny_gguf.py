"""Tiny models written as GGUF files, as llama.cpp's converter writes them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy
from gguf import GGMLQuantizationType, GGUFValueType
from torch import nn

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
KINDS = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def permute(tensor: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Return a weight with the two halves of each head as pairs, as llama.cpp's converter orders them."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def convert_tensors(model: nn.Module) -> dict[str, numpy.ndarray]:
    """Return a model's tensors under the names of GGUF."""
    config = model.config
    gemma = config.model_type.startswith("gemma")
    names = NAMES | (GEMMA_NAMES if gemma else {})
    tensors = {}
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        values = parameter.detach().float().numpy()
        if gemma and "norm" in name:
            values = values + 1
        if config.model_type in ("llama", "mistral") and "q_proj" in name:
            values = permute(values, config.num_attention_heads)
        if config.model_type in ("llama", "mistral") and "k_proj" in name:
            values = permute(values, config.num_key_value_heads)
        if stem.startswith("model.layers."):
            _, _, index, part = stem.split(".", 3)
            tensors[f"blk.{index}.{names[part]}.{suffix}"] = values
        else:
            tensors[f"{names[stem]}.{suffix}"] = values
    return tensors


def describe(model: nn.Module) -> dict[str, tuple[Any, GGUFValueType]]:
    """Return the settings of a model: name -> (value, type)."""
    config, whole, real = model.config, GGUFValueType.UINT32, GGUFValueType.FLOAT32
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    settings = {
        "block_count": (config.num_hidden_layers, whole),
        "context_length": (config.max_position_embeddings, whole),
        "embedding_length": (config.hidden_size, whole),
        "feed_forward_length": (config.intermediate_size, whole),
        "attention.head_count": (config.num_attention_heads, whole),
        "attention.head_count_kv": (config.num_key_value_heads, whole),
        "attention.layer_norm_rms_epsilon": (config.rms_norm_eps, real),
        "rope.freq_base": (rope["rope_theta"], real),
        "rope.dimension_count": (size, whole),
        "attention.key_length": (size, whole),
        "attention.value_length": (size, whole),
    }
    if config.model_type.startswith("gemma") or (config.model_type == "phi3" and config.sliding_window):
        settings["attention.sliding_window"] = (config.sliding_window, whole)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            settings[name] = (getattr(config, name), real)
    return settings


def write_gguf(
    path: Path,
    model: nn.Module,
    tokenizer: Any,
    *,
    settings: dict[str, tuple | None] | None = None,
    tensors: dict[str, numpy.ndarray | None] | None = None,
    quantized: bool = False,
    parts: int = 1,
) -> Path:
    """Write a model and its byte-level tokenizer, and return the path of the (first) file.

    Args:
        path: path of the file.
        model: tiny model of one of the families.
        tokenizer: byte-level.
        settings: more or other settings: name -> (value, type, and for a list its elements' type). None removes one.
        tensors: the same for tensors.
        quantized: matrices in one storage type after the other. Otherwise all are in float32.
        parts: number of files, named as llama.cpp names them.
    """
    architecture = ARCHITECTURES.get(model.config.model_type, model.config.model_type)
    metadata = {f"{architecture}.{name}": value for name, value in describe(model).items()}
    metadata |= describe_tokenizer(tokenizer)
    if model.config.model_type.startswith("gemma"):  # its tokenizer class fails on unknown characters without one
        metadata["tokenizer.ggml.unknown_token_id"] = (tokenizer.eos_token_id, GGUFValueType.UINT32)
    metadata |= settings or {}
    contents = {
        name: values for name, values in (convert_tensors(model) | (tensors or {})).items() if values is not None
    }
    names = list(contents)
    paths = [path.with_name(gguf.SHARD_NAME_FORMAT.format(path.stem, part + 1, parts)) for part in range(parts)]
    for part, target in enumerate(paths if parts > 1 else [path]):
        writer = gguf.GGUFWriter(target, architecture)
        if parts > 1:
            writer.add_key_value("split.no", part, GGUFValueType.UINT16)
            writer.add_key_value("split.count", parts, GGUFValueType.UINT16)
            writer.add_key_value("split.tensors.count", len(names), GGUFValueType.INT32)
        for name, value in metadata.items() if part == 0 else ():
            if value is not None:
                writer.add_key_value(name, *value)
        for name in names[part::parts]:
            values = numpy.ascontiguousarray(contents[name])
            kind = KINDS[names.index(name) % len(KINDS)]
            if quantized and values.ndim == 2:
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths[0] if parts > 1 else path


def describe_tokenizer(tokenizer: Any) -> dict[str, tuple]:
    """Return the settings of a byte-level tokenizer."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    strings, whole = (GGUFValueType.ARRAY, GGUFValueType.STRING), GGUFValueType.UINT32
    special = {tokenizer.bos_token, tokenizer.eos_token}
    return {
        "tokenizer.ggml.model": ("gpt2", GGUFValueType.STRING),
        "tokenizer.ggml.pre": ("gpt-2", GGUFValueType.STRING),
        "tokenizer.ggml.tokens": ([token for token, _ in vocabulary], *strings),
        "tokenizer.ggml.token_type": (
            [3 if token in special else 1 for token, _ in vocabulary],
            GGUFValueType.ARRAY,
            GGUFValueType.INT32,
        ),
        "tokenizer.ggml.merges": ([" ".join(merge) for merge in merges], *strings),
        "tokenizer.ggml.bos_token_id": (tokenizer.bos_token_id, whole),
        "tokenizer.ggml.eos_token_id": (tokenizer.eos_token_id, whole),
    }
