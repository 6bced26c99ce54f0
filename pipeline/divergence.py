"""KL divergence between the next-token distributions of two streams of final hidden states, without keeping logits.

Logits of a vocabulary of V are V / D times larger than the hidden states they come from. They are made a few hundred
positions at a time, and the gradient with respect to the hidden states, lm_head^T (q - p), is taken at once, so that
nothing of that size waits for a backward pass and no logit is computed twice.
"""

from typing import Any

import torch

_POSITIONS = 128  # logits of so many positions at a time: 25 MB for a vocabulary of 49152


def mean_divergence(
    ours: torch.Tensor, exact: torch.Tensor, lm_head: torch.Tensor, exact_lm_head: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over positions of KL(exact ‖ ours) in nats, [] float32; gradients reach `ours` only.

    Args:
        ours, exact: [..., D] behind the final norm.
        lm_head: [V, D].
        exact_lm_head: of `exact`, where it is another.
    """
    exact_lm_head = lm_head if exact_lm_head is None else exact_lm_head
    return _MeanDivergence.apply(ours.flatten(0, -2), exact.flatten(0, -2), lm_head, exact_lm_head)


class _MeanDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ours: torch.Tensor, exact: torch.Tensor, lm_head: torch.Tensor, exact_lm_head: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=ours.device)
        wanted = ours.requires_grad
        gradient = torch.empty_like(ours) if wanted else None
        for start in range(0, len(ours), _POSITIONS):
            rows = slice(start, start + _POSITIONS)
            log_p = (exact[rows] @ exact_lm_head.T).float().log_softmax(-1)
            log_q = (ours[rows] @ lm_head.T).float().log_softmax(-1)
            p = log_p.exp()
            log_p -= log_q
            if wanted:
                excess = log_q.exp_().sub_(p)
                gradient[rows] = excess.div_(len(ours)).to(lm_head.dtype) @ lm_head
            total += p.mul_(log_p).sum(dtype=torch.float64)
        ctx.save_for_backward(gradient)
        return (total / len(ours)).float()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None
