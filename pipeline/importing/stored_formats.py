"""Checkpoints that store weights in 8-bit or 4-bit floating point: read tensor by tensor as float32.

    quant_method, format                    tensors of a linear                        values
    fp8, weight_block_size null             weight [O, I], weight_scale_inv [] or [1]  weight · scale
    fp8, weight_block_size [a, b]           weight_scale_inv [⌈O/a⌉, ⌈I/b⌉]            scale of row o / a, column i / b
    fp8 of AutoFP8, no weight_block_size    weight_scale [] or [1]                     weight · scale
    compressed-tensors, float-quantized     weight_scale [1], [O, 1], [O, I/g], blocks by tensor, channel, group, block
    mxfp4                                   X_blocks [E, O, G, 16], X_scales [E, O, G] e2m1 · 2^(scale - 127)

Products are in float32, rounded once, and the import casts once. Block sizes come from the config and are never guessed
from shapes; the last block of a row or column may be short. transformers 5.23 is not a reference there: it reads 288
rows with 3 scales as blocks of 96.

`weight_scale_inv` is a factor all the same, as DeepSeek-V3 defined it. Scales of activations are dropped: the imported
model gets its own. mxfp4 stores experts as [E, O, I], and the result is [E, I, O], as the model class has them.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipeline.importing.source import ModelImportError, Read

_FP8 = ("F8_E4M3", "F8_E5M2")
# Codes 0 to 7 of e2m1, then the same with a minus sign (OCP Microscaling Formats 1.0, table 5).
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1 = torch.cat([_E2M1, -_E2M1])
_E8M0_BIAS = 127
_E8M0_NAN = 255
ACTIVATION_SCALES = "scales of activations"
_ACTIVATION_NAMES = ("activation_scale", "input_scale", "output_scale", "q_scale", "k_scale", "v_scale")
_LEFTOVERS = ("scale", "scale_inv", "zero_point", "g_idx", "weight_packed", "weight_shape")
_SAMPLED_ROWS = 4
_DEFAULT_BLOCK = [128, 128]  # of FineGrainedFP8Config in transformers


@dataclass(frozen=True)
class StoredFormat:
    """How a checkpoint stores quantized weights.

    Attributes:
        title: for metrics and reports.
        suffix: end of the name of a scale, after the module's name; "" for mxfp4.
        block: rows and columns that share a scale; -1: all of them.
        block_is_default: whether the config does not state it.
    """

    title: str
    suffix: str
    block: tuple[int, int] = (-1, -1)
    block_is_default: bool = False


@dataclass(frozen=True)
class Dequantized:
    """A checkpoint with its quantized weights as float32.

    Attributes:
        names: names of the tensors of the unquantized checkpoint.
        read: reads one of them.
        quantized: the names of those that were stored quantized.
        title: of the format in which they were stored.
        dropped: name of a tensor -> the part it belongs to.
    """

    names: set[str]
    read: Read
    quantized: set[str]
    title: str | None = None
    dropped: dict[str, str] = field(default_factory=dict)


def find_quantization(raw: Mapping[str, Any]) -> Any:
    """Return the quantization settings in a config.json, of the wrapper or of its text model, or None."""
    text = raw.get("text_config")
    for level in (raw, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if level.get(key) is not None:
                return level[key]
    return None


def read_stored_format(source: str, settings: Any) -> StoredFormat:
    """Return the format that `quantization_config` describes.

    Raises:
        ModelImportError: it is none of those in the module's docstring.
    """
    values = settings if isinstance(settings, dict) else {"quant_method": settings}
    method = values.get("quant_method")
    if method == "fp8":
        return _read_fp8(source, values)
    if method == "mxfp4":
        return StoredFormat("mxfp4, groups of 32", "")
    if method == "compressed-tensors":
        _check_plain(source, values)
        return _read_compressed_tensors(source, values)
    raise _refuse(source, f"quant_method={method!r}")


def _refuse(source: str, setting: str) -> ModelImportError:
    return ModelImportError(
        f"model.source={source!r}: already quantized ({setting}). Weights are read from fp8, mxfp4 and "
        "compressed-tensors' float-quantized only. Start from the original model: its README names it as base_model."
    )


def _read_fp8(source: str, values: dict[str, Any]) -> StoredFormat:
    block = values.get("weight_block_size", _DEFAULT_BLOCK)
    if block is None:
        return StoredFormat("fp8, one scale per tensor", "weight_scale_inv")
    rows, columns = _check_block(source, "weight_block_size", block)
    is_default = "weight_block_size" not in values
    return StoredFormat(f"fp8, blocks of {rows} x {columns}", "weight_scale_inv", (rows, columns), is_default)


def _read_compressed_tensors(source: str, values: dict[str, Any]) -> StoredFormat:
    name = values.get("format")
    groups = values.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    formats = {group.get("format") or name for group in groups} or {name}
    if formats != {"float-quantized"}:
        raise _refuse(source, f"quant_method='compressed-tensors', format={sorted(map(str, formats))}")
    schemes = [group.get("weights") or {} for group in groups]
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure")
    if not schemes or any(scheme.get(key) != schemes[0].get(key) for scheme in schemes for key in keys):
        raise _refuse(source, "quant_method='compressed-tensors' with several schemes for weights in config_groups")
    scheme = schemes[0]
    if (scheme.get("num_bits"), scheme.get("type"), scheme.get("symmetric", True)) != (8, "float", True):
        raise _refuse(source, f"quant_method='compressed-tensors', weights={scheme}")
    strategy = scheme.get("strategy")
    title = f"compressed-tensors float-quantized, by {strategy}"
    if strategy == "tensor":
        return StoredFormat(title, "weight_scale")
    if strategy == "channel":
        return StoredFormat(title, "weight_scale", (1, -1))
    if strategy == "group":
        size = scheme.get("group_size")
        _check_block(source, "group_size", [1, size])
        assert isinstance(size, int)
        return StoredFormat(f"{title} of {size}", "weight_scale", (1, size))
    if strategy == "block":
        block = scheme.get("block_structure")
        if isinstance(block, str):  # older releases: "128x128"
            block = [int(part) if part.isdigit() else 0 for part in block.split("x")]
        rows, columns = _check_block(source, "block_structure", block)
        return StoredFormat(f"{title} of {rows} x {columns}", "weight_scale", (rows, columns))
    raise _refuse(source, f"quant_method='compressed-tensors', strategy={strategy!r}")


def _check_plain(source: str, values: dict[str, Any]) -> None:
    """Refuse settings of compressed-tensors that change the model besides its numbers."""
    sparsity = values.get("sparsity_config") or {}
    stored = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if stored not in (None, "dense"):
        raise _refuse(source, f"quant_method='compressed-tensors', sparsity_config.format={stored!r}")
    if values.get("transform_config"):
        raise _refuse(source, "quant_method='compressed-tensors' with transform_config: its weights are rotated")


def _check_block(source: str, key: str, block: Any) -> tuple[int, int]:
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ModelImportError(
            f"model.source={source!r}: {key}={block!r} in its quantization_config is not a block of rows and columns. "
            "Get config.json again."
        )
    return sizes[0], sizes[1]


def open_stored(
    source: str, stored: StoredFormat, names: set[str], read: Read, find_dtype: Callable[[str], str]
) -> Dequantized:
    """Return a checkpoint with quantized weights as one without.

    Args:
        source: as in params.yaml, for messages.
        stored: the format.
        names: names of the tensors in the checkpoint.
        read: reads one of them as stored.
        find_dtype: name -> dtype as safetensors calls it (F8_E4M3, BF16, U8).

    Raises:
        ModelImportError: a quantized weight lacks its scale, or a scale its weight.
    """
    dropped = {name: ACTIVATION_SCALES for name in names if name.rpartition(".")[2] in _ACTIVATION_NAMES}
    rest = names - set(dropped)
    if _is_auto_fp8(stored, rest):
        stored = replace(stored, title="fp8, one scale per tensor", suffix="weight_scale", block=(-1, -1))
    if stored.suffix:
        pairs = {name: _name_scale(name, stored) for name in rest if find_dtype(name) in _FP8}
        problem = f"stored as {stored.title}"
    else:
        stems = {name.removesuffix("_blocks") for name in rest if name.endswith("_blocks")}
        pairs = {f"{stem}_blocks": f"{stem}_scales" for stem in stems}
        problem = "stored as mxfp4"
    for weight, scale in sorted(pairs.items()):
        if scale not in rest:
            raise ModelImportError(
                f"model.source={source!r}: {weight} is {problem}, but its scales {scale} are missing. Get a "
                "complete copy."
            )
    used = set(pairs.values())
    left = sorted(name for name in rest - used - set(pairs) if _is_leftover(name))
    if left:
        raise ModelImportError(
            f"model.source={source!r}: {left[0]} belongs to no quantized weight of this checkpoint, {problem} by its "
            f"config ({len(left)} such tensors). Without it values would be wrong. Get a complete copy."
        )

    def read_float(name: str) -> torch.Tensor:
        if not stored.suffix and f"{name}_blocks" in pairs:
            return dequantize_mxfp4(source, name, read(f"{name}_blocks"), read(f"{name}_scales"))
        if name in pairs and stored.suffix:
            return dequantize_fp8(source, name, read(name), read(pairs[name]), stored.block)
        return read(name)

    quantized = set(pairs) if stored.suffix else {name.removesuffix("_blocks") for name in pairs}
    return Dequantized((rest - used - set(pairs)) | quantized, read_float, quantized, stored.title, dropped)


def _is_auto_fp8(stored: StoredFormat, names: Collection[str]) -> bool:
    """Return whether a checkpoint has the names of AutoFP8, which states no block size and has one scale per tensor."""
    suffixes = {name.rpartition(".")[2] for name in names}
    return stored.block_is_default and "weight_scale" in suffixes and "weight_scale_inv" not in suffixes


def _name_scale(weight: str, stored: StoredFormat) -> str:
    """Return the name of a weight's scales: `q_proj.weight` -> `q_proj.weight_scale_inv`."""
    return weight.removesuffix("weight") + stored.suffix if weight.endswith("weight") else f"{weight}_scale_inv"


