"""The prefix's keys and values in every block: computed once in full precision, stored with every quantized model."""

from pathlib import Path

import torch

from pipeline.blocks.walk import BlockRunner, load_blocks
from pipeline.models.checkpoint import Checkpoint
from pipeline.runtime.artifacts import load_tensors

PREFIX = "prefix.safetensors"


@torch.no_grad()
def compute_prefix_kv(checkpoint: Checkpoint, embeddings: torch.Tensor, runner: BlockRunner) -> torch.Tensor | None:
    """Compute keys (after RoPE) and values of a prefix in every block, in full precision.

    Args:
        checkpoint: an unquantized one, plain or rotated.
        embeddings: [P, D] in the checkpoint's basis (for a rotated model: original embeddings @ R1).

    Returns:
        [L, 2, heads, P, d] on the CPU in the checkpoint's dtype, or None when P is 0.
    """
    if len(embeddings) == 0:
        return None
    hidden = embeddings.to(device=runner.device, dtype=checkpoint.dtype).unsqueeze(0)
    prefixes = []
    for block in load_blocks(checkpoint, runner.device):
        hidden, prefix_kv = runner.run_prefix(block, hidden)
        prefixes.append(prefix_kv.cpu())
        del block
    return torch.stack(prefixes)


def load_prefix_kv(folder: Path, stage: str) -> torch.Tensor | None:
    """Load the prefix's KV [L, 2, kv_heads, P, d] of a quantized checkpoint; None if it has no prefix."""
    tensors, _ = load_tensors(folder / PREFIX, stage)
    return tensors.get("kv")
