"""Rotate a model so that no channel dominates, without changing its outputs (QuaRot, arXiv:2404.00456, §4).

Hidden states are row vectors: h' = h R1. Whatever reads the residual stream undoes R1, and whatever writes to it
applies R1. RMSNorm commutes with a rotation once its weight is folded into its readers: neither its eps nor its mean of
squares depends on R1. (Embeddings must not be centred; LayerNorm would need that.) With W [out, in] and g the weight of
the norm before it:

    embedding  E' = E R1
    readers    W' = (W · g) R1
    writers    W' = R1^T W,  b' = b R1
    v_proj     W' = R2^T W,  b' = b R2      in each head
    o_proj     W' = W R2                    in each head of its input
    o_proj     W'' = W' R5                  and its input, all heads together, is multiplied by R5 online
    down_proj  W' = W R4                    and its input is multiplied by R4 online; in each expert
    router     W' = (W · g) R1, or with an online R1 (W · g): it reads the norm's output, never the rotated input
    keys       R3 acts on them online (see blocks/kv_cache.py)

R2 spreads channels within a head. R5 also evens out the differences between heads (QuaRot's "Hadamard heads").

Some families have norms between the output of attention or MLP and the residual stream (post-norms). R1 cannot pass
the weights of these norms, so merging it there is refused, and no norm is folded. An online R1 works for every family.
It acts after the norms before attention and MLP and leaves the residual stream unrotated:

    norm       g' = 1, and its output is multiplied by a Hadamard matrix H online
    readers    W' = (W · g) H

The embedding, lm_head and the writers are then unchanged, and the norm's weight is free to scale channels before H
(quantization/equalization.py).

With `online_signs`, the weight of each norm becomes random signs s = ±1 instead of one, and its readers
W' = (W · g · s) H. R2 is followed by random signs, the same in every head: R2' = R2 diag(s). The reason is that a
Hadamard matrix alone spreads badly what many channels share. Without signs, R5 also collects again what R2 has spread
if both have a common factor: with 9 heads of 64 the factor 16 of R5's 36 * 16, with 32 heads of 128 all of it.

R3, R4 and R5 are plain normalised Hadamard transforms. R1 and R2 are a Hadamard transform times random signs, a Haar
random matrix, or the identity. A block Hadamard (R1, R2, R4) acts on each group of `block_size` consecutive channels
alone. If that is the block of a number format, an outlier is spread over its own block and not into all others. All
products are computed in float64 and cast once.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pipeline.blocks.quantized import BlockSettings, describe_blocks
from pipeline.models.architectures import Architecture, UnsupportedModelError
from pipeline.models.checkpoint import Checkpoint, CheckpointWriter, copy_companions
from pipeline.models.experts import split_experts
from pipeline.numerics.hadamard import hadamard_transform, random_signs
from pipeline.rotation.gate import InvarianceGate
from pipeline.rotation.matrices import ROTATIONS, Rotation, change_heads, count_rows, make_rotation
from pipeline.rotation.params import R1Mode, R2Mode, R3Mode, R4Mode, R5Mode
from pipeline.runtime.artifacts import make_header, replacing_folder, save_tensors
from pipeline.runtime.progress import show_progress


def rotate_block(
    tensors: dict[str, torch.Tensor],
    architecture: Architecture,
    *,
    r1: Rotation,
    r2: Rotation,
    settings: BlockSettings,
    head_dim: int,
    signs: dict[str, torch.Tensor] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Fold norms and merge R1, R2 and the inverses of R4 and R5 into one block, one tensor in float64 at a time.

    Args:
        tensors: the original block's, named as inside the block, experts one by one; not changed.
        settings: says which rotations are online.
        head_dim: d from the config (in some models it is not hidden size / heads).
        signs: norm -> signs [D] before an online R1, for the norms that carry any.

    Yields:
        The same names with float64 tensors. The weight of a folded norm is one, or its signs.
    """
    signs = signs or {}
    tensors = split_experts(tensors, architecture.interleaved_experts)
    architecture = architecture.of_tensors(tensors)
    folded = architecture.norms if architecture.rotates_residual or settings.online_r1 else {}
    rotate_input = hadamard_transform if settings.online_r1 else r1.apply
    readers = {*architecture.attention_readers, *architecture.mlp_readers}
    norms = {reader: norm for norm, norm_readers in folded.items() for reader in norm_readers}
    mlp_outputs = {down for _, _, down in architecture.mlps.values()}
    writers = {architecture.attention_output, *mlp_outputs}
    # These read the norm's output before an online R1. A merged R1 turns their input as well.
    routers = {name: norm for norm, names in architecture.full_precision_readers.items() for name in names}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():  # a buffer
            yield name, tensor
            continue
        module, _, kind = name.rpartition(".")
        rotated = tensor.to(torch.float64, copy=True)
        if kind == "bias":  # a row vector like the outputs it is added to
            if module in writers:
                rotated = r1.apply(rotated)
            elif module == architecture.value:
                rotated = change_heads(rotated, r2.apply, head_dim)
        elif module in folded:
            rotated = signs.get(module, torch.ones_like(rotated)) - architecture.norm_offset
        if kind == "weight":
            if module in norms:
                norm = norms[module]
                gain = tensors[f"{norm}.weight"].to(torch.float64) + architecture.norm_offset
                gain = gain * signs.get(norm, 1.0)
                _change_rows_(rotated, lambda rows, gain=gain: rotate_input(rows * gain))
            elif module in readers:
                _change_rows_(rotated, rotate_input)
            elif module in routers:
                norm = routers[module]
                if norm in folded:
                    gain = tensors[f"{norm}.weight"].to(torch.float64) + architecture.norm_offset
                    rotated *= gain * signs.get(norm, 1.0)
                _change_rows_(rotated, r1.apply)
            if module in writers:
                _change_rows_(rotated.T, r1.apply)
            if module == architecture.value:
                _change_rows_(rotated.T, lambda rows: change_heads(rows, r2.apply, head_dim))
            if module == architecture.attention_output:
                _change_rows_(rotated, lambda rows: change_heads(rows, r2.apply, head_dim))
                if settings.online_r5:
                    _change_rows_(rotated, hadamard_transform)
            if module in mlp_outputs and settings.online_r4:
                _change_rows_(rotated, lambda rows: hadamard_transform(rows, block_size=settings.r4_block_size))
        yield name, rotated


