"""Rotate a model so that no channel stands out, without changing what it computes (QuaRot, arXiv:2404.00456, §4).

Hidden states are row vectors: h' = h R1. Everything that reads the residual stream undoes R1, everything that writes
to it applies it; RMSNorm commutes with a rotation once its weight is folded into its readers (its eps and its mean of
squares do not see R1, and no centring is involved, which would be for LayerNorm). With W [out, in] and g the weight
of the norm before it:

    embedding  E' = E R1            readers  W' = (W · g) R1         writers  W' = R1^T W,  b' = b R1
    v_proj     per head: W' = R2^T W, b' = b R2                      o_proj   per head of its input: W' = W R2
    down_proj  W' = W R4, and its input is multiplied by R4 online   R3 acts on keys online (see blocks/kv_cache.py)
    o_proj     W'' = W' R5, and its input, all heads together, is multiplied by R5 online

Where norms stand between what a block writes and the residual stream (post-norms), R1 cannot pass their weights:
merged, it is the identity there, and no norm is folded. Online, it stands behind the norms in front of attention and
MLP, where every family has room for it, and leaves the residual stream as it is:

    norm     g' = 1, and its output is multiplied by a Hadamard matrix H online        readers  W' = (W · g) H

Then nothing is left of R1 in the embedding, lm_head and the writers, and the norm's weight is free to scale channels in
front of H (quantization/equalization.py).

R2 spreads channels within their head; R5 also evens out what differs from head to head (QuaRot's "Hadamard heads").

With `online_signs`, a norm is left with random signs s = ±1 in place of one, its readers W' = (W · g · s) H; R2 gets
random signs behind it, R2' = R2 diag(s), the same in every head. A Hadamard matrix alone spreads badly what many
channels share, and R5 puts together again what R2 has spread by a factor of both: of 9 heads of 64 the 16 of R5's
36 * 16, of 32 heads of 128 all of it.

R3, R4 and R5 are plain normalised Hadamard transforms. R1 and R2 are one of: Hadamard times random signs, Haar random,
identity. A block Hadamard (R1, R2, R4) acts on every few consecutive channels by themselves: of the size of a number
format's blocks it spreads what stands out over its own block, not into all others. All products are computed in float64
and cast once.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pipeline.blocks.quantized import BlockSettings, describe_blocks
from pipeline.models.architectures import Architecture, UnsupportedModelError
from pipeline.models.checkpoint import Checkpoint, CheckpointWriter, copy_companions
from pipeline.numerics.hadamard import hadamard_transform, random_signs
from pipeline.rotation.gate import InvarianceGate
from pipeline.rotation.matrices import ROTATIONS, Rotation, change_heads, count_rows, make_rotation
from pipeline.runtime.artifacts import make_header, replacing_folder, save_tensors
from pipeline.runtime.progress import show_progress


def rotate_block(
    tensors: dict[str, torch.Tensor],
    architecture: Architecture,
    r1: Rotation,
    r2: Rotation,
    settings: BlockSettings,
    head_dim: int,
    signs: dict[str, torch.Tensor] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Fold norms and merge R1, R2 and the inverses of R4 and R5 into one block, one tensor in float64 at a time.

    Args:
        tensors: of the original block, named as inside it; not changed.
        settings: which rotations are online.
        head_dim: d, as the config states it (not hidden / heads: some models differ).
        signs: norm -> signs [D] in front of an online R1, of those that have them.

    Yields:
        The same names with float64 tensors; folded norms multiply by one, or by their signs.
    """
    signs = signs or {}
    folded = architecture.norms if architecture.rotates_residual or settings.online_r1 else {}
    to_input = hadamard_transform if settings.online_r1 else r1.apply
    readers = (*architecture.attention_readers, *architecture.mlp_readers)
    norms = {reader: norm for norm, readers in folded.items() for reader in readers}
    writers = (architecture.attention_output, architecture.mlp_output)
    for name, tensor in tensors.items():
        linear, _, kind = name.rpartition(".")
        rotated = tensor.to(torch.float64, copy=True)
        if kind == "bias":
            # A row vector, as what the linear gives.
            if linear in writers:
                rotated = r1.apply(rotated)
            elif linear == architecture.value:
                rotated = change_heads(rotated, r2.apply, head_dim)
        elif linear in folded:
            rotated = signs.get(linear, torch.ones_like(rotated)) - architecture.norm_offset
        if kind == "weight":
            if linear in norms:
                norm = norms[linear]
                gain = tensors[f"{norm}.weight"].to(torch.float64) + architecture.norm_offset
                gain = gain * signs.get(norm, 1.0)
                _change_rows_(rotated, lambda rows, gain=gain: to_input(rows * gain))
            elif linear in readers:
                _change_rows_(rotated, to_input)
            if linear in writers:
                _change_rows_(rotated.T, r1.apply)
            if linear == architecture.value:
                _change_rows_(rotated.T, lambda rows: change_heads(rows, r2.apply, head_dim))
            if linear == architecture.attention_output:
                _change_rows_(rotated, lambda rows: change_heads(rows, r2.apply, head_dim))
                if settings.online_r5:
                    _change_rows_(rotated, hadamard_transform)
            if linear == architecture.mlp_output and settings.online_r4:
                _change_rows_(rotated, lambda rows: hadamard_transform(rows, block_size=settings.r4_block_size))
        yield name, rotated


