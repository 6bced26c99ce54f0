"""Clip factors minimise their objective; each objective is compared with a slow version written out."""

import math

import pytest
import torch

from pipeline.numerics.quantizer import QuantizerSpec, choose_parameters, fake_quantize, group, measure_range
from pipeline.quantization.scale_search import (
    AttentionProbabilities,
    Candidate,
    Objective,
    keep_range,
    make_activation_objective,
    make_key_objective,
    make_tensor_objective,
    make_value_objective,
    make_weight_objective,
    search_factors,
)

GENERATOR = torch.Generator().manual_seed(11)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def candidate_for(spec, samples, shape, shift=None):
    shifted = samples if shift is None else samples - shift
    low, high = measure_range(group(shifted, spec.group_size))
    over = (0,) if len(shape) == 1 else (0, 2)
    return Candidate.for_samples(spec, samples, (low.amin(over), high.amax(over)), shape, shift)


def search_exhaustively(error_of, count):
    """Return the least error of each scale over 400 factors."""
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
@pytest.mark.parametrize("kind", ["tensor", "layer"])
def test_activation_factors_minimise_the_error(spec, kind):
    """A loop over groups gives the same errors, of the values or of the outputs of both layers."""
    x = randn(60, 32) + 0.3
    x[0, 3] = 12
    weights = [randn(24, 32), randn(16, 32)]
    groups = spec.count_groups(32)
    candidate = candidate_for(spec, x, (groups,))
    tensor = kind == "tensor"
    objective = make_tensor_objective(x, candidate) if tensor else make_activation_objective(x, candidate, weights)

    def slow(factor):
        errors = []
        for index, part in enumerate(x.chunk(groups, dim=1)):
            columns = slice(index * part.shape[1], (index + 1) * part.shape[1])
            if spec.dynamic:
                low, high = part.amin(1, keepdim=True).clamp_max(0), part.amax(1, keepdim=True).clamp_min(0)
            else:
                low, high = part.min().clamp_max(0), part.max().clamp_min(0)
            change = quantized(part, low, high, factor[index], spec) - part
            outputs = [change] if tensor else [change @ weight[:, columns].T for weight in weights]
            errors.append(sum(output.square().sum() for output in outputs))
        return torch.stack(errors)

    factors = torch.rand(groups, 2, generator=GENERATOR) / 2 + 0.5
    if spec.symmetric:
        factors[:, 1] = factors[:, 0]
    assert torch.allclose(objective.error_of(factors), slow(factors), rtol=1e-3)
    search = search_factors(objective, two_sided=not spec.symmetric)
    assert torch.allclose(search.error, slow(search.factor), rtol=1e-3)
    least = search_exhaustively(objective.error_of, groups)
    assert search.error.sum() <= least.sum() * 1.06  # the grid's steps are 3 %
    assert (search.error <= keep_range(objective).error).all()
    assert search.relative_error == pytest.approx((search.error.sum() / objective.reference.sum()).item())


STEPS = [0.85 ** (fifth / 5) for fifth in range(105)]  # every factor that a search can reach


@pytest.mark.parametrize("optimum", [1.0, 0.97, 0.85, 0.62, 0.33, 0.2, 0.11])
def test_a_smooth_search_finds_the_best_step_with_fewer_trials(optimum):
    tried = []

    def error_of(factor):
        tried.append(factor[0, 0].item())
        return (factor[:, 0].log() - math.log(optimum)).square() + 0.1

    search = search_factors(Objective(error_of, torch.ones(1)), smooth=True)
    count = len(tried)
    best = min(STEPS, key=lambda factor: error_of(torch.full((1, 2), factor)).item())
    assert search.factor[0].tolist() == pytest.approx([best, best])
    tried.clear()
    every_step = search_factors(Objective(error_of, torch.ones(1)))
    assert torch.allclose(every_step.factor, search.factor)
    assert count <= len(tried) - 4
    tried.clear()
    two_scales = Objective(lambda factor: error_of(factor[:1]).expand(2), torch.ones(2))
    assert torch.allclose(search_factors(two_scales, smooth=True).factor, search.factor.expand(2, 2))
    assert len(tried) > count  # with several scales, every step is tried


@pytest.mark.parametrize("outlier", [1.0, 12.0, 30.0, 300.0])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_single_scale_of_samples_is_the_best_of_all_steps(bits, outlier):
    x, weight = randn(512, 64), randn(96, 64)
    x[7, 3] *= outlier
    candidate = candidate_for(QuantizerSpec(bits), x, (1,))
    for objective in (make_tensor_objective(x, candidate), make_activation_objective(x, candidate, [weight])):
        least = min(objective.error_of(torch.full((1, 2), factor)).item() for factor in STEPS)
        assert search_factors(objective, smooth=True).error.item() == pytest.approx(least, rel=1e-5)


