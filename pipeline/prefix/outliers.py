"""Outlier tokens: the tokens that carry massive activations (arXiv:2410.05265, Eq. 3).

For the activations x [T, C] of one window at one site, the token maximum is M_t = max over channels of |x_t|, and its
ratio is r_t = M_t / median over t of M. A token is an outlier if r_t > threshold (64 in the paper).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch


def token_maxima(x: torch.Tensor) -> torch.Tensor:
    """Return max over channels of |x|: [..., C] -> [...], in float32."""
    low, high = torch.aminmax(x, dim=-1)
    return torch.maximum(high, -low).float()


def outlier_ratios(maxima: torch.Tensor) -> torch.Tensor:
    """Return r = M / median of the window, [..., T] -> [..., T]; 0 for a window whose median is 0."""
    median = maxima.median(dim=-1, keepdim=True).values
    return torch.where(median > 0, maxima / median.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


@dataclass
class LayerOutliers:
    """Outlier statistics of one layer over N windows of T tokens.

    Attributes:
        layer: index of the block.
        mean_count: outlier tokens per window, position 0 included.
        content: token id -> how often it is an outlier at a position other than 0.
        positions: position -> how often the token there is an outlier.
        mean_top1_ratio: mean over windows of the window's largest r_t.
        max_top1_ratio: its maximum over windows.
        peaks: token id -> sum of r_t squared over the windows in which it has the largest r_t after position 0. The
            threshold plays no part.
        expert_peaks: expert -> the largest magnitude of its output; empty for a dense block. Experts whose outputs are
            much larger than all others are called super experts (arXiv:2507.23279).
    """

    layer: int
    mean_count: float
    content: Counter[int]
    positions: Counter[int]
    mean_top1_ratio: float
    max_top1_ratio: float
    peaks: dict[int, float] = field(default_factory=dict)
    expert_peaks: dict[str, float] = field(default_factory=dict)


def describe_outliers(layer: int, maxima: torch.Tensor, token_ids: torch.Tensor, threshold: float) -> LayerOutliers:
    """Return the statistics of one layer.

    Args:
        maxima: token maxima [N, T].
        token_ids: [N, T].
        threshold: threshold of r_t.
    """
    ratios = outlier_ratios(maxima)
    outlier = ratios > threshold
    top1 = ratios.amax(dim=-1)
    positions = outlier.nonzero()[:, 1]
    # Position 0 can attend to nothing before it, so it is an outlier whatever its token is.
    content = token_ids[:, 1:][outlier[:, 1:]]
    largest = ratios[:, 1:].max(dim=-1)
    peaks: defaultdict[int, float] = defaultdict(float)
    for token, ratio in zip(token_ids[:, 1:].gather(1, largest.indices[:, None]), largest.values, strict=True):
        peaks[int(token)] += float(ratio) ** 2
    return LayerOutliers(
        layer,
        outlier.sum().item() / len(outlier),
        Counter(content.tolist()),
        Counter(positions.tolist()),
        top1.mean().item(),
        top1.max().item(),
        dict(peaks),
    )


def rank_peaks(layers: list[LayerOutliers]) -> list[int]:
    """Return content tokens by their `peaks` summed over layers, the largest sum first; ties go to the smaller id."""
    total: defaultdict[int, float] = defaultdict(float)
    for layer in layers:
        for token, peak in layer.peaks.items():
            total[token] += peak
    return [token for token, peak in most_frequent(total) if peak > 0]


Number = TypeVar("Number", int, float)


def most_frequent(counts: Mapping[int, Number], limit: int | None = None) -> list[tuple[int, Number]]:
    """Return the `limit` most frequent items (None: all) with their counts; ties are in ascending order."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]


def list_tokens(
    counts: Counter[int], decode: Callable[[list[int]], str], limit: int | None = None
) -> list[dict[str, Any]]:
    """Return the most frequent tokens as rows of {"id", "text", "count"}."""
    return [{"id": token, "text": decode([token]), "count": count} for token, count in most_frequent(counts, limit)]
