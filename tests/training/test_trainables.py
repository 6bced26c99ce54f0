"""Unfreezing changes nothing, and a frozen block computes the trained one."""

import math

import pytest
import torch
from torch import nn

from pipeline.blocks.quantized import QuantizedLinear
from pipeline.blocks.walk import BlockRunner
from pipeline.numerics.quantizer import QuantizerSpec, dequantize_weight, integer_range, quantize_weight
from pipeline.training.state import TrainingError
from pipeline.training.trainables import (
    HIGHEST_TEMPERATURE,
    LearnedIntegers,
    _make_integers_,
    freeze_,
    lower_temperature_,
    unfreeze_,
)
from tests.blocks.test_quantized import quantized_block, settings_of
from tests.conftest import open_model

MODES = [
    {"symmetric": True},
    {"symmetric": False, "group_size": 4},
    {"symmetric": False, "dynamic": True},
]


@pytest.fixture(params=MODES, ids=str)
def block(request, imported):
    checkpoint, _ = open_model(imported["llama_untied_biases"])
    settings = settings_of(weights=4, activations=4, key=4, value=4, online=True, **request.param)
    return checkpoint, quantized_block(checkpoint, settings)


def run(checkpoint, block):
    hidden = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(9))
    return BlockRunner(checkpoint, torch.device("cpu"), 2).run(block, hidden)


def weights_of(checkpoint, block):
    return {name: block.get_submodule(name).dense_weight(torch.float32) for name in checkpoint.architecture.linears}


@pytest.mark.parametrize("with_weights", [True, False])
def test_unfreezing_and_freezing_changes_nothing(with_weights, block):
    checkpoint, block = block
    names, expected = dict(block.state_dict()), run(checkpoint, block)
    weights = weights_of(checkpoint, block) if with_weights else None
    unfreeze_(block, checkpoint.architecture, weights=weights, norms=True)
    with torch.enable_grad():
        assert torch.equal(run(checkpoint, block), expected)
    freeze_(block)
    assert torch.equal(run(checkpoint, block), expected)
    assert block.state_dict().keys() == names.keys()
    for name, tensor in block.state_dict().items():
        assert tensor.dtype == names[name].dtype, name
        assert torch.equal(tensor, names[name]), name
    assert not any(p.requires_grad for p in block.parameters())


