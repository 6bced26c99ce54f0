"""How well static ranges fit the values that reach them: the share beyond the range, and the signal-to-noise ratio.

A static scale was chosen on calibration text. On other text more values may be beyond its range, where they are cut
off, or they may use a small part of it, where the step is coarse. Per site and block this counts

    share   of values that would round to integers beyond the range (0.001: one in a thousand)
    sqnr    10 log10 (energy of the values / energy of their quantization errors), in dB

Prefix positions never pass a quantizer and are not counted.
"""

import logging
import math
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pipeline.blocks.quantized import find_site_quantizers
from pipeline.blocks.walk import BlockRunner
from pipeline.models.architectures import Architecture
from pipeline.models.layers import DecoderLayer
from pipeline.models.sites import Site, base_site
from pipeline.numerics.quantizer import ActivationQuantizer, group
from pipeline.runtime.artifacts import write_rows
from pipeline.runtime.streams import Stream

logger = logging.getLogger(__name__)

Report = dict[str, dict[str, float]]  # site -> {"share", "sqnr"}
SATURATION = "plots/saturation.json"
PROBED_WINDOWS = 4  # of each text: enough for shares, and counting costs time
_WORST = 3


class SaturationProbe:
    """Counts at a block's activation quantizers inside its context: `with SaturationProbe(…) as probe: …`."""

    def __init__(self, block: DecoderLayer, architecture: Architecture) -> None:
        quantizers = find_site_quantizers(block, architecture).items()
        self._quantizers = {site: quantizer for site, quantizer in quantizers if quantizer.calibrated}
        # Sums stay on the device until `report`: a hook that waited for numbers would stop every batch.
        self._sums = {site: torch.zeros(3, dtype=torch.float64) for site in self._quantizers}
        self._counts = dict.fromkeys(self._quantizers, 0)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "SaturationProbe":
        for site, quantizer in self._quantizers.items():
            self._handles.append(quantizer.register_forward_hook(self._make_hook(site)))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def report(self) -> Report:
        """Return share and SQNR of every site, over all calls since the context was first entered."""
        result = {}
        for site, sums in self._sums.items():
            if not self._counts[site]:  # an expert without tokens
                continue
            beyond, signal, noise = sums.tolist()
            sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf
            result[site] = {"share": beyond / max(self._counts[site], 1), "sqnr": min(sqnr, 200.0)}
        return result

    def _make_hook(self, site: str) -> Any:
        def hook(module: ActivationQuantizer, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            x = args[0]
            output = output if module.code_of_zero is None else module.from_codes(output)
            noise = (output - x).float().square().sum()
            values = torch.stack([count_beyond(module, x).double(), x.float().square().sum().double(), noise.double()])
            self._sums[site] = self._sums[site].to(values.device) + values
            self._counts[site] += x.numel()

        return hook


def advance_probed_(
    runner: BlockRunner,
    block: DecoderLayer,
    architecture: Architecture,
    hidden: Stream,
    prefix_kv: torch.Tensor | None,
) -> Report:
    """Advance `hidden` [N, T, D] through a block, as `runner.advance_`, and return the report of its first windows."""
    probed = min(PROBED_WINDOWS, len(hidden))
    with SaturationProbe(block, architecture) as probe:
        runner.advance_(block, hidden, prefix_kv, windows=range(probed))
    runner.advance_(block, hidden, prefix_kv, windows=range(probed, len(hidden)))
    return probe.report()


@torch.no_grad()
def count_beyond(quantizer: ActivationQuantizer, x: torch.Tensor) -> torch.Tensor:
    """Count the values of x that would round to integers beyond the quantizer's range, [] int64."""
    grouped = group(quantizer.center(x).float(), quantizer.spec.group_size)
    scale, zero_point = quantizer.find_parameters(grouped)
    low, high = (end * scale for end in quantizer.spec.grid.find_ends(zero_point))
    return ((grouped < low) | (grouped > high)).sum()


def summarise_saturation(texts: dict[str, dict[int, Report]]) -> dict[str, Any]:
    """Return the largest share and the lowest SQNR per text, for the metrics; log a warning that names the worst sites.

    Args:
        texts: name of a text ("calibration", a corpus) -> block -> report. Empty for a model without quantizers.
    """
    summary: dict[str, Any] = {"largest_saturation": {}, "lowest_sqnr": {}}
    for text, blocks in texts.items():
        sites = [
            (values, f"block {index} {site}") for index, report in blocks.items() for site, values in report.items()
        ]
        if not sites:
            continue
        by_share = sorted(sites, key=lambda entry: -entry[0]["share"])
        by_sqnr = sorted(sites, key=lambda entry: entry[0]["sqnr"])
        summary["largest_saturation"][text] = round(by_share[0][0]["share"], 5)
        summary["lowest_sqnr"][text] = round(by_sqnr[0][0]["sqnr"], 2)
        logger.warning(
            "%s: worst fitting static ranges: %s; lowest signal to noise: %s",
            text,
            ", ".join(f"{name} ({values['share']:.2%} beyond)" for values, name in by_share[:_WORST]),
            ", ".join(f"{name} ({values['sqnr']:.1f} dB)" for values, name in by_sqnr[:_WORST]),
        )
    return {key: values for key, values in summary.items() if values}


def write_saturation(path: Path, texts: dict[str, dict[int, Report]]) -> None:
    """Write a table for `dvc plots`, a row per block: SITE_share and SITE_sqnr of every `Site`.

    The worst of several texts, and of several experts, counts.
    """
    rows = []
    for index in sorted({index for blocks in texts.values() for index in blocks}):
        row: dict[str, Any] = {"block": index}
        reports = [blocks[index] for blocks in texts.values()]
        for site in Site:
            values = [report[name] for report in reports for name in report if base_site(name) == site]
            row[f"{site}_share"] = max((value["share"] for value in values), default=None)
            row[f"{site}_sqnr"] = min((value["sqnr"] for value in values), default=None)
        rows.append(row)
    write_rows(path, rows)
