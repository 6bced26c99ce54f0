"""Scale the hidden channels of the MLP so that quantizing them costs least (cross-layer equalization).

Channel c of down_proj's input is act(gate) * up: scaling row c of up_proj by s_c and column c of down_proj by 1 / s_c
changes nothing in full precision (arXiv:1906.04721, Eq. 4, for any positive s). Behind R4 the quantization noise of the
input is about the same in all directions, of a size given by the energy of all channels, sum of s_c^2 a_c^2, with a_c
the root mean square of channel c; down_proj carries it to the output with its energy, sum of b_c^2 / s_c^2, with b_c
the norm of column c. The same product bounds the noise of down_proj's weights. It is least (Cauchy-Schwarz) for

    s_c = sqrt(b_c / a_c),   where it is (sum of a_c b_c)^2 instead of (sum of a_c^2) (sum of b_c^2)

so that no channel takes up range that its column does not need. Nothing is left to do at inference.
"""

import torch
from torch import nn

from pipeline.blocks.quantized import QuantizedLinear
from pipeline.blocks.walk import BlockRunner, batches
from pipeline.models.architectures import Architecture
from pipeline.runtime.ranks import ALONE, Ranks

EQUALIZATION = "equalization.safetensors"  # scales [L, F] of all blocks
_SPREAD = 32.0  # at most so far from their geometric mean: a channel that is silent here may speak elsewhere


@torch.no_grad()
def equalize_mlp_(
    block: nn.Module,
    architecture: Architecture,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    runner: BlockRunner,
    centered: bool,
    ranks: Ranks = ALONE,
) -> torch.Tensor:
    """Equalize up_proj and down_proj of a block in place; the block computes what it computed before.

    Args:
        block: with quantizers (none calibrated) and float weights; R4's inverse may be merged into down_proj.
        hidden: [N, T, D] windows before the block, to measure a_c on; this rank's (there may be none).
        centered: whether the mean of each channel will be kept out of the integers: a_c is then measured about it.

    Returns:
        s, [F] float32, of geometric mean 1.
    """
    down: QuantizedLinear = block.get_submodule(architecture.mlp_output)
    total = torch.zeros(2, down.in_features, dtype=torch.float64, device=down.weight.device)

    def record(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        x = args[0].flatten(0, -2).double()
        total.add_(torch.stack((x.sum(0), x.square().sum(0))))

    handle = down.register_forward_pre_hook(record)
    for rows in batches(len(hidden), runner.batch_size):
        runner.run(block, hidden[rows].to(runner.device), prefix_kv)
    handle.remove()
    ranks.sum_(total)
    mean, energy = total / ranks.count(hidden.shape[0] * hidden.shape[1])
    rms = (energy - mean.square() if centered else energy).clamp_min(0).sqrt()
    columns = down.weight.double()
    columns = down.rotate(columns, inverse=True)
    norms = columns.norm(dim=0)
    used = (rms > 0) & (norms > 0)
    scales = torch.where(used, (norms / rms.where(used, 1.0)).sqrt(), 1.0)
    if used.any():
        scales = torch.where(used, scales / scales[used].log().mean().exp(), 1.0).clamp(1 / _SPREAD, _SPREAD)
    scales = scales.float()  # as they are stored: who starts from full-precision weights must get these
    scale_mlp_(block, architecture, scales)
    return scales


@torch.no_grad()
def scale_mlp_(block: nn.Module, architecture: Architecture, scales: torch.Tensor) -> None:
    """Multiply row c of up_proj by scales[c] and divide column c of down_proj by it, in place; weights are float."""
    up: QuantizedLinear = block.get_submodule(architecture.mlp_readers[-1])
    down: QuantizedLinear = block.get_submodule(architecture.mlp_output)
    scales = scales.double().to(down.weight.device)
    columns = down.weight.double()
    columns = down.rotate(columns, inverse=True)
    columns = columns / scales
    columns = down.rotate(columns)
    down.weight = columns.to(down.weight.dtype)
    up.weight = (up.weight.double() * scales.unsqueeze(1)).to(up.weight.dtype)
    if up.bias is not None:
        up.bias = (up.bias.double() * scales).to(up.bias.dtype)
