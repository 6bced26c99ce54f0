"""Rotate a model so that no channel stands out, without changing what it computes (QuaRot, arXiv:2404.00456, §4).

Hidden states are row vectors: h' = h R1. Everything that reads the residual stream undoes R1, everything that writes
to it applies it; RMSNorm commutes with a rotation once its weight is folded into its readers (its eps and its mean of
squares do not see R1, and no centring is involved, which would be for LayerNorm). With W [out, in] and g the weight
of the norm before it:

    embedding  E' = E R1            readers  W' = (W · g) R1         writers  W' = R1^T W,  b' = b R1
    v_proj     per head: W' = R2^T W, b' = b R2                      o_proj   per head of its input: W' = W R2
    down_proj  W' = W R4, and its input is multiplied by R4 online   R3 acts on keys online (see kv_cache.py)

Where norms stand between what a block writes and the residual stream (post-norms), R1 cannot pass their weights: it is
the identity there, no norm is folded, and R2, R3 and R4 are what there is.

R4 and R3 are plain normalised Hadamard transforms. R1 and R2 are one of: Hadamard times random signs, Haar random,
identity. All products are computed in float64 and cast once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.architectures import Architecture, UnsupportedModelError
from pipeline.artifacts import load_tensors, make_header, replacing_folder, save_tensors
from pipeline.checkpoint import Checkpoint, CheckpointWriter, copy_companions
from pipeline.errors import PipelineError
from pipeline.hadamard import hadamard_transform, random_orthogonal, random_signs
from pipeline.lm_head import LmHead
from pipeline.progress import show_progress
from pipeline.quantized_block import BlockSettings, describe_blocks, fill_block
from pipeline.walk import BlockRunner, compute_prefix_kv

ROTATIONS = "rotations.safetensors"
_ENTRIES, _ROWS = 1 << 23, 8192  # of a matrix at a time, in float64, at most
_GATE_WINDOWS, _GATE_LENGTH = 2, 64
GATE_TOLERANCE = 1e-4


class RotationError(PipelineError):
    """The rotated model does not compute what the original does."""


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix acting on rows: x -> x R.

    Either `signs` [n] (R = diag(signs) H, H the normalised Hadamard transform), or a dense `matrix` [n, n], or neither
    (identity). float64.
    """

    signs: torch.Tensor | None = None
    matrix: torch.Tensor | None = None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> x R in x's dtype."""
        if self.signs is not None:
            return hadamard_transform(x * self.signs.to(x))
        return x if self.matrix is None else x @ self.matrix.to(x)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        kept = {f"{name}.signs": self.signs, f"{name}.matrix": self.matrix}
        return {key: tensor for key, tensor in kept.items() if tensor is not None}


def make_rotation(mode: str, n: int, generator: torch.Generator) -> Rotation:
    """A rotation of width n; `mode` is hadamard, random or identity."""
    if mode == "hadamard":
        return Rotation(signs=random_signs(n, generator))
    return Rotation(matrix=random_orthogonal(n, generator)) if mode == "random" else Rotation()


def load_rotation(folder: Path, name: str) -> Rotation:
    """R1 or R2 of a rotated checkpoint (`name`: "r1" or "r2")."""
    tensors, _ = load_tensors(folder / ROTATIONS, "rotation")
    return Rotation(tensors.get(f"{name}.signs"), tensors.get(f"{name}.matrix"))


def compute_rotated_prefix_kv(
    checkpoint: Checkpoint, embeddings: torch.Tensor, runner: BlockRunner
) -> torch.Tensor | None:
    """As `compute_prefix_kv`, of a rotated model from embeddings [P, D] in the original model's basis."""
    return compute_prefix_kv(checkpoint, load_rotation(checkpoint.folder, "r1").apply(embeddings.double()), runner)


