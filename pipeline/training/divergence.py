"""KL divergence between the next-token distributions of two streams of final hidden states, without keeping logits.

Logits of a vocabulary of V are V / D times larger than the hidden states they come from. They are made a few hundred
positions at a time, and the gradient with respect to the hidden states, (q - p) lm_head, is taken at once, so that
nothing of that size waits for a backward pass and no logit is computed twice.
"""

from typing import Any

import torch

from pipeline.models.lm_head import LmHead

LOGIT_POSITIONS = 128  # logits of so many positions at a time: 25 MB for a vocabulary of 49152


def mean_divergence(
    ours: torch.Tensor, reference: torch.Tensor, lm_head: LmHead, reference_lm_head: LmHead | None = None
) -> torch.Tensor:
    """Return the mean over positions of KL(reference ‖ ours) in nats, [] float32; gradients reach `ours` only.

    Args:
        ours: [..., D], final hidden states of the model under training, after its norm.
        reference: [..., D], those of the model to compare with: the original, wherever this is used for training.
        reference_lm_head: the head of `reference`; None: `lm_head`.
    """
    reference_lm_head = lm_head if reference_lm_head is None else reference_lm_head
    alone = ours.flatten(0, -2).unsqueeze(0)
    return _MeanDivergences.apply(alone, reference.flatten(0, -2), lm_head, reference_lm_head)[0].float()


def mean_divergences(ours: torch.Tensor, reference: torch.Tensor, lm_head: LmHead) -> torch.Tensor:
    """`mean_divergence` of several streams [C, T, D] from one [T, D], whose logits are made once: [C] float64."""
    return _MeanDivergences.apply(ours, reference, lm_head, lm_head)


class _MeanDivergences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ours: torch.Tensor, reference: torch.Tensor, lm_head: LmHead, reference_lm_head: LmHead
    ) -> torch.Tensor:
        totals = torch.zeros(len(ours), dtype=torch.float64, device=ours.device)
        gradient = torch.empty_like(ours) if ours.requires_grad else None
        for start in range(0, len(reference), LOGIT_POSITIONS):
            rows = slice(start, start + LOGIT_POSITIONS)
            log_p = reference_lm_head.logits(reference[rows]).log_softmax(-1)
            p = log_p.exp()
            for number, states in enumerate(ours):
                logits = lm_head.logits(states[rows])
                log_q = logits.log_softmax(-1)
                totals[number] += (log_p - log_q).mul_(p).sum(dtype=torch.float64)
                if gradient is not None:
                    excess = log_q.exp_().sub_(p)
                    gradient[number, rows] = lm_head.pull_back_(excess.div_(len(reference)), logits)
        ctx.save_for_backward(gradient)
        return totals / len(reference)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype)[:, None, None], None, None, None
