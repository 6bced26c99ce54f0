"""The prefix as an artifact: the candidates of `prefix_training`, and what a quantized model carries."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.runtime.artifacts import ArtifactError, Header, load_tensors


def resize_rows(rows: torch.Tensor, length: int | None) -> torch.Tensor:
    """Cut or repeat rows [P, …] to [length, …] so that the last stays last; None or no rows: as they are.

    [a, b, c] -> 2: [b, c]; -> 5: [b, c, a, b, c].
    """
    if length is None or not len(rows):
        return rows
    return rows[(torch.arange(length) - length) % len(rows)]


@dataclass(frozen=True)
class CandidatePrefix:
    """A prefix to put in front of a model.

    Attributes:
        token_ids: [P] int64; empty for a continuous one.
        embeddings: [P, D] in the original model's basis.
        begun_from: token ids; of a continuous one those its training began from, empty where that was random.
        header: of the artifact.
    """

    token_ids: torch.Tensor
    embeddings: torch.Tensor
    begun_from: torch.Tensor
    header: Header


def load_prefix(path: Path, use: str, length: int | None = None) -> CandidatePrefix:
    """The prefix that `prefix.use` selects, cut or repeated to `prefix.length`.

    Args:
        path: the artifact of `prefix_training`.
        use: `none` gives an empty prefix (P = 0) of the right width; `found`, `trained`, `discretised`.

    Raises:
        ArtifactError: the file is missing, foreign or damaged, or holds no such candidate.
    """
    tensors, header = load_tensors(path, "prefix_training")
    candidate = "found" if use == "none" else use
    if f"{candidate}.embeddings" not in tensors:
        raise ArtifactError(
            f"{path} holds no {use} prefix; set prefix_training.enabled: true and rerun: dvc repro prefix_training"
        )
    embeddings = tensors[f"{candidate}.embeddings"]
    token_ids = tensors.get(f"{candidate}.token_ids", torch.zeros(0, dtype=torch.int64))
    begun_from = tensors.get(f"{candidate}.initial_token_ids", token_ids)
    if use == "none":
        return CandidatePrefix(token_ids[:0], embeddings[:0], token_ids[:0], header)
    return CandidatePrefix(*(resize_rows(rows, length) for rows in (token_ids, embeddings, begun_from)), header)
