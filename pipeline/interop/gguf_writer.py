"""The checkpoint's weights as a GGUF file, for llama.cpp and what is built on it.

Symmetric integers are what two of its types hold, in blocks of 32 values with a float16 scale each:

    Q4_0   up to 4 bits      Q8_0   5 to 8 bits      (whole rows, or groups that are multiples of 32)

The integers are written as they are; the scale is rounded to float16 and repeated where a group has several blocks.
Weights that are not quantized, embedding and lm_head keep their dtype, norms are float32. Rows of Llama's q and k go
into llama.cpp's order: of each head, pairs [d/2, 2] instead of two halves [2, d/2].
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType, GGUFValueType

from pipeline.blocks.quantized import BlockSettings, QuantizedLinear, load_block
from pipeline.importing.gguf_source import COMMON, HEAD_NORMS
from pipeline.models.checkpoint import Checkpoint
from pipeline.numerics.formats import INT
from pipeline.numerics.quantizer import QuantizerSpec
from pipeline.runtime.progress import show_progress

FILE = "model.gguf"
_FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> llama.cpp's name
_NAMES = {ours: theirs for theirs, ours in (COMMON | HEAD_NORMS).items()}
_BLOCK = 32
_STRINGS = (GGUFValueType.ARRAY, GGUFValueType.STRING)
_WHOLE, _REAL = GGUFValueType.UINT32, GGUFValueType.FLOAT32
_NORMAL, _CONTROL = 1, 3  # kinds of tokens


def find_gguf_obstacles(checkpoint: Checkpoint, described: list[BlockSettings], window: int | None) -> list[str]:
    """What a GGUF file cannot hold of the model's weights, whatever else is dropped: a line for each.

    Args:
        described: settings of every block.
        window: of the narrowest layer that slides, or None.
    """
    config, problems = checkpoint.config, {}
    if config.model_type not in _FAMILIES or window is not None:
        slides = "" if window is None else " with layers that slide"
        problems[f"gguf: {config.model_type} models{slides} are not written; remove it from export.formats"] = None
    elif config.rope_parameters.get("rope_type", "default") != "default":
        problems[f"gguf: rope_type={config.rope_parameters['rope_type']!r} is not written; remove it"] = None
    for own in described:
        for short in checkpoint.architecture.linear_sites:
            reason = _find_misfit(own.spec(short))
            if reason:
                problems[f"gguf: {short}: {reason}; set quantizer_init.weights"] = None
    widths = checkpoint.architecture.site_widths(checkpoint.build_block(0))
    for short in checkpoint.architecture.linear_sites:
        if widths[short] % _BLOCK:
            problems[f"gguf: {short} has {widths[short]} inputs, no multiple of {_BLOCK}; remove it"] = None
    if _find_pre_tokenizer(checkpoint.tokenizer) is None:
        problems["gguf: the tokenizer is none of the byte-level BPE that llama.cpp has a name for; remove it"] = None
    return list(problems)


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Write the quantized checkpoint to a GGUF file."""
    architecture = _FAMILIES[checkpoint.config.model_type]
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=True)
    for name, value in (_describe(checkpoint, architecture) | _describe_tokenizer(checkpoint)).items():
        writer.add_key_value(name, *value)
    own = checkpoint.architecture
    outside = {own.embedding: "token_embd.weight", own.final_norm: "output_norm.weight", own.lm_head: "output.weight"}
    for name, theirs in outside.items():
        _add(writer, theirs, checkpoint.load_tensor(name))
    heads = {"q_proj": checkpoint.config.num_attention_heads, "k_proj": checkpoint.config.num_key_value_heads}
    heads = heads if architecture == "llama" else {}
    for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "writing GGUF"):
        block = load_block(checkpoint, index)
        for name in own.linears:
            linear: QuantizedLinear = block.get_submodule(name)
            rows = heads.get(name.rpartition(".")[2])
            _add(writer, f"blk.{index}.{_NAMES[name]}.weight", *_pack(linear), rows=rows)
            if linear.bias is not None:
                _add(writer, f"blk.{index}.{_NAMES[name]}.bias", linear.bias, rows=rows)
        for name, tensor in block.state_dict().items():
            stem = name.removesuffix(".weight")
            if "_proj." not in name and "quantizer." not in name:
                _add(writer, f"blk.{index}.{_NAMES[stem]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pack_blocks(integers: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [out, in] with scales [out, G] -> bytes [out, in / 32 · (18 or 34)] of Q4_0 (bits <= 4) or Q8_0.

    Raises:
        ValueError: a scale is beyond float16.
    """
    blocks = integers.unflatten(-1, (-1, _BLOCK))  # [out, in / 32, 32]
    half = scale.half()
    if not torch.isfinite(half).all() or (half == 0).any():
        raise ValueError("scales beyond float16, which GGUF's types have")
    repeated = half.repeat_interleave(blocks.shape[1] // scale.shape[1], dim=1).unsqueeze(-1)
    if bits <= 4:
        codes = (blocks + 8).to(torch.uint8)
        codes = codes[..., : _BLOCK // 2] | codes[..., _BLOCK // 2 :] << 4
    else:
        codes = blocks.contiguous().view(torch.uint8)
    return torch.cat((repeated.contiguous().view(torch.uint8), codes), dim=-1).flatten(-2)


def _find_misfit(spec: QuantizerSpec) -> str:
    """Why neither type holds a weight quantized so; empty where one does."""
    if not spec.enabled:
        return ""
    if spec.format != INT:
        return f"{spec.format} is not what Q4_0 and Q8_0 hold"
    if not spec.symmetric:
        return "Q4_0 and Q8_0 have no zero points"
    if spec.group_size != -1 and spec.group_size % _BLOCK:
        return f"group_size={spec.group_size} is no multiple of {_BLOCK}"
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
    rows: int | None = None,
) -> None:
    """Add a tensor, of `kind` where it is bytes; `rows`: heads whose rows go into llama.cpp's order."""
    if rows is not None:
        tensor = tensor.unflatten(0, (rows, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    if kind is None and tensor.dtype == torch.bfloat16 and tensor.dim() == 2:
        kind, tensor = GGMLQuantizationType.BF16, tensor.contiguous().view(torch.uint8)
    values = (tensor if kind is not None else tensor.float()).contiguous().numpy()
    writer.add_tensor(name, numpy.ascontiguousarray(values), raw_dtype=kind)


def _describe(checkpoint: Checkpoint, architecture: str) -> dict[str, tuple[Any, ...]]:
    config = checkpoint.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own = {
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
    return {f"{architecture}.{name}": value for name, value in own.items()}


def _describe_tokenizer(checkpoint: Checkpoint) -> dict[str, tuple[Any, ...]]:
    tokenizer, rows = checkpoint.tokenizer, checkpoint.config.vocab_size
    names = {index: token for token, index in tokenizer.get_vocab().items() if index < rows}
    tokens = [names.get(index, f"[PAD{index}]") for index in range(rows)]  # as llama.cpp's converter fills up
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    kinds = [_CONTROL if index in special or index not in names else _NORMAL for index in range(rows)]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    found: dict[str, tuple[Any, ...]] = {
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
    kept = {name: index for name, index in ids.items() if index is not None and index < rows}
    found |= {f"tokenizer.ggml.{name}_token_id": (index, _WHOLE) for name, index in kept.items()}
    found["tokenizer.ggml.add_bos_token"] = (False, GGUFValueType.BOOL)
    if tokenizer.chat_template:
        found["tokenizer.chat_template"] = (tokenizer.chat_template, GGUFValueType.STRING)
    return found


def _find_pre_tokenizer(tokenizer: Any) -> str | None:
    """llama.cpp's name of what splits texts in front of byte-level BPE, by how it treats digits; None: it has none."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    text = json.dumps(core["pre_tokenizer"])
    if core["model"]["type"] != "BPE" or "ByteLevel" not in text:
        return None
    if '"Digits"' in text:
        return "smollm"
    if "Regex" not in text:
        return "gpt-2"
    return "llama-bpe" if "{1,3}" in text else "qwen2"
