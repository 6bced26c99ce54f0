"""The quantized checkpoint's weights as a GGUF file, for llama.cpp and programs built on it.

Two of its types hold symmetric integers, in blocks of 32 values with a float16 scale each:

    Q4_0   up to 4 bits      Q8_0   5 to 8 bits      (whole rows, or groups that are multiples of 32)

Integers are written unchanged. The scale is rounded to float16 and repeated where a group has several blocks. Weights
that are not quantized, embedding and lm_head keep their dtype; norms are float32. Rows of Llama's q and k go into
llama.cpp's order: within each head, pairs [d/2, 2] instead of two halves [2, d/2].
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from transformers import PreTrainedTokenizerFast

from pipeline.blocks.quantized import BlockSettings, QuantizedLinear, find_quantized_linear, load_block
from pipeline.importing.gguf_source import COMMON, HEAD_NORMS
from pipeline.models.checkpoint import Checkpoint
from pipeline.numerics.formats import INT
from pipeline.numerics.quantizer import QuantizerSpec
from pipeline.runtime.progress import show_progress

FILE = "model.gguf"
_FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> llama.cpp's name
_NAMES = {name: gguf_name for gguf_name, name in (COMMON | HEAD_NORMS).items()}
_BLOCK = 32
_STRINGS = (GGUFValueType.ARRAY, GGUFValueType.STRING)
_WHOLE, _REAL = GGUFValueType.UINT32, GGUFValueType.FLOAT32
_NORMAL, _CONTROL = 1, 3  # llama.cpp's types of tokens


def find_gguf_obstacles(checkpoint: Checkpoint, all_settings: list[BlockSettings], window: int | None) -> list[str]:
    """Return a message for each reason why a GGUF file cannot hold the model's weights.

    Args:
        all_settings: settings of every block.
        window: the narrowest window of a sliding layer, or None.
    """
    config, problems = checkpoint.config, dict[str, None]()  # an ordered set
    if config.model_type not in _FAMILIES or window is not None:
        slides = "" if window is None else " with layers that slide"
        problems[f"export.formats: gguf cannot hold {config.model_type} models{slides}. Remove gguf."] = None
    elif config.rope_parameters.get("rope_type", "default") != "default":
        rope_type = config.rope_parameters["rope_type"]
        problems[f"export.formats: gguf cannot hold rope_type={rope_type!r}. Remove gguf."] = None
    elif config.hidden_act != "silu":
        activation = config.hidden_act
        problems[f"export.formats: gguf takes hidden_act=silu for granted, not {activation}. Remove gguf."] = None
    for settings in all_settings:
        for linear in checkpoint.architecture.linear_names:
            misfit = _find_misfit(settings.spec(linear))
            if misfit:
                problems[f"quantizer_init.weights: gguf cannot hold {linear}: {misfit}"] = None
    widths = checkpoint.architecture.setting_widths([checkpoint.build_block(0)])
    for linear in checkpoint.architecture.linear_names:
        if widths[linear] % _BLOCK:
            problems[
                f"export.formats: gguf cannot hold {linear}: its {widths[linear]} inputs are not a multiple of "
                f"{_BLOCK}. Remove gguf."
            ] = None
    if _find_pre_tokenizer(checkpoint.tokenizer) is None:
        problems["export.formats: gguf has no name for this tokenizer's byte-level BPE. Remove gguf."] = None
    return list(problems)


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Write the quantized checkpoint to a GGUF file."""
    architecture = _FAMILIES[checkpoint.config.model_type]
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=True)
    for name, value in (_describe_model(checkpoint, architecture) | _describe_tokenizer(checkpoint)).items():
        writer.add_key_value(name, *value)
    parts = checkpoint.architecture
    outside_blocks = {
        parts.embedding: "token_embd.weight",
        parts.final_norm: "output_norm.weight",
        parts.lm_head: "output.weight",
    }
    for name, gguf_name in outside_blocks.items():
        _add(writer, gguf_name, checkpoint.load_tensor(name))
    heads_of = {"q_proj": checkpoint.config.num_attention_heads, "k_proj": checkpoint.config.num_key_value_heads}
    heads_of = heads_of if architecture == "llama" else {}
    for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "writing GGUF"):
        block = load_block(checkpoint, index)
        for name in parts.linears:
            linear = find_quantized_linear(block, name)
            heads = heads_of.get(name.rpartition(".")[2])
            values, kind = _pack(linear)
            _add(writer, f"blk.{index}.{_NAMES[name]}.weight", values, kind, heads)
            if linear.bias is not None:
                _add(writer, f"blk.{index}.{_NAMES[name]}.bias", linear.bias, heads=heads)
        for name, tensor in block.state_dict().items():
            stem = name.removesuffix(".weight")
            if "_proj." not in name and "quantizer." not in name:
                _add(writer, f"blk.{index}.{_NAMES[stem]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pack_blocks(integers: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers int8 [out, in] with scales [out, G] into blocks of Q4_0 (bits <= 4) or Q8_0.

    Returns:
        Bytes [out, in / 32 · 18] of Q4_0, or [out, in / 32 · 34] of Q8_0.

    Raises:
        ValueError: a scale is beyond the range of float16.
    """
    blocks = integers.unflatten(-1, (-1, _BLOCK))  # [out, in / 32, 32]
    half = scale.half()
    if not torch.isfinite(half).all() or (half == 0).any():
        raise ValueError("a scale is beyond float16, in which GGUF's types store scales")
    repeated = half.repeat_interleave(blocks.shape[1] // scale.shape[1], dim=1).unsqueeze(-1)
    if bits <= 4:
        codes = (blocks + 8).to(torch.uint8)
        codes = codes[..., : _BLOCK // 2] | codes[..., _BLOCK // 2 :] << 4
    else:
        codes = blocks.contiguous().view(torch.uint8)
    return torch.cat((repeated.contiguous().view(torch.uint8), codes), dim=-1).flatten(-2)


def _find_misfit(spec: QuantizerSpec) -> str:
    """Return why neither type holds a weight with this quantizer, and the remedy; empty where one does."""
    if not spec.enabled:
        return ""
    if spec.format != INT:
        return f"Q4_0 and Q8_0 hold integers, not {spec.format}. Use format: int."
    if not spec.symmetric:
        return "Q4_0 and Q8_0 have no zero points. Use symmetric: true."
    if spec.group_size != -1 and spec.group_size % _BLOCK:
        return f"group_size={spec.group_size} is not a multiple of {_BLOCK}. Use one, or -1 for whole rows."
    return ""


def _pack(linear: QuantizedLinear) -> tuple[torch.Tensor, GGMLQuantizationType | None]:
    if linear.weight_scale is None:
        return linear.weight, None
    kind = GGMLQuantizationType.Q4_0 if linear.spec.bits <= 4 else GGMLQuantizationType.Q8_0
    return pack_blocks(linear.weight, linear.weight_scale, linear.spec.bits), kind


def _add(
    writer: gguf.GGUFWriter,
    name: str,
    tensor: torch.Tensor,
    kind: GGMLQuantizationType | None = None,
    heads: int | None = None,
) -> None:
    """Add a tensor to the file.

    Args:
        kind: type of a tensor of packed bytes; None: floating-point values.
        heads: how many heads of q or k have their rows put into llama.cpp's order; None: rows stay in their order.
    """
    if heads is not None:
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    if kind is None and tensor.dtype == torch.bfloat16 and tensor.dim() == 2:
        kind, tensor = GGMLQuantizationType.BF16, tensor.contiguous().view(torch.uint8)
    values = (tensor if kind is not None else tensor.float()).contiguous().numpy()
    writer.add_tensor(name, numpy.ascontiguousarray(values), raw_dtype=kind)


def _describe_model(checkpoint: Checkpoint, architecture: str) -> dict[str, tuple[Any, ...]]:
    """Return GGUF's metadata of the model: key -> value and its type."""
    config = checkpoint.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "block_count": (config.num_hidden_layers, _WHOLE),
        "context_length": (config.max_position_embeddings, _WHOLE),
        "embedding_length": (config.hidden_size, _WHOLE),
        "feed_forward_length": (config.intermediate_size, _WHOLE),
        "attention.head_count": (config.num_attention_heads, _WHOLE),
        "attention.head_count_kv": (config.num_key_value_heads, _WHOLE),
        "attention.layer_norm_rms_epsilon": (config.rms_norm_eps, _REAL),
        "attention.key_length": (size, _WHOLE),
        "attention.value_length": (size, _WHOLE),
        "rope.freq_base": (config.rope_parameters["rope_theta"], _REAL),
        "rope.dimension_count": (size, _WHOLE),
        "vocab_size": (config.vocab_size, _WHOLE),
    }
    return {f"{architecture}.{name}": value for name, value in values.items()}


