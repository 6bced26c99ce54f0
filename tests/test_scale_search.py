import math

import pytest
import torch

from pipeline.quantizer import choose_scale, fake_quantize
from pipeline.scale_search import search_activation, search_factors, search_keys, search_values, search_weight

GENERATOR = torch.Generator().manual_seed(11)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def brute_force(error_of, count):
    """The least error over 400 factors, each scale by itself."""
    factors = torch.linspace(0.04, 1.0, 400)
    return torch.stack([error_of(torch.full((count,), factor.item())) for factor in factors]).min(dim=0).values


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activation_factor_minimises_the_error_of_the_layers_outputs(bits):
    x = randn(400, 32)
    x[0, 3] = 12
    weights = [randn(24, 32), randn(16, 32)]

    def error_of(factors):
        out = fake_quantize(x, choose_scale(x.abs().max(), bits, factors), bits)
        return sum(((out - x) @ weight.T).square().sum() for weight in weights).reshape(1)

    found = search_activation(x, x.abs().max(), weights, bits, "mse")
    assert found.error.item() == pytest.approx(error_of(found.factor).item(), rel=1e-4)
    assert found.error.item() <= brute_force(error_of, 1).item() * 1.03  # the grid's steps are 3 %
    assert found.error <= search_activation(x, x.abs().max(), weights, bits, "minmax").error
    energy = sum((x @ weight.T).square().sum().item() for weight in weights)
    assert found.relative_error == pytest.approx(found.error.item() / energy, rel=1e-4)


@pytest.mark.parametrize("few_outputs", [True, False])
def test_both_forms_of_the_activation_error_agree(few_outputs):
    x, weight = randn(50, 12), randn(4 if few_outputs else 40, 12)
    found = search_activation(x, x.abs().max(), [weight], 4, "minmax")
    out = fake_quantize(x, choose_scale(x.abs().max(), 4), 4)
    assert found.error.item() == pytest.approx(((out - x) @ weight.T).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_weight_factors_minimise_the_output_error_per_channel_and_group(group_size):
    weight, x = randn(6, 128), randn(300, 128) * torch.linspace(0.1, 3, 128)
    weight[2, 5] = 9
    groups = 128 // (128 if group_size == -1 else group_size)
    size = 128 // groups

    def error_of(factors):
        errors = []
        for row in range(6):
            for group in range(groups):
                part = slice(group * size, (group + 1) * size)
                own = weight[row, part]
                scale = choose_scale(own.abs().max(), 4, factors[row * groups + group])
                errors.append((x[:, part] @ (fake_quantize(own, scale, 4) - own)).square().mean())
        return torch.stack(errors)

    found = search_weight(weight, x.T @ x / len(x), 4, group_size, "mse")
    assert found.factor.shape == (6 * groups,)
    assert torch.allclose(found.error, error_of(found.factor), rtol=1e-3, atol=1e-6)
    assert found.error.sum() <= brute_force(error_of, 6 * groups).sum() * 1.08  # measured: 1.06 and 1.03
    assert (found.error <= search_weight(weight, x.T @ x / len(x), 4, group_size, "minmax").error).all()


def test_key_factors_minimise_the_error_of_causal_probabilities_with_the_prefix():
    """Against a reference that loops over heads and masks by hand."""
    queries, keys, prefix = randn(2, 4, 7, 8), randn(2, 2, 7, 8), randn(2, 3, 8) * 2
    max_abs = keys.abs().amax(dim=(0, 2, 3)) * 1.5

    def probabilities(k):
        result = torch.zeros(2, 4, 7, 10)
        for batch in range(2):
            for head in range(4):
                for row in range(7):
                    seen = torch.cat((prefix[head // 2], k[batch, head // 2, : row + 1]))
                    result[batch, head, row, : 3 + row + 1] = (seen @ queries[batch, head, row] * 0.5).softmax(0)
        return result

    def error_of(factors):
        quantized = fake_quantize(keys, choose_scale(max_abs, 4, factors).view(2, 1, 1), 4)
        change = (probabilities(quantized) - probabilities(keys)).square()
        return torch.stack([change[:, :2].sum(), change[:, 2:].sum()])

    for method in ("minmax", "mse"):
        found = search_keys(queries, keys, prefix, max_abs, 0.5, 4, method)
        assert torch.allclose(found.error, error_of(found.factor), rtol=1e-3)
    without = search_keys(queries, keys, None, max_abs, 0.5, 4, "minmax")
    assert not torch.allclose(without.error, error_of(torch.ones(2)), rtol=1e-2)


def test_value_factors_minimise_their_own_error_per_head():
    values = randn(2, 3, 200, 8)
    values[0, 1, 0, 0] = 8
    max_abs = values.abs().amax(dim=(0, 2, 3))
    found = search_values(values, max_abs, 4, "mse")
    for head in range(3):
        scale = choose_scale(max_abs[head], 4, found.factor[head])
        error = (fake_quantize(values[:, head], scale, 4) - values[:, head]).square().sum()
        assert found.error[head].item() == pytest.approx(error.item(), rel=1e-4)
    assert found.factor[1] < found.factor[0]


def test_factors_never_compound():
    """An error that is least at 0.5 is found at 0.5, however many better candidates come before it."""
    target = torch.tensor([0.5, 0.9, 0.06])
    found = search_factors(lambda factors: (factors - target).abs(), torch.ones(3), "mse")
    assert (found.factor / target - 1).abs().max() < 0.05


def test_optima_at_the_low_end_of_the_grid_are_counted():
    found = search_factors(lambda factors: factors.clone(), torch.ones(4), "mse")
    assert found.at_edge == 4
    assert search_factors(lambda factors: -factors, torch.ones(4), "mse").at_edge == 0


def test_minmax_takes_factor_one():
    found = search_factors(lambda factors: factors.clone(), torch.ones(2), "minmax")
    assert found.factor.tolist() == [1.0, 1.0]


def test_all_zero_inputs_have_no_error():
    zeros = torch.zeros(10, 4)
    found = search_activation(zeros, zeros.max(), [torch.ones(2, 4)], 4, "mse")
    assert found.relative_error == 0.0
    assert math.isfinite(found.factor.item())
