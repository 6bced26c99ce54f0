"""What passes each place where channels can be scaled, and how much what the model predicts depends on it.

    a_c^2 = E[x_c^2] or Var[x_c]    b_c^2 = E[g_c^2],   g = derivative of log p(y_1, …, y_T) by x at one token, y ~ p

Labels y are drawn from the model's own distribution, so that b^2 is the diagonal of the Fisher matrix, the curvature of
the model's divergence from itself: noise of variance v in channel c costs v b_c^2 / 2 nats. Both are of the model in
full precision, behind the prefix. Two walks: forward, hidden states in front of each block kept; then from the last
block to the first, each run again and differentiated. One block is in memory at a time.
"""

import torch

from pipeline.blocks.prefetch import prefetch_blocks
from pipeline.blocks.quantized import block_settings, load_block
from pipeline.blocks.walk import BlockRunner, batches, load_blocks
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.equalization import Equalizer
from pipeline.rotation.matrices import load_rotation
from pipeline.runtime.progress import show_progress
from pipeline.runtime.ranks import ALONE, Ranks

LOGIT_POSITIONS = 64  # logits of so many at a time


def measure_sensitivity(
    checkpoint: Checkpoint,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    places: tuple[str, ...],
    runner: BlockRunner,
    numbers: list[int],
    ranks: Ranks = ALONE,
) -> list[dict[str, torch.Tensor]]:
    """Of each block: site -> mean, mean square, and mean squared derivative of its channels, [3, C] float64.

    Args:
        checkpoint: the rotated model.
        hidden: [n, T, D] embedded windows, this rank's (there may be none); overwritten.
        prefix_kv: [L, 2, kv_heads, P, d] or None.
        places: see `equalization.py`.
        numbers: of these windows among those of all ranks: each draws labels of its own.
    """
    tokens = ranks.count(hidden.shape[0] * hidden.shape[1])
    count, kept = checkpoint.block_count, []
    for index, block in enumerate(load_blocks(checkpoint, runner.device)):
        kept.append(hidden.clone())
        runner.advance_(block, hidden, runner.take_prefix(prefix_kv, index))
        del block
    gradient = differentiate_predictions(checkpoint, hidden, numbers, runner.device)
    found: list[dict[str, torch.Tensor]] = []
    backwards = range(count - 1, -1, -1)
    blocks = prefetch_blocks(lambda index: load_block(checkpoint, index), backwards, runner.device)
    r2 = load_rotation(checkpoint.folder, "r2")
    for index in show_progress(backwards, count, "sensitivity"):
        settings = block_settings(checkpoint, index)
        equalizer = Equalizer(next(blocks), checkpoint.architecture, settings, r2, places)
        sums, own_prefix = equalizer.make_sums(), runner.take_prefix(prefix_kv, index)
        for rows in batches(len(hidden), runner.batch_size):
            x = kept[index][rows].to(runner.device)
            gradient[rows] = equalizer.add_(sums, x, gradient[rows].to(x), own_prefix, runner).to(gradient)
        kept.pop()
        ranks.sum_(*sums.values())
        found.append({site: (total / tokens).cpu() for site, total in sums.items()})
        del equalizer
    return found[::-1]


def differentiate_predictions(
    checkpoint: Checkpoint, hidden: torch.Tensor, numbers: list[int], device: torch.device
) -> torch.Tensor:
    """Derivative of log p(y) by hidden states [n, T, D] behind the last block; a window's number gives its labels."""
    norm, lm_head = checkpoint.load_final_norm().to(device).requires_grad_(False), checkpoint.load_lm_head().to(device)
    gradient = torch.empty_like(hidden)
    for number, states, into in zip(numbers, hidden, gradient, strict=True):
        generator = torch.Generator().manual_seed(number)
        for start in range(0, len(states), LOGIT_POSITIONS):
            part = slice(start, start + LOGIT_POSITIONS)
            x = states[part].to(device)
            with torch.no_grad():
                logits = lm_head.logits(norm(x))
                p = logits.softmax(-1)
                labels = draw_labels(p, generator)
                slope = p.neg_()
                slope[torch.arange(len(labels), device=device), labels] += 1  # of log p(y) by the logits
                slope = lm_head.pull_back_(slope, logits)
            with torch.enable_grad():
                x = x.requires_grad_()
                into[part] = torch.autograd.grad(norm(x), x, slope)[0].to(into)
    return gradient


def draw_labels(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One index for each distribution [N, V]: where its running sum passes a random number; the same on any device."""
    total = p.cpu().double().cumsum(-1)
    passed = torch.rand(len(p), 1, dtype=torch.float64, generator=generator) * total[:, -1:]
    return torch.searchsorted(total, passed).squeeze(1).clamp_max(p.shape[1] - 1).to(p.device)
