"""Every mode of a quantizer equals plain Python, element by element, and compressed-tensors."""

import itertools
import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as ct_fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from pipeline.numerics.quantizer import (
    ActivationQuantizer,
    QuantizerSpec,
    choose_parameters,
    dequantize_weight,
    fake_quantize,
    group,
    integer_range,
    measure_range,
    quantize,
    quantize_weight,
    require_finite,
)

BITS = [2, 3, 4, 5, 6, 7, 8]
SPECS = [
    QuantizerSpec(bits, symmetric, group_size, dynamic, centered)
    for bits, symmetric, group_size, dynamic, centered in itertools.product(
        (2, 4, 8), (True, False), (-1, 4), (True, False), (True, False)
    )
]


def slow_parameters(values: list[float], bits: int, symmetric: bool, low_factor=1.0, high_factor=1.0):
    """Return scale and zero point of a group, in plain Python, whose round() is half to even, too."""
    low, high = min([*values, 0.0]) * low_factor, max([*values, 0.0]) * high_factor
    if symmetric:
        return max(-low, high) / (2 ** (bits - 1) - 1) or 1.0, None
    scale = (high - low) / (2**bits - 1) or 1.0
    return scale, min(max(round(-low / scale), 0), 2**bits - 1)


def slow_fake_quantize(value: float, scale: float, zero_point: float | None, bits: int) -> float:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if zero_point is None else (0, 2**bits - 1)
    offset = zero_point or 0
    return (min(max(round(value / scale) + offset, low), high) - offset) * scale


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_point", [None, 1.0])
def test_fake_quantize_equals_a_per_element_reference(bits, zero_point):
    # A power of two as scale: division and product are exact, so that the comparison is too.
    x = randn(7, 11, seed=bits) * 3
    expected = [[slow_fake_quantize(value, 0.25, zero_point, bits) for value in row] for row in x.tolist()]
    offset = None if zero_point is None else torch.tensor(zero_point)
    assert fake_quantize(x, torch.tensor(0.25), bits, offset).tolist() == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 4, 8])
