"""lm_head in 8 bits computes, in every form, the product of integers that a slow reference computes."""

import copy

import pytest
import torch

from pipeline.models.lm_head import LmHead, QuantizedHead, find_head, multiply_head, quantize_head
from pipeline.numerics.hadamard import hadamard_transform


def make_head(rotate, outputs=70, width=48):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, width, generator=generator)
    weight[3] = 0  # a row of padding
    hidden = torch.randn(2, 5, width, generator=generator)
    hidden[..., 7] *= 40  # a large channel, as of a final norm
    hidden[1, 2] = 0
    return weight, hidden, QuantizedHead(*quantize_head(weight, rotate), rotate)


def compute_slowly(weight, hidden, rotate):
    """Round, multiply and scale with Python's numbers, one output after the other, in float64."""
    if rotate:
        weight, hidden = hadamard_transform(weight.double()).float(), hadamard_transform(hidden)
    rows = []
    for x in hidden.reshape(-1, hidden.shape[-1]).tolist():
        token_scale = max(map(abs, x)) / 127 or 1.0
        codes = [round(value / token_scale) for value in x]
        for w in weight.tolist():
            scale = max(map(abs, w)) / 127 or 1.0
            rows.append(token_scale * scale * sum(n * round(v / scale) for n, v in zip(codes, w, strict=True)))
    return torch.tensor(rows).reshape(*hidden.shape[:-1], len(weight))


@pytest.mark.parametrize("rotate", [False, True])
def test_head_equals_a_slow_reference(rotate):
    weight, hidden, head = make_head(rotate)
    expected = compute_slowly(weight, hidden, rotate)
    assert (head(hidden) - expected).abs().max() <= 1e-5 * expected.abs().max()  # measured: 2e-7
    assert not head(hidden)[..., 3].any()
    assert not head(hidden)[1, 2].any()


def test_rotation_removes_most_of_the_error_of_a_large_channel():
    errors = {}
    for rotate in (False, True):
        weight, hidden, head = make_head(rotate)
        errors[rotate] = (head(hidden) - hidden @ weight.T).norm().item()
    assert errors[True] < 0.5 * errors[False]  # measured: 0.35


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotate", [False, True])
@torch.no_grad()
def test_all_forms_of_the_head_are_one_function(rotate, dtype):
    _, hidden, head = make_head(rotate)
    hidden = hidden.to(dtype)
    evaluated = find_head(head, None).logits(hidden)
    assert torch.equal(head(hidden).float(), evaluated)
    head.keeps_unpacked = True
    assert torch.equal(head(hidden).float(), evaluated)
    cast = copy.deepcopy(head).to(torch.bfloat16)
    assert (cast.weight.dtype, cast.weight_scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(cast(hidden).float(), evaluated)
    head.multiply_integers_()
    assert head(hidden).dtype == dtype
    close = (head(hidden).float() - evaluated).abs() <= (
        1e-5 if dtype == torch.float32 else 1e-2
    ) * evaluated.abs().max()
    assert close.all()  # a value at the edge between two integers may get either: none here


def test_gradients_pass_straight_through():
    _, hidden, head = make_head(rotate=True)
    quantized = find_head(head, 1.5)
    dense = hadamard_transform(head.weight.float() * head.weight_scale[:, None], inverse=True)
    hidden = hidden[0].requires_grad_()
    logits = quantized.logits(hidden)
    gradient = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    expected = (gradient * (1 - (logits.detach() / 1.5).square())) @ dense
    pulled = quantized.pull_back_(gradient.clone(), logits.detach())
    assert torch.allclose(pulled, expected, atol=1e-4 * expected.abs().max().item())
    z = multiply_head(hidden, head.weight.float(), head.weight_scale, True)
    (found,) = torch.autograd.grad((z * gradient).sum(), hidden)
    # Autograd keeps the scales of tokens constant, and so does `pull_back_`.
    assert torch.allclose(found, gradient @ dense, atol=1e-4 * found.abs().max().item())


def test_head_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="lm_head is a Identity, not a linear"):
        find_head(torch.nn.Identity(), None)
    assert isinstance(find_head(torch.nn.Linear(4, 3, bias=False), None), LmHead)
