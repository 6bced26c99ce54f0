"""The quantized model in formats of other programs, as far as they can hold it.

    compressed-tensors   packed weights; activations where the format's schemes compute the same values. Loaded by
                         transformers and by serving engines that have the compressed-tensors library.
    peft                 the prefix as a PEFT prefix-tuning adapter for the compressed-tensors folder.
    gguf                 weights only, for llama.cpp (`gguf_writer.py`).
    onnx                 all of it, for ONNX Runtime and compilers of NPUs (`onnx_folder.py`).

No format but onnx holds everything. `compare_formats` compares the parts of the model with those that a format computes
exactly. It raises an error unless `drop` names every part that would be lost. Parts that the model cannot do without
(R4, biases that the family's class has no place for) are always refused. manifest.json lists the parts that each folder
keeps and drops.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.quantized import BlockSettings, require_settings
from pipeline.export.folder import save_tokenizer
from pipeline.export.params import OnnxParams, find_misfits
from pipeline.interop.compressed_tensors import (
    METHOD,
    find_expert_obstacles,
    find_homeless_biases,
    find_lost_activations,
    needs_bfloat16,
    write_compressed_tensors,
)
from pipeline.interop.gguf_writer import FILE, find_gguf_obstacles, write_gguf
from pipeline.interop.onnx_folder import find_onnx_obstacles, write_onnx
from pipeline.models.architectures import find_narrowest_window
from pipeline.models.checkpoint import LM_HEAD, Checkpoint, build_skeleton
from pipeline.models.layers import list_layers
from pipeline.models.sites import Site, site_group
from pipeline.runtime.artifacts import Header, replacing_folder, save_tensors, write_folder_header, write_json
from pipeline.runtime.errors import PipelineError

COMPRESSED_TENSORS, PEFT, GGUF, ONNX = METHOD, "peft", "gguf", "onnx"
MANIFEST = "manifest.json"
SITES = {group: {site for site in Site if site_group(site) == group} for group in ("activations", "keys", "values")}
_LOAD = "AutoModelForCausalLM.from_pretrained(folder)"
_LOAD_FP4 = "AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)"
# Unless it dequantizes at once, it expects the zero points of weights unpacked (compressed-tensors 0.20), and
# linears in place of experts.
_LOAD_ASYMMETRIC = (
    "AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))"
)
_LOAD_VLLM = "vllm.LLM(folder)"  # transformers has no quantized inputs of experts
_LOAD_GGUF = "llama.cpp, or AutoModelForCausalLM.from_pretrained(folder, gguf_file='model.gguf')"
_LOAD_ONNX = "prefixquant onnx-generate folder TEXT, or onnxruntime.InferenceSession('model.onnx')"
_LOAD_ADAPTER = "PeftModel.from_pretrained(model, folder), model loaded from ../compressed-tensors"


class FormatError(PipelineError):
    """A format cannot hold the model; the message names the parts that would be lost."""


@dataclass(frozen=True)
class FormatContents:
    """The parts of a model that a format's folder holds, and how it is loaded.

    Attributes:
        keeps, drops: the model's parts, of weights, activations, keys, values and prefix.
        load: the call by which transformers or PEFT loads the folder.
        prefix: `token_ids` and `text` of a dropped prefix of tokens, for the caller to put before every text.
    """

    keeps: list[str]
    drops: list[str]
    load: str
    prefix: dict[str, Any] | None = None


def write_formats(
    checkpoint: Checkpoint,
    prefix_kv: torch.Tensor | None,
    folder: Path,
    *,
    formats: Sequence[str],
    drop: Sequence[str],
    max_shard_size: str,
    header: Header,
    text_start_token_id: int | None = None,
    prefix_token_ids: Sequence[int] = (),
    onnx: OnnxParams | None = None,
) -> dict[str, FormatContents]:
    """Replace `folder` by one subfolder per format and manifest.json, and return format -> its contents.

    Args:
        checkpoint: the quantized one.
        prefix_kv: [L, 2, kv_heads, P, d] in the checkpoint's basis, or None.
        drop: parts that may be lost: activations, keys, values, prefix.
        text_start_token_id: the start token between the prefix and every text, or None.
        prefix_token_ids: [P], empty for a continuous prefix.
        onnx: the graph of the format onnx; None: the defaults.

    Raises:
        FormatError: lists everything that a format cannot hold.
    """
    onnx = OnnxParams() if onnx is None else onnx
    contents = compare_formats(checkpoint, prefix_kv is not None, formats, drop, onnx)
    if prefix_kv is not None and PEFT not in contents and prefix_token_ids:
        prefix = {"token_ids": list(prefix_token_ids), "text": checkpoint.tokenizer.decode(prefix_token_ids)}
        contents = {name: replace(parts, prefix=prefix) if name != ONNX else parts for name, parts in contents.items()}
    with replacing_folder(folder) as partial:
        for name in contents:
            (partial / name).mkdir()
        if COMPRESSED_TENSORS in contents:
            subfolder = partial / COMPRESSED_TENSORS
            write_compressed_tensors(checkpoint, subfolder, "activations" not in drop, max_shard_size, header)
            if PEFT in contents or prefix_kv is None:  # without the prefix, the model's own tokenizer serves best
                save_tokenizer(checkpoint, subfolder, text_start_token_id)
        if GGUF in contents:
            write_gguf(checkpoint, partial / GGUF / FILE)
        if ONNX in contents:
            write_onnx(
                checkpoint,
                prefix_kv,
                partial / ONNX,
                params=onnx,
                header=header,
                text_start_token_id=text_start_token_id,
                prefix_token_ids=prefix_token_ids,
            )
        if prefix_kv is not None and PEFT in contents:
            _write_adapter(prefix_kv, partial / PEFT, header)
        write_json(partial / MANIFEST, {name: vars(parts) for name, parts in contents.items()})
        write_folder_header(partial, header)
    return contents


def compare_formats(
    checkpoint: Checkpoint,
    has_prefix: bool,
    formats: Sequence[str],
    drop: Sequence[str],
    onnx: OnnxParams | None = None,
) -> dict[str, FormatContents]:
    """Return the parts of the model that each format keeps and drops.

    Raises:
        FormatError: lists all parts that a format cannot hold and `drop` does not name.
    """
    if not formats:
        return {}
    unfit = [name for name in formats if name != COMPRESSED_TENSORS]
    if checkpoint.architecture.experts is not None and unfit:
        raise FormatError(
            f"export.formats={formats}: model_type={checkpoint.config.model_type!r} has experts, and "
            f"{' and '.join(unfit)} are written for dense models only. Leave them out. artifacts/export holds the "
            "model."
        )
    all_settings = [require_settings(checkpoint, index) for index in range(checkpoint.block_count)]
    others = [name for name in formats if name != ONNX]
    problems = _find_obstacles(checkpoint, all_settings) if others else []
    if ONNX in formats:
        problems += find_onnx_obstacles(checkpoint, all_settings, OnnxParams() if onnx is None else onnx)
    window = find_narrowest_window(checkpoint.config, list_layers(build_skeleton(checkpoint.config)))
    problems += find_misfits(formats, window)
    if LM_HEAD in checkpoint.settings:
        problems.append(
            f"quantizer_init.lm_head_bits={checkpoint.settings[LM_HEAD]['bits']}: {' and '.join(formats)} cannot hold "
            "lm_head with its rotation and the ranges of its input. Use 16."
        )
    enabled = {site for settings in all_settings for site, spec in settings.sites.items() if spec.enabled}
    lost = {"activations": ""}  # part -> reason
    if GGUF in formats:
        problems += find_gguf_obstacles(checkpoint, all_settings, window)
        lost["activations"] = "gguf holds weights only" if enabled & SITES["activations"] else ""
    if COMPRESSED_TENSORS in formats:
        lost["activations"] = find_lost_activations(checkpoint, all_settings) or lost["activations"]
    for part in ("keys", "values") if others else ():
        lost[part] = "the format has no quantized cache that computes the same values" if enabled & SITES[part] else ""
    if others and has_prefix:
        lost["prefix"] = f"{others[0]} has no place for it (compressed-tensors with peft has)"
    if PEFT in formats:
        lost["prefix"] = "gguf has no place for it" if GGUF in formats and has_prefix else ""
        if not has_prefix:
            problems.append("export.formats: peft holds the prefix, and this model has none. Remove peft.")
    problems += [
        f"{part}: {reason}. Add {part} to export.drop to write the format without them."
        for part, reason in lost.items()
        if reason and part not in drop
    ]
    if problems:
        raise FormatError("export.formats cannot hold this model:\n  " + "\n  ".join(problems))
    parts = ["weights", *(part for part, sites in SITES.items() if enabled & sites)]
    parts += ["prefix"] if has_prefix else []
    contents = {}
    if COMPRESSED_TENSORS in formats:
        keeps = [part for part in parts if part == "weights" or (part == "activations" and part not in drop)]
        drops = [part for part in parts if part not in keeps]
        contents[COMPRESSED_TENSORS] = FormatContents(keeps, drops, _choose_loading(checkpoint, all_settings, keeps))
    if GGUF in formats:
        contents[GGUF] = FormatContents(["weights"], parts[1:], _LOAD_GGUF)
    if ONNX in formats:
        contents[ONNX] = FormatContents(parts, [], _LOAD_ONNX)
    if PEFT in formats:
        contents[PEFT] = FormatContents(["prefix"], [], _LOAD_ADAPTER)
    return contents


def _choose_loading(checkpoint: Checkpoint, all_settings: list[BlockSettings], keeps: Sequence[str]) -> str:
    """Return the call that loads the compressed-tensors folder with the parts that it keeps."""
    weights = [settings.spec(linear) for settings in all_settings for linear in checkpoint.architecture.linear_names]
    if checkpoint.architecture.experts is not None:
        return _LOAD_VLLM if "activations" in keeps else _LOAD_ASYMMETRIC
    if needs_bfloat16(weights):
        return _LOAD_FP4
    return _LOAD if all(spec.symmetric or not spec.enabled for spec in weights) else _LOAD_ASYMMETRIC


def _find_obstacles(checkpoint: Checkpoint, all_settings: list[BlockSettings]) -> list[str]:
    """Return a message for each reason to refuse the model, whatever `drop` names."""
    problems = []
    linears = checkpoint.architecture.linear_names
    if not any(settings.spec(linear).enabled for settings in all_settings for linear in linears):
        problems.append(
            "quantizer_init.weights.bits=16: the formats hold quantized weights. Use fewer, or empty export.formats."
        )
    if any(settings.online_r1 for settings in all_settings):
        problems.append(
            "rotation.r1=online: q/k/v and gate/up expect rotated inputs, and transformers would not rotate them. Use "
            "hadamard or identity."
        )
    for rotation, reader in (("r4", "down_proj"), ("r5", "o_proj")):
        if any(getattr(settings, f"online_{rotation}") for settings in all_settings):
            problems.append(
                f"rotation.{rotation}: {reader} expects a rotated input, and transformers would not rotate it. Use "
                "identity."
            )
    problems += find_expert_obstacles(checkpoint, all_settings)
    homeless = find_homeless_biases(checkpoint)
    if homeless:
        problems.append(
            f"quantizer_init.weights.centered=true: it adds biases to {', '.join(homeless)}, and "
            f"{checkpoint.config.model_type} models have none there. Use false."
        )
    return problems


def _write_adapter(prefix_kv: torch.Tensor, folder: Path, header: Header) -> None:
    """Write the prefix as PEFT reads it: [P, L, 2, kv_heads, d], flattened to [P, …]."""
    layers, _, heads, tokens, width = prefix_kv.shape
    embeddings = prefix_kv.float().permute(3, 0, 1, 2, 4).reshape(tokens, -1)
    save_tensors(folder / "adapter_model.safetensors", {"prompt_embeddings": embeddings}, header)
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"../{COMPRESSED_TENSORS}",
        "inference_mode": True,
        "num_virtual_tokens": tokens,
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
        "token_dim": heads * width,
        "encoder_hidden_size": heads * width,
        "prefix_projection": False,
    }
    write_json(folder / "adapter_config.json", config)
