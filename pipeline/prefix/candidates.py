"""Read a prefix from the artifact of `prefix_training`, which holds every candidate."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.runtime.artifacts import ArtifactError, Header, load_tensors


def resize_rows(rows: torch.Tensor, length: int | None) -> torch.Tensor:
    """Cut or repeat rows [P, …] to [length, …] so that the last row stays last; None or P = 0 changes nothing.

    [a, b, c] -> 2: [b, c]; -> 5: [b, c, a, b, c].
    """
    if length is None or not len(rows):
        return rows
    return rows[(torch.arange(length) - length) % len(rows)]


@dataclass(frozen=True)
class CandidatePrefix:
    """A prefix to use with a model.

    Attributes:
        token_ids: [P] int64; empty for a continuous prefix.
        embeddings: [P, D] in the original model's basis.
        initial_token_ids: `token_ids`; for a continuous prefix the tokens that its training started from, empty if it
            started from random embeddings.
        header: header of the artifact.
    """

    token_ids: torch.Tensor
    embeddings: torch.Tensor
    initial_token_ids: torch.Tensor
    header: Header


def load_prefix(path: Path, use: str, length: int | None = None) -> CandidatePrefix:
    """Return the prefix that `prefix.use` selects, cut or repeated to `prefix.length`.

    Args:
        path: prefix.safetensors of `prefix_training`.
        use: none (an empty prefix of the right width) | found | trained | discretised.

    Raises:
        ArtifactError: the file is missing, damaged or of another stage, or has no such candidate.
    """
    tensors, header = load_tensors(path, "prefix_training")
    candidate = "found" if use == "none" else use
    if f"{candidate}.embeddings" not in tensors:
        raise ArtifactError(
            f"{path} holds no {use} prefix. Set prefix_training.enabled: true and run: dvc repro prefix_training"
        )
    embeddings = tensors[f"{candidate}.embeddings"]
    token_ids = tensors.get(f"{candidate}.token_ids", torch.zeros(0, dtype=torch.int64))
    initial_token_ids = tensors.get(f"{candidate}.initial_token_ids", token_ids)
    if use == "none":
        return CandidatePrefix(token_ids[:0], embeddings[:0], token_ids[:0], header)
    return CandidatePrefix(
        token_ids=resize_rows(token_ids, length),
        embeddings=resize_rows(embeddings, length),
        initial_token_ids=resize_rows(initial_token_ids, length),
        header=header,
    )