def test_a_frozen_block_equals_the_trained_one(block):
    """After random moves, the block in training (with and without gradients) and the frozen block agree."""
    checkpoint, block = block
    before = run(checkpoint, block)
    trainables = unfreeze_(block, checkpoint.architecture, weights=weights_of(checkpoint, block), norms=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        run(checkpoint, block)  # a cached weight from here must not be used below
        for parameter in trainables.quantizers + trainables.norms:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        for parameter in trainables.weights:
            parameter += 0.05 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
        trained = run(checkpoint, block)
    with torch.enable_grad():
        assert torch.equal(run(checkpoint, block), trained)
    assert (trained - before).abs().max() > 0.01
    freeze_(block)
    assert (run(checkpoint, block) - trained).abs().max() <= 1e-6 * trained.abs().max()
    for name in checkpoint.architecture.linears:
        assert not block.get_submodule(name).weight.is_floating_point()


def test_weights_are_rounded_with_the_trained_scales(imported):
    checkpoint, _ = open_model(imported["llama_untied_biases"])
    block = quantized_block(checkpoint, settings_of(weights=4))
    start = weights_of(checkpoint, block)
    linear = block.mlp.up_proj
    scale = linear.weight_scale.clone()
    trainables = unfreeze_(block, checkpoint.architecture, weights=start)
    theta = linear.parametrizations["weight_scale"].original
    assert any(theta is parameter for parameter in trainables.quantizers)
    with torch.no_grad():
        theta += 0.3
    freeze_(block)
    assert torch.allclose(linear.weight_scale, scale * torch.e**0.3)
    assert torch.equal(linear.weight, quantize_weight(start["mlp.up_proj"], linear.weight_scale, 4))


def test_every_quantizer_parameter_gets_a_gradient(block):
    checkpoint, block = block
    trainables = unfreeze_(block, checkpoint.architecture, weights=weights_of(checkpoint, block), norms=True)
    run(checkpoint, block).square().sum().backward()
    everything = trainables.quantizers + trainables.weights + trainables.norms
    assert all(p.grad is not None and p.grad.isfinite().all() for p in everything)
    for parameter in trainables.weights + trainables.norms:
        assert (parameter.grad != 0).any()
    moved = sum((p.grad != 0).any().item() for p in trainables.quantizers)
    assert moved >= len(trainables.quantizers) / 2  # zero points get one only if values lie beyond the range


def test_bfloat16_block_is_trained_in_float32(imported):
    checkpoint, _ = open_model(imported["llama_untied_biases"])
    block = quantized_block(checkpoint, settings_of(weights=4, activations=4), torch.bfloat16)
    runner, hidden = BlockRunner(checkpoint, torch.device("cpu"), 2), torch.randn(2, 6, 48).bfloat16()
    expected, names = runner.run(block, hidden), dict(block.state_dict())
    start = {n: w.bfloat16() for n, w in weights_of(checkpoint, block).items()}
    trainables = unfreeze_(block, checkpoint.architecture, weights=start, norms=True)
    everything = trainables.quantizers + trainables.weights + trainables.norms
    assert {p.dtype for p in everything} == {torch.float32}
    runner.run(block, hidden).float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in everything)
    with torch.no_grad():
        for parameter in trainables.norms:
            parameter += 1e-4  # too small a change for bfloat16
    assert all((p.detach() - p.detach().bfloat16().float()).abs().max() > 0 for p in trainables.norms)
    freeze_(block)
    assert {name: tensor.dtype for name, tensor in block.state_dict().items()} == {n: t.dtype for n, t in names.items()}
    assert (runner.run(block, hidden) - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_scales_and_zero_points_get_the_gradients_of_the_dense_weight(symmetric, bias):
    """One scale per channel needs no gradient of the weight; autograd through the dense weight gives the same."""
    generator = torch.Generator().manual_seed(5)
    source = nn.Linear(12, 7, bias=bias)
    linear = QuantizedLinear(source, QuantizerSpec(4, symmetric), False, None)
    zero_point = None if symmetric else torch.randint(3, 12, (7, 1), generator=generator).float().requires_grad_()
    scale = (torch.rand(7, 1, generator=generator) + 0.1).requires_grad_()
    low, high = (-8, 8) if symmetric else (0, 16)
    integers = torch.randint(low, high, (7, 12), generator=generator)
    linear.set_integers_(integers.to(torch.int8 if symmetric else torch.uint8), scale, zero_point)
    x = torch.randn(2, 5, 12, generator=generator, requires_grad=True)
    upstream = torch.randn(2, 5, 7, generator=generator)
    trained = [tensor for tensor in (x, scale, zero_point) if tensor is not None]
    weight = dequantize_weight(linear.weight, scale, zero_point)
    expected = nn.functional.linear(x, weight, linear.bias)
    gradients = torch.autograd.grad(expected, trained, upstream)
    linear.unfrozen = True
    output = linear(x)
    assert torch.equal(output, expected)
    for gradient, other in zip(torch.autograd.grad(output, trained, upstream), gradients, strict=True):
        assert gradient.shape == other.shape
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "offset"), [("llama_tied", 0.0), ("gemma3_text", 1.0)])
def test_norms_are_trained_relative_to_their_gain(family, offset, imported):
    checkpoint, _ = open_model(imported[family])
    block = quantized_block(checkpoint, settings_of(weights=4, activations=4))
    before = block.input_layernorm.weight.detach().clone()
    trainables = unfreeze_(block, checkpoint.architecture, norms=True)
    assert torch.equal(block.input_layernorm.weight, before)
    with torch.no_grad():
        trainables.norms[0].fill_(math.log(2))
    freeze_(block)
    assert torch.allclose(block.input_layernorm.weight + offset, 2 * (before + offset), rtol=1e-5)


METHODS = ("straight_through", "soft_rounding")


def draw_offsets(checkpoint, block, spread=0.45):
    generator = torch.Generator().manual_seed(2)
    shapes = {name: block.get_submodule(name).weight.shape for name in checkpoint.architecture.linears}
    return {name: spread * (2 * torch.rand(shape, generator=generator) - 1) for name, shape in shapes.items()}


