"""Measure how much the quantization of each site and linear of each block costs, for several numbers of bits.

    cost = 1/2 mean over tokens of (g · dx)^2 nats per token

dx is the error that one quantizer makes, and g the derivative of log p(y_1, …, y_T) by the values it acts on, with y
drawn from the model's own distribution (`sensitivity.py`). The mean of (g · dx)^2 is dx^T F dx with the Fisher matrix F
of the site. The cost is therefore the second-order estimate of the KL divergence from the full-precision model, one
quantizer at a time. The error of a weight is the error of its layer's output, dx = (W' - W) x.

The quantizers are those that `init_blocks` makes with all sites of a group at the same number of bits. The values are
those of the full-precision model after the prefix.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from pipeline.blocks.kv_cache import Positions, as_quantized_attention
from pipeline.blocks.quantized import QuantizedLinear, fill_block, find_quantized_linear, find_site_quantizers
from pipeline.blocks.walk import BlockRunner, batches
from pipeline.models.architectures import Architecture
from pipeline.models.checkpoint import Checkpoint, load_block_file
from pipeline.models.layers import DecoderLayer
from pipeline.models.sites import Site, base_site
from pipeline.quantization.equalization import Equalizer, scale_prefix
from pipeline.quantization.params import QuantizerInitParams
from pipeline.quantization.quantizer_init import resolve_settings
from pipeline.quantization.sensitivity import differentiate_predictions, keep_inputs_
from pipeline.rotation.matrices import load_rotation
from pipeline.runtime.progress import show_progress
from pipeline.runtime.ranks import ALONE, Ranks

BlockCosts = dict[str, list[float]]  # site or linear, by the name in params -> nats per token for each candidate


@dataclass(frozen=True)
class Candidate:
    """A quantized model whose finished blocks are in `folder`, as `init_blocks` leaves them, and its settings."""

    params: QuantizerInitParams
    folder: Path


@torch.no_grad()
def measure_costs(
    checkpoint: Checkpoint,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    *,
    candidates: Sequence[Candidate],
    channels: Sequence[dict[str, torch.Tensor]],
    runner: BlockRunner,
    numbers: list[int],
    stage: str,
    ranks: Ranks = ALONE,
) -> list[BlockCosts]:
    """Return, for each block, the costs of every site and linear that a candidate quantizes.

    Args:
        checkpoint: the rotated model.
        hidden: [n, T, D] embedded windows of this rank, which may have none; overwritten.
        prefix_kv: [L, 2, kv_heads, P, d] or None.
        channels: channels of each block, from `measure_channels`, for the same scales as the candidates'.
        numbers: the windows' numbers among the windows of all ranks. A number decides the labels of its window.
        stage: the stage in the headers of the candidates' files.
    """
    tokens = max(1, ranks.count(hidden.shape[0] * hidden.shape[1]))
    block_inputs = keep_inputs_(checkpoint, hidden, prefix_kv, runner)
    gradient = differentiate_predictions(checkpoint, hidden, numbers, runner.device)
    r2, params, costs = load_rotation(checkpoint.folder, "r2"), candidates[0].params, []
    for index in show_progress(range(checkpoint.block_count - 1, -1, -1), checkpoint.block_count, "costs of bits"):
        settings, _ = resolve_settings(params, checkpoint, index)
        tensors = checkpoint.load_block_tensors(index)
        block = fill_block(checkpoint, index, tensors, settings, device=runner.device)
        equalizer = Equalizer(block, checkpoint.architecture, settings, r2, tuple(params.equalize))
        scales = equalizer.choose(channels[index], runner)
        equalizer.scale_(scales)
        block_prefix = runner.take_prefix(prefix_kv, index)
        if block_prefix is not None:
            block_prefix = scale_prefix(block_prefix, scales, r2)
        quantized = []
        for candidate in candidates:
            tensors = load_block_file(candidate.folder, checkpoint.architecture, index, stage)
            candidate_settings, _ = resolve_settings(candidate.params, checkpoint, index)
            quantized.append(fill_block(checkpoint, index, tensors, candidate_settings, device=runner.device))
        sums = make_sums(block, checkpoint.architecture, len(candidates), runner.device)
        for rows in batches(len(hidden), runner.batch_size):
            x = block_inputs[index][rows].to(runner.device)
            slope = gradient[rows].to(x)
            recorded = record_slopes(block, checkpoint.architecture, x, slope, prefix_kv=block_prefix, runner=runner)
            for number, other in enumerate(quantized):
                add_errors_(sums, number, other, checkpoint.architecture, recorded)
            gradient[rows] = recorded.before.to(gradient)
        block_inputs.pop()
        ranks.sum_(*sums.values())
        ranks.broadcast_(*sums.values())
        costs.append({site: (total / (2 * tokens)).tolist() for site, total in sums.items()})
        del block, quantized, equalizer
    return costs[::-1]


@dataclass
class Recorded:
    """The values of one batch at all sites and linears, and the derivatives of log p by them.

    Attributes:
        sites: site -> its values; keys as the cache receives them, [B, heads, T, d].
        linears: full name of a linear -> its input before any rotation, and its output.
        slopes: site or full name -> the derivative by the site's values, or by the linear's output.
        positions: cos and sin of the keys, where they are quantized after RoPE.
        before: the derivative by the block's input, [B, T, D].
    """

    sites: dict[str, torch.Tensor] = field(default_factory=dict)
    linears: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    slopes: dict[str, torch.Tensor] = field(default_factory=dict)
    positions: Positions | None = None
    before: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@torch.enable_grad()
def record_slopes(
    block: DecoderLayer,
    architecture: Architecture,
    hidden: torch.Tensor,
    gradient: torch.Tensor,
    *,
    prefix_kv: torch.Tensor | None,
    runner: BlockRunner,
) -> Recorded:
    """Run a float block, none of whose quantizers is calibrated, and differentiate log p by its inner values.

    Args:
        hidden: [B, T, D] before the block.
        gradient: [B, T, D], the derivative of log p by the hidden states after the block.
    """
    hidden, recorded = hidden.detach().requires_grad_(), Recorded()
    with _recording(block, architecture.of_block(block), recorded):
        output = runner.run(block, hidden, prefix_kv)
    values = recorded.sites | {name: pair[1] for name, pair in recorded.linears.items()}
    *slopes, recorded.before = torch.autograd.grad(output, [*values.values(), hidden], gradient)
    recorded.slopes = dict(zip(values, slopes, strict=True))
    return recorded


@contextmanager
def _recording(block: DecoderLayer, architecture: Architecture, recorded: Recorded) -> Iterator[None]:
    """Keep the values at every site and linear during a run. An expert without a token leaves none."""

    def keep_site(site: str, module: nn.Module, args: tuple[torch.Tensor]) -> None:
        recorded.sites[site] = args[0]

    def keep_keys(module: nn.Module, args: tuple[torch.Tensor, Positions] | tuple[torch.Tensor]) -> None:
        recorded.sites[Site.KEY] = args[0]
        recorded.positions = args[1] if len(args) == 2 else None

    def keep_linear(name: str, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        recorded.linears[name] = args[0], output

    handles = [as_quantized_attention(block.self_attn).key_quantizer.register_forward_pre_hook(keep_keys)]
    for site, quantizer in find_site_quantizers(block, architecture).items():
        if site != Site.KEY:
            handles.append(quantizer.register_forward_pre_hook(functools.partial(keep_site, site)))
    for name in architecture.linear_names.values():
        linear = find_quantized_linear(block, name)
        handles.append(linear.register_forward_hook(functools.partial(keep_linear, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def make_sums(
    block: DecoderLayer, architecture: Architecture, candidates: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return zeros [candidates] float64 for each site and linear, by the name that params have for it."""
    architecture = architecture.of_block(block)
    names = [*find_site_quantizers(block, architecture), *architecture.linear_names]
    return {base_site(name): torch.zeros(candidates, dtype=torch.float64, device=device) for name in names}


