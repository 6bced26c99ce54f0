"""KL divergence between next-token distributions, from final hidden states and without keeping logits.

Logits are V / D times larger than the hidden states that they are computed from (V: size of the vocabulary). They are
computed for `LOGIT_POSITIONS` positions at a time. Their gradient with respect to the hidden states, (q - p) @ lm_head,
is computed at once, so no tensor of that size waits for the backward pass, and no logit is computed twice.
"""

from typing import Any

import torch

from pipeline.models.lm_head import LmHead

LOGIT_POSITIONS = 128  # positions per part: 25 MB of logits for a vocabulary of 49152


def mean_divergence(
    hidden: torch.Tensor, reference: torch.Tensor, lm_head: LmHead, reference_lm_head: LmHead | None = None
) -> torch.Tensor:
    """Return the mean over positions of KL(reference ‖ model) in nats, [] float32; gradients reach `hidden` only.

    Args:
        hidden: [..., D], final hidden states of the model, after its norm.
        reference: [..., D], the same of the model to compare with. In training, that is the original.
        reference_lm_head: the head of the reference; None: `lm_head`.
    """
    reference_lm_head = lm_head if reference_lm_head is None else reference_lm_head
    single_stream = hidden.flatten(0, -2).unsqueeze(0)
    return _MeanDivergences.apply(single_stream, reference.flatten(0, -2), lm_head, reference_lm_head)[0].float()


def mean_divergences(hidden: torch.Tensor, reference: torch.Tensor, lm_head: LmHead) -> torch.Tensor:
    """Return the mean divergence of each of C streams from one reference, [C] float64.

    The reference's logits are computed once for all streams.

    Args:
        hidden: [C, T, D], final hidden states of C streams.
        reference: [T, D].
    """
    return _MeanDivergences.apply(hidden, reference, lm_head, lm_head)


class _MeanDivergences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, reference: torch.Tensor, lm_head: LmHead, reference_lm_head: LmHead
    ) -> torch.Tensor:
        totals = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(reference), LOGIT_POSITIONS):
            rows = slice(start, start + LOGIT_POSITIONS)
            log_p = reference_lm_head.logits(reference[rows]).log_softmax(-1)
            p = log_p.exp()
            for number, states in enumerate(hidden):
                logits = lm_head.logits(states[rows])
                log_q = logits.log_softmax(-1)
                totals[number] += (log_p - log_q).mul_(p).sum(dtype=torch.float64)
                if gradient is not None:
                    excess = log_q.exp_().sub_(p)
                    gradient[number, rows] = lm_head.pull_back_(excess.div_(len(reference)), logits)
        ctx.save_for_backward(gradient)
        return totals / len(reference)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (upstream,) = gradients
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype)[:, None, None], None, None, None