def test_the_reference_is_the_energy_of_the_outputs():
    x, weights = randn(60, 32), [randn(24, 32), randn(40, 32)]
    for spec in (QuantizerSpec(4), QuantizerSpec(4, group_size=32)):
        _, reference = make_activation_objective(x, candidate_for(spec, x, (1,)), weights)
        expected = sum((x @ weight.T).square().sum().item() for weight in weights)
        assert reference.sum().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("few_outputs", [True, False])
def test_both_forms_of_the_activation_objective_agree(few_outputs):
    x, weight = randn(50, 12), randn(4 if few_outputs else 40, 12)
    candidate = candidate_for(QuantizerSpec(4), x, (1,))
    error_of, _ = make_activation_objective(x, candidate, [weight])
    change = candidate.measure_change(x, torch.ones(1, 2)).squeeze(1)
    assert error_of(torch.ones(1, 2)).item() == pytest.approx((change @ weight.T).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("kind", ["tensor", "layer"])
def test_weight_factors_minimise_the_error_per_channel_and_group(symmetric, group_size, kind):
    weight, x = randn(6, 128) + 0.2, randn(300, 128) * torch.linspace(0.1, 3, 128)
    weight[2, 5] = 9
    spec = QuantizerSpec(4, symmetric, group_size)
    groups = spec.count_groups(128)
    size = 128 // groups
    candidate = Candidate(spec, *measure_range(group(weight, group_size)), (6, groups))
    objective = make_weight_objective(weight, candidate, x.T @ x / 300 if kind == "layer" else None)

    def slow(factor):
        errors = []
        for row in range(6):
            for index in range(groups):
                part = slice(index * size, (index + 1) * size)
                values = weight[row, part]
                low, high = values.min().clamp_max(0), values.max().clamp_min(0)
                change = quantized(values, low, high, factor[row * groups + index], spec) - values
                errors.append(change.square().sum() if kind == "tensor" else (x[:, part] @ change).square().mean())
        return torch.stack(errors)

    search = search_factors(objective, two_sided=not symmetric)
    assert search.factor.shape == (6 * groups, 2)
    assert torch.allclose(search.error, slow(search.factor), rtol=1e-3, atol=1e-6)
    least = search_exhaustively(objective.error_of, 6 * groups)
    assert search.error.sum() <= least.sum() * 1.08  # measured: up to 1.06
    assert (search.error <= objective.error_of(torch.ones(6 * groups, 2))).all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("dynamic", "cap", "window", "has_sinks"),
    [
        (True, None, None, False),
        (False, None, None, True),
        (False, 2.0, None, False),
        (False, None, 3, False),
        (False, None, 6, True),
    ],
)
def test_key_factors_minimise_the_error_of_causal_probabilities_with_the_prefix(
    groups, dynamic, cap, window, has_sinks
):
    """Compare with a loop over heads, masks and groups."""
    queries, keys, prefix = randn(2, 4, 7, 8), randn(2, 2, 7, 8), randn(2, 3, 8) * 2
    turn = torch.linalg.qr(randn(8, 8)).Q  # as RoPE between the quantizer and the scores
    shift = randn(2, 1, 8)
    spec = QuantizerSpec(4, group_size=8 // groups, dynamic=dynamic)
    candidate = candidate_for(spec, keys, (2, 1, groups), shift)
    sinks = randn(4) if has_sinks else None
    attend = AttentionProbabilities(queries, prefix, kv_heads=2, scaling=0.5, cap=cap, window=window, sinks=sinks)
    objective = make_key_objective(attend, keys, candidate, finish=lambda k: k @ turn)

    def probabilities(k):
        result = torch.zeros(2, 4, 7, 10)
        for batch in range(2):
            for head in range(4):
                for row in range(7):
                    first = 0 if window is None else max(0, 3 + row + 1 - window)  # position in prefix and text
                    visible = torch.cat((prefix[head // 2], k[batch, head // 2] @ turn))[first : 3 + row + 1]
                    scores = visible @ queries[batch, head, row] * 0.5
                    scores = scores if cap is None else cap * torch.tanh(scores / cap)
                    sink = -math.inf if sinks is None else sinks[head].item()
                    weights = torch.cat((scores, torch.tensor([sink]))).softmax(0)[:-1]
                    result[batch, head, row, first : 3 + row + 1] = weights
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
                group_factor = factor[head * groups + index]
                changed[:, head, :, part] = quantized(values, low, high, group_factor, spec) + shift[head, :, part]
                error = (probabilities(changed) - probabilities(keys)).square()
                errors[head, index] = error[:, 2 * head : 2 * head + 2].sum()
        return errors.flatten()

    factor = torch.rand(2 * groups, 1, generator=GENERATOR).expand(-1, 2) / 2 + 0.5
    assert torch.allclose(objective.error_of(factor), slow(factor), rtol=2e-3)
    search = search_factors(objective)
    assert torch.allclose(search.error, slow(search.factor), rtol=2e-3)
    assert (search.error <= objective.error_of(torch.ones(2 * groups, 2))).all()


@pytest.mark.parametrize("window", [None, 2, 5])
def test_value_factors_minimise_the_error_of_the_attention_output(window):
    queries, keys, values, prefix = randn(2, 4, 6, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8), randn(2, 3, 8)
    candidate = candidate_for(QuantizerSpec(3, group_size=4), values, (2, 1, 2))
    attend = AttentionProbabilities(queries, prefix, kv_heads=2, scaling=0.5, window=window)
    error_of, _ = make_value_objective(attend, keys, values, candidate)
    factor = torch.rand(4, 1, generator=GENERATOR).expand(-1, 2) / 2 + 0.5
    change = candidate.measure_change(values, factor).flatten(-2)
    errors = torch.zeros(2, 2)
    for batch in range(2):
        for head in range(4):
            for row in range(6):
                first = 0 if window is None else max(0, 3 + row + 1 - window)  # position in prefix and text
                visible = torch.cat((prefix[head // 2], keys[batch, head // 2]))[first : 3 + row + 1]
                p = (visible @ queries[batch, head, row] * 0.5).softmax(0)[max(0, 3 - first) :]
                output = p @ change[batch, head // 2, max(0, first - 3) : row + 1]
                errors[head // 2] += output.view(2, 4).square().sum(1)
    assert torch.allclose(error_of(factor), errors.flatten(), rtol=1e-3)


def test_value_factors_minimise_their_own_error_per_head():
    values = randn(2, 3, 200, 8)
    values[0, 1, 0, 0] = 8
    candidate = candidate_for(QuantizerSpec(4), values, (3, 1, 1))
    search = search_factors(make_tensor_objective(values, candidate))
    for head in range(3):
        x = values[:, head]
        high = x.abs().max()
        error = (quantized(x, -high, high, search.factor[head], QuantizerSpec(4)) - x).square().sum()
        assert search.error[head].item() == pytest.approx(error.item(), rel=1e-4)
    assert search.factor[1, 0] < search.factor[0, 0]


def test_the_two_ends_of_an_asymmetric_range_are_clipped_separately():
    x = torch.cat((torch.rand(500, 1, generator=GENERATOR), torch.full((1, 1), -9.0)))  # one outlier at the low end
    candidate = candidate_for(QuantizerSpec(4, symmetric=False), x, (1,))
    objective = make_tensor_objective(x, candidate)
    one, two = (search_factors(objective, two_sided) for two_sided in (False, True))
    assert one.factor[0, 0] == one.factor[0, 1]
    assert two.factor[0, 0] < two.factor[0, 1]
    assert two.error < one.error


def test_factors_never_compound():
    """A factor multiplies the measured range, not the best factor so far."""
    target = torch.tensor([0.5, 0.9, 0.06])
    search = search_factors(Objective(lambda factors: (factors[:, 0] - target).abs() + 1e-3, torch.ones(3)))
    assert (search.factor[:, 0] / target - 1).abs().max() < 0.05


def test_optima_at_the_low_end_of_the_grid_are_counted():
    search = search_factors(Objective(lambda factors: factors[:, 0].clone(), torch.ones(4)))
    assert search.at_edge == 4
    assert search_factors(Objective(lambda factors: 2 - factors[:, 0], torch.ones(4))).at_edge == 0


def test_the_coarse_grid_ends_when_nothing_can_improve():
    tried = []

    def error_of(factors):
        tried.append(factors[0, 0].item())
        return (factors[:, 0] - 0.8).square() + 1e-3

    search = search_factors(Objective(error_of, torch.ones(2)))
    assert search.factor[0, 0].item() == pytest.approx(0.8, rel=0.04)
    assert len(tried) < 15
    assert min(tried) > 0.4


def test_all_zero_inputs_have_no_error():
    zeros = torch.zeros(10, 4)
    candidate = candidate_for(QuantizerSpec(4), zeros, (1,))
    search = search_factors(make_activation_objective(zeros, candidate, [torch.ones(2, 4)]))
    assert search.relative_error == 0.0
    assert math.isfinite(search.factor[0, 0].item())
