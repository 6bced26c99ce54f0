"""The prefix as an artifact: what `prefix_search` finds, and what a quantized model carries."""

from pathlib import Path

import torch

from pipeline.artifacts import Header, load_tensors

PREFIX = "prefix.safetensors"


def load_prefix(path: Path, use: str) -> tuple[torch.Tensor, torch.Tensor, Header]:
    """The prefix that `prefix.use` selects: token ids [P], embeddings [P, D] in the original basis, its header.

    `none` gives an empty prefix (P = 0) of the right width. Raises ArtifactError.
    """
    tensors, header = load_tensors(path, "prefix_search")
    count = 0 if use == "none" else len(tensors["token_ids"])
    return tensors["token_ids"][:count], tensors["embeddings"][:count], header


def load_prefix_kv(folder: Path, stage: str) -> torch.Tensor | None:
    """The prefix's KV [L, 2, kv_heads, P, d] of a quantized checkpoint, None when it has no prefix."""
    tensors, _ = load_tensors(folder / PREFIX, stage)
    return tensors.get("kv")