def _change_rows_(matrix: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace the rows [n, C] of a matrix, or of a transposed one, by change(rows), a slice of rows at a time."""
    count = count_rows(matrix)
    for start in range(0, len(matrix), count):
        # Contiguous in both directions: element by element, a transposed matrix takes thirty times as long.
        changed = change(matrix[start : start + count].contiguous())
        if matrix.is_contiguous():
            matrix[start : start + count] = changed
        else:
            matrix.T[:, start : start + count] = changed.T.contiguous()


def rotate_model(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    r1: R1Mode,
    r2: R2Mode,
    r3: R3Mode,
    r4: R4Mode,
    r5: R5Mode,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int = -1,
    online_signs: bool = False,
) -> dict[str, float]:
    """Write the rotated checkpoint to `folder`, one block in memory at a time, and check that nothing has changed.

    The invariance gate walks a few random windows through the original and the rotated blocks side by side, in float64,
    before the cast to `dtype`. The deviations that float32 and a narrower dtype add are reported but not judged.

    Args:
        checkpoint: the original model.
        folder: replaced as a whole once the gate is passed.
        r1, r2, r3, r4, r5: how each rotation is made, as in params.yaml.
        seed: for the random signs and matrices.
        dtype: the dtype of the written tensors.
        block_size: channels per block of the rotations that are block_hadamard.
        online_signs: whether random signs precede an online R1 (in the norms' weights) and R5 (in R2).

    Returns:
        Metrics, relative to max |logit| and compared with the original in float64: `max_logit_deviation` of the rotated
        model in float64; `float32_logit_deviation` of the rotated and `float32_original_deviation` of the original
        model in float32; `dtype_logit_deviation` of the rotated model in a narrower `dtype`.

    Raises:
        RotationError: `max_logit_deviation` exceeds 1e-9; `folder` is left as it was.
        UnsupportedModelError: R1 cannot be merged into this family, or there is nothing to carry the signs.
    """
    config, architecture = checkpoint.config, checkpoint.architecture
    online_r1 = r1 == "online"
    if r1 not in ("identity", "online") and not architecture.rotates_residual:
        raise UnsupportedModelError(
            f"rotation.r1={r1}: model_type={config.model_type!r} has norms after attention and MLP "
            f"({', '.join(architecture.post_norms)}), and R1 cannot pass their weights. Set rotation.r1: online "
            "(or identity); the other rotations can stay."
        )
    generator = torch.Generator().manual_seed(seed)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    merged_r1 = make_rotation("identity" if online_r1 else r1, config.hidden_size, generator, block_size)
    merged_r2 = make_rotation(r2, head_dim, generator, block_size, signs_after=online_signs and r5 != "identity")
    signed_norms = tuple(architecture.norms) if online_signs and online_r1 else ()
    if online_signs and not signed_norms and merged_r2.signs_after is None:
        raise UnsupportedModelError(
            f"rotation.online_signs=true: model_type={config.model_type!r} has no norms before attention and MLP to "
            "carry the signs. Set rotation.r5 and r2: hadamard, or online_signs: false."
        )
    settings = BlockSettings(
        online_r3=r3 != "identity",
        online_r4=r4 != "identity",
        online_r1=online_r1,
        online_r5=r5 != "identity",
        r4_block_size=block_size if r4 == "block_hadamard" else -1,
    )
    values: dict[str, str | int | bool] = {"r1": r1, "r2": r2, "r3": r3, "r4": r4, "r5": r5}
    if "block_hadamard" in (r1, r2, r4):
        values["block_size"] = block_size
    if online_signs:
        values["online_signs"] = True
    values |= {"seed": seed, "dtype": str(dtype)}
    header = make_header("rotation", values, {"model": checkpoint.header})
    gate = InvarianceGate(checkpoint, settings=settings, r1=merged_r1, dtype=dtype, device=device, generator=generator)
    with replacing_folder(folder) as partial:
        writer = CheckpointWriter(partial, architecture, "rotation", header)
        for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "rotating blocks"):
            original = checkpoint.load_block_tensors(index)
            gate.advance_original_(index, original)
            rotated = dict(
                rotate_block(
                    original,
                    architecture,
                    r1=merged_r1,
                    r2=merged_r2,
                    settings=settings,
                    head_dim=head_dim,
                    signs={norm: random_signs(config.hidden_size, generator) for norm in signed_norms},
                )
            )
            del original
            gate.advance_rotated_(index, rotated)
            single, written = {}, {}
            for name in list(rotated):
                tensor = rotated.pop(name)
                single[name] = tensor.float() if tensor.is_floating_point() else tensor
                narrow = dtype != torch.float32 and tensor.is_floating_point() and not architecture.keeps_float32(name)
                written[name] = tensor.to(dtype) if narrow else single[name]
            gate.advance_rounded_(index, single, written)
            del single
            writer.write_block(index, written)
        norm = checkpoint.load_tensor(architecture.final_norm)
        offset = architecture.norm_offset
        folded = norm.to(torch.float64) + offset if architecture.rotates_residual and not online_r1 else None
        embedding = _rotate_rows(checkpoint.load_tensor(architecture.embedding), merged_r1, None, dtype)
        lm_head = _rotate_rows(checkpoint.load_tensor(architecture.lm_head), merged_r1, folded, dtype)
        metrics = gate.judge(merged_r1, folded)
        writer.write_embeddings(
            {
                architecture.embedding: embedding,
                architecture.final_norm: (norm if folded is None else torch.ones_like(norm) - offset).to(dtype),
                architecture.lm_head: lm_head,
            }
        )
        save_tensors(partial / ROTATIONS, merged_r1.to_tensors("r1") | merged_r2.to_tensors("r2"), header)
        copy_companions(checkpoint.folder, partial)
        untied = {"tie_word_embeddings": False, "dtype": str(dtype).removeprefix("torch.")}
        writer.finish(checkpoint.read_config() | untied, describe_blocks([settings]))
    return metrics


def _rotate_rows(matrix: torch.Tensor, r1: Rotation, norm: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return (matrix · norm) R1 for a matrix [V, D], a slice of rows at a time so that float64 stays small."""
    result = torch.empty(matrix.shape, dtype=dtype)
    count = count_rows(matrix)
    for start in range(0, len(matrix), count):
        rows = matrix[start : start + count].to(torch.float64)
        result[start : start + count] = r1.apply(rows if norm is None else rows * norm).to(dtype)
    return result