def _describe_tokenizer(checkpoint: Checkpoint) -> dict[str, tuple[Any, ...]]:
    """Return GGUF's metadata of the tokenizer: key -> value and its type, for lists also the type of items."""
    tokenizer, rows = checkpoint.tokenizer, checkpoint.config.vocab_size
    names = {index: token for token, index in tokenizer.get_vocab().items() if index < rows}
    tokens = [
        names.get(index, f"[PAD{index}]") for index in range(rows)
    ]  # unused rows get the names that llama.cpp's converter gives them
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    kinds = [_CONTROL if index in special or index not in names else _NORMAL for index in range(rows)]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    values: dict[str, tuple[Any, ...]] = {
        "tokenizer.ggml.model": ("gpt2", GGUFValueType.STRING),
        "tokenizer.ggml.pre": (_find_pre_tokenizer(tokenizer), GGUFValueType.STRING),
        "tokenizer.ggml.tokens": (tokens, *_STRINGS),
        "tokenizer.ggml.token_type": (kinds, GGUFValueType.ARRAY, GGUFValueType.INT32),
        "tokenizer.ggml.merges": (
            [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
            *_STRINGS,
        ),
    }
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    for name, index in ids.items():
        if index is not None and index < rows:
            values[f"tokenizer.ggml.{name}_token_id"] = (index, _WHOLE)
    values["tokenizer.ggml.add_bos_token"] = (False, GGUFValueType.BOOL)
    return values | _describe_templates(tokenizer.chat_template or {})


def _describe_templates(templates: str | dict[str, str]) -> dict[str, tuple[Any, ...]]:
    """Return the settings of one chat template, or of several by name, as llama.cpp names them."""
    named = {"default": templates} if isinstance(templates, str) else templates
    settings: dict[str, tuple[Any, ...]] = {
        "tokenizer.chat_template" + ("" if name == "default" else f".{name}"): (template, GGUFValueType.STRING)
        for name, template in named.items()
    }
    others = sorted(named.keys() - {"default"})
    return settings | ({"tokenizer.chat_templates": (others, *_STRINGS)} if others else {})


def _find_pre_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return llama.cpp's name of the splitting before byte-level BPE, told by its treatment of digits, or None."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    text = json.dumps(core["pre_tokenizer"])
    if core["model"]["type"] != "BPE" or "ByteLevel" not in text:
        return None
    if '"Digits"' in text:
        return "smollm"
    if "Regex" not in text:
        return "gpt-2"
    return "llama-bpe" if "{1,3}" in text else "qwen2"
