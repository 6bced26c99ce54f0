"""Recompute the choice of a mixture's router, for code that needs more of it than the router returns.

Routers of transformers choose the k experts with the largest scores, and weigh their outputs by these scores. A score
is a softmax or a sigmoid of the logits. Some families add a correction bias to it, for the choice alone, or choose
among the best groups of experts only:

    mixtral, qwen2_moe, qwen3_moe, olmoe   softmax
    hunyuan_v1_moe                         softmax; the weight belongs to a linear in the router
    glm4_moe                               sigmoid, correction bias of the router, groups, factor on the weights
    minimax_m2                             sigmoid, correction bias of the block
    ernie4_5_moe                           softmax, correction bias of a module in the router, least sum of weights
"""

from typing import Literal

import torch
from torch import nn

ExpertScores = Literal["softmax", "sigmoid"]
CORRECTION_BIAS = "e_score_correction_bias"


def is_correction_bias(name: str) -> bool:
    """Return whether a tensor is a correction bias: its small steps decide, so it is float32 in every model."""
    return name.endswith(CORRECTION_BIAS)


def find_correction_bias(router: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """Return the bias [E] that a router adds to scores before it chooses, or None.

    Args:
        args: the arguments of its call. Some families pass the bias as the second one.
    """
    holder = getattr(router, "moe_statics", router)
    bias = getattr(holder, CORRECTION_BIAS, args[1] if len(args) > 1 else None)
    return None if bias is None else bias.flatten()


def rank_experts(kind: ExpertScores, logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the values [n, E] by which a router without groups ranks experts, for logits [n, E]."""
    if bias is None:
        return logits
    return _score(kind, logits) + bias


def choose_experts(
    router: nn.Module, kind: ExpertScores, logits: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the experts [n, k] that a router chooses, computed in the dtype of the logits [n, E]."""
    ranks, count = rank_experts(kind, logits, bias), int(getattr(router, "num_group", 1))
    if count > 1:
        groups = ranks.unflatten(1, (count, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(int(getattr(router, "topk_group", count)), dim=-1).indices
        left_out = torch.ones(len(ranks), count, dtype=torch.bool, device=ranks.device).scatter(1, best, False)
        ranks = groups.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(1)
    top_k = router.top_k
    assert isinstance(top_k, int)
    return ranks.topk(top_k, dim=-1).indices


def weigh_experts(router: nn.Module, kind: ExpertScores, logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the factors [n, k] of the outputs of chosen experts, computed in the dtype of the logits [n, E]."""
    weights = _score(kind, logits).gather(1, indices)
    if getattr(router, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(float(getattr(router, "norm_min", 0.0)))
    return weights * float(getattr(router, "routed_scaling_factor", 1.0))


def _score(kind: ExpertScores, logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
