"""Join the tensors of experts at import, so that the model is written as transformers holds it.

Checkpoints store one tensor for each expert and projection, in names of two kinds, or already transformers' own, which
may be transposed:

    model.layers.0.mlp.experts.3.gate_proj.weight [I, D]           qwen2_moe, qwen3_moe, olmoe, glm4_moe and others
    model.layers.0.block_sparse_moe.experts.3.w1.weight [I, D]     mixtral, minimax_m2 (gate, up, down: w1, w3, w2)
    model.layers.0.mlp.experts.gate_up_proj [E, 2I, D]             as transformers saves it
    model.language_model.layers.0.mlp.experts.gate_up_proj         the same [E, D, 2I]: qwen3_vl_moe

The correction bias of ernie4_5_moe is in `mlp.moe_statics` there, and in `mlp.gate.moe_statics` in transformers' class.
"""

import re
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from pipeline.importing.source import ModelImportError, Read
from pipeline.models.architectures import UnsupportedModelError, count_experts, find_architecture

_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_NAME = re.compile(
    r"(?P<block>.+\.layers\.(?P<index>\d+)\..+)\.experts\.(?P<expert>\d+)\.(?P<projection>[a-z0-9_]+)\.weight"
)
_STATICS = {".mlp.moe_statics.": ".mlp.gate.moe_statics."}  # in checkpoints -> in the model class
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def join_experts(source: str, config: PreTrainedConfig, names: set[str], read: Read) -> tuple[set[str], Read]:
    """Return the names and the reader of a checkpoint in which the experts of each block are joined.

    Checkpoints of dense families, and tensors that are joined already, are returned unchanged.

    Raises:
        ModelImportError: experts are missing, or there are more than the config has.
        UnsupportedModelError: a setting of the config is not supported.
    """
    if find_architecture(config).experts is None:
        return names, read
    clip = getattr(config, "clip_qkv", None)
    if clip is not None:
        raise UnsupportedModelError(
            f"model.source={source!r}: clip_qkv={clip} in its config: queries, keys and values are clipped, which "
            "rotations and scales of channels would change. Only models without it are supported."
        )
    joined: dict[str, Callable[[], torch.Tensor]] = {}
    blocks: dict[str, dict[str, dict[int, str]]] = {}  # block -> projection -> expert -> name in the checkpoint
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None or int(match["index"]) >= config.num_hidden_layers:  # heads for multi-token prediction
            renamed = _replace(name.replace(".block_sparse_moe.", ".mlp."), _STATICS)
            joined[renamed] = lambda name=name: read(name)
            continue
        block = match["block"].replace(".block_sparse_moe", ".mlp")
        projection = _MIXTRAL.get(match["projection"], match["projection"])
        blocks.setdefault(block, {}).setdefault(projection, {})[int(match["expert"])] = name
    for block, projections in blocks.items():
        _check_count(source, block, projections, count_experts(config))
        for fused, parts in _FUSED.items():
            stored = [projections[part] for part in parts]
            joined[f"{block}.experts.{fused}"] = lambda stored=stored: _join(read, stored)
    return set(joined), lambda name: joined[name]()


def turn_experts(name: str, tensor: torch.Tensor, hidden: int) -> torch.Tensor:
    """Return the joined experts of a multimodal checkpoint as [E, out, in]; other tensors are returned unchanged.

    As in transformers, experts whose shape fits already are not transposed. `hidden` is the width of the stream.
    """
    fused = name.rpartition(".experts.")[2]
    if tensor.dim() != 3 or fused not in _FUSED:
        return tensor
    fits = tensor.shape[1 if fused == "down_proj" else 2] == hidden
    return tensor if fits else tensor.transpose(1, 2).contiguous()


def name_in_checkpoint(model_type: str, name: str) -> str:
    """Return the name that checkpoints of a family have for a tensor or module of one expert, or for its router.

    mixtral, minimax_m2: model.layers.0.mlp.experts.3.gate_proj -> model.layers.0.block_sparse_moe.experts.3.w1.
    ernie4_5_moe: the place of the correction bias. Other families and other names are returned unchanged.
    """
    if model_type == "ernie4_5_moe":
        return _replace(name, {there: here for here, there in _STATICS.items()})
    if model_type not in ("mixtral", "minimax_m2") or ".mlp." not in name:
        return name
    for stored, projection in _MIXTRAL.items():
        name = name.replace(f".{projection}", f".{stored}")
    return name.replace(".mlp.", ".block_sparse_moe.")


def _replace(name: str, parts: dict[str, str]) -> str:
    for part, replacement in parts.items():
        name = name.replace(part, replacement)
    return name


def _join(read: Read, stored: list[dict[int, str]]) -> torch.Tensor:
    """Return [E, out, in]; the rows of several projections of an expert lie below each other."""
    return torch.stack([torch.cat([read(names[expert]) for names in stored]) for expert in sorted(stored[0])])


def _check_count(source: str, block: str, projections: dict[str, dict[int, str]], count: int) -> None:
    expected = {part for parts in _FUSED.values() for part in parts}
    if unknown := set(projections) - expected:
        raise ModelImportError(
            f"model.source={source!r}: {block}.experts have tensors of an unknown kind: {', '.join(sorted(unknown))}. "
            "Start from the original model."
        )
    for part in sorted(expected):
        present = set(projections.get(part, {}))
        if present != set(range(count)):
            missing = sorted(set(range(count)) - present)
            surplus = sorted(present - set(range(count)))
            kinds = (("missing", missing), ("too many", surplus))
            counts = " and ".join(f"{len(ids)} {kind} (experts {ids[:3]})" for kind, ids in kinds if ids)
            raise ModelImportError(
                f"model.source={source!r}: {block}.experts: {part}: {counts}; the config has {count} experts. Get a "
                "complete copy, or correct config.json."
            )
