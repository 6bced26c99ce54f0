import pytest
import torch

from pipeline.gptq import round_gptq
from pipeline.quantizer import choose_scale, dequantize_weight, quantize_weight

GENERATOR = torch.Generator().manual_seed(3)


def layer(out, width, tokens=400):
    mixing = torch.randn(width, width, generator=GENERATOR) / width**0.5
    x = torch.randn(tokens, width, generator=GENERATOR) @ (mixing + 0.3 * torch.eye(width))
    weight = torch.randn(out, width, generator=GENERATOR)
    return weight, x.T @ x / tokens


def slow_gptq(weight, hessian, scale, bits, damping):
    """The method as it is derived: after each input, the exact least-squares update of all that are left (float64)."""
    weight, hessian = weight.double().clone(), hessian.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    integers = torch.zeros_like(weight)
    for place, column in enumerate(order):
        step = scale[:, column].double()
        integers[:, column] = (weight[:, column] / step).round().clamp(low, high)
        error = integers[:, column] * step - weight[:, column]
        later = order[place + 1 :]
        if later:
            # argmin over d of [e, d] H [e, d]^T
            weight[:, later] -= torch.linalg.solve(hessian[later][:, later], hessian[later, column][:, None] * error).T
    return integers.to(torch.int8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_equals_the_derivation_step_by_step(bits, groups):
    weight, hessian = layer(5, 24)
    scale = choose_scale(weight.unflatten(1, (groups, -1)).abs().amax(-1), bits)
    found = round_gptq(weight, hessian, scale, bits, 0.01)
    expected = slow_gptq(weight, hessian, scale.repeat_interleave(24 // groups, 1), bits, 0.01)
    assert (found.integers == expected).float().mean() > 0.99  # measured: 1.0; float32 may tie otherwise
    assert found.damping == 0.01


@pytest.mark.parametrize("width", [16, 130, 300])
def test_errs_less_at_the_output_than_rounding_to_nearest(width):
    weight, hessian = layer(8, width)
    scale = choose_scale(weight.abs().amax(1, keepdim=True), 4, 0.8)

    def error(integers):
        change = dequantize_weight(integers, scale) - weight
        return ((change @ hessian) * change).sum()

    found = round_gptq(weight, hessian, scale, 4, 0.01).integers
    assert found.dtype == torch.int8
    assert found.min() >= -8
    assert found.max() <= 7
    assert error(found) < 0.8 * error(quantize_weight(weight, scale, 4))


def test_uncorrelated_inputs_are_rounded_to_nearest():
    weight, _ = layer(8, 32)
    scale = choose_scale(weight.abs().amax(1, keepdim=True), 4)
    hessian = torch.diag(torch.linspace(1, 3, 32))
    assert torch.equal(round_gptq(weight, hessian, scale, 4, 0.01).integers, quantize_weight(weight, scale, 4))


def test_a_singular_or_empty_hessian_never_crashes(caplog):
    weight, hessian = layer(4, 16, tokens=3)
    scale = choose_scale(weight.abs().amax(1, keepdim=True), 4)
    hessian[5], hessian[:, 5] = 0, 0
    assert round_gptq(weight, hessian, scale, 4, 0.01).integers.shape == (4, 16)
    rounded = quantize_weight(weight, scale, 4)
    assert torch.equal(round_gptq(weight, torch.zeros(16, 16), scale, 4, 0.01).integers, rounded)
    indefinite = hessian - 2 * torch.eye(16)
    found = round_gptq(weight, indefinite, scale, 4, 0.01)
    assert found.damping > 0.01
    assert "damping raised" in caplog.text
    assert torch.isfinite(dequantize_weight(found.integers, scale)).all()
