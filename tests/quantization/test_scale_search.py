"""Clip factors minimise the error they are judged by: each objective against a reference written out."""

import math

import pytest
import torch

from pipeline.numerics.quantizer import QuantizerSpec, choose_parameters, fake_quantize, group, measure_range
from pipeline.quantization.scale_search import (
    Candidate,
    activation_error,
    attention_error,
    attention_output_error,
    keep_range,
    search_factors,
    tensor_error,
    weight_error,
)

GENERATOR = torch.Generator().manual_seed(11)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def candidate_for(spec, samples, shape, shift=None):
    shifted = samples if shift is None else samples - shift
    low, high = measure_range(group(shifted, spec.group_size))
    over = (0,) if len(shape) == 1 else (0, 2)
    return Candidate.for_samples(spec, samples, (low.amin(over), high.amax(over)), shape, shift)


def brute_force(error_of, count):
    """The least error over 400 common factors, each scale by itself."""
    factors = torch.linspace(0.04, 1.0, 400)
    return torch.stack([error_of(torch.full((count, 2), factor.item())) for factor in factors]).min(dim=0).values


def quantized(x, low, high, factor, spec):
    scale, zero_point = choose_parameters(low * factor[0], high * factor[1], spec.bits, spec.symmetric)
    return fake_quantize(x, scale, spec.bits, zero_point)


