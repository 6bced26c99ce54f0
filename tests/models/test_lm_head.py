"""lm_head and its soft cap give the logits and the gradients of the model's own class."""

import pytest
import torch

from pipeline.models.architectures import find_logit_cap
from pipeline.models.lm_head import LmHead
from tests.conftest import make_model


@pytest.mark.parametrize("family", ["llama_tied", "gemma2"])
@torch.no_grad()
def test_logits_equal_the_model(family):
    model = make_model(family)
    token_ids = torch.tensor([[5, 9, 40]])
    head = LmHead(model.lm_head.weight, find_logit_cap(model.config))
    assert (head.cap is None) == (family == "llama_tied")
    logits = head.logits(model.model(token_ids).last_hidden_state)
    assert torch.equal(logits, model(token_ids).logits)
    assert head.to("meta").weight.device.type == "meta"
    assert head.to("meta").cap == head.cap


@pytest.mark.parametrize("cap", [None, 1.5])
def test_pulled_back_gradients_equal_autograd(cap):
    generator = torch.Generator().manual_seed(0)
    head = LmHead(torch.randn(11, 6, generator=generator, dtype=torch.float64), cap)
    hidden = torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    z = hidden @ head.weight.T
    logits = z if cap is None else cap * torch.tanh(z / cap)
    gradient = torch.randn(4, 11, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad((logits * gradient).sum(), hidden)
    pulled = head.pull_back_(gradient.clone(), logits.detach())
    assert torch.allclose(pulled, expected, rtol=1e-12)


def test_logits_are_multiplied_in_the_dtype_of_the_weight_and_returned_in_float32():
    head = LmHead(torch.randn(11, 6).bfloat16())
    hidden = torch.randn(4, 6)
    assert head.logits(hidden).dtype == torch.float32
    assert torch.equal(head.logits(hidden), (hidden.bfloat16() @ head.weight.T).float())
