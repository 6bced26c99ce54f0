"""The exported model in formats of others, as far as they can carry it.

    compressed-tensors   weights, packed; activations where the format's schemes compute the same. Loaded by
                         transformers and by serving engines with the compressed-tensors library.
    peft                 the prefix as a PEFT prefix-tuning adapter on top of the former.
    gguf                 weights alone, for llama.cpp (`gguf_writer.py`).

Neither has room for everything: `plan_formats` compares what the model is made of with what a format computes, exactly,
and raises unless whatever would be lost is named in `drop`. What cannot be left out without breaking the model (R4,
biases the family has no place for) is always refused. manifest.json lists what each folder keeps and drops.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.quantized import BlockSettings, block_settings
from pipeline.export.folder import save_tokenizer
from pipeline.export.params import find_misfits
from pipeline.interop.compressed_tensors import (
    METHOD,
    find_homeless_biases,
    find_lost_activations,
    needs_bfloat16,
    write_compressed_tensors,
)
from pipeline.interop.gguf_writer import FILE, find_gguf_obstacles, write_gguf
from pipeline.models.architectures import find_narrowest_window
from pipeline.models.checkpoint import Checkpoint, build_skeleton
from pipeline.models.sites import Site, site_group
from pipeline.runtime.artifacts import Header, replacing_folder, save_tensors, write_folder_header, write_json
from pipeline.runtime.errors import PipelineError

COMPRESSED_TENSORS, PEFT, GGUF = METHOD, "peft", "gguf"
MANIFEST = "manifest.json"
SITES = {group: {site for site in Site if site_group(site) == group} for group in ("activations", "keys", "values")}
_LOAD = "AutoModelForCausalLM.from_pretrained(folder)"
_LOAD_FP4 = "AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)"
# It expects the zero points of weights unpacked unless it dequantizes at once (compressed-tensors 0.20).
_LOAD_ASYMMETRIC = (
    "AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))"
)
_LOAD_GGUF = "llama.cpp, or AutoModelForCausalLM.from_pretrained(folder, gguf_file='model.gguf')"
_LOAD_ADAPTER = "PeftModel.from_pretrained(model, folder), model loaded from ../compressed-tensors"


class FormatError(PipelineError):
    """A format cannot express the model; the message says what it would lose."""


@dataclass(frozen=True)
class Plan:
    """What a format's folder will hold, what not, and how it is read.

    Attributes:
        load: how transformers or PEFT read it.
        prefix: of a dropped prefix of tokens, for the caller to put in front of every text: "token_ids" and "text".
    """

    keeps: list[str]
    drops: list[str]
    load: str
    prefix: dict[str, Any] | None = None


def write_formats(
    checkpoint: Checkpoint,
    prefix_kv: torch.Tensor | None,
    folder: Path,
    formats: list[str],
    drop: list[str],
    max_shard_size: str,
    header: Header,
    start_token: int | None = None,
    prefix_token_ids: Sequence[int] = (),
) -> dict[str, Plan]:
    """Replace `folder` by one subfolder per format and manifest.json.

    Args:
        checkpoint: the quantized one.
        prefix_kv: [L, 2, kv_heads, P, d] in its basis, or None.
        drop: what may be lost: activations, keys, values, prefix.
        start_token: what stands between the prefix and every text, or None.
        prefix_token_ids: [P] of a prefix of tokens; none of a continuous one.

    Raises:
        FormatError: lists everything that a format cannot express.
    """
    plans = plan_formats(checkpoint, prefix_kv is not None, formats, drop)
    if prefix_kv is not None and PEFT not in plans and prefix_token_ids:
        prefix = {"token_ids": list(prefix_token_ids), "text": checkpoint.tokenizer.decode(prefix_token_ids)}
        plans = {name: replace(plan, prefix=prefix) for name, plan in plans.items()}
    with replacing_folder(folder) as partial:
        if COMPRESSED_TENSORS in plans:
            own = partial / COMPRESSED_TENSORS
            own.mkdir()
            write_compressed_tensors(checkpoint, own, "activations" not in drop, max_shard_size, header)
            if PEFT in plans or prefix_kv is None:  # else the prefix is lost, and what its tokenizer does is best
                save_tokenizer(checkpoint, own, start_token)
        if GGUF in plans:
            own = partial / GGUF
            own.mkdir()
            write_gguf(checkpoint, own / FILE)
        if PEFT in plans:
            own = partial / PEFT
            own.mkdir()
            _write_adapter(prefix_kv, own, header)
        write_json(partial / MANIFEST, {name: vars(plan) for name, plan in plans.items()})
        write_folder_header(partial, header)
    return plans


def plan_formats(checkpoint: Checkpoint, has_prefix: bool, formats: list[str], drop: list[str]) -> dict[str, Plan]:
    """What each format will keep and drop. Raises FormatError with all that is neither expressible nor in `drop`."""
    if not formats:
        return {}
    described = [block_settings(checkpoint, index) for index in range(checkpoint.block_count)]
    problems = _find_obstacles(checkpoint, described)
    window = find_narrowest_window(checkpoint.config, build_skeleton(checkpoint.config).model.layers)
    problems += find_misfits(formats, window)
    lost = {"activations": ""}
    if GGUF in formats:
        problems += find_gguf_obstacles(checkpoint, described, window)
        quantized = any(own.spec(site).enabled for own in described for site in SITES["activations"])
        lost["activations"] = "gguf has weights alone" if quantized else ""
    if COMPRESSED_TENSORS in formats:
        lost["activations"] = find_lost_activations(checkpoint, described) or lost["activations"]
    lost |= {what: _lost_cache(described, what) for what in ("keys", "values")}
    lost["prefix"] = f"{formats[0]} has no place for it (compressed-tensors with peft has)" if has_prefix else ""
    if PEFT in formats:
        lost["prefix"] = "gguf has no place for it" if GGUF in formats and has_prefix else ""
        if not has_prefix:
            problems.append("peft: there is no prefix to write; remove it from export.formats")
    problems += [
        f"{what}: {reason}; add {what} to export.drop to do without"
        for what, reason in lost.items()
        if reason and what not in drop
    ]
    if problems:
        raise FormatError("export.formats cannot express this model:\n  " + "\n  ".join(problems))
    enabled = {site for own in described for site, spec in own.sites.items() if spec.enabled}
    present = ["weights", *(what for what in ("activations", "keys", "values") if enabled & SITES[what])]
    present += ["prefix"] if has_prefix else []
    kept = {"weights"} | ({"activations"} - set(drop))
    weights = [own.spec(short) for own in described for short in checkpoint.architecture.linear_sites]
    load = _LOAD if all(spec.symmetric or not spec.enabled for spec in weights) else _LOAD_ASYMMETRIC
    load = _LOAD_FP4 if needs_bfloat16(weights) else load
    keeps, drops = ([what for what in present if (what in kept) is wanted] for wanted in (True, False))
    plans = {COMPRESSED_TENSORS: Plan(keeps, drops, load)} if COMPRESSED_TENSORS in formats else {}
    if GGUF in formats:
        plans[GGUF] = Plan(["weights"], present[1:], _LOAD_GGUF)
    if PEFT in formats:
        plans[PEFT] = Plan(["prefix"], [], _LOAD_ADAPTER)
    return plans


def _find_obstacles(checkpoint: Checkpoint, described: list[BlockSettings]) -> list[str]:
    """What no `drop` can help with."""
    problems = []
    if not any(own.spec(short).enabled for own in described for short in checkpoint.architecture.linear_sites):
        problems.append("weights: none are quantized; set quantizer_init.weights.bits, or remove export.formats")
    if any(own.online_r1 for own in described):
        problems.append(
            "rotation.r1=online: q/k/v and gate/up count on a rotation of their input that transformers would not "
            "apply; set rotation.r1: hadamard (or identity)"
        )
    for rotation, reader in (("r4", "down_proj"), ("r5", "o_proj")):
        if any(getattr(own, f"online_{rotation}") for own in described):
            problems.append(
                f"rotation.{rotation}=hadamard: {reader} counts on a rotation of its input that transformers would not "
                f"apply; set rotation.{rotation}: identity"
            )
    homeless = find_homeless_biases(checkpoint)
    if homeless:
        problems.append(
            f"biases of {', '.join(homeless)}: {checkpoint.config.model_type} models have none; set "
            "quantizer_init.weights.centered: false"
        )
    return problems


def _lost_cache(described: list[BlockSettings], what: str) -> str:
    enabled = any(own.spec(site).enabled for own in described for site in SITES[what])
    return "the format has no quantized cache that computes the same" if enabled else ""


def _write_adapter(prefix_kv: torch.Tensor, folder: Path, header: Header) -> None:
    """PEFT reads [P, L, 2, kv_heads, d], flattened to [P, …]."""
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