def test_weights_equal_a_per_element_reference_in_every_group(bits, symmetric, group_size):
    weight = randn(3, 16, seed=bits) + 0.3
    scale, zero_point = choose_parameters(*measure_range(group(weight, group_size)), bits, symmetric)
    size = 16 if group_size == -1 else group_size
    assert scale.shape == (3, 16 // size)
    integers = quantize_weight(weight, scale, bits, zero_point)
    assert integers.dtype == (torch.int8 if symmetric else torch.uint8)
    dense = dequantize_weight(integers, scale, zero_point)
    for row in range(3):
        for start in range(0, 16, size):
            values = weight[row, start : start + size].tolist()
            step, offset = slow_parameters(values, bits, symmetric)
            for column, value in enumerate(values, start):
                expected = slow_fake_quantize(value, step, offset, bits)
                assert dense[row, column].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("heads", [None, 2])
def test_activation_quantizers_equal_a_per_element_reference(spec, heads):
    """Compare all modes: static, dynamic, groups, zero points, two clip factors, means, with and without heads."""
    x = randn(3, 8) + 0.5 if heads is None else randn(2, 2, 3, 8) + 0.5  # [n, C] or [B, heads, T, d]
    quantizer = ActivationQuantizer(spec, 8, heads)
    buffers = {name: torch.rand(buffer.shape) for name, buffer in quantizer.named_buffers()}
    torch.manual_seed(1)
    if "clip_factor" in buffers:
        buffers["clip_factor"] = torch.rand(buffers["clip_factor"].shape) / 2 + 0.5
        if spec.symmetric:
            buffers["clip_factor"][..., 1] = buffers["clip_factor"][..., 0]
    if "zero_point" in buffers:
        buffers["zero_point"] = torch.full(buffers["zero_point"].shape, 1.0)
    assert quantizer(x) is x  # not calibrated
    quantizer.calibrate_(**buffers)
    quantized = quantizer(x)
    size = 8 if spec.group_size == -1 else spec.group_size
    for token in itertools.product(*(range(length) for length in x.shape[:-1])):
        head = (token[1], 0) if heads else ()
        shift = buffers["shift"][head].tolist() if spec.centered else [0.0] * 8
        centered = [value - mean for value, mean in zip(x[token].tolist(), shift, strict=True)]
        for start in range(0, 8, size):
            values, where = centered[start : start + size], (*head, start // size)
            if spec.dynamic:
                step, offset = slow_parameters(
                    values, spec.bits, spec.symmetric, *buffers["clip_factor"][where].tolist()
                )
            else:
                step = buffers["scale"][where].item()
                offset = None if spec.symmetric else buffers["zero_point"][where].item()
            for column, value in enumerate(values, start):
                expected = slow_fake_quantize(value, step, offset, spec.bits) + shift[column]
                # A value on a rounding boundary may fall to either side in float32.
                near = abs(value / step % 1 - 0.5) < 1e-4
                assert near or quantized[(*token, column)].item() == pytest.approx(expected, abs=2e-5)
    assert quantizer.fired == 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("strategy", "group_size"), [("channel", None), ("group", 8)])
def test_weights_equal_compressed_tensors(bits, symmetric, strategy, group_size):
    """The same scales and zero points give the same values. Asymmetric ranges give the same scales, too.

    (Symmetric scales differ by design: compressed-tensors spreads 2^b - 1 steps over [-max, max].)
    """
    weight = randn(6, 32, seed=bits) + 0.2
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group_size)
    low, high = measure_range(group(weight, group_size or -1))
    scale, zero_point = choose_parameters(low, high, bits, symmetric)
    shift = 0 if symmetric else 2 ** (bits - 1)  # its integers are signed
    if not symmetric:
        expected_scale, expected_zero = calculate_qparams(low, high, args)
        assert torch.allclose(scale, expected_scale)
        assert torch.equal(zero_point - shift, expected_zero.round())
    signed = torch.zeros_like(scale) if symmetric else zero_point - shift
    expected = ct_fake_quantize(weight, scale, signed, args)
    dense = dequantize_weight(quantize_weight(weight, scale, bits, zero_point), scale, zero_point)
    assert torch.allclose(dense, expected, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_quantizers_equal_compressed_tensors_per_token(symmetric):
    x = randn(5, 16) + 0.3
    quantizer = ActivationQuantizer(QuantizerSpec(8, symmetric, dynamic=True), 16)
    quantizer.calibrate_(clip_factor=torch.ones(1, 2))
    args = QuantizationArgs(num_bits=8, symmetric=symmetric, strategy="token", dynamic=True)
    scale, zero_point = choose_parameters(*measure_range(x.unsqueeze(1)), 8, symmetric)
    signed = torch.zeros_like(scale) if symmetric else zero_point - 128
    assert torch.allclose(quantizer(x), ct_fake_quantize(x, scale, signed, args), atol=1e-6)


def test_scale_puts_the_largest_magnitude_on_the_largest_positive_integer():
    x = torch.tensor([-3.5, 1.0, 7.0])
    scale, zero_point = choose_parameters(*measure_range(x), 4, symmetric=True)
    assert scale.item() == 1.0
    assert zero_point is None
    assert quantize(x, scale, 4).tolist() == [-4.0, 1.0, 7.0]  # -3.5 rounds half to even
    assert integer_range(4) == (-8, 7)


def test_asymmetric_parameters_of_the_documented_example():
    x = torch.tensor([-3.0, 0.0, 12.0])
    scale, zero_point = choose_parameters(*measure_range(x), 4, symmetric=False)
    assert (scale.item(), zero_point.item()) == (1.0, 3.0)
    assert quantize(x, scale, 4, zero_point).tolist() == [0.0, 3.0, 15.0]
    assert integer_range(4, symmetric=False) == (0, 15)


EDGES = {
    "constant": [2.5] * 6,
    "negative": [-2.5] * 6,
    "zero": [0.0] * 6,
    "tiny": [1e-20, -2e-20, 3e-21],
    "subnormal": [1e-44, 0.0],
    "huge": [1e20, -3e20],
    "largest": [1e38, -1e38],
    "one": [0.7],
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_scale_is_zero_infinite_or_nan_and_zero_stays_zero(name, symmetric, bits):
    x = torch.tensor(EDGES[name])
    scale, zero_point = choose_parameters(*measure_range(x), bits, symmetric)
    assert 0 < scale.item() < math.inf
    quantized = fake_quantize(torch.cat((x, torch.zeros(1))), scale, bits, zero_point)
    assert torch.isfinite(quantized).all()
    assert quantized[-1] == 0
    if name != "subnormal":  # below the smallest normal number the scale stays at it
        # Within half a step (a whole one where the zero point was rounded), and a range of one sign keeps its ends.
        assert (quantized[:-1] / scale - x / scale).abs().max() <= (0.5001 if symmetric else 1.0001)


def test_ranges_that_are_not_finite_are_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            require_finite(torch.tensor([0.0]), torch.tensor([bad]))
    require_finite(torch.tensor([-1.0]), torch.tensor([1.0]))


def test_bfloat16_activations_get_the_integers_of_float32():
    x = (randn(1000) * 3).bfloat16()
    scale = torch.tensor(0.0837)
    assert torch.equal(fake_quantize(x, scale, 8), fake_quantize(x.float(), scale, 8).bfloat16())
    centered = ActivationQuantizer(QuantizerSpec(8, centered=True), 8)
    centered.calibrate_(scale=scale, shift=torch.arange(8.0))
    quantized = centered(x.view(-1, 8))
    assert quantized.dtype == torch.bfloat16
    assert torch.equal(quantized, centered(x.view(-1, 8).float()).bfloat16())


# --- Gradients: rounding passes them straight through ---------------------------------------------------------------


def smooth(x, scale, zero_point, constants):
    """Fake quantization with constant rounding offsets and clipping. Its gradients are the straight-through ones."""
    offset = 0 if zero_point is None else zero_point + constants["zero_point"]
    integers = torch.where(constants["inside"], x / scale + constants["x"] + offset, constants["edge"])
    return (integers - offset) * scale


@pytest.mark.parametrize("symmetric", [True, False])
def test_straight_through_gradients_equal_finite_differences_of_the_smooth_parts(symmetric):
    x = (randn(40).double() * 2).requires_grad_()
    scale = torch.tensor(0.31, dtype=torch.float64, requires_grad=True)
    zero_point = None if symmetric else torch.tensor(5.3, dtype=torch.float64, requires_grad=True)
    constants = {
        "x": (x / scale).round() - x / scale,
        "zero_point": None if symmetric else zero_point.round() - zero_point,
    }
    constants = {name: None if offset is None else offset.detach() for name, offset in constants.items()}
    integers = (x / scale).round().detach() + (0 if symmetric else zero_point.round().detach())
    constants["edge"] = integers.clamp(*integer_range(4, symmetric))
    constants["inside"] = constants["edge"] == integers
    assert 0 < constants["inside"].sum() < 40
    weights = randn(40, seed=3).double()
    inputs = [x, scale] if symmetric else [x, scale, zero_point]
    gradients = torch.autograd.grad((fake_quantize(x, scale, 4, zero_point) * weights).sum(), inputs)
    step = 1e-6
    for place, (tensor, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        flat = tensor.detach().clone().flatten()
        for index in range(flat.numel()):
            ends = []
            for sign in (1, -1):
                moved = flat.clone()
                moved[index] += sign * step
                arguments = [t.detach() for t in inputs]
                arguments[place] = moved.view(tensor.shape)
                zero = None if symmetric else arguments[2]
                ends.append((smooth(arguments[0], arguments[1], zero, constants) * weights).sum())
            difference = (ends[0] - ends[1]) / (2 * step)
            assert gradient.flatten()[index].item() == pytest.approx(difference.item(), abs=1e-6)


def test_values_are_the_same_with_and_without_gradients():
    x = randn(3, 50)
    scale, zero_point = torch.full((3, 1), 0.2), torch.full((3, 1), 6.0)
    for offset in (None, zero_point):
        with_gradients = fake_quantize(x.clone().requires_grad_(), scale, 4, offset)
        assert torch.equal(with_gradients.detach(), fake_quantize(x, scale, 4, offset))


def test_gradients_reach_clip_factors_of_dynamic_quantizers():
    """A step against the gradient of a factor that clips lowers the loss."""
    x = randn(20, 16)
    for symmetric in (True, False):
        quantizer = ActivationQuantizer(QuantizerSpec(8, symmetric, dynamic=True), 16)
        quantizer.calibrate_(clip_factor=torch.full((1, 2), 0.5))
        quantizer.clip_factor = torch.nn.Parameter(quantizer.clip_factor)
        loss = (quantizer(x) - x).square().sum()
        loss.backward()
        moved = quantizer.clip_factor.detach() - 0.01 * quantizer.clip_factor.grad.sign()
        assert quantizer.clip_factor.grad.abs().sum() > 0
        quantizer.clip_factor = torch.nn.Parameter(moved)
        assert (quantizer(x) - x).square().sum() < loss


def test_sixteen_bits_never_quantize():
    quantizer = ActivationQuantizer(QuantizerSpec(16, centered=True), 3)
    x = torch.randn(3)
    assert quantizer(x) is x
    assert not list(quantizer.buffers())
    assert quantizer.fired == 0
