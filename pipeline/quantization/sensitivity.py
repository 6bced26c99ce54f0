"""Measure how large each channel is that can be scaled, and how sensitive the model's predictions are to it.

    a_c^2 = E[x_c^2] or Var[x_c]    b_c^2 = E[g_c^2],   g = derivative of log p(y_1, …, y_T) by x at one token, y ~ p

Labels y are drawn from the model's own distribution. b^2 is therefore the diagonal of the Fisher matrix, the curvature
of the model's divergence from itself: noise of variance v in channel c costs v b_c^2 / 2 nats. Both are measured in the
rotated full-precision model, after the prefix.

This takes two walks, with one block in memory at a time. The first runs forward and keeps the hidden states before each
block. The second goes from the last block to the first, runs each block again and differentiates it.
"""

import torch

from pipeline.blocks.prefetch import prefetch_blocks
from pipeline.blocks.quantized import load_block, require_settings
from pipeline.blocks.walk import BlockRunner, batches, load_blocks
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.equalization import Equalizer
from pipeline.rotation.matrices import load_rotation
from pipeline.runtime.progress import show_progress
from pipeline.runtime.ranks import ALONE, Ranks

LOGIT_POSITIONS = 64  # positions whose logits are in memory at a time


def measure_sensitivity(
    checkpoint: Checkpoint,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    *,
    sites: tuple[str, ...],
    runner: BlockRunner,
    numbers: list[int],
    ranks: Ranks = ALONE,
) -> list[dict[str, torch.Tensor]]:
    """Return, for each block, site -> mean, mean square and mean squared derivative of its channels, [3, C] float64.

    Args:
        checkpoint: the rotated model.
        hidden: [n, T, D] embedded windows of this rank, which may have none; overwritten.
        prefix_kv: [L, 2, kv_heads, P, d] or None.
        sites: the sites to be scaled, see `equalization.py`; the result has `attention_output` in place of `value`.
        numbers: the windows' numbers among the windows of all ranks. A number decides the labels of its window.
    """
    tokens = ranks.count(hidden.shape[0] * hidden.shape[1])
    block_inputs = keep_inputs_(checkpoint, hidden, prefix_kv, runner)
    gradient = differentiate_predictions(checkpoint, hidden, numbers, runner.device)
    channels: list[dict[str, torch.Tensor]] = []
    indices = range(checkpoint.block_count - 1, -1, -1)
    blocks = prefetch_blocks(lambda index: load_block(checkpoint, index), indices, runner.device)
    r2 = load_rotation(checkpoint.folder, "r2")
    for index in show_progress(indices, checkpoint.block_count, "sensitivity"):
        settings = require_settings(checkpoint, index)
        equalizer = Equalizer(next(blocks), checkpoint.architecture, settings, r2, sites)
        sums, block_prefix = equalizer.make_sums(), runner.take_prefix(prefix_kv, index)
        for rows in batches(len(hidden), runner.batch_size):
            x = block_inputs[index][rows].to(runner.device)
            gradient[rows] = equalizer.add_(sums, x, gradient[rows].to(x), block_prefix, runner).to(gradient)
        block_inputs.pop()
        channels.append(equalizer.average(sums, tokens, ranks))
        del equalizer
    return channels[::-1]


def keep_inputs_(
    checkpoint: Checkpoint, hidden: torch.Tensor, prefix_kv: torch.Tensor | None, runner: BlockRunner
) -> list[torch.Tensor]:
    """Walk through all blocks and return the hidden states [n, T, D] before each; `hidden` ends after the last."""
    block_inputs: list[torch.Tensor] = []
    for index, block in enumerate(load_blocks(checkpoint, runner.device)):
        block_inputs.append(hidden.clone())
        runner.advance_(block, hidden, runner.take_prefix(prefix_kv, index))
        del block
    return block_inputs


def differentiate_predictions(
    checkpoint: Checkpoint, hidden: torch.Tensor, numbers: list[int], device: torch.device
) -> torch.Tensor:
    """Differentiate log p(y) by the hidden states [n, T, D] after the last block; `numbers` seed the labels y."""
    norm, lm_head = checkpoint.load_final_norm().to(device).requires_grad_(False), checkpoint.load_lm_head().to(device)
    gradient = torch.empty_like(hidden)
    for number, states, window_gradient in zip(numbers, hidden, gradient, strict=True):
        generator = torch.Generator().manual_seed(number)
        for start in range(0, len(states), LOGIT_POSITIONS):
            part = slice(start, start + LOGIT_POSITIONS)
            x = states[part].to(device)
            with torch.no_grad():
                logits = lm_head.logits(norm(x))
                p = logits.softmax(-1)
                labels = draw_labels(p, generator)
                slope = p.neg_()
                slope[torch.arange(len(labels), device=device), labels] += 1  # derivative of log p(y) by the logits
                slope = lm_head.pull_back_(slope, logits)
            with torch.enable_grad():
                x = x.requires_grad_()
                window_gradient[part] = torch.autograd.grad(norm(x), x, slope)[0].to(window_gradient)
    return gradient


def draw_labels(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one index from each distribution [N, V], on the CPU, so that every device draws the same.

    The index is where the running sum of the distribution passes a random number.
    """
    total = p.cpu().double().cumsum(-1)
    passed = torch.rand(len(p), 1, dtype=torch.float64, generator=generator) * total[:, -1:]
    return torch.searchsorted(total, passed).squeeze(1).clamp_max(p.shape[1] - 1).to(p.device)