def rotate_block(
    tensors: dict[str, torch.Tensor],
    architecture: Architecture,
    r1: Rotation,
    r2: Rotation,
    online_r4: bool,
    head_dim: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Fold norms and merge R1, R2 and the inverse of R4 into one block, one tensor in float64 at a time.

    Args:
        tensors: of the original block, named as inside it; not changed.
        head_dim: d, as the config states it (not hidden / heads: some models differ).

    Yields:
        The same names with float64 tensors; folded norms are ones.
    """
    folded = architecture.norms if architecture.rotates_residual else {}
    norms = {reader: f"{norm}.weight" for norm, readers in folded.items() for reader in readers}
    writers = (architecture.attention_output, architecture.mlp_output)
    for name, tensor in tensors.items():
        linear, _, kind = name.rpartition(".")
        rotated = tensor.to(torch.float64, copy=True)
        if kind == "bias":
            # A row vector, as what the linear gives.
            if linear in writers:
                rotated = r1.apply(rotated)
            elif linear == architecture.value:
                rotated = _rotate_heads(rotated, r2, head_dim)
        elif linear in folded:
            rotated = torch.ones_like(rotated)
        if kind == "weight":
            if linear in norms:
                norm = tensors[norms[linear]].to(torch.float64)
                _change_rows_(rotated, lambda rows, norm=norm: r1.apply(rows * norm))
            if linear in writers:
                _change_rows_(rotated.T, r1.apply)
            if linear == architecture.value:
                _change_rows_(rotated.T, lambda rows: _rotate_heads(rows, r2, head_dim))
            if linear == architecture.attention_output:
                _change_rows_(rotated, lambda rows: _rotate_heads(rows, r2, head_dim))
            if linear == architecture.mlp_output and online_r4:
                _change_rows_(rotated, hadamard_transform)
        yield name, rotated


def _change_rows_(matrix: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace the rows [n, C] of a matrix (or of a transposed one) by change(rows), some at a time."""
    rows = _count_rows(matrix)
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
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, float]:
    """Write the rotated checkpoint to `folder`, one block in memory at a time, and check that nothing changed.

    The invariance gate walks a few random windows through original and rotated blocks side by side, in float32, before
    the cast to `dtype`. What a narrower dtype adds is measured by a third stream and reported, not judged.

    Args:
        checkpoint: the original model.
        folder: replaced as a whole when the gate is passed.
        r1_mode, r2_mode: hadamard, random or identity; r3_mode, r4_mode: hadamard or identity.
        seed: of the random signs and matrices.
        dtype: of the tensors written.

    Returns:
        Metrics: `max_logit_deviation` (relative to max |logit|), and `dtype_logit_deviation` for narrower dtypes.

    Raises:
        RotationError: the deviation exceeds 1e-4; `folder` is left as it was.
        UnsupportedModelError: R1 is asked for and cannot be merged into this family.
    """
    config, architecture = checkpoint.config, checkpoint.architecture
    if r1_mode != "identity" and not architecture.rotates_residual:
        raise UnsupportedModelError(
            f"rotation.r1={r1_mode}: model_type={config.model_type!r} has norms behind attention and MLP "
            f"({', '.join(architecture.post_norms)}), whose weights R1 cannot pass; set rotation.r1: identity "
            "(r2, r3 and r4 stay)"
        )
    generator = torch.Generator().manual_seed(seed)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    r1 = make_rotation(r1_mode, config.hidden_size, generator)
    r2 = make_rotation(r2_mode, head_dim, generator)
    settings = BlockSettings(online_r3=r3_mode != "identity", online_r4=r4_mode != "identity")
    modes = {"r1": r1_mode, "r2": r2_mode, "r3": r3_mode, "r4": r4_mode}
    values = modes | {"seed": seed, "dtype": str(dtype)}
    header = make_header("rotation", values, {"model": checkpoint.header})
    gate = _InvarianceGate(checkpoint, settings, r1, dtype, device, generator)
    with replacing_folder(folder) as partial:
        writer = CheckpointWriter(partial, architecture, "rotation", header)
        for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "rotating blocks"):
            original = checkpoint.load_block_tensors(index)
            gate.advance_original_(index, original)
            exact, narrow = {}, {}
            for name, tensor in rotate_block(original, architecture, r1, r2, settings.online_r4, head_dim):
                exact[name] = tensor.float()
                narrow[name] = exact[name] if dtype == torch.float32 else tensor.to(dtype)
            del original
            gate.advance_rotated_(index, exact)
            del exact
            gate.advance_narrowed_(index, narrow)
            writer.write_block(index, narrow)
        norm = checkpoint.load_tensor(architecture.final_norm)
        folded = norm.to(torch.float64) if architecture.rotates_residual else None
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


