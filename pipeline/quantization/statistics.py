"""What the quantizers of one block will see: ranges, samples and Gram matrices, recorded in one forward.

The block runs in full precision over all calibration windows with hooks on its (uncalibrated) quantizers, so that each
statistic is of exactly the values that will be quantized: mlp_hidden behind R4, keys behind RoPE and R3 (or before
both), with the prefix in the cache but none of its positions counted.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward  # with and without a cap

from pipeline.blocks.quantized import find_site_quantizers, read_input
from pipeline.blocks.walk import BlockRunner, batches
from pipeline.models.architectures import Architecture
from pipeline.models.sites import CACHE_SITES, Site
from pipeline.numerics.quantizer import group
from pipeline.quantization.observers import ChannelObserver, ValueHistogram
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.runtime.streams import Stream

_ROWS = 256  # of a Hessian at a time: what lies below the diagonal is not computed but near it
_RECORDING = "prefixquant_recording_"
_KERNELS = {"sdpa": (sdpa_attention_forward, sdpa_mask), "eager": (eager_attention_forward, eager_mask)}


class NumericalError(PipelineError):
    """A block produced NaN or infinite values; names the block and the place."""


def _make_recording(attend: Callable[..., Any]) -> Callable[..., Any]:
    def record(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        module.recorded = query, key[:, :, -query.shape[2] :]
        return attend(module, query, key, *args, **kwargs)

    return record


for _name, (_attend, _mask) in _KERNELS.items():
    AttentionInterface.register(_RECORDING + _name, _make_recording(_attend))
    # Without a mask function of the same name transformers would pass no mask: attention would silently not be causal.
    AttentionMaskInterface.register(_RECORDING + _name, _mask)


@dataclass
class SiteStatistics:
    """What is recorded of one site over all windows.

    Attributes:
        channels: extrema and mean of every channel, [C] or [heads, d].
        histogram: of the values, less the channels' means where the quantizer is centered; only where asked for.
        samples: per batch; some tokens [n, C] of activations, whole windows [B, heads, T, d] of keys and values.
        gram: sum over all tokens of x^T x, [C, C], of which only what is above the diagonal and near it counts
            (activations read by a weight that is to be quantized); until `take_hessian`.
    """

    channels: ChannelObserver = field(default_factory=ChannelObserver)
    histogram: ValueHistogram = field(default_factory=ValueHistogram)
    samples: list[torch.Tensor] = field(default_factory=list)
    gram: torch.Tensor | None = None

    @property
    def sample(self) -> torch.Tensor:
        return self.samples[0] if len(self.samples) == 1 else torch.cat(self.samples)

    def combine_(self, ranks: Ranks) -> None:
        """Make them those of all ranks' windows, but for the histogram."""
        self.channels.combine_(ranks)
        self.samples = [ranks.join(self.sample)]
        if self.gram is not None:
            ranks.sum_(self.gram)

    def add_gram_(self, tokens: torch.Tensor) -> None:
        """Count float32 tokens [n, C] in."""
        width = tokens.shape[1]
        if self.gram is None:
            self.gram = tokens.new_zeros(width, width)
        for start in range(0, width, _ROWS):
            rows = slice(start, start + _ROWS)
            self.gram[rows, start:].addmm_(tokens[:, rows].T, tokens[:, start:])

    def take_hessian(self) -> torch.Tensor:
        """Mean over tokens of x^T x, [C, C]: what was `gram`, which is gone."""
        hessian, self.gram = self.gram.div_(self.channels.count), None
        for start in range(_ROWS, len(hessian), _ROWS):
            rows = slice(start, start + _ROWS)
            hessian[rows, :start] = hessian[:start, rows].T
        return hessian

    def center_(self, hessian: torch.Tensor) -> torch.Tensor:
        """Make it the mean of (x - mean)^T (x - mean)."""
        for row, mean in zip(hessian.split(_ROWS), self.channels.mean.split(_ROWS), strict=True):
            row -= torch.outer(mean, self.channels.mean)
        return hessian


@dataclass
class BlockStatistics:
    """What is recorded of one block.

    Attributes:
        sites: of every activation site, and of keys and values where they are to be quantized.
        queries, keys: [B, heads, T, d] of the sampled windows behind RoPE, as attention sees them.
        inputs, outputs: [B, T, D] of the sampled windows before and behind the block.
    """

    sites: dict[str, SiteStatistics]
    queries: torch.Tensor
    keys: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor

    @functools.cached_property
    def energy(self) -> float:
        """Of what the block adds to its input on the sampled windows: the squared difference, summed."""
        return (self.outputs - self.inputs.float()).square().sum().item()


def choose_windows(windows: int, wanted: int) -> list[int]:
    """`wanted` of `windows` indices, evenly spread, first and last included; all of them if there are fewer."""
    wanted = min(windows, wanted)
    return sorted({round(place * (windows - 1) / max(1, wanted - 1)) for place in range(wanted)})


def choose_own_windows(windows: int, wanted: int, ranks: Ranks) -> list[int]:
    """Of `choose_windows`, those of this rank, by its own numbers."""
    return ranks.locate(torch.tensor(choose_windows(windows, wanted))).tolist()


