"""Find the tokens to prefix (arXiv:2410.05265, §5.1): those that draw massive activations where they first occur.

One walk over the original model measures outlier tokens in every layer. `prefix_search.choose` chooses among them:

    threshold   the paper's rule. o is the mean number of outlier tokens per window, rounded up, in the layer that has
                most. The prefix is the o most frequent outlier tokens, followed by the start token
    benefit     the default. Candidate prefixes are compared by the cost of static quantizers after them (`benefit.py`);
                the ratios only rank the tokens

The prefix then takes the massive activations with it. A second, shorter walk with the prefix in the cache measures the
ratios that remain.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.walk import BlockRunner, walk
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.layers import DecoderLayer
from pipeline.prefix.benefit import choose_by_benefit
from pipeline.prefix.outliers import (
    LayerOutliers,
    describe_outliers,
    list_tokens,
    most_frequent,
    rank_peaks,
    token_maxima,
)
from pipeline.prefix.params import PrefixSearchParams
from pipeline.prefix.sites import watch_expert_peaks_, watch_token_maxima_
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.text.start_token import choose_start_token
from pipeline.text.windows import find_text_start_token, prepend_start_token

_WINDOWS_WITH_PREFIX = 4
_LISTED_EXPERTS = 8  # of a block
_EXPLAIN_BENEFIT = "the shortest candidate within a standard error of the least divergence behind simulated quantizers"


@dataclass(frozen=True)
class Prefix:
    """The prefix found.

    Attributes:
        token_ids: int64 [P], the start token last; empty if no prefix is best.
        embeddings: [P, D], rows of the original model's embedding table.
        report: all measurements, as JSON values.
    """

    token_ids: torch.Tensor
    embeddings: torch.Tensor
    report: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """Return the stage's metrics: the largest values over layers, without and with the prefix."""
        layers, candidates = self.report["layers"], self.report["candidates"]
        return {
            "prefix_token_ids": self.report["prefix_token_ids"],
            "prefix_texts": self.report["prefix_texts"],
            **{
                key: max(layer[key] for layer in layers)
                for key in (
                    "outlier_tokens_per_window",
                    "outlier_tokens_per_window_with_prefix",
                    "top1_median_ratio",
                    "top1_median_ratio_with_prefix",
                )
            },
            **({"simulated_kl": _pick_costs(candidates)} if candidates else {}),
        }


def search_prefix(
    checkpoint: Checkpoint,
    token_ids: torch.Tensor,
    *,
    params: PrefixSearchParams,
    runner: BlockRunner,
    ranks: Ranks = ALONE,
    text_start_token_id: int | None = None,
) -> Prefix:
    """Find the prefix of a model.

    Args:
        checkpoint: the original model.
        token_ids: search windows [N, T], content alone.
        ranks: each measures its own windows; all return the same prefix.
        text_start_token_id: the start token before every text, or None. It is left out after a prefix that ends in it.
    """
    site, threshold = params.site, params.outlier_threshold
    windows = prepend_start_token(token_ids, text_start_token_id)
    before = measure_outliers(checkpoint, windows, runner=runner, site=site, threshold=threshold, ranks=ranks)
    start_token_id, start_choice = choose_start_token(checkpoint)
    decode = checkpoint.tokenizer.decode
    table = None
    if params.choose == "benefit":
        choice = choose_by_benefit(
            checkpoint,
            rank_peaks(before),
            start_token_id=start_token_id,
            token_ids=token_ids,
            runner=runner,
            ranks=ranks,
            text_start_token_id=text_start_token_id,
        )
        chosen, why = choice.token_ids, _EXPLAIN_BENEFIT
        table = [row | {"texts": [decode([token]) for token in row["token_ids"]]} for row in choice.table]
    else:
        chosen = choose_prefix(before, start_token_id, params.start_token_counts)
        why = _explain_threshold(before, chosen, threshold)
    embeddings = checkpoint.embed(torch.tensor(chosen, dtype=torch.int64))
    after = before
    if chosen:
        prefix_kv = compute_prefix_kv(checkpoint, embeddings, runner)
        some_windows = token_ids[: max(_WINDOWS_WITH_PREFIX, ranks.world)]
        after = measure_outliers(
            checkpoint,
            prepend_start_token(some_windows, find_text_start_token(text_start_token_id, chosen)),
            runner=runner,
            site=site,
            threshold=threshold,
            prefix_kv=prefix_kv,
            ranks=ranks,
        )
    report = {
        "prefix_token_ids": chosen,
        "prefix_texts": [decode([token]) for token in chosen],
        "start_token": start_choice,
        "outlier_token_count": max(layer.mean_count for layer in before),
        "why": why,
        "candidates": table,
        "layers": [
            {
                "layer": layer.layer,
                "outlier_tokens_per_window": layer.mean_count,
                "top1_median_ratio": layer.mean_top1_ratio,
                "top1_median_ratio_max": layer.max_top1_ratio,
                "top1_median_ratio_with_prefix": with_prefix.mean_top1_ratio,
                "top1_median_ratio_max_with_prefix": with_prefix.max_top1_ratio,
                "outlier_tokens_per_window_with_prefix": with_prefix.mean_count,
                "tokens": list_tokens(layer.content, decode, 10),
                "tokens_with_prefix": list_tokens(with_prefix.content, decode, 10),
                "positions": [
                    {"position": position, "count": count} for position, count in most_frequent(layer.positions, 10)
                ],
                **_describe_experts(layer, with_prefix),
            }
            for layer, with_prefix in zip(before, after, strict=True)
        ],
    }
    return Prefix(torch.tensor(chosen, dtype=torch.int64), embeddings, report)