@pytest.mark.parametrize("method", METHODS)
def test_integers_under_training_compute_the_same_until_they_move(method, block):
    """Without gradients, as in evaluation; straight through also with them. Offsets of up to half a step do nothing."""
    checkpoint, block = block
    tensors, expected = {name: t.clone() for name, t in block.state_dict().items()}, run(checkpoint, block)
    learned = LearnedIntegers(method, draw_offsets(checkpoint, block, spread=0.7))
    trainables = unfreeze_(block, checkpoint.architecture, norms=True, integers=learned)
    assert len(trainables.integers) == len(checkpoint.architecture.linears)
    with torch.no_grad():
        assert torch.equal(run(checkpoint, block), expected)
    with torch.enable_grad():
        assert torch.equal(run(checkpoint, block), expected) == (method == "straight_through")
    freeze_(block)
    for name, tensor in block.state_dict().items():
        assert tensor.dtype == tensors[name].dtype, name
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_trained_integers_stay_in_range_and_the_frozen_block_equals_the_evaluated_one(method, block):
    checkpoint, block = block
    before = {name: block.get_submodule(name).weight.int() for name in checkpoint.architecture.linears}
    learned = LearnedIntegers(method, draw_offsets(checkpoint, block))
    trainables = unfreeze_(block, checkpoint.architecture, integers=learned)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for theta in trainables.integers:
            theta += 3 * torch.randn(theta.shape, generator=generator)
        for theta in trainables.quantizers:
            theta += 0.05 * torch.randn(theta.shape, generator=generator)
        expected = run(checkpoint, block)
    freeze_(block)
    assert torch.equal(run(checkpoint, block), expected)
    for name, integers in before.items():
        linear = block.get_submodule(name)
        low, high = integer_range(4, linear.spec.symmetric)
        moved = linear.weight.int() - integers
        assert low <= linear.weight.min() < linear.weight.max() <= high
        assert moved.abs().max() == 1 if method == "soft_rounding" else moved.abs().max() > 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_integers_and_scales_get_the_gradients_of_the_formula(method, symmetric):
    """Against autograd of the formulas in float64, without this module's code."""
    generator = torch.Generator().manual_seed(8)
    spec = QuantizerSpec(bits=4, symmetric=symmetric, group_size=4)
    low, high = integer_range(4, symmetric)
    codes = torch.randint(low, high + 1, (6, 8), generator=generator).to(torch.int8 if symmetric else torch.uint8)
    scale = torch.rand(6, 2, generator=generator) + 0.5
    zero_point = None if symmetric else torch.full((6, 2), 7.0)
    offset = 0.9 * torch.rand(6, 8, generator=generator) - 0.45
    x, upstream = (torch.randn(5, width, generator=generator) for width in (8, 6))
    linear = QuantizedLinear(nn.Linear(8, 6, bias=False), spec, False, None)
    linear.set_integers_(codes, scale, zero_point)
    theta = _make_integers_(linear, LearnedIntegers(method, {"q": offset}), "q")
    linear.weight_scale = nn.Parameter(scale.clone())
    linear(x).backward(upstream)

    wide, s = theta.detach().double().requires_grad_(), scale.double().requires_grad_()
    if method == "straight_through":
        levels = (wide + (wide.round() - wide).detach()).clamp(low, high)
    else:
        lower = torch.where(offset < 0, codes.double() - 1, codes.double())
        levels = (lower + 1 / (1 + torch.exp(-wide / HIGHEST_TEMPERATURE))).clamp(low, high)
    shifted = levels if zero_point is None else levels - 7
    weight = shifted * s.repeat_interleave(4, 1)
    (x.double() @ weight.T).backward(upstream.double())
    # Largest difference measured: 3e-6.
    torch.testing.assert_close(theta.grad, wide.grad.float(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(linear.weight_scale.grad, s.grad.float(), atol=2e-5, rtol=1e-5)
    assert theta.grad.abs().max() > 0.1


def test_soft_rounding_meets_its_integers_as_the_temperature_falls(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    block = quantized_block(checkpoint, settings_of(weights=4, activations=16, key=16, value=16))
    learned = LearnedIntegers("soft_rounding", draw_offsets(checkpoint, block))
    unfreeze_(block, checkpoint.architecture, integers=learned)
    with torch.no_grad():
        hard = run(checkpoint, block)
    distances = []
    for progress in (0.0, 0.5, 1.0):
        lower_temperature_(block, progress)
        with torch.enable_grad():
            distances.append((run(checkpoint, block) - hard).norm().item() / hard.norm().item())
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 0


def test_integers_of_other_formats_are_refused():
    linear = QuantizedLinear(nn.Linear(8, 6), QuantizerSpec(bits=8, format="fp8_e4m3"), False, None)
    linear.set_integers_(torch.zeros(6, 8, dtype=torch.uint8), torch.ones(6, 1))
    with pytest.raises(TrainingError, match=r"weights=soft_rounding: q has format fp8_e4m3, .* Set weights: fixed"):
        _make_integers_(linear, LearnedIntegers("soft_rounding", {"q": torch.zeros(6, 8)}), "q")
