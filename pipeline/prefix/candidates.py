"""The prefix as an artifact: the candidates of `prefix_training`, and what a quantized model carries."""

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


def load_prefix(path: Path, use: str, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor, Header]:
    """The prefix that `prefix.use` selects, cut or repeated to `prefix.length`.

    Args:
        path: the artifact of `prefix_training`.
        use: `none` gives an empty prefix (P = 0) of the right width; `found`, `trained`, `discretised`.

    Returns:
        Token ids [P] (empty for `trained`, which has none), embeddings [P, D] in the original basis, the header.

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
    if use == "none":
        return token_ids[:0], embeddings[:0], header
    return resize_rows(token_ids, length), resize_rows(embeddings, length), header
