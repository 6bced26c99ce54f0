"""What a model's activations look like, block by block: the numbers behind the pictures of `plots.py`.

Token maxima (`prefix/outliers.py`) of every linear's input and output and of the blocks' inputs and outputs, outlier
tokens with their positions and contents, and coarse surfaces of a few blocks. Prefix positions are in the cache and
enter nothing. Inputs are taken where a quantizer acts: of down_proj behind R4, where the model has it.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.blocks.quantized import find_site_quantizers
from pipeline.blocks.walk import BlockRunner, walk
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import Site
from pipeline.prefix.outliers import describe_outliers, list_tokens, token_maxima
from pipeline.runtime.artifacts import Header, load_json, replacing_folder, save_tensors, write_json

ACTIVATIONS = "activations.safetensors"
STATISTICS = ("top1", "top2", "top3", "median", "least")  # of token maxima, over all tokens
OUTLIER_SITE = Site.MLP_HIDDEN
_SURFACE = (64, 64)  # cells a surface is pooled to: tokens, channels


@dataclass
class Activations:
    """What was measured.

    Attributes:
        statistics: site -> [L, 5], of `STATISTICS`. Sites: attention_input, attention_output, mlp_input, mlp_hidden
            (the linears' inputs); q_proj, … (their outputs); block_input, block_output.
        surfaces: "input.I" and "output.I" of block I -> [tokens, channels], the largest magnitude in each cell of the
            first window.
        outliers: by block: {"layer", "count" per window, "top1_median_ratio"}.
        positions, contents: position and token id -> how often an outlier in any block stands there, is it.
    """

    statistics: dict[str, torch.Tensor]
    surfaces: dict[str, torch.Tensor]
    outliers: list[dict[str, float]]
    positions: Counter[int]
    contents: Counter[int]

    def summary(self) -> dict[str, Any]:
        """The stage's metrics: the largest token maximum of each place, and what outliers there are."""
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
    prefix_kv: torch.Tensor | None,
    threshold: float,
    surface_blocks: list[int],
) -> Activations:
    """Walk windows [N, T] through a model in full precision, plain or rotated.

    Args:
        prefix_kv: [L, 2, kv_heads, P, d] in the model's basis, or None.
        threshold: an outlier's ratio to the median, arXiv:2410.05265, Eq. 3.
        surface_blocks: of which surfaces are taken.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    statistics: dict[str, list[torch.Tensor]] = {}
    surfaces: dict[str, torch.Tensor] = {}
    outliers, positions, contents = [], Counter[int](), Counter[int]()
    hidden = checkpoint.embed(token_ids)

    def keep(site: str, x: torch.Tensor) -> None:
        seen.setdefault(site, []).append(token_maxima(x).cpu())

    def watch(index: int, block: nn.Module) -> None:
        seen["block_input"] = [token_maxima(hidden)]
        if index in surface_blocks:
            surfaces[f"input.{index}"] = _pool(hidden[0])
        _hang_hooks(block, checkpoint, keep)

    def after(index: int, block: nn.Module) -> None:
        keep("block_output", hidden)
        if index in surface_blocks:
            surfaces[f"output.{index}"] = _pool(hidden[0])
        maxima = {site: torch.cat(parts) for site, parts in seen.items()}
        for site, values in maxima.items():
            statistics.setdefault(site, []).append(_describe(values.flatten()))
        layer = describe_outliers(index, maxima[OUTLIER_SITE], token_ids, threshold)
        row = {"layer": index, "count": layer.mean_count, "top1_median_ratio": layer.mean_top1_ratio}
        outliers.append(row)
        positions.update(layer.positions)
        contents.update(layer.content)
        seen.clear()

    walk(checkpoint, hidden, runner, "activations", prefix_kv, watch, after)
    stacked = {site: torch.stack(rows) for site, rows in statistics.items()}
    return Activations(stacked, surfaces, outliers, positions, contents)


def write_activations(folder: Path, found: Activations, checkpoint: Checkpoint, header: Header) -> None:
    """Replace `folder` by the tensors and outliers.json."""
    tensors = {f"statistics.{site}": values for site, values in found.statistics.items()}
    tensors |= {f"surface.{name}": values for name, values in found.surfaces.items()}
    contents = list_tokens(found.contents, checkpoint.tokenizer.decode)
    positions = [{"position": place, "count": count} for place, count in sorted(found.positions.items())]
    with replacing_folder(folder) as partial:
        save_tensors(partial / ACTIVATIONS, tensors, header)
        write_json(partial / "outliers.json", {"layers": found.outliers, "positions": positions, "contents": contents})


def read_outliers(folder: Path) -> dict[str, Any]:
    """outliers.json of `write_activations`."""
    return load_json(folder / "outliers.json", "activation_plots")


def _hang_hooks(block: nn.Module, checkpoint: Checkpoint, keep: Any) -> None:
    architecture = checkpoint.architecture
    quantizers = find_site_quantizers(block, architecture)
    for site, readers in architecture.site_readers.items():
        if quantizers:
            quantizers[site].register_forward_hook(lambda m, args, output, site=site: keep(site, args[0]))
        else:
            linear = block.get_submodule(readers[0])
            linear.register_forward_pre_hook(lambda m, args, site=site: keep(site, args[0]))
    for short, name in architecture.linear_names.items():
        block.get_submodule(name).register_forward_hook(lambda m, args, output, site=short: keep(site, output))


def _describe(maxima: torch.Tensor) -> torch.Tensor:
    """[5] of `STATISTICS` from token maxima [n], n >= 3."""
    return torch.stack((*maxima.topk(3).values, maxima.median(), maxima.min()))


def _pool(x: torch.Tensor) -> torch.Tensor:
    """|x| [T, C] -> at most 64 x 64 cells, each its largest magnitude, float32."""
    size = [min(own, limit) for own, limit in zip(x.shape, _SURFACE, strict=True)]
    return nn.functional.adaptive_max_pool2d(x.abs().float()[None], size)[0].cpu()
