"""The matrices a model is rotated by: made, applied, stored, and applied to a prefix."""

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
ENTRIES, _ROWS = 1 << 23, 8192  # of a matrix at a time, in float64, at most


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix acting on rows: x -> x R.

    Either `signs` [n] (R = diag(signs) H, H the normalised Hadamard transform), or a dense `matrix` [n, n], or neither
    (identity). float64.

    Attributes:
        block_size: H acts on so many consecutive channels at a time; -1: on all.
        behind: with `signs`, others [n] behind H: R = diag(signs) H diag(behind).
    """

    signs: torch.Tensor | None = None
    matrix: torch.Tensor | None = None
    block_size: int = -1
    behind: torch.Tensor | None = None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> x R in x's dtype."""
        if self.signs is not None:
            x = hadamard_transform(x * self.signs.to(x), block_size=self.block_size)
            return x if self.behind is None else x * self.behind.to(x)
        return x if self.matrix is None else x @ self.matrix.to(x)

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """x R [..., n] -> x."""
        if self.signs is not None:
            x = x if self.behind is None else x * self.behind.to(x)
            return hadamard_transform(x, True, self.block_size) * self.signs.to(x)
        return x if self.matrix is None else x @ self.matrix.to(x).T

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        blocks = None if self.block_size == -1 else torch.tensor([self.block_size])
        kept = {"signs": self.signs, "matrix": self.matrix, "block_size": blocks, "behind": self.behind}
        return {f"{name}.{key}": tensor for key, tensor in kept.items() if tensor is not None}


def make_rotation(
    mode: str, n: int, generator: torch.Generator, block_size: int = -1, behind: bool = False
) -> Rotation:
    """A rotation of width n; `mode` is hadamard, block_hadamard (of `block_size`), random or identity.

    `behind`: a Hadamard gets random signs behind it too, for where another follows.
    """
    if mode in ("hadamard", "block_hadamard"):
        signs = random_signs(n, generator)
        last = random_signs(n, generator) if behind else None
        return Rotation(signs, block_size=-1 if mode == "hadamard" else block_size, behind=last)
    return Rotation(matrix=random_orthogonal(n, generator)) if mode == "random" else Rotation()


def load_rotation(folder: Path, name: str) -> Rotation:
    """R1 or R2 of a rotated checkpoint (`name`: "r1" or "r2")."""
    tensors, _ = load_tensors(folder / ROTATIONS, "rotation")
    blocks = tensors.get(f"{name}.block_size")
    size = -1 if blocks is None else int(blocks)
    return Rotation(tensors.get(f"{name}.signs"), tensors.get(f"{name}.matrix"), size, tensors.get(f"{name}.behind"))


def compute_rotated_prefix_kv(
    checkpoint: Checkpoint, embeddings: torch.Tensor, runner: BlockRunner
) -> torch.Tensor | None:
    """As `compute_prefix_kv`, of a rotated model from embeddings [P, D] in the original model's basis."""
    return compute_prefix_kv(checkpoint, load_rotation(checkpoint.folder, "r1").apply(embeddings.double()), runner)


def count_rows(matrix: torch.Tensor) -> int:
    """How many rows of a matrix are taken to float64 at a time."""
    return min(_ROWS, max(1, ENTRIES // matrix.shape[1]))


def change_heads(x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor], head_dim: int) -> torch.Tensor:
    """`change` (R2's `apply` or `undo`) of each head along the last dimension: [..., heads * d]."""
    return change(x.unflatten(-1, (-1, head_dim))).flatten(-2)
