"""Equalization must not change a block: its scaled copy is compared with an unscaled one, in float64.

That scaling changes nothing follows from three assumptions: channels that RoPE turns together share a scale, keys are
not normalised after they were scaled, and the MLP multiplies up_proj by its gate. A family that breaks one would be off
by several percent without an error. So a few rows are run through both, and the run stops where they differ.
"""

import torch

from pipeline.blocks.quantized import BlockSettings, fill_block
from pipeline.blocks.walk import BlockRunner
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.equalization import Equalizer, Scales, scale_prefix
from pipeline.rotation.gate import compute_exactly_
from pipeline.rotation.matrices import Rotation
from pipeline.runtime.errors import PipelineError

EQUALIZATION_TOLERANCE = 1e-5  # measured: 1e-13; 8e-7 where RoPE is computed in float32; 3e-2 and more where wrong
_ROWS = 16


class EqualizationError(PipelineError):
    """Scaling the channels of a block changes its output; the message names the block and the site."""


@torch.no_grad()
def check_equalization(
    checkpoint: Checkpoint,
    index: int,
    scales: Scales,
    *,
    settings: BlockSettings,
    r2: Rotation,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    runner: BlockRunner,
) -> float:
    """Compare block `index` before and after scaling, with the first 16 rows of `hidden`.

    Args:
        checkpoint: the rotated model.
        scales: scales of the block's sites, from `Equalizer.choose`.
        settings: the block's.
        r2: R2 of the rotated model.
        hidden: [N, T, D] before the block.
        prefix_kv: [2, kv_heads, P, d], not scaled, or None.
        runner: one that runs float64 blocks only.

    Returns:
        The largest deviation of a row, relative to the largest change that the block makes to that row.

    Raises:
        EqualizationError: it exceeds 1e-5.
    """
    if not scales or not len(hidden):
        return 0.0
    rows = hidden[:1, :_ROWS].to(runner.device, torch.float64)
    kv = None if prefix_kv is None else prefix_kv.double()

    def run(block_scales: Scales) -> torch.Tensor:
        tensors = checkpoint.load_block_tensors(index)
        block = fill_block(checkpoint, index, tensors, settings, device=runner.device, dtype=torch.float64)
        equalizer = Equalizer(block, checkpoint.architecture, settings, r2)
        equalizer.scale_(block_scales)
        compute_exactly_(block)
        return runner.run(block, rows, None if kv is None else scale_prefix(kv, block_scales, r2))

    expected = run({})
    change = (expected - rows).abs().amax(-1)

    def deviate(block_scales: Scales) -> float:
        deviation = (run(block_scales) - expected).abs().amax(-1) / change
        return torch.nan_to_num(deviation, nan=torch.inf).max().item()

    deviation = deviate(scales)
    if not deviation <= EQUALIZATION_TOLERANCE:
        by_site = {site: deviate({site: s}) for site, s in scales.items()}
        site = max(by_site, key=by_site.__getitem__)
        raise EqualizationError(
            f"block {index}: scaling the channels of {site} changes the block's output by {by_site[site]:.1e} of what "
            f"the block adds, in float64; allowed is {EQUALIZATION_TOLERANCE:.0e}. In this family "
            f"(model_type={checkpoint.config.model_type!r}) the scales of {site} do not cancel. Take {site} out of "
            "quantizer_init.equalize."
        )
    return deviation