SPECS = [
    QuantizerSpec(bits, symmetric, group_size, dynamic)
    for bits in (2, 4, 8)
    for symmetric in (True, False)
    for group_size in (-1, 8)
    for dynamic in (True, False)
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("objective", ["tensor", "layer"])
def test_activation_factors_minimise_the_error(spec, objective):
    """Group by group, the values' own error or that of the outputs of both layers, is what a loop computes."""
    x = randn(60, 32) + 0.3
    x[0, 3] = 12
    weights = [randn(24, 32), randn(16, 32)]
    groups = spec.count_groups(32)
    candidate = candidate_for(spec, x, (groups,))
    error_of, reference = (
        tensor_error(x, candidate) if objective == "tensor" else activation_error(x, candidate, weights)
    )

    def slow(factor):
        errors = []
        for index, part in enumerate(x.chunk(groups, dim=1)):
            columns = slice(index * part.shape[1], (index + 1) * part.shape[1])
            if spec.dynamic:
                low, high = part.amin(1, keepdim=True).clamp_max(0), part.amax(1, keepdim=True).clamp_min(0)
            else:
                low, high = part.min().clamp_max(0), part.max().clamp_min(0)
            change = quantized(part, low, high, factor[index], spec) - part
            outputs = [change] if objective == "tensor" else [change @ weight[:, columns].T for weight in weights]
            errors.append(sum(output.square().sum() for output in outputs))
        return torch.stack(errors)

    factors = torch.rand(groups, 2, generator=GENERATOR) / 2 + 0.5
    if spec.symmetric:
        factors[:, 1] = factors[:, 0]
    assert torch.allclose(error_of(factors), slow(factors), rtol=1e-3)
    found = search_factors(error_of, reference, two_sided=not spec.symmetric)
    assert torch.allclose(found.error, slow(found.factor), rtol=1e-3)
    assert found.error.sum() <= brute_force(error_of, groups).sum() * 1.06  # the grid's steps are 3 %
    assert (found.error <= keep_range(error_of, reference).error).all()
    assert found.relative_error == pytest.approx((found.error.sum() / reference.sum()).item())


STEPS = [0.85 ** (fifth / 5) for fifth in range(105)]  # every factor that a search may come to


@pytest.mark.parametrize("optimum", [1.0, 0.97, 0.85, 0.62, 0.33, 0.2, 0.11])
def test_a_single_scale_finds_what_trying_every_step_finds_in_fewer(optimum):
    tried = []

    def error_of(factor):
        tried.append(factor[0, 0].item())
        return (factor[:, 0].log() - math.log(optimum)).square() + 0.1

    found = search_factors(error_of, torch.ones(1), smooth=True)
    count = len(tried)
    best = min(STEPS, key=lambda factor: error_of(torch.full((1, 2), factor)).item())
    assert found.factor[0].tolist() == pytest.approx([best, best])
    tried.clear()
    every = search_factors(error_of, torch.ones(1))
    assert torch.allclose(every.factor, found.factor)
    assert count <= len(tried) - 4
    tried.clear()
    two = search_factors(lambda factor: error_of(factor[:1]).expand(2), torch.ones(2), smooth=True)
    assert torch.allclose(two.factor, found.factor.expand(2, 2))
    assert len(tried) > count  # several scales try every step


@pytest.mark.parametrize("outlier", [1.0, 12.0, 30.0, 300.0])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_single_scale_of_samples_is_the_best_of_all_steps(bits, outlier):
    x, weight = randn(512, 64), randn(96, 64)
    x[7, 3] *= outlier
    candidate = candidate_for(QuantizerSpec(bits), x, (1,))
    for error_of, reference in (tensor_error(x, candidate), activation_error(x, candidate, [weight])):
        least = min(error_of(torch.full((1, 2), factor)).item() for factor in STEPS)
        assert search_factors(error_of, reference, smooth=True).error.item() == pytest.approx(least, rel=1e-5)


def test_the_reference_is_the_energy_of_the_outputs():
    x, weights = randn(60, 32), [randn(24, 32), randn(40, 32)]
    for spec in (QuantizerSpec(4), QuantizerSpec(4, group_size=32)):
        _, reference = activation_error(x, candidate_for(spec, x, (1,)), weights)
        expected = sum((x @ weight.T).square().sum().item() for weight in weights)
        assert reference.sum().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("few_outputs", [True, False])
def test_both_forms_of_the_activation_error_agree(few_outputs):
    x, weight = randn(50, 12), randn(4 if few_outputs else 40, 12)
    candidate = candidate_for(QuantizerSpec(4), x, (1,))
    error_of, _ = activation_error(x, candidate, [weight])
    change = candidate.change(x, torch.ones(1, 2)).squeeze(1)
    assert error_of(torch.ones(1, 2)).item() == pytest.approx((change @ weight.T).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("objective", ["tensor", "layer"])
def test_weight_factors_minimise_the_error_per_channel_and_group(symmetric, group_size, objective):
    weight, x = randn(6, 128) + 0.2, randn(300, 128) * torch.linspace(0.1, 3, 128)
    weight[2, 5] = 9
    spec = QuantizerSpec(4, symmetric, group_size)
    groups = spec.count_groups(128)
    size = 128 // groups
    candidate = Candidate(spec, *measure_range(group(weight, group_size)), (6, groups))
    error_of, reference = weight_error(weight, candidate, x.T @ x / 300 if objective == "layer" else None)

    def slow(factor):
        errors = []
        for row in range(6):
            for index in range(groups):
                part = slice(index * size, (index + 1) * size)
                own = weight[row, part]
                low, high = own.min().clamp_max(0), own.max().clamp_min(0)
                change = quantized(own, low, high, factor[row * groups + index], spec) - own
                errors.append(change.square().sum() if objective == "tensor" else (x[:, part] @ change).square().mean())
        return torch.stack(errors)

    found = search_factors(error_of, reference, two_sided=not symmetric)
    assert found.factor.shape == (6 * groups, 2)
    assert torch.allclose(found.error, slow(found.factor), rtol=1e-3, atol=1e-6)
    assert found.error.sum() <= brute_force(error_of, 6 * groups).sum() * 1.08  # measured: up to 1.06
    assert (found.error <= error_of(torch.ones(6 * groups, 2))).all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("dynamic", "cap", "window"),
    [(True, None, None), (False, None, None), (False, 2.0, None), (False, None, 3), (False, None, 6)],
)
def test_key_factors_minimise_the_error_of_causal_probabilities_with_the_prefix(groups, dynamic, cap, window):
    """Against a reference that loops over heads, masks and groups by hand."""
    queries, keys, prefix = randn(2, 4, 7, 8), randn(2, 2, 7, 8), randn(2, 3, 8) * 2
    turn = torch.linalg.qr(randn(8, 8)).Q  # RoPE's place: something between the quantizer and the scores
    shift = randn(2, 1, 8)
    spec = QuantizerSpec(4, group_size=8 // groups, dynamic=dynamic)
    candidate = candidate_for(spec, keys, (2, 1, groups), shift)
    error_of, reference = attention_error(queries, keys, prefix, candidate, 0.5, lambda k: k @ turn, cap, window)

    def probabilities(k):
        result = torch.zeros(2, 4, 7, 10)
        for batch in range(2):
            for head in range(4):
                for row in range(7):
                    first = 0 if window is None else max(0, 3 + row + 1 - window)  # of prefix and text
                    seen = torch.cat((prefix[head // 2], k[batch, head // 2] @ turn))[first : 3 + row + 1]
                    scores = seen @ queries[batch, head, row] * 0.5
                    scores = scores if cap is None else cap * torch.tanh(scores / cap)
                    result[batch, head, row, first : 3 + row + 1] = scores.softmax(0)
        return result

    def slow(factor):
        errors = torch.zeros(2, groups)
        for head in range(2):
            for index in range(groups):
                part = slice(index * 8 // groups, (index + 1) * 8 // groups)
                values = (keys - shift)[:, head, :, part]
                over = {"dim": -1, "keepdim": True} if dynamic else {}
                low, high = torch.amin(values, **over), torch.amax(values, **over)
                changed = keys.clone()
                own = factor[head * groups + index]
                changed[:, head, :, part] = quantized(values, low, high, own, spec) + shift[head, :, part]
                error = (probabilities(changed) - probabilities(keys)).square()
                errors[head, index] = error[:, 2 * head : 2 * head + 2].sum()
        return errors.flatten()

    factor = torch.rand(2 * groups, 1, generator=GENERATOR).expand(-1, 2) / 2 + 0.5
    assert torch.allclose(error_of(factor), slow(factor), rtol=2e-3)
    found = search_factors(error_of, reference)
    assert torch.allclose(found.error, slow(found.factor), rtol=2e-3)
    assert (found.error <= error_of(torch.ones(2 * groups, 2))).all()


@pytest.mark.parametrize("window", [None, 2, 5])
def test_value_factors_minimise_the_error_of_the_attention_output(window):
    queries, keys, values, prefix = randn(2, 4, 6, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8), randn(2, 3, 8)
    candidate = candidate_for(QuantizerSpec(3, group_size=4), values, (2, 1, 2))
    error_of, _ = attention_output_error(queries, keys, values, prefix, candidate, 0.5, window=window)
    factor = torch.rand(4, 1, generator=GENERATOR).expand(-1, 2) / 2 + 0.5
    change = candidate.change(values, factor).flatten(-2)
    errors = torch.zeros(2, 2)
    for batch in range(2):
        for head in range(4):
            for row in range(6):
                first = 0 if window is None else max(0, 3 + row + 1 - window)  # of prefix and text
                seen = torch.cat((prefix[head // 2], keys[batch, head // 2]))[first : 3 + row + 1]
                p = (seen @ queries[batch, head, row] * 0.5).softmax(0)[max(0, 3 - first) :]
                output = p @ change[batch, head // 2, max(0, first - 3) : row + 1]
                errors[head // 2] += output.view(2, 4).square().sum(1)
    assert torch.allclose(error_of(factor), errors.flatten(), rtol=1e-3)


def test_value_factors_minimise_their_own_error_per_head():
    values = randn(2, 3, 200, 8)
    values[0, 1, 0, 0] = 8
    candidate = candidate_for(QuantizerSpec(4), values, (3, 1, 1))
    found = search_factors(*tensor_error(values, candidate))
    for head in range(3):
        own = values[:, head]
        high = own.abs().max()
        error = (quantized(own, -high, high, found.factor[head], QuantizerSpec(4)) - own).square().sum()
        assert found.error[head].item() == pytest.approx(error.item(), rel=1e-4)
    assert found.factor[1, 0] < found.factor[0, 0]


def test_the_two_ends_of_an_asymmetric_range_are_clipped_separately():
    x = torch.cat((torch.rand(500, 1, generator=GENERATOR), torch.full((1, 1), -9.0)))  # one outlier at the low end
    candidate = candidate_for(QuantizerSpec(4, symmetric=False), x, (1,))
    error_of, reference = tensor_error(x, candidate)
    one, two = (search_factors(error_of, reference, two_sided) for two_sided in (False, True))
    assert one.factor[0, 0] == one.factor[0, 1]
    assert two.factor[0, 0] < two.factor[0, 1]
    assert two.error < one.error


def test_factors_never_compound():
    """An error that is least at 0.5 is found at 0.5, however many better candidates come before it."""
    target = torch.tensor([0.5, 0.9, 0.06])
    found = search_factors(lambda factors: (factors[:, 0] - target).abs() + 1e-3, torch.ones(3))
    assert (found.factor[:, 0] / target - 1).abs().max() < 0.05


def test_optima_at_the_low_end_of_the_grid_are_counted():
    found = search_factors(lambda factors: factors[:, 0].clone(), torch.ones(4))
    assert found.at_edge == 4
    assert search_factors(lambda factors: 2 - factors[:, 0], torch.ones(4)).at_edge == 0


def test_the_coarse_walk_ends_when_nothing_can_improve():
    tried = []

    def error_of(factors):
        tried.append(factors[0, 0].item())
        return (factors[:, 0] - 0.8).square() + 1e-3

    found = search_factors(error_of, torch.ones(2))
    assert found.factor[0, 0].item() == pytest.approx(0.8, rel=0.04)
    assert len(tried) < 15
    assert min(tried) > 0.4


def test_all_zero_inputs_have_no_error():
    zeros = torch.zeros(10, 4)
    found = search_factors(*activation_error(zeros, candidate_for(QuantizerSpec(4), zeros, (1,)), [torch.ones(2, 4)]))
    assert found.relative_error == 0.0
    assert math.isfinite(found.factor[0, 0].item())