@torch.no_grad()
def measure_outliers(
    checkpoint: Checkpoint,
    token_ids: torch.Tensor,
    *,
    runner: BlockRunner,
    site: str,
    threshold: float,
    prefix_kv: torch.Tensor | None = None,
    ranks: Ranks = ALONE,
) -> list[LayerOutliers]:
    """Return the outlier statistics of every layer, in one walk. Prefix positions are never counted.

    Args:
        token_ids: [N, T], all tokens that are read after the prefix; a start token among them is position 0.
        site: down_proj_input (the paper's) | block_output, whose token maxima are measured.
        threshold: threshold of the ratio to the median.
        prefix_kv: [L, 2, heads, P, d] or None.
    """
    hidden = checkpoint.embed(token_ids[ranks.slice_windows(len(token_ids))])
    maxima: list[torch.Tensor] = []
    layers: list[LayerOutliers] = []
    peaks: dict[str, float] = {}

    def watch(index: int, block: DecoderLayer) -> None:
        maxima.clear()
        peaks.clear()
        watch_expert_peaks_(block, checkpoint.architecture, peaks)
        if site == "down_proj_input":
            watch_token_maxima_(block, checkpoint.architecture, lambda values: maxima.append(values.cpu()))
        else:
            block.register_forward_hook(lambda module, args, output: maxima.append(token_maxima(output).cpu()))

    def after(index: int, block: DecoderLayer) -> None:
        whole = ranks.collect(torch.cat(maxima), len(token_ids))
        layer = describe_outliers(index, whole, token_ids, threshold)
        all_peaks = torch.tensor(list(peaks.values()))
        ranks.max_(all_peaks)
        layer.expert_peaks = dict(zip(peaks, all_peaks.tolist(), strict=True))
        layers.append(layer)

    walk(checkpoint, hidden, runner, "searching outliers", prefix_kv, watch, after)
    return layers


def _describe_experts(layer: LayerOutliers, with_prefix: LayerOutliers) -> dict[str, Any]:
    """Return the experts with the largest outputs, without and with the prefix; {} for a dense block."""
    ranked = sorted(layer.expert_peaks, key=lambda name: -layer.expert_peaks[name])
    largest = [
        {"expert": name, "peak": layer.expert_peaks[name], "peak_with_prefix": with_prefix.expert_peaks[name]}
        for name in ranked[:_LISTED_EXPERTS]
    ]
    return {"largest_experts": largest} if largest else {}


def choose_prefix(layers: list[LayerOutliers], start_token_id: int | None, start_token_counts: bool) -> list[int]:
    """Choose the prefix by the paper's rule; return its token ids, [] if no layer has an outlier.

    Content tokens are ranked by how often they are outliers, over all layers; ties go to the smaller id.

    Args:
        start_token_id: the start token that the prefix ends in, or None.
        start_token_counts: whether it is one of the o tokens (the paper's text), or comes after them (official code).
    """
    largest = max(layer.mean_count for layer in layers)
    if largest == 0:
        return []
    content: Counter[int] = sum((layer.content for layer in layers), Counter())
    count = math.ceil(largest)
    if start_token_id is not None:
        content.pop(start_token_id, None)
        count -= start_token_counts
    chosen = [token for token, _ in most_frequent(content, count)]
    return chosen if start_token_id is None else [*chosen, start_token_id]


def _pick_costs(candidates: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the cost without a prefix, which is the first candidate, and the cost of the chosen one."""
    return {"none": candidates[0]["kl"], "chosen": next(row["kl"] for row in candidates if row["chosen"])}


def _explain_threshold(layers: list[LayerOutliers], chosen: list[int], threshold: float) -> str:
    """Return the sentence of the report that explains a choice by the paper's rule."""
    if not chosen:
        return f"no token exceeds {threshold:g} times the median in any layer: the prefix is empty"
    layer = max(layers, key=lambda layer: layer.mean_count)
    return (
        f"layer {layer.layer} has most outlier tokens, {layer.mean_count:.2f} per window (ratio above {threshold:g}), "
        f"rounded up to {math.ceil(layer.mean_count)}"
    )