def add_errors_(
    sums: dict[str, torch.Tensor], number: int, block: DecoderLayer, architecture: Architecture, recorded: Recorded
) -> None:
    """Add the sum over tokens of (g · dx)^2 of every quantizer of candidate `number`, whose block is `block`."""
    architecture = architecture.of_block(block)
    quantizers = find_site_quantizers(block, architecture)
    for site, x in recorded.sites.items():
        x = x.detach()
        if site == Site.KEY:
            error = as_quantized_attention(block.self_attn).key_quantizer(x, recorded.positions) - x
        else:
            error = quantizers[site](x) - x
        sums[base_site(site)][number] += _sum_squares(recorded.slopes[site], error)
    for short, name in architecture.linear_names.items():
        linear = find_quantized_linear(block, name)
        if name in recorded.linears and linear.spec.enabled:
            x, output = recorded.linears[name]
            error = _multiply(linear, x.detach()) - output.detach()
            sums[base_site(short)][number] += _sum_squares(recorded.slopes[name], error)


def _multiply(linear: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """Return the output of a linear with a quantized weight for an input that is not quantized."""
    return nn.functional.linear(linear.rotate(x), linear.dense_weight(x.dtype), linear.bias)


def _sum_squares(slope: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens of (slope · error)^2, float64, for [..., C]; for keys and values [B, heads, T, d]."""
    products = slope.float() * error.float()
    along = products.sum((1, 3)) if products.dim() == 4 else products.sum(-1)
    return along.double().square().sum()