@torch.no_grad()
def record_block(
    block: nn.Module,
    architecture: Architecture,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    runner: BlockRunner,
    mse_samples: int,
    percentiles: frozenset[str] = frozenset(),
    ranks: Ranks = ALONE,
) -> BlockStatistics:
    """Run a block in full precision over all windows and record what its quantizers see.

    Args:
        block: with quantizers, none of them calibrated.
        hidden: [N, T, D] before the block, this rank's windows.
        prefix_kv: [2, kv_heads, P, d] or None.
        mse_samples: how many windows' worth of samples is kept: of activations so many tokens, evenly spread over all
            windows; of everything else whole windows. The same whatever the batch size.
        percentiles: sites that also get a histogram; costs a second pass over all windows.
        ranks: statistics are of all ranks' windows, and the same on all of them.

    Raises:
        NumericalError: a site sees NaN or infinity; names the site.
    """
    own_count, length, _ = hidden.shape
    windows = ranks.count(own_count)
    stride = max(1, windows // mse_samples)
    chosen = choose_own_windows(windows, mse_samples, ranks)
    quantizers = find_site_quantizers(block, architecture)
    sites = {
        site: SiteStatistics()
        for site, quantizer in quantizers.items()
        if quantizer.spec.enabled or site not in CACHE_SITES
    }
    weighed = {
        site
        for site, readers in architecture.site_readers.items()
        if any(block.get_submodule(name).spec.enabled for name in readers)
    }
    queries, keys, outputs = [], [], []
    rows = slice(0, 0)

    def whole_windows(x: torch.Tensor) -> torch.Tensor:
        inside = [window - rows.start for window in chosen if rows.start <= window < rows.stop]
        return x[inside].float()

    def record(site: str, x: torch.Tensor) -> None:
        kept = sites[site]
        if x.dim() == 4:  # keys and values, [B, heads, T, d]
            kept.channels.update(x.transpose(1, 2).flatten(0, 1))
            kept.samples.append(whole_windows(x))
            return
        tokens = x.flatten(0, -2).float()
        kept.channels.update(tokens)
        for place, window in enumerate(x, start=rows.start):  # counted through all windows of all ranks
            first = -((place * ranks.world + ranks.rank) * length) % stride
            kept.samples.append(window[first::stride].clone().float())
        if site in weighed:
            kept.add_gram_(tokens)

    def count_values(site: str, x: torch.Tensor) -> None:
        spec, kept = quantizers[site].spec, sites[site]
        x = x.transpose(1, 2).flatten(0, 1) if x.dim() == 4 else x.flatten(0, -2)
        grouped = group(x - kept.channels.mean if spec.centered else x, spec.group_size)
        kept.histogram.update(grouped.flatten(1, -2))

    attention = block.self_attn
    measure_key_mean_(block, architecture, hidden, runner, ranks)
    attention.config._attn_implementation = _RECORDING + architecture.kernel
    with _hooks({site: quantizers[site] for site in sites}, record):
        for rows in batches(own_count, runner.batch_size):
            outputs.append(whole_windows(runner.run(block, hidden[rows].to(runner.device), prefix_kv)))
            for kept, x in zip((queries, keys), attention.recorded, strict=True):
                kept.append(whole_windows(x))
    attention.config._attn_implementation = architecture.kernel
    del attention.recorded
    for site, kept in sites.items():
        kept.combine_(ranks)
        if not (torch.isfinite(kept.channels.low).all() and torch.isfinite(kept.channels.high).all()):
            raise NumericalError(f"the activations at {site} are not finite")
    if percentiles:  # a second pass: what is counted depends on the means
        with _hooks({site: quantizers[site] for site in percentiles}, count_values):
            for rows in batches(own_count, runner.batch_size):
                runner.run(block, hidden[rows].to(runner.device), prefix_kv)
        for site in sorted(percentiles):  # in the same order on all ranks: a set has another one in each process
            ranks.sum_(sites[site].histogram.counts)
    inputs = hidden[chosen].to(runner.device)
    seen = (torch.cat(queries), torch.cat(keys), inputs, torch.cat(outputs))
    return BlockStatistics(sites, *(ranks.join(own) for own in seen))


@torch.no_grad()
def measure_key_mean_(
    block: nn.Module, architecture: Architecture, hidden: Stream, runner: BlockRunner, ranks: Ranks = ALONE
) -> None:
    """Give the key quantizer the mean of the keys before RoPE over all windows [N, T, D], where it takes that out."""
    attention = block.self_attn
    keys = attention.key_quantizer
    if not keys.mean_taken_out:
        return
    total = torch.zeros_like(keys.mean, dtype=torch.float64)
    for rows in batches(len(hidden), runner.batch_size):
        x = read_input(block, architecture, Site.ATTENTION_INPUT, hidden[rows].to(runner.device))
        found = attention.k_proj(x)
        if hasattr(attention, "k_norm"):  # of each head, or of all together
            found = attention.k_norm(found.unflatten(-1, (-1, attention.k_norm.weight.numel())))
        total += found.reshape(-1, *keys.mean.shape).double().sum(0)
    count = torch.tensor(hidden.shape[0] * hidden.shape[1], dtype=torch.float64, device=total.device)
    ranks.sum_(total, count)
    keys.mean = (total / count).float()


@contextmanager
def _hooks(quantizers: dict[str, nn.Module], record: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call record(site, input) whenever a quantizer is asked."""

    def make_hook(site: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        return lambda module, args: record(site, args[0])

    handles = [quantizer.register_forward_pre_hook(make_hook(site)) for site, quantizer in quantizers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
