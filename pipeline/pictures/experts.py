"""The part of the report about mixtures of experts: two pictures and two lists.

router_agreement.png   by block and variant: the share of tokens whose experts are the original's
expert_tokens.png      by block and expert: the share of the tokens that the original sends to it

Super experts are those with the largest outputs (arXiv:2507.23279). Starved experts got so few calibration tokens that
quantizer_init added the tokens whose routing score came next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.inspection.routing import measure_agreement
from pipeline.runtime.artifacts import open_tensors

_LISTED = 10
_DPI = 110


@dataclass(frozen=True)
class ExpertLists:
    """The rows of the report's tables about experts.

    Attributes:
        super_experts: "block 3 experts.1", its largest output without a prefix, and with it; the largest first.
        starved: "block 3 experts.1", its tokens, and the tokens that were added.
    """

    super_experts: list[tuple[str, float, float]]
    starved: list[tuple[str, int, int]]


def read_choices(path: Path) -> torch.Tensor | None:
    """Return the experts chosen for all windows that `evaluation` kept in `path`, [N, T, L, k]; None without experts.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    with open_tensors(path, "evaluation") as (file, _):
        names = [name for name in file.keys() if name.startswith("experts.")]  # noqa: SIM118 (not a dict)
        return torch.cat([file.get_tensor(name) for name in names]) if names else None


def list_agreement(choices: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Return a row for each block: "block", and for each variant but the original its router agreement, or None.

    Args:
        choices: variant -> [N, T, L, k], with `original` among them.
    """
    original = choices["original"]
    rows: list[dict[str, Any]] = [{"block": index} for index in range(original.shape[2])]
    for variant, chosen in choices.items():
        if variant != "original":
            for row, share in zip(rows, measure_agreement(chosen, original), strict=True):
                row[variant] = share
    return rows


def draw_expert_tokens(path: Path, counts: torch.Tensor) -> None:
    """Draw the share of choices that fall on each expert of each block, from counts [L, E]."""
    blocks, experts = counts.shape
    shares = counts.double() / counts.sum(1, keepdim=True)  # NaN in blocks without experts
    figure = Figure(figsize=(max(5.0, 1.9 + 0.3 * blocks), 1.4 + min(0.3 * experts, 8.0)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares.T.numpy(), aspect="auto", cmap="viridis", vmin=0)
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("block")
    axis.set_ylabel("expert")
    figure.colorbar(image, ax=axis, label="share of choices")
    figure.suptitle("Tokens of each expert in the original, held-out text")
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def list_experts(blocks: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> ExpertLists:
    """Return the rows about experts.

    Args:
        blocks: the blocks in quantizer_init's report.json.
        layers: the layers in prefix_search's report.json.
    """
    peaks = [
        (f"block {layer['layer']} {row['expert']}", row["peak"], row["peak_with_prefix"])
        for layer in layers
        for row in layer.get("largest_experts", [])
    ]
    starved = [
        (f"block {index} experts.{row['expert']}", row["tokens"], row["added"])
        for index, block in enumerate(blocks)
        for row in block.get("experts", {}).get("starved", [])
    ]
    return ExpertLists(sorted(peaks, key=lambda row: -row[1])[:_LISTED], starved)
