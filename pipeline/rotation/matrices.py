"""The matrices R1 and R2: make them, apply them, store them, and rotate a prefix."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.walk import BlockRunner
from pipeline.models.checkpoint import Checkpoint
from pipeline.numerics.hadamard import hadamard_transform, random_orthogonal, random_signs
from pipeline.runtime.artifacts import load_tensors

ROTATIONS = "rotations.safetensors"
ENTRIES, _ROWS = 1 << 23, 8192  # largest part of a matrix that is in float64 at a time


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix that acts on rows: x -> x R.

    It has `signs` [n] (R = diag(signs) H with H the normalised Hadamard transform), or a dense `matrix` [n, n], or
    neither (the identity). Both are float64.

    Attributes:
        block_size: the number of consecutive channels that H mixes; -1: all.
        signs_after: with `signs`, a second set of signs [n]: R = diag(signs) H diag(signs_after).
    """

    signs: torch.Tensor | None = None
    matrix: torch.Tensor | None = None
    block_size: int = -1
    signs_after: torch.Tensor | None = None

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return self.signs is None and self.matrix is None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x R for x [..., n], in x's dtype."""
        if self.signs is not None:
            x = hadamard_transform(x * self.signs.to(x), block_size=self.block_size)
            return x if self.signs_after is None else x * self.signs_after.to(x)
        return x if self.matrix is None else x @ self.matrix.to(x)

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """Return x R^T for x [..., n], the inverse of `apply`, in x's dtype."""
        if self.signs is not None:
            x = x if self.signs_after is None else x * self.signs_after.to(x)
            return hadamard_transform(x, True, self.block_size) * self.signs.to(x)
        return x if self.matrix is None else x @ self.matrix.to(x).T

    def to_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the rotation as tensors of an artifact, from which `load_rotation` reads it."""
        block_size = None if self.block_size == -1 else torch.tensor([self.block_size])
        # `behind` is the stored name of `signs_after`.
        stored = {"signs": self.signs, "matrix": self.matrix, "block_size": block_size, "behind": self.signs_after}
        return {f"{name}.{key}": tensor for key, tensor in stored.items() if tensor is not None}


def make_rotation(
    mode: str, n: int, generator: torch.Generator, block_size: int = -1, signs_after: bool = False
) -> Rotation:
    """Make a rotation of width n.

    Args:
        mode: hadamard, block_hadamard, random or identity.
        block_size: channels per block of a block_hadamard.
        signs_after: whether a Hadamard transform is followed by random signs too, because another transform follows.
    """
    if mode in ("hadamard", "block_hadamard"):
        signs = random_signs(n, generator)
        last_signs = random_signs(n, generator) if signs_after else None
        return Rotation(signs, block_size=-1 if mode == "hadamard" else block_size, signs_after=last_signs)
    return Rotation(matrix=random_orthogonal(n, generator)) if mode == "random" else Rotation()


def load_rotation(folder: Path, name: str) -> Rotation:
    """Load R1 or R2 (`name`: "r1" or "r2") of a rotated checkpoint. Raises ArtifactError."""
    tensors, _ = load_tensors(folder / ROTATIONS, "rotation")
    block_size = tensors.get(f"{name}.block_size")
    return Rotation(
        signs=tensors.get(f"{name}.signs"),
        matrix=tensors.get(f"{name}.matrix"),
        block_size=-1 if block_size is None else int(block_size),
        signs_after=tensors.get(f"{name}.behind"),
    )


def compute_rotated_prefix_kv(
    checkpoint: Checkpoint, embeddings: torch.Tensor, runner: BlockRunner
) -> torch.Tensor | None:
    """Compute a prefix's KV in a rotated model from embeddings [P, D] in the original model's basis.

    See `compute_prefix_kv` for the result.
    """
    return compute_prefix_kv(checkpoint, load_rotation(checkpoint.folder, "r1").apply(embeddings.double()), runner)


def count_rows(matrix: torch.Tensor) -> int:
    """Return how many rows of a matrix are in float64 at a time."""
    return min(_ROWS, max(1, ENTRIES // matrix.shape[1]))


def change_heads(x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor], head_dim: int) -> torch.Tensor:
    """Apply `change` (`apply` or `undo` of R2) to each head of x [..., heads * d]."""
    return change(x.unflatten(-1, (-1, head_dim))).flatten(-2)