def _change_rows_(matrix: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace the rows [n, C] of a matrix (or of a transposed one) by change(rows), some at a time."""
    rows = count_rows(matrix)
    for start in range(0, len(matrix), rows):
        # Contiguous both ways: element by element, a transposed matrix takes thirty times as long.
        changed = change(matrix[start : start + rows].contiguous())
        if matrix.is_contiguous():
            matrix[start : start + rows] = changed
        else:
            matrix.T[:, start : start + rows] = changed.T.contiguous()


def rotate_model(
    checkpoint: Checkpoint,
    folder: Path,
    r1_mode: str,
    r2_mode: str,
    r3_mode: str,
    r4_mode: str,
    r5_mode: str,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int = -1,
    online_signs: bool = False,
) -> dict[str, float]:
    """Write the rotated checkpoint to `folder`, one block in memory at a time, and check that nothing changed.

    The invariance gate walks a few random windows through original and rotated blocks side by side, in float64, before
    the cast to `dtype`. What float32 and a narrower dtype add is measured by streams of their own and reported, not
    judged.

    Args:
        checkpoint: the original model.
        folder: replaced as a whole when the gate is passed.
        r1_mode: online, hadamard, block_hadamard, random or identity; r2_mode: the same but online; r3_mode, r4_mode,
            r5_mode: hadamard or identity, R4 also block_hadamard.
        seed: of the random signs and matrices.
        dtype: of the tensors written.
        block_size: of those that are block_hadamard.
        online_signs: whether random signs stand in front of an online R1, in the norms' weights, and of R5, in R2.

    Returns:
        Metrics, relative to max |logit|, against the original in float64: `max_logit_deviation` of the rotated model
        in float64; `float32_logit_deviation` of it in float32, beside `float32_original_deviation`, of the original in
        float32; `dtype_logit_deviation` for narrower dtypes.

    Raises:
        RotationError: the first deviation exceeds 1e-9; `folder` is left as it was.
        UnsupportedModelError: R1 is asked for and cannot be merged into this family, or signs are and nothing
            carries them.
    """
    config, architecture = checkpoint.config, checkpoint.architecture
    if r1_mode not in ("identity", "online") and not architecture.rotates_residual:
        raise UnsupportedModelError(
            f"rotation.r1={r1_mode}: model_type={config.model_type!r} has norms behind attention and MLP "
            f"({', '.join(architecture.post_norms)}), whose weights R1 cannot pass; set rotation.r1: online "
            "(or identity; all others stay)"
        )
    generator = torch.Generator().manual_seed(seed)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    online_r1 = r1_mode == "online"
    r1 = make_rotation("identity" if online_r1 else r1_mode, config.hidden_size, generator, block_size)
    r2 = make_rotation(r2_mode, head_dim, generator, block_size, online_signs and r5_mode != "identity")
    signed = tuple(architecture.norms) if online_signs and online_r1 else ()
    if online_signs and not signed and r2.behind is None:
        raise UnsupportedModelError(
            f"rotation.online_signs=true: model_type={config.model_type!r} has no norms in front of attention and MLP "
            "to carry them; set rotation.r5 and r2: hadamard, or online_signs: false"
        )
    settings = BlockSettings(
        online_r3=r3_mode != "identity",
        online_r4=r4_mode != "identity",
        online_r1=online_r1,
        online_r5=r5_mode != "identity",
        r4_block_size=block_size if r4_mode == "block_hadamard" else -1,
    )
    modes = {"r1": r1_mode, "r2": r2_mode, "r3": r3_mode, "r4": r4_mode, "r5": r5_mode}
    modes |= {"block_size": block_size} if "block_hadamard" in modes.values() else {}
    modes |= {"online_signs": True} if online_signs else {}
    values = modes | {"seed": seed, "dtype": str(dtype)}
    header = make_header("rotation", values, {"model": checkpoint.header})
    gate = InvarianceGate(checkpoint, settings, r1, dtype, device, generator)
    with replacing_folder(folder) as partial:
        writer = CheckpointWriter(partial, architecture, "rotation", header)
        for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "rotating blocks"):
            original = checkpoint.load_block_tensors(index)
            gate.advance_original_(index, original)
            signs = {norm: random_signs(config.hidden_size, generator) for norm in signed}
            rotated = dict(rotate_block(original, architecture, r1, r2, settings, head_dim, signs))
            del original
            gate.advance_rotated_(index, rotated)
            single, written = {}, {}
            for name in list(rotated):
                tensor = rotated.pop(name)
                single[name] = tensor.float()
                written[name] = single[name] if dtype == torch.float32 else tensor.to(dtype)
            gate.advance_rounded_(index, single, written)
            del single
            writer.write_block(index, written)
        norm = checkpoint.load_tensor(architecture.final_norm)
        folded = norm.to(torch.float64) if architecture.rotates_residual and not online_r1 else None
        embedding = _rotate_rows(checkpoint.load_tensor(architecture.embedding), r1, None, dtype)
        lm_head = _rotate_rows(checkpoint.load_tensor(architecture.lm_head), r1, folded, dtype)
        metrics = gate.judge(r1, folded)
        writer.write_embeddings(
            {
                architecture.embedding: embedding,
                architecture.final_norm: (norm if folded is None else torch.ones_like(norm)).to(dtype),
                architecture.lm_head: lm_head,
            }
        )
        save_tensors(partial / ROTATIONS, r1.tensors("r1") | r2.tensors("r2"), header)
        copy_companions(checkpoint.folder, partial)
        untied = {"tie_word_embeddings": False, "dtype": str(dtype).removeprefix("torch.")}
        writer.finish(checkpoint.read_config() | untied, describe_blocks([settings]))
    return metrics


def _rotate_rows(matrix: torch.Tensor, r1: Rotation, norm: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """(matrix · norm) R1 for a vocabulary-sized matrix [V, D], rows in slices so that float64 stays small."""
    result = torch.empty(matrix.shape, dtype=dtype)
    count = count_rows(matrix)
    for start in range(0, len(matrix), count):
        rows = matrix[start : start + count].to(torch.float64)
        result[start : start + count] = r1.apply(rows if norm is None else rows * norm).to(dtype)
    return result
