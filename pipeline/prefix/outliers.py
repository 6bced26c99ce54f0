"""Outlier tokens: which tokens carry massive activations (arXiv:2410.05265, Eq. 3).

For the activations x [T, C] of one window at one place, the token maximum is M_t = max over channels of |x_t|, its
ratio r_t = M_t / median over t of M. A token is an outlier where r_t > threshold (64 in the paper).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


def token_maxima(x: torch.Tensor) -> torch.Tensor:
    """max over channels of |x|: [..., C] -> [...], in float32."""
    low, high = torch.aminmax(x, dim=-1)
    return torch.maximum(high, -low).float()


def outlier_ratios(maxima: torch.Tensor) -> torch.Tensor:
    """r = M / median of the window: [..., T] -> [..., T]. A window whose median is 0 has ratios 0."""
    median = maxima.median(dim=-1, keepdim=True).values
    return torch.where(median > 0, maxima / median.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


@dataclass
class LayerOutliers:
    """What one layer shows over N windows of T tokens.

    Attributes:
        layer: index of the block.
        mean_count: outlier tokens per window, position 0 included.
        content: token id -> how often it is an outlier at a position other than 0.
        positions: position -> how often an outlier stands there.
        mean_top1_ratio, max_top1_ratio: over windows, of the window's largest r_t.
        peaks: token id -> r_t squared, summed over windows, of the token that is each window's largest behind position
            0, whatever the threshold.
    """

    layer: int
    mean_count: float
    content: Counter[int]
    positions: Counter[int]
    mean_top1_ratio: float
    max_top1_ratio: float
    peaks: Counter[int] = field(default_factory=Counter)


def describe_outliers(layer: int, maxima: torch.Tensor, token_ids: torch.Tensor, threshold: float) -> LayerOutliers:
    """Statistics of one layer from token maxima [N, T] and the windows' ids [N, T]."""
    ratios = outlier_ratios(maxima)
    outlier = ratios > threshold
    top1 = ratios.amax(dim=-1)
    positions = outlier.nonzero()[:, 1]
    # Position 0 is an outlier whatever its token (nothing precedes it to attend to), so its token says nothing.
    content = token_ids[:, 1:][outlier[:, 1:]]
    largest = ratios[:, 1:].max(dim=-1)
    peaks: Counter[int] = Counter()
    for token, ratio in zip(token_ids[:, 1:].gather(1, largest.indices[:, None]), largest.values, strict=True):
        peaks[int(token)] += float(ratio) ** 2
    return LayerOutliers(
        layer,
        outlier.sum().item() / len(outlier),
        Counter(content.tolist()),
        Counter(positions.tolist()),
        top1.mean().item(),
        top1.max().item(),
        peaks,
    )


def rank_peaks(layers: list[LayerOutliers]) -> list[int]:
    """Content tokens by their `peaks`, summed over layers, the largest first; ties go to the smaller id."""
    total: Counter[int] = sum((layer.peaks for layer in layers), Counter())
    return [token for token, _ in most_frequent(total)]


def most_frequent(counts: Counter[int], limit: int | None = None) -> list[tuple[int, int]]:
    """The `limit` most frequent items with their counts, ties in ascending order of the items; None: all."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]


def list_tokens(
    counts: Counter[int], decode: Callable[[list[int]], str], limit: int | None = None
) -> list[dict[str, Any]]:
    """The most frequent tokens as {"id", "text", "count"}."""
    return [{"id": token, "text": decode([token]), "count": count} for token, count in most_frequent(counts, limit)]
