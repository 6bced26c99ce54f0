"""Record the values that the quantizers of one block will quantize: ranges, samples and Gram matrices.

The block runs in full precision over all calibration windows, with hooks on its quantizers, none of which is calibrated
yet. Each statistic is therefore of exactly the values that will be quantized: mlp_hidden after R4, keys after RoPE and
R3 (or before both). The prefix is in the cache, and none of its positions is counted.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from pipeline.blocks.kv_cache import as_quantized_attention, find_key_source, turn_keys
from pipeline.blocks.quantized import find_quantized_linear, find_site_quantizers, read_input
from pipeline.blocks.walk import BlockRunner, batches
from pipeline.models.architectures import Architecture, check_attention_arguments
from pipeline.models.layers import Attention, DecoderLayer, as_norm
from pipeline.models.sites import CACHE_SITES, Site
from pipeline.numerics.quantizer import group
from pipeline.quantization.expert_statistics import ExpertRecorder, ExpertUse
from pipeline.quantization.site_statistics import SiteStatistics
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.runtime.streams import Stream

_RECORDING = "prefixquant_recording_"
AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class NumericalError(PipelineError):
    """A block produced NaN or infinite values; the message names the block and the site."""


class RecordedAttention(Attention):
    """The type of an attention module that records. No object is an instance of it.

    Attributes:
        recorded: queries and keys [B, heads, T, d] of the last call.
    """

    recorded: tuple[torch.Tensor, torch.Tensor]


def _attend_eagerly(module: nn.Module, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention as the eager function of the module's own family, with its caps on scores or its sinks."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


_KERNELS: dict[str, tuple[AttentionFunction, Callable[..., Any]]] = {
    "sdpa": (sdpa_attention_forward, sdpa_mask),
    "eager": (_attend_eagerly, eager_mask),
}


def _make_recording(attend: AttentionFunction) -> AttentionFunction:
    """Return an attention function that keeps its queries and the text's keys in `module.recorded`."""
    computed = ("s_aux",) if attend is _attend_eagerly else ()

    def record(
        module: RecordedAttention, query: torch.Tensor, key: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        check_attention_arguments(kwargs, computed)
        module.recorded = query, key[:, :, -query.shape[2] :]
        return attend(module, query, key, *args, **kwargs)

    return record


for _name, (_attend, _mask) in _KERNELS.items():
    AttentionInterface.register(_RECORDING + _name, _make_recording(_attend))
    # Without a mask function of the same name, transformers passes no mask and attention is silently not causal.
    AttentionMaskInterface.register(_RECORDING + _name, _mask)


@dataclass
class BlockStatistics:
    """The statistics of one block.

    Attributes:
        sites: statistics of every input of linears, and of keys and values that are to be quantized.
        queries, keys: [B, heads, T, d] of the sampled windows, as attention multiplies them (after RoPE).
        inputs, outputs: [B, T, D], the hidden states of the sampled windows before and after the block.
        uses: the routed experts' use by all windows; empty for a dense block.
    """

    sites: dict[str, SiteStatistics]
    queries: torch.Tensor
    keys: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor
    uses: list[ExpertUse] = field(default_factory=list)

    @functools.cached_property
    def energy(self) -> float:
        """The summed square of the block's change to its input on the sampled windows."""
        return (self.outputs - self.inputs.float()).square().sum().item()


def choose_windows(windows: int, wanted: int) -> list[int]:
    """Choose `wanted` of `windows` indices, evenly spread, the first and last included; all if there are fewer."""
    wanted = min(windows, wanted)
    return sorted({round(step * (windows - 1) / max(1, wanted - 1)) for step in range(wanted)})


def choose_rank_windows(windows: int, wanted: int, ranks: Ranks) -> list[int]:
    """Choose windows as `choose_windows` does and return this rank's, by its own numbers."""
    return ranks.locate(torch.tensor(choose_windows(windows, wanted))).tolist()


@torch.no_grad()
def record_block(
    block: DecoderLayer,
    architecture: Architecture,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    *,
    runner: BlockRunner,
    mse_samples: int,
    percentile_sites: frozenset[str] = frozenset(),
    ranks: Ranks = ALONE,
) -> BlockStatistics:
    """Run a block in full precision over all windows and record the values that its quantizers will quantize.

    Args:
        block: with quantizers, none of them calibrated.
        hidden: [N, T, D] before the block, this rank's windows.
        prefix_kv: [2, kv_heads, P, d] or None.
        mse_samples: the number of sampled windows. Keys, values and hidden states are sampled as whole windows. Inputs
            of linears are sampled as the same number of tokens, evenly spread over all windows. The samples do not
            depend on the batch size.
        percentile_sites: sites that also get a histogram. If there are any, all windows run a second time.
        ranks: statistics cover the windows of all ranks and are the same on each.

    Raises:
        NumericalError: the values at a site are not finite; names the site.
    """
    architecture = architecture.of_block(block)
    rank_count, length, _ = hidden.shape
    windows = ranks.count(rank_count)
    stride = max(1, windows // mse_samples)
    sampled = choose_rank_windows(windows, mse_samples, ranks)
    quantizers = find_site_quantizers(block, architecture)
    sites = {
        site: SiteStatistics()
        for site, quantizer in quantizers.items()
        if quantizer.spec.enabled or site not in CACHE_SITES
    }
    gram_sites = {
        site
        for site, readers in architecture.site_readers.items()
        if any(find_quantized_linear(block, name).spec.enabled for name in readers)
    }
    recorder = None
    if architecture.experts is not None:
        recorder = ExpertRecorder(
            block,
            architecture,
            sites,
            gram_sites=gram_sites,
            samples=-(-windows * length // stride),
            length=length,
            ranks=ranks,
        )
    expert_sites = set() if recorder is None else set(recorder.names)
    queries: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    rows = slice(0, 0)  # of the batch that runs

    def take_windows(x: torch.Tensor) -> torch.Tensor:
        inside = [window - rows.start for window in sampled if rows.start <= window < rows.stop]
        return x[inside].float()

    def record(site: str, x: torch.Tensor) -> None:
        statistics = sites[site]
        if x.dim() == 4:  # keys and values, [B, heads, T, d]
            statistics.channels.update(x.transpose(1, 2).flatten(0, 1))
            statistics.samples.append(take_windows(x))
            return
        if x.dim() == 2:  # of experts that read all tokens
            x = x.unflatten(0, (-1, length))
        tokens = x.flatten(0, -2).float()
        statistics.channels.update(tokens)
        for number, window in enumerate(x, start=rows.start):
            # Every `stride`th token, counted through all windows of all ranks.
            first = -((number * ranks.world + ranks.rank) * length) % stride
            statistics.samples.append(window[first::stride].clone().float())
        if site in gram_sites:
            statistics.add_gram_(tokens)

    def count_values(site: str, x: torch.Tensor) -> None:
        spec, statistics = quantizers[site].spec, sites[site]
        x = x.transpose(1, 2).flatten(0, 1) if x.dim() == 4 else x.flatten(0, -2)
        grouped = group(x - statistics.channels.mean if spec.centered else x, spec.group_size)
        statistics.histogram.update(grouped.flatten(1, -2))

    attention = cast(RecordedAttention, block.self_attn)
    prefix_tokens = 0 if prefix_kv is None else prefix_kv.shape[-2]
    measure_key_mean_(block, architecture, hidden, runner, prefix_tokens=prefix_tokens, ranks=ranks)
    attention.config._attn_implementation = _RECORDING + architecture.kernel
    routed = nullcontext() if recorder is None else recorder.recording()
    with _hooking({site: quantizers[site] for site in sites if site not in expert_sites}, record), routed:
        for rows in batches(rank_count, runner.batch_size):
            if recorder is not None:
                recorder.begin_batch(rows.start)
            outputs.append(take_windows(runner.run(block, hidden[rows].to(runner.device), prefix_kv)))
            for samples, x in zip((queries, keys), attention.recorded, strict=True):
                samples.append(take_windows(x))
    attention.config._attn_implementation = architecture.kernel
    del attention.recorded
    if recorder is not None:
        recorder.top_up_(block, hidden, prefix_kv, runner)
        recorder.combine_()
    for site, statistics in sites.items():
        if site not in expert_sites:
            statistics.combine_(ranks)
        if not (torch.isfinite(statistics.channels.low).all() and torch.isfinite(statistics.channels.high).all()):
            raise NumericalError(
                f"the activations at {site} are not finite. Check the model's weights for NaN and infinity."
            )
    if percentile_sites:  # a second pass, because the histograms depend on the means
        with _hooking({site: quantizers[site] for site in percentile_sites}, count_values):
            for rows in batches(rank_count, runner.batch_size):
                runner.run(block, hidden[rows].to(runner.device), prefix_kv)
        for site in sorted(percentile_sites):  # a set has another order in each process
            ranks.sum_(sites[site].histogram.require_counts())
    return BlockStatistics(
        sites,
        queries=ranks.join(torch.cat(queries)),
        keys=ranks.join(torch.cat(keys)),
        inputs=ranks.join(hidden[sampled].to(runner.device)),
        outputs=ranks.join(torch.cat(outputs)),
        uses=[] if recorder is None else recorder.uses,
    )


@torch.no_grad()
def measure_key_mean_(
    block: DecoderLayer,
    architecture: Architecture,
    hidden: Stream,
    runner: BlockRunner,
    *,
    prefix_tokens: int,
    ranks: Ranks = ALONE,
) -> None:
    """Give the key quantizer the mean of its keys over all windows [N, T, D], if it takes the mean out.

    They are those that `find_key_source` writes: before RoPE, except in families whose norms follow it.
    """
    attention = as_quantized_attention(block.self_attn)
    quantizer, source = attention.key_quantizer, find_key_source(attention)
    if not quantizer.mean_taken_out:
        return
    total = torch.zeros_like(quantizer.mean, dtype=torch.float64)
    for rows in batches(len(hidden), runner.batch_size):
        x = read_input(block, architecture, Site.ATTENTION_INPUT, hidden[rows].to(runner.device))
        keys = attention.k_proj(x)
        if source is not attention.k_proj:  # a norm, which normalises each head, or all heads together
            keys = keys.unflatten(-1, (-1, as_norm(source).weight.numel()))
            if architecture.norms_follow_rope:
                tables = runner.rotary_tables(block, x, prefix_tokens)
                keys = turn_keys(keys.transpose(1, 2), *tables, architecture.rope_neighbours).transpose(1, 2)
            keys = source(keys)
        total += keys.reshape(-1, *quantizer.mean.shape).double().sum(0)
    count = torch.tensor(hidden.shape[0] * hidden.shape[1], dtype=torch.float64, device=total.device)
    ranks.sum_(total, count)
    quantizer.mean = (total / count).float()


@contextmanager
def _hooking(quantizers: Mapping[str, nn.Module], record: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call record(site, input) whenever a quantizer runs."""

    def make_hook(site: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        return lambda module, args: record(site, args[0])

    handles = [quantizer.register_forward_pre_hook(make_hook(site)) for site, quantizer in quantizers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
