import math

import pytest
import torch

from pipeline.quantizer import (
    StaticQuantizer,
    choose_scale,
    dequantize_weight,
    fake_quantize,
    group_weight,
    integer_range,
    quantize,
    quantize_weight,
)

BITS = [2, 3, 4, 5, 6, 7, 8]


def slow_fake_quantize(value: float, scale: float, bits: int) -> float:
    """One element at a time, in plain Python, where round is half to even as well."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return min(max(round(value / scale), low), high) * scale


@pytest.mark.parametrize("bits", BITS)
def test_fake_quantize_equals_a_per_element_reference(bits):
    # A power of two as scale: division and product are exact, so that the comparison is too.
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(bits)) * 3
    scale = torch.tensor(0.25)
    expected = [[slow_fake_quantize(value, 0.25, bits) for value in row] for row in x.tolist()]
    assert fake_quantize(x, scale, bits).tolist() == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 4, 8])
def test_weights_equal_a_per_element_reference_in_every_group(bits, group_size):
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(bits))
    scale = choose_scale(group_weight(weight, group_size).abs().amax(-1), bits)
    assert scale.shape == (3, 1 if group_size == -1 else 16 // group_size)
    size = 16 if group_size == -1 else group_size
    dense = dequantize_weight(quantize_weight(weight, scale, bits), scale)
    for row in range(3):
        for column in range(16):
            step = scale[row, column // size].item()
            expected = slow_fake_quantize(weight[row, column].item(), step, bits)
            assert dense[row, column].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_scale_puts_the_largest_magnitude_on_the_largest_positive_integer():
    x = torch.tensor([-3.5, 1.0, 7.0])
    scale = choose_scale(x.abs().max(), 4)
    assert scale.item() == 1.0
    assert quantize(x, scale, 4).tolist() == [-4.0, 1.0, 7.0]  # -3.5 rounds half to even
    assert integer_range(4) == (-8, 7)


@pytest.mark.parametrize("bits", BITS)
def test_clipping_and_range(bits):
    low, high = integer_range(bits)
    x = torch.tensor([-1e6, 1e6])
    assert quantize(x, torch.tensor(1.0), bits).tolist() == [low, high]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_no_scale_is_zero_infinite_or_nan_and_zero_stays_zero(bits, value):
    scale = choose_scale(torch.tensor(value), bits)
    assert scale > 0
    assert math.isfinite(scale.item())
    out = fake_quantize(torch.tensor([0.0, value, -value]), scale, bits)
    assert torch.isfinite(out).all()
    assert out[0] == 0
    if value >= 1e-20:
        assert out[1].item() == pytest.approx(value, rel=1e-5)


def test_broken_statistics_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        choose_scale(torch.tensor([1.0, float("nan")]), 4)


def test_bfloat16_activations_are_rounded_as_their_float32_values():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = torch.tensor(0.0371)
    assert torch.equal(fake_quantize(x, scale, 4), fake_quantize(x.float(), scale, 4).bfloat16())


def test_quantizer_passes_on_until_calibrated_and_counts_when_it_acts():
    quantizer = StaticQuantizer(4, (2, 1, 1))
    x = torch.randn(1, 2, 3, 4)
    assert quantizer(x) is x
    assert quantizer.fired == 0
    quantizer.set_scale_(torch.tensor([0.5, 0.25]))
    out = quantizer(x)
    assert quantizer.fired == 1
    assert torch.equal(out[:, 0], fake_quantize(x[:, 0], torch.tensor(0.5), 4))
    assert torch.equal(out[:, 1], fake_quantize(x[:, 1], torch.tensor(0.25), 4))


def test_sixteen_bits_never_quantize():
    quantizer = StaticQuantizer(16)
    x = torch.randn(3)
    assert quantizer(x) is x
    assert not list(quantizer.buffers())