def _is_leftover(name: str) -> bool:
    return name.endswith(("_scales", "_blocks")) or name.rpartition(".")[2].endswith(_LEFTOVERS)


def dequantize_fp8(
    source: str, name: str, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """Return weight · scale in float32.

    Args:
        source: as in params.yaml, for messages.
        name: name of the weight, for messages.
        weight: fp8, [O, I].
        scale: any floating-point dtype; one value, or [rows of blocks, columns of blocks].
        block: rows and columns that share a scale; -1: all. The last block may be short.

    Raises:
        ModelImportError: the scales do not have the shape that block size and weight ask for, or are not finite.
    """
    if weight.dim() != 2:
        raise ModelImportError(
            f"model.source={source!r}: {name} is stored as fp8 with shape {list(weight.shape)}. Only the weights of "
            "linears, with two dimensions, are read from fp8."
        )
    rows, columns = (length if size == -1 else size for size, length in zip(block, weight.shape, strict=True))
    expected = math.ceil(weight.shape[0] / rows), math.ceil(weight.shape[1] / columns)
    table = scale.float()
    if tuple(table.shape) != expected and not (table.numel() == 1 and expected == (1, 1)):
        raise ModelImportError(
            f"model.source={source!r}: {name} {list(weight.shape)} has scales of shape {list(scale.shape)}, its config "
            f"asks for {list(expected)} (blocks of {rows} x {columns}). Get config and weights of one model."
        )
    table = table.reshape(expected)
    _check_scales(source, name, table)
    values = weight.float()
    for index in range(expected[0]):
        factors = table[index].repeat_interleave(columns)[: weight.shape[1]]
        values[index * rows : (index + 1) * rows] *= factors
    _check_rows(source, name, weight, table, (rows, columns), values)
    return values


def _check_scales(source: str, name: str, scales: torch.Tensor) -> None:
    if not torch.isfinite(scales).all():
        raise ModelImportError(f"model.source={source!r}: scales of {name} are NaN or infinite. Get an intact copy.")


def _check_rows(
    source: str,
    name: str,
    weight: torch.Tensor,
    table: torch.Tensor,
    block: tuple[int, int],
    values: torch.Tensor,
) -> None:
    """Compute a few rows a second time in float64, where products are exact, with scales found by division."""
    chosen = torch.linspace(0, len(weight) - 1, min(_SAMPLED_ROWS, len(weight))).long()
    columns = torch.arange(weight.shape[1]) // block[1]
    exact = weight[chosen].double() * table.double()[chosen // block[0]][:, columns]
    if not torch.equal(values[chosen], exact.float()):
        raise ModelImportError(
            f"model.source={source!r}: {name} was not dequantized exactly. Report this with the model's name."
        )


def dequantize_mxfp4(source: str, name: str, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return experts' weights [E, I, O] in float32.

    Args:
        source: as in params.yaml, for messages.
        name: name of the tensor, for messages.
        blocks: uint8 [E, O, G, 16], two e2m1 codes per byte, the first one in its low half; I = 32 G.
        scales: uint8 [E, O, G], e8m0: 2^(scale - 127).

    Raises:
        ModelImportError: shapes or dtypes are others, or a scale is NaN (255).
    """
    fits = blocks.dim() == 4 and blocks.shape == (*scales.shape, 16)
    if not fits or blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ModelImportError(
            f"model.source={source!r}: {name}_blocks {list(blocks.shape)} and {name}_scales {list(scales.shape)} are "
            "not mxfp4: expected uint8, 16 bytes for each scale. Get an intact copy."
        )
    if (scales == _E8M0_NAN).any():
        raise ModelImportError(f"model.source={source!r}: scales of {name} are NaN. Get an intact copy.")
    experts, rows, groups, _ = blocks.shape
    values = torch.empty(experts, groups * 32, rows)
    for index in range(experts):  # one at a time: codes as indices take 8 bytes each
        codes = torch.stack([blocks[index] & 15, blocks[index] >> 4], dim=-1).flatten(2)  # [O, G, 32]
        exponents = scales[index].int() - _E8M0_BIAS
        values[index] = torch.ldexp(_E2M1[codes.long()], exponents[..., None]).flatten(1).T
    return values
