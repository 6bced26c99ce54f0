"""KL divergence between the next-token distributions of two streams of final hidden states, without keeping logits.

Logits of a vocabulary of V are V / D times larger than the hidden states they come from. They are made a few hundred
positions at a time, and the gradient with respect to the hidden states, (q - p) lm_head, is taken at once, so that
nothing of that size waits for a backward pass and no logit is computed twice.
"""

from typing import Any

import torch

from pipeline.models.lm_head import LmHead

_POSITIONS = 128  # logits of so many positions at a time: 25 MB for a vocabulary of 49152


def mean_divergence(
    ours: torch.Tensor, exact: torch.Tensor, lm_head: LmHead, exact_lm_head: LmHead | None = None
) -> torch.Tensor:
    """Mean over positions of KL(exact ‖ ours) in nats, [] float32; gradients reach `ours` only.

    Args:
        ours, exact: [..., D] behind the final norm.
        exact_lm_head: of `exact`, where it is another.
    """
    exact_lm_head = lm_head if exact_lm_head is None else exact_lm_head
    return _MeanDivergence.apply(ours.flatten(0, -2), exact.flatten(0, -2), lm_head, exact_lm_head)


@torch.no_grad()
def mean_divergences(ours: torch.Tensor, exact: torch.Tensor, lm_head: LmHead) -> torch.Tensor:
    """`mean_divergence` of several streams from one, [C] float64: its logits are made once. No gradients.

    Args:
        ours: [C, T, D] behind the final norm.
        exact: [T, D].
    """
    totals = torch.zeros(len(ours), dtype=torch.float64, device=ours.device)
    for start in range(0, len(exact), _POSITIONS):
        rows = slice(start, start + _POSITIONS)
        log_p = lm_head.logits(exact[rows]).log_softmax(-1)
        p = log_p.exp()
        for number, states in enumerate(ours):
            log_q = lm_head.logits(states[rows]).log_softmax(-1)
            totals[number] += log_q.neg_().add_(log_p).mul_(p).sum(dtype=torch.float64)
    return totals / len(exact)


class _MeanDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ours: torch.Tensor, exact: torch.Tensor, lm_head: LmHead, exact_lm_head: LmHead
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=ours.device)
        wanted = ours.requires_grad
        gradient = torch.empty_like(ours) if wanted else None
        for start in range(0, len(ours), _POSITIONS):
            rows = slice(start, start + _POSITIONS)
            log_p = exact_lm_head.logits(exact[rows]).log_softmax(-1)
            logits = lm_head.logits(ours[rows])
            log_q = logits.log_softmax(-1)
            p = log_p.exp()
            log_p -= log_q
            if wanted:
                excess = log_q.exp_().sub_(p)
                gradient[rows] = lm_head.pull_back_(excess.div_(len(ours)), logits)
            total += p.mul_(log_p).sum(dtype=torch.float64)
        ctx.save_for_backward(gradient)
        return (total / len(ours)).float()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None