class _InvarianceGate:
    """Streams of the same windows through the original and the rotated model, block by block, in float32."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: BlockSettings,
        r1: Rotation,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self.checkpoint = checkpoint
        self.settings = settings
        self.narrow = None if dtype == torch.float32 else dtype
        self.runner = BlockRunner(checkpoint, device, _GATE_WINDOWS)
        shape = (_GATE_WINDOWS, _GATE_LENGTH)
        token_ids = torch.randint(0, checkpoint.config.vocab_size, shape, generator=generator)
        self.original = checkpoint.embed(token_ids).float()
        self.rotated = r1.apply(self.original.double()).float()
        self.narrowed = self.rotated.clone() if self.narrow is None else self.rotated.to(self.narrow).float()

    def advance_original_(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        self._advance_(index, tensors, self.original, None)

    def advance_rotated_(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        self._advance_(index, tensors, self.rotated, self.settings)

    def advance_narrowed_(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        if self.narrow is not None:
            self._advance_(index, tensors, self.narrowed, self.settings)

    def _advance_(
        self, index: int, tensors: dict[str, torch.Tensor], hidden: torch.Tensor, settings: BlockSettings | None
    ) -> None:
        block = fill_block(self.checkpoint, index, tensors, settings, self.runner.device, torch.float32)
        self.runner.advance_(block, hidden)

    @torch.no_grad()
    def judge(self, r1: Rotation, folded: torch.Tensor | None) -> dict[str, float]:
        """Compare logits, a slice of the vocabulary at a time. Raises RotationError.

        Args:
            folded: the final norm's weight [D] float64 that goes into lm_head, or None: it stays where it is.
        """
        norm: nn.Module = self.checkpoint.load_final_norm().float().requires_grad_(False)
        original = norm(self.original).flatten(0, 1)
        if folded is not None:
            norm.weight = nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)
        rotated, narrowed = (norm(hidden).flatten(0, 1) for hidden in (self.rotated, self.narrowed))
        head = self.checkpoint.load_lm_head()
        cap, head = head.cap, head.weight
        largest, deviation, narrow_deviation = 0.0, 0.0, 0.0
        count = _count_rows(head)
        for start in range(0, len(head), count):
            rows = head[start : start + count]
            rotated_rows = r1.apply(rows.double() if folded is None else rows.double() * folded).float()
            logits = LmHead(rows.float(), cap).logits(original)
            largest = max(largest, logits.abs().max().item())
            deviation = max(deviation, (LmHead(rotated_rows, cap).logits(rotated) - logits).abs().max().item())
            if self.narrow is not None:
                change = LmHead(rotated_rows.to(self.narrow).float(), cap).logits(narrowed) - logits
                narrow_deviation = max(narrow_deviation, change.abs().max().item())
        relative = deviation / largest
        if not math.isfinite(relative) or relative > GATE_TOLERANCE:
            raise RotationError(
                f"the rotated model is not the original: logits differ by {relative:.2e} of max |logit| "
                f"({largest:.4g}), allowed are {GATE_TOLERANCE:.0e}; nothing was written"
            )
        metrics = {"max_logit_deviation": relative}
        if self.narrow is not None:
            metrics["dtype_logit_deviation"] = narrow_deviation / largest
        return metrics


def _rotate_heads(x: torch.Tensor, r2: Rotation, head_dim: int) -> torch.Tensor:
    """R2 on each head along the last dimension: [..., heads * d]."""
    return r2.apply(x.unflatten(-1, (-1, head_dim))).flatten(-2)


def _count_rows(matrix: torch.Tensor) -> int:
    """How many rows of a matrix are taken to float64 at a time."""
    return min(_ROWS, max(1, _ENTRIES // matrix.shape[1]))


def _rotate_rows(matrix: torch.Tensor, r1: Rotation, norm: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """(matrix · norm) R1 for a vocabulary-sized matrix [V, D], rows in slices so that float64 stays small."""
    result = torch.empty(matrix.shape, dtype=dtype)
    count = _count_rows(matrix)
    for start in range(0, len(matrix), count):
        rows = matrix[start : start + count].to(torch.float64)
        result[start : start + count] = r1.apply(rows if norm is None else rows * norm).to(dtype)
    return result
