import pytest
import torch

from pipeline.numerics.descent import descend
from pipeline.numerics.gptq import factor_inverse, round_gptq
from pipeline.numerics.quantizer import choose_parameters, dequantize_weight, group, measure_range, quantize_weight
from tests.numerics.test_gptq import layer, parameters
from tests.numerics.test_grids import WEIGHTS, randn


def damped(hessian, damping):
    return hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))


def error(weight, codes, hessian, damping, scale, zero_point=None, grid=None):
    """Of each output, [out], as it is defined."""
    change = (dequantize_weight(codes, scale, zero_point, grid) - weight).double()
    return ((change @ damped(hessian, damping)) * change).sum(1)


def slow_descent(weight, integers, hessian, damping, scale, zero_point, bits, passes):
    """Every integer that there is tried for each input in turn, the whole error computed anew."""
    lowest, count = (-(2 ** (bits - 1)) if zero_point is None else 0), 2**bits
    integers = integers.clone()
    for column in [*range(weight.shape[1])] * passes:
        errors = []
        for value in range(lowest, lowest + count):
            integers[:, column] = value
            errors.append(error(weight, integers, hessian, damping, scale, zero_point))
        integers[:, column] = (torch.stack(errors).argmin(0) + lowest).to(integers.dtype)
    return integers


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_trying_every_integer(passes, groups, symmetric):
    weight, hessian = layer(6, 80)  # more than are kept up to date at a time
    scale, zero_point = parameters(weight, 3, 80 // groups, symmetric, factor=0.8)
    start = round_gptq(weight, factor_inverse(hessian, 0.05), scale, zero_point, 3)
    found = descend(weight, start, hessian, 0.05, scale, zero_point, 3, passes)
    expected = slow_descent(weight, start, hessian, 0.05, scale, zero_point, 3, passes)
    assert found.dtype == start.dtype
    assert (found == expected).float().mean() > 0.99  # measured: 1.0; float32 may tie otherwise
    assert (found != start).any()


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_output_errs_more_than_before_and_codes_are_of_the_grid(name):
    spec, weight = WEIGHTS[name], randn(12, 64, seed=1)
    x = randn(300, 64, seed=2) @ randn(64, 64, seed=4)
    hessian = x.T @ x / len(x)
    scale, _ = choose_parameters(*measure_range(group(weight, spec.group_size)), spec.grid)
    codes = round_gptq(weight, factor_inverse(hessian, 0.01), scale, None, spec.grid)
    before = kept = error(weight, codes, hessian, 0.01, scale, None, spec.grid)
    for _ in range(3):
        codes = descend(weight, codes, hessian, 0.01, scale, None, spec.grid, passes=1)
        after = error(weight, codes, hessian, 0.01, scale, None, spec.grid)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert before.sum() < 0.97 * kept.sum()
    dense = dequantize_weight(codes, scale, None, spec.grid)
    assert torch.equal(quantize_weight(dense, scale, spec.grid), codes)


def test_what_cannot_be_better_stays():
    weight, hessian = layer(8, 32)
    scale, _ = parameters(weight)
    nearest = quantize_weight(weight, scale, 4)
    uncorrelated = torch.diag(torch.linspace(1, 3, 32))
    assert torch.equal(descend(weight, nearest, uncorrelated, 0.01, scale, None, 4), nearest)
    assert torch.equal(descend(weight, nearest, torch.zeros(32, 32), 0.01, scale, None, 4), nearest)
    settled = descend(weight, nearest, hessian, 0.01, scale, None, 4, passes=50)
    assert torch.equal(descend(weight, settled, hessian, 0.01, scale, None, 4), settled)
