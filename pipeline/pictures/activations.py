"""Measurements of a model's activations, block by block, which `plots.py` draws.

They are token maxima (`prefix/outliers.py`) of every linear's input and output and of the blocks' inputs and outputs,
outlier tokens with their positions and contents, and coarse surfaces and histograms of a few blocks. Prefix positions
are only in the cache, so they are not measured. Inputs are measured where their quantizer acts; for down_proj this is
after R4.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.blocks.quantized import find_site_quantizers
from pipeline.blocks.walk import BlockRunner, walk
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.layers import DecoderLayer
from pipeline.models.sites import Site, base_site
from pipeline.prefix.outliers import describe_outliers, list_tokens, token_maxima
from pipeline.prefix.sites import watch_token_maxima_
from pipeline.runtime.artifacts import Header, load_json, replacing_folder, save_tensors, write_json

ACTIVATIONS = "activations.safetensors"
STATISTICS = ("top1", "top2", "top3", "median", "least")  # of the maxima of all tokens
OUTLIER_SITE = Site.MLP_HIDDEN
_SURFACE = (64, 64)  # cells of a pooled surface: tokens, channels
# Bins of a histogram: 16 for each power of ten of |x| from 1e-3 to 1e5, negative values first, and one around zero.
BIN_EDGES = torch.logspace(-3, 5, 129, dtype=torch.float64)


@dataclass
class Activations:
    """The measurements of one variant of a model.

    Attributes:
        statistics: site -> [L, 5], the values of `STATISTICS`. Sites are the linears' inputs (attention_input,
            attention_output, mlp_input, mlp_hidden), their outputs (q_proj, …), block_input and block_output.
        surfaces: "input.I", "output.I" and "mlp_hidden.I" of block I -> [tokens, channels], the largest magnitude in
            each cell of the first window.
        histograms: block I -> [257] int64, the number of values at `mlp_hidden` in each bin (`count_values`).
        outliers: for each block {"layer", "count" per window, "top1_median_ratio"}.
        positions: position -> number of outliers there, in all blocks.
        contents: token id -> number of outliers that are this token, in all blocks.
    """

    statistics: dict[str, torch.Tensor]
    surfaces: dict[str, torch.Tensor]
    histograms: dict[int, torch.Tensor]
    outliers: list[dict[str, float]]
    positions: Counter[int]
    contents: Counter[int]

    def summary(self) -> dict[str, Any]:
        """Return the stage's metrics: largest token maxima of four sites, and figures about outliers."""
        largest = {site: round(values[:, 0].max().item(), 2) for site, values in self.statistics.items()}
        return {
            "largest": {site: largest[site] for site in ("block_output", OUTLIER_SITE, "q_proj", "v_proj")},
            "top1_median_ratio": round(max(row["top1_median_ratio"] for row in self.outliers), 2),
            "outlier_tokens_per_window": max(row["count"] for row in self.outliers),
        }


@torch.no_grad()
def measure_activations(
    checkpoint: Checkpoint,
    token_ids: torch.Tensor,
    runner: BlockRunner,
    *,
    prefix_kv: torch.Tensor | None,
    threshold: float,
    surface_blocks: list[int],
) -> Activations:
    """Walk windows [N, T] through a model in full precision, plain or rotated.

    Args:
        prefix_kv: [L, 2, kv_heads, P, d] in the model's basis, or None.
        threshold: ratio to the median above which a token is an outlier (arXiv:2410.05265, Eq. 3).
        surface_blocks: indices of the blocks whose surfaces and histograms are measured.
    """
    block_maxima: dict[str, list[torch.Tensor]] = {}  # site -> token maxima of each batch
    statistics: dict[str, list[torch.Tensor]] = {}
    surfaces: dict[str, torch.Tensor] = {}
    histograms: dict[int, torch.Tensor] = {}
    outliers, positions, contents = [], Counter[int](), Counter[int]()
    hidden = checkpoint.embed(token_ids)

    def measure(site: str, x: torch.Tensor) -> None:
        block_maxima.setdefault(site, []).append(token_maxima(x).cpu())

    def measure_values(index: int, x: torch.Tensor) -> None:
        surfaces.setdefault(f"{OUTLIER_SITE}.{index}", _pool(x if x.dim() == 2 else x[0]))
        histograms[index] = histograms.get(index, 0) + count_values(x)

    def add_maxima(values: torch.Tensor) -> None:
        block_maxima.setdefault(OUTLIER_SITE, []).append(values.cpu())

    def before(index: int, block: DecoderLayer) -> None:
        block_maxima["block_input"] = [token_maxima(hidden)]
        if index in surface_blocks:
            surfaces[f"input.{index}"] = _pool(hidden[0])
            _hook_site(block, checkpoint, OUTLIER_SITE, lambda x: measure_values(index, x))
        _add_hooks(block, checkpoint, measure, add_maxima)

    def after(index: int, block: DecoderLayer) -> None:
        measure("block_output", hidden)
        if index in surface_blocks:
            surfaces[f"output.{index}"] = _pool(hidden[0])
        maxima = {site: torch.cat(parts) for site, parts in block_maxima.items()}
        for site, values in maxima.items():
            statistics.setdefault(site, []).append(_describe(values.flatten()))
        layer = describe_outliers(index, maxima[OUTLIER_SITE], token_ids, threshold)
        row = {"layer": index, "count": layer.mean_count, "top1_median_ratio": layer.mean_top1_ratio}
        outliers.append(row)
        positions.update(layer.positions)
        contents.update(layer.content)
        block_maxima.clear()

    walk(checkpoint, hidden, runner, "activations", prefix_kv, before, after)
    stacked = {site: torch.stack(rows) for site, rows in statistics.items()}
    return Activations(stacked, surfaces, histograms, outliers, positions, contents)


