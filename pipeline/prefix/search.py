"""Find the tokens to prefix (arXiv:2410.05265, §5.1): the ones that draw massive activations wherever they first occur.

One walk over the original model looks at outlier tokens in every layer. Which of them make the prefix is chosen by

    threshold   the paper's rule: their number o is the largest over layers of the mean over windows, rounded up; the
                prefix is the o most frequent outlier tokens followed by the start token
    benefit     ours: what static quantizers cost behind it (`benefit.py`), however far the outliers stand out

Put once in front of every sequence, they take the massive activations with them: a second, shorter walk with the prefix
in the cache shows the ratios that are left.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.walk import BlockRunner, walk
from pipeline.models.checkpoint import Checkpoint
from pipeline.prefix.benefit import choose_by_benefit
from pipeline.prefix.outliers import (
    LayerOutliers,
    describe_outliers,
    list_tokens,
    most_frequent,
    rank_peaks,
    token_maxima,
)
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.text.start_token import choose_start_token
from pipeline.text.windows import find_text_start_token, prepend_start_token

_AFTER_WINDOWS = 4
_EXPLAIN_BENEFIT = "the shortest candidate within a standard error of the least divergence behind simulated quantizers"


@dataclass(frozen=True)
class Prefix:
    """The prefix found.

    Attributes:
        token_ids: int64 [P], the start token last; empty when nothing is an outlier.
        embeddings: [P, D], rows of the original model's embedding table.
        report: everything measured, as JSON values.
    """

    token_ids: torch.Tensor
    embeddings: torch.Tensor
    report: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """The stage's metrics: the largest values over layers, without and with the prefix."""
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
    runner: BlockRunner,
    site: str,
    threshold: float,
    start_token_counts: bool,
    ranks: Ranks = ALONE,
    window_start: int | None = None,
    choose: str = "threshold",
) -> Prefix:
    """Find the prefix of a model.

    Args:
        checkpoint: the original, unrotated model.
        token_ids: search windows [N, T], content alone.
        site: `down_proj_input` (the paper's) or `block_output`: whose token maxima are judged.
        threshold: r_t beyond which a token is an outlier; `benefit` only counts them.
        start_token_counts: of the paper's rule: whether the start token is one of the o tokens (the paper's text) or
            comes on top of them (the official code).
        ranks: each looks at its own windows; all find the same.
        window_start: the start token in front of every window that no prefix ends in, or None.
        choose: threshold (the paper's rule) or benefit (`benefit.py`).
    """
    before = measure_outliers(
        checkpoint, prepend_start_token(token_ids, window_start), runner, site, threshold, ranks=ranks
    )
    start_token, start_choice = choose_start_token(checkpoint)
    decode = checkpoint.tokenizer.decode
    table = None
    if choose == "benefit":
        ranked = rank_peaks(before)
        choice = choose_by_benefit(checkpoint, ranked, start_token, token_ids, runner, ranks, window_start)
        chosen, why = choice.token_ids, _EXPLAIN_BENEFIT
        table = [row | {"texts": [decode([token]) for token in row["token_ids"]]} for row in choice.table]
    else:
        chosen = choose_prefix(before, start_token, start_token_counts)
        why = _explain(before, chosen, threshold)
    embeddings = checkpoint.embed(torch.tensor(chosen, dtype=torch.int64))
    after = before
    if chosen:
        prefix_kv = compute_prefix_kv(checkpoint, embeddings, runner)
        behind = prepend_start_token(
            token_ids[: max(_AFTER_WINDOWS, ranks.world)], find_text_start_token(window_start, chosen)
        )
        after = measure_outliers(checkpoint, behind, runner, site, threshold, prefix_kv, ranks)
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
            }
            for layer, with_prefix in zip(before, after, strict=True)
        ],
    }
    return Prefix(torch.tensor(chosen, dtype=torch.int64), embeddings, report)


@torch.no_grad()
def measure_outliers(
    checkpoint: Checkpoint,
    token_ids: torch.Tensor,
    runner: BlockRunner,
    site: str,
    threshold: float,
    prefix_kv: torch.Tensor | None = None,
    ranks: Ranks = ALONE,
) -> list[LayerOutliers]:
    """Outlier statistics of every layer, in one walk; prefix positions are in the cache and never counted.

    `token_ids` [N, T] are all that is read: a start token in front is position 0.
    """
    hidden = checkpoint.embed(token_ids[ranks.slice_windows(len(token_ids))])
    maxima: list[torch.Tensor] = []
    layers: list[LayerOutliers] = []

    def watch(index: int, block: nn.Module) -> None:
        maxima.clear()
        if site == "down_proj_input":
            down = block.get_submodule(checkpoint.architecture.mlp_output)
            down.register_forward_pre_hook(lambda module, args: maxima.append(token_maxima(args[0]).cpu()))
        else:
            block.register_forward_hook(lambda module, args, output: maxima.append(token_maxima(output).cpu()))

    def after(index: int, block: nn.Module) -> None:
        whole = ranks.collect(torch.cat(maxima), len(token_ids))
        layers.append(describe_outliers(index, whole, token_ids, threshold))

    walk(checkpoint, hidden, runner, "searching outliers", prefix_kv, watch, after)
    return layers


def choose_prefix(layers: list[LayerOutliers], start_token: int | None, start_token_counts: bool) -> list[int]:
    """The prefix's token ids, start token last; [] when no layer has an outlier.

    Content tokens are ranked by how often they are outliers, over all layers; ties go to the smaller id.
    """
    largest = max(layer.mean_count for layer in layers)
    if largest == 0:
        return []
    content: Counter[int] = sum((layer.content for layer in layers), Counter())
    count = math.ceil(largest)
    if start_token is not None:
        content.pop(start_token, None)
        count -= start_token_counts
    chosen = [token for token, _ in most_frequent(content, count)]
    return chosen if start_token is None else [*chosen, start_token]


def _pick_costs(candidates: list[dict[str, Any]]) -> dict[str, float | None]:
    """Without a prefix, the first of the candidates, and behind the chosen one."""
    return {"none": candidates[0]["kl"], "chosen": next(row["kl"] for row in candidates if row["chosen"])}


def _explain(layers: list[LayerOutliers], chosen: list[int], threshold: float) -> str:
    if not chosen:
        return f"no token exceeds {threshold:g} times the median in any layer: the prefix is empty"
    layer = max(layers, key=lambda layer: layer.mean_count)
    return (
        f"layer {layer.layer} has most outlier tokens, {layer.mean_count:.2f} per window (ratio above {threshold:g}), "
        f"rounded up to {math.ceil(layer.mean_count)}"
    )
