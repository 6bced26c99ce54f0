"""Pictures of activations: the variants of a model side by side, on the same axes.

token_maxima_inputs.png, …_outputs.png   by block: the three largest token maxima, the median and the smallest
outlier_counts.png                       by block: outlier tokens per window
outlier_positions.png, outlier_contents.png
histogram_I.png                          values at the input of down_proj of block I, with the levels of its quantizer
surface_input_I.png, surface_output_I.png, surface_mlp_hidden_I.png  |x| over tokens and channels of block I
site_quality.png                         signal-to-quantization-noise ratio by site and block

They are drawn with matplotlib and need no display.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.models.sites import Site
from pipeline.numerics.quantizer import ActivationQuantizer
from pipeline.pictures.activations import ACTIVATIONS, BIN_EDGES, OUTLIER_SITE, STATISTICS, read_outliers
from pipeline.runtime.artifacts import load_tensors

_INPUTS = {
    Site.ATTENTION_INPUT: "input of q, k, v",
    Site.ATTENTION_OUTPUT: "input of o_proj",
    Site.MLP_INPUT: "input of gate, up",
    Site.MLP_HIDDEN: "input of down_proj",
}
_OUTPUTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_STYLES = {"top1": "#b2182b", "top2": "#ef8a62", "top3": "#fddbc7", "median": "#2166ac", "least": "#67a9cf"}
_COLUMN = 3.6  # inches
_CONTENTS = 12  # tokens shown
_DPI = 110


@dataclass(frozen=True)
class Measured:
    """The measurements of one variant: statistics and surfaces as tensors, and the content of outliers.json."""

    tensors: dict[str, torch.Tensor]
    outliers: dict[str, Any]


def read_measured(folders: dict[str, Path]) -> dict[str, Measured]:
    """Return variant -> the measurements in its folder. Raise ArtifactError."""
    return {
        name: Measured(load_tensors(folder / ACTIVATIONS, "activation_plots")[0], read_outliers(folder))
        for name, folder in folders.items()
    }


class _Box(Protocol):
    """Axes in three dimensions, whose `zoom` matplotlib declares by its default, an integer."""

    def set_box_aspect(self, aspect: None, *, zoom: float) -> None: ...


def draw_all(variants: dict[str, Measured], folder: Path, levels: Mapping[int, torch.Tensor]) -> list[Path]:
    """Draw every picture into `folder`, which must exist.

    Args:
        variants: variant -> its measurements. `quantized` is only in the histograms; elsewhere it looks like
            `prefixed`.
        levels: block -> the values that its quantizer at `mlp_hidden` rounds to (`find_levels`), in ascending order.

    Returns:
        The files in order, without pictures that show nothing (no outlier in any variant).
    """
    drawn = []
    for name, figure in _draw({name: measured for name, measured in variants.items() if name != "quantized"}):
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=_DPI, metadata={"Software": None})
        drawn.append(path)
    for block in sorted(int(name.removeprefix("histogram.")) for name in _first(variants) if "histogram." in name):
        path = folder / f"histogram_{block}.png"
        _draw_histograms(variants, block, levels.get(block)).savefig(path, dpi=_DPI, metadata={"Software": None})
        drawn.append(path)
    without_outliers = not any(row["count"] for measured in variants.values() for row in measured.outliers["layers"])
    without_contents = not any(measured.outliers["contents"] for measured in variants.values())
    empty = {"outlier_counts", "outlier_positions"} if without_outliers else set()
    empty |= {"outlier_contents"} if without_contents else set()
    return [path for path in drawn if path.stem not in empty]


def find_levels(quantizer: ActivationQuantizer, largest: float) -> torch.Tensor | None:
    """Return the values that a quantizer rounds to, in ascending order.

    They are read off its output for values from -largest to largest, so they are right for every format.

    Returns:
        [N], N at most 2^bits; None if there is no common set of levels: dynamic ranges, several groups, a mean that is
        taken out, or no quantization.
    """
    spec = quantizer.spec
    if not spec.enabled or spec.dynamic or spec.centered or quantizer.scale.numel() > 1:
        return None
    values = torch.linspace(-largest, largest, 1 << 16, device=quantizer.scale.device)
    return quantizer(values[:, None]).unique().cpu()


def draw_site_quality(path: Path, rows: Sequence[Mapping[str, float | None]], sites: Sequence[str]) -> None:
    """Draw signal-to-quantization-noise ratios (dB) as a heat map of sites by block.

    Args:
        rows: the rows of quantizer_init's saturation.json: "block" and "SITE_sqnr".
        sites: rows of the picture, from the top.
    """
    values = torch.tensor([[_or_nan(row.get(f"{site}_sqnr")) for row in rows] for site in sites])
    figure = Figure(figsize=(max(5.0, 1.9 + 0.3 * len(rows)), 1.4 + 0.36 * len(sites)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(values.numpy(), aspect="auto", cmap="RdYlGn", vmin=5, vmax=30)
    axis.set_yticks(range(len(sites)), sites)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("block")
    figure.colorbar(image, ax=axis, label="SQNR, dB")
    figure.suptitle("How well each site is quantized, calibration text")
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _first(variants: Mapping[str, Measured]) -> dict[str, torch.Tensor]:
    return next(iter(variants.values())).tensors


def _draw(variants: dict[str, Measured]) -> Iterator[tuple[str, Figure]]:
    yield "token_maxima_inputs", _draw_maxima(variants, _INPUTS, "Token-wise maxima of the linears' inputs")
    outputs = {name: f"output of {name}" for name in _OUTPUTS}
    yield "token_maxima_outputs", _draw_maxima(variants, outputs, "Token-wise maxima of the linears' outputs")
    blocks = {"block_input": "input of the block", "block_output": "output of the block"}
    yield "token_maxima_blocks", _draw_maxima(variants, blocks, "Token-wise maxima of the blocks")
    yield "outlier_counts", _draw_counts(variants)
    yield "outlier_positions", _draw_positions(variants)
    yield "outlier_contents", _draw_contents(variants)
    for name in sorted(_first(variants)):
        if name.startswith("surface."):
            _, side, block = name.split(".")
            title = "|input of down_proj|" if side == OUTLIER_SITE else f"|{side}|"
            yield f"surface_{side}_{block}", _draw_surfaces(variants, name, f"{title} of block {block}")


def _make_figure(title: str, rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_COLUMN * columns + 0.8, height * rows + 0.7), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)


def _draw_maxima(variants: dict[str, Measured], sites: Mapping[Site, str] | Mapping[str, str], title: str) -> Figure:
    figure, axes = _make_figure(title, len(sites), len(variants), 2.1)
    for row, (site, label) in zip(axes, sites.items(), strict=True):
        for axis, (variant, measured) in zip(row, variants.items(), strict=True):
            values = measured.tensors[f"statistics.{site}"]
            for name, colour in reversed(_STYLES.items()):  # the largest on top
                axis.plot(values[:, STATISTICS.index(name)].clamp_min(1e-6), color=colour, label=name, lw=1.4)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            if site == next(iter(sites)):
                axis.set_title(variant)
        row[0].set_ylabel(f"{label}\nmax |x| of a token")
    for axis in axes[-1]:
        axis.set_xlabel("block")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _draw_counts(variants: dict[str, Measured]) -> Figure:
    figure, axes = _make_figure("Outlier tokens by block", 1, len(variants), 2.6)
    for axis, (variant, measured) in zip(axes[0], variants.items(), strict=True):
        layers = measured.outliers["layers"]
        axis.bar([row["layer"] for row in layers], [row["count"] for row in layers], color="#b2182b")
        axis.set_title(variant)
        axis.set_xlabel("block")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].set_ylabel("outlier tokens per window")
    return figure


def _draw_positions(variants: dict[str, Measured]) -> Figure:
    figure, axes = _make_figure("Positions of outlier tokens", 1, len(variants), 2.6)
    for axis, (variant, measured) in zip(axes[0], variants.items(), strict=True):
        rows = measured.outliers["positions"]
        axis.stem([row["position"] for row in rows] or [0], [row["count"] for row in rows] or [0], basefmt=" ")
        axis.set_title(variant)
        axis.set_xlabel("position in the window, tokens")
        axis.set_xscale("symlog", linthresh=1)
    axes[0][0].set_ylabel("outliers, all blocks and windows")
    return figure


def _draw_contents(variants: dict[str, Measured]) -> Figure:
    figure = Figure(figsize=(_COLUMN * len(variants) + 0.8, 3.6), layout="constrained")
    figure.suptitle("What outlier tokens are (position 0 left out)")
    axes = figure.subplots(1, len(variants), sharex=True, squeeze=False)
    for axis, (variant, measured) in zip(axes[0], variants.items(), strict=True):
        rows = measured.outliers["contents"][:_CONTENTS][::-1]
        names = [repr(row["text"]).replace("$", r"\$") for row in rows]
        axis.barh(names, [row["count"] for row in rows], color="#2166ac", height=0.6)
        axis.set_ylim(len(rows) - _CONTENTS - 0.5, len(rows) - 0.5)
        axis.set_title(variant)
        axis.set_xlabel("outliers, all blocks and windows")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not rows:
            axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center")
            axis.set_yticks([])
    return figure


def _draw_histograms(variants: dict[str, Measured], block: int, levels: torch.Tensor | None) -> Figure:
    """Draw the values at `mlp_hidden` of a block; `levels` go into the panel of the quantized model."""
    figure, axes = _make_figure(f"Values at the input of down_proj, block {block}", 1, len(variants), 2.8)
    half = len(BIN_EDGES) - 1
    inner = torch.cat((BIN_EDGES.new_zeros(1), BIN_EDGES))
    magnitudes = (inner[1:] * inner[:-1].clamp_min(inner[1] / 2)).sqrt()
    centers = torch.cat((-magnitudes[1:].flip(0), BIN_EDGES.new_zeros(1), magnitudes[1:]))
    for axis, (variant, measured) in zip(axes[0], variants.items(), strict=True):
        counts = measured.tensors[f"histogram.{block}"]
        axis.step(centers.numpy(), (counts / counts.sum()).clamp_min(1e-12).numpy(), where="mid", lw=1.2)
        axis.set_title(variant)
        axis.set_xlabel("value")
        if variant == "quantized" and levels is not None:
            for level in levels.tolist():
                axis.axvline(level, color="#b2182b", lw=0.7, alpha=0.7)
    taken = torch.stack([measured.tensors[f"histogram.{block}"] for measured in variants.values()]).sum(0).nonzero()
    outermost = (taken - half).abs().max().clamp_min(1).item() - 1
    limit = float(BIN_EDGES[min(int(outermost) + 1, half)])
    axes[0][0].set_xscale("symlog", linthresh=max(limit / 1e4, 1e-2))
    axes[0][0].set_xlim(-limit, limit)
    axes[0][0].set_yscale("log")
    axes[0][0].set_ylim(1e-8, 1)
    axes[0][0].set_ylabel("share of values")
    return figure


def _draw_surfaces(variants: dict[str, Measured], name: str, title: str) -> Figure:
    figure = Figure(figsize=(_COLUMN * len(variants) + 0.8, 3.9), layout="constrained")
    figure.suptitle(f"{title}, first window, log scale")
    surfaces = {variant: measured.tensors[name] for variant, measured in variants.items()}
    logs = {variant: surface.clamp_min(1e-3).log10() for variant, surface in surfaces.items()}
    every = torch.cat([values.flatten() for values in logs.values()])
    low, high = every.min().item(), every.max().item()
    for place, (variant, values) in enumerate(logs.items()):
        axis = figure.add_subplot(1, len(variants), place + 1, projection="3d")
        tokens, channels = values.shape
        y, x = torch.meshgrid(torch.arange(tokens), torch.arange(channels), indexing="ij")
        axis.plot_surface(
            x.numpy(), y.numpy(), values.numpy(), cmap="viridis", vmin=low, vmax=high, rcount=tokens, ccount=channels
        )
        axis.set_zlim(low, high)
        axis.set_title(variant)
        axis.set_xlabel("channels, pooled")
        axis.set_ylabel("tokens, pooled")
        axis.set_zlabel("log10 max |x|")
        cast(_Box, axis).set_box_aspect(None, zoom=0.85)
    return figure
