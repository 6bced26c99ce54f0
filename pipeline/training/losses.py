"""Losses of block-wise fine-tuning: the distance of a block's output from its target.

    mse             mean squared difference
    clamp_mse       mse, with output and target clamped to the range that holds all but the largest 0.1 % of the
                    target's magnitudes in the window
    skip_mse        mse, without the 3 tokens whose target has the largest mean magnitude
    normalized_mse  squared difference of each token relative to the energy of the token's target; mean over tokens
    cosine          1 - cosine similarity of each token; mean over tokens

All take output and target [B, T, D], the positions after the prefix, and return one loss per window, [B] float32. The
loss of a batch is the mean of these, so it does not depend on how windows are spread over processes.
"""

from collections.abc import Callable

import torch
from torch import nn

_CLAMPED_SHARE = 0.001
_SKIPPED_TOKENS = 3

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.float() - target.float()).square().mean((1, 2))


def clamp_mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    output, target = output.float(), target.float()
    magnitudes = target.abs().flatten(1)
    clamped_count = max(1, round(_CLAMPED_SHARE * magnitudes.shape[1]))
    largest = magnitudes.topk(clamped_count, dim=1).values[:, -1, None, None]
    return mse(torch.minimum(torch.maximum(output, -largest), largest), target.clamp(-largest, largest))


def skip_mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    magnitudes = target.float().abs().mean(-1)
    skipped = magnitudes.topk(min(_SKIPPED_TOKENS, magnitudes.shape[-1] - 1), dim=-1).indices
    weights = torch.ones_like(magnitudes).scatter(-1, skipped, 0.0)
    errors = (output.float() - target.float()).square().mean(-1)
    return (errors * weights).sum(-1) / weights.sum(-1)


def normalized_mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    target = target.float()
    errors = (output.float() - target).square().sum(-1)
    return (errors / target.square().sum(-1).clamp_min(1e-30)).mean(-1)


def cosine(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 1 - nn.functional.cosine_similarity(output.float(), target.float(), dim=-1).mean(-1)


LOSSES: dict[str, Loss] = {
    "mse": mse,
    "clamp_mse": clamp_mse,
    "skip_mse": skip_mse,
    "normalized_mse": normalized_mse,
    "cosine": cosine,
}
