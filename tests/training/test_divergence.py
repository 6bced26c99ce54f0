"""The divergence and its gradient equal autograd over whole logits."""

import pytest
import torch

from pipeline.models.lm_head import LmHead
from pipeline.training import divergence
from pipeline.training.divergence import mean_divergence, mean_divergences


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("other_head", [True, False])
def test_value_and_gradient_equal_autograd_over_all_logits(other_head, cap, monkeypatch):
    monkeypatch.setattr(divergence, "LOGIT_POSITIONS", 3)  # several parts, the last one short
    generator = torch.Generator().manual_seed(1)
    hidden, reference = (torch.randn(2, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    head, second = (torch.randn(11, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    second = second if other_head else head
    hidden.requires_grad_()
    bend = (lambda z: z) if cap is None else (lambda z: cap * torch.tanh(z / cap))
    log_p, log_q = bend(reference @ second.T).log_softmax(-1), bend(hidden @ head.T).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(3 * expected, hidden)
    closed = mean_divergence(hidden, reference, LmHead(head, cap), LmHead(second, cap) if other_head else None)
    assert closed.item() == pytest.approx(expected.item(), rel=1e-5)  # logits are compared in float32
    (closed_gradient,) = torch.autograd.grad(3 * closed, hidden)
    assert torch.allclose(closed_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_divergence_of_equal_states_is_zero():
    states, head = torch.randn(6, 5), torch.randn(11, 5)
    assert mean_divergence(states, states, LmHead(head)).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("cap", [None, 1.5])
def test_each_of_several_streams_is_compared_with_the_reference(cap, monkeypatch):
    monkeypatch.setattr(divergence, "LOGIT_POSITIONS", 3)
    hidden, reference, head = torch.randn(2, 7, 5), torch.randn(7, 5), LmHead(torch.randn(11, 5), cap)
    expected = [mean_divergence(states, reference, head).item() for states in hidden]
    assert mean_divergences(hidden, reference, head).tolist() == pytest.approx(expected, rel=1e-5)