def write_activations(folder: Path, activations: Activations, checkpoint: Checkpoint, header: Header) -> None:
    """Replace `folder` by activations.safetensors and outliers.json."""
    tensors = {f"statistics.{site}": values for site, values in activations.statistics.items()}
    tensors |= {f"surface.{name}": values for name, values in activations.surfaces.items()}
    tensors |= {f"histogram.{index}": counts for index, counts in activations.histograms.items()}
    contents = list_tokens(activations.contents, checkpoint.tokenizer.decode)
    positions = [{"position": place, "count": count} for place, count in sorted(activations.positions.items())]
    outliers = {"layers": activations.outliers, "positions": positions, "contents": contents}
    with replacing_folder(folder) as partial:
        save_tensors(partial / ACTIVATIONS, tensors, header)
        write_json(partial / "outliers.json", outliers)


def read_outliers(folder: Path) -> dict[str, Any]:
    """Return the outliers.json that `write_activations` wrote. Raise ArtifactError."""
    return load_json(folder / "outliers.json", "activation_plots")


def _add_hooks(
    block: DecoderLayer,
    checkpoint: Checkpoint,
    measure: Callable[[str, torch.Tensor], None],
    add_maxima: Callable[[torch.Tensor], None],
) -> None:
    """Measure the inputs and outputs of a block's linears whenever it runs.

    Args:
        add_maxima: gets the token maxima at `mlp_hidden` of a block with experts, where inputs are of some tokens only.
    """

    def measure_output(site: str) -> Callable[[nn.Module, tuple[torch.Tensor], torch.Tensor], None]:
        return lambda module, args, output: measure(site, output)

    architecture = checkpoint.architecture.of_block(block)
    for site in architecture.site_readers:
        if architecture.experts is None or base_site(site) != Site.MLP_HIDDEN:
            _hook_site(block, checkpoint, site, functools.partial(measure, site))
    if architecture.experts is not None:
        watch_token_maxima_(block, architecture, add_maxima)
    for linear, name in architecture.linear_names.items():
        linear = base_site(linear)  # all experts together
        block.get_submodule(name).register_forward_hook(measure_output(linear))


def _hook_site(block: DecoderLayer, checkpoint: Checkpoint, site: str, measure: Callable[[torch.Tensor], None]) -> None:
    """Measure the input of a site's linears, after R4 or R5, before it is quantized; with experts [n, C] of each."""

    def measure_quantized(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        measure(args[0])

    architecture = checkpoint.architecture.of_block(block)
    quantizers = find_site_quantizers(block, architecture)
    if architecture.experts is not None and site == Site.MLP_HIDDEN:
        for expert_site in architecture.mlps:
            _hook_site(block, checkpoint, expert_site, measure)
    elif architecture.experts is not None and site == Site.MLP_INPUT and not quantizers:
        experts = block.get_submodule(architecture.experts)
        experts.register_forward_pre_hook(lambda m, args: measure(args[0]))
    elif quantizers:
        quantizers[site].register_forward_hook(measure_quantized)
    else:
        reader = architecture.site_readers[site][0]
        block.get_submodule(reader).register_forward_pre_hook(lambda m, args: measure(args[0]))


def count_values(x: torch.Tensor) -> torch.Tensor:
    """Return how many values of x lie in each bin, [257] int64 on the CPU.

    Bin 128 holds magnitudes up to `BIN_EDGES[0]`. Bin 128 + i holds values from edge i - 1 to edge i, and bin 128 - i
    the same magnitudes with a negative sign. The outermost bins take all that is larger.
    """
    half = len(BIN_EDGES) - 1
    values = x.detach().flatten().double()
    bins = torch.bucketize(values.abs(), BIN_EDGES.to(values.device)).clamp_max(half)
    return torch.bincount(half + bins * values.sign().long(), minlength=2 * half + 1).cpu()


def _describe(maxima: torch.Tensor) -> torch.Tensor:
    """Return the `STATISTICS` [5] of token maxima [n], n >= 3."""
    return torch.stack((*maxima.topk(3).values, maxima.median(), maxima.min()))


def _pool(x: torch.Tensor) -> torch.Tensor:
    """Pool |x| [T, C] to at most 64 x 64 cells, each with its largest magnitude, in float32."""
    size = [min(length, limit) for length, limit in zip(x.shape, _SURFACE, strict=True)]
    return nn.functional.adaptive_max_pool2d(x.abs().float()[None], size)[0].cpu()
