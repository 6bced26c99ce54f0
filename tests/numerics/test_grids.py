"""Every number format equals plain Python, element by element, and compressed-tensors."""

import itertools
import math

import pytest
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as ct_fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp

from pipeline.numerics.formats import FORMATS
from pipeline.numerics.gptq import factor_inverse, round_gptq
from pipeline.numerics.grids import BlockGrid, E2M1Grid, E4M3Grid, IntegerGrid, MXFP4Grid, NVFP4Grid
from pipeline.numerics.packing import pack_integers, unpack_integers
from pipeline.numerics.quantizer import (
    ActivationQuantizer,
    QuantizerSpec,
    choose_parameters,
    dequantize_weight,
    fake_quantize,
    group,
    measure_range,
    quantize_weight,
)
from pipeline.quantization.params import FormatName

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = sorted({(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)} | {m * 2.0**-9 for m in range(8)})[:-1]
WEIGHTS = {
    "fp8_e4m3": QuantizerSpec(8, format="fp8_e4m3"),
    "fp8_e4m3 groups": QuantizerSpec(8, group_size=8, format="fp8_e4m3"),
    "mxfp4": QuantizerSpec(4, group_size=32, format="mxfp4"),
    "nvfp4": QuantizerSpec(4, group_size=16, format="nvfp4"),
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_snap(value, magnitudes):
    """Return the nearest value. If two are equally near, return the one with an even index, whose last bit is 0."""
    near = min(range(len(magnitudes)), key=lambda place: (abs(abs(value) - magnitudes[place]), place % 2))
    return math.copysign(magnitudes[near], value)


@pytest.mark.parametrize(("grid", "magnitudes"), [(E2M1Grid(), E2M1), (E4M3Grid(), E4M3)])
def test_floats_round_to_the_nearest_value_and_halves_to_even(grid, magnitudes):
    halves = [(low + high) / 2 for low, high in itertools.pairwise(magnitudes)]
    values = [*magnitudes, *halves, *(randn(200) * grid.high / 2).tolist(), 2 * grid.high]
    values += [-value for value in values]
    assert grid.snap_(torch.tensor(values)).tolist() == [slow_snap(value, magnitudes) for value in values]
    assert E4M3[-1] == 448


def test_params_and_library_have_the_same_format_names():
    assert set(FormatName.__args__) == set(FORMATS)


@pytest.mark.parametrize(
    "grid",
    [IntegerGrid(4, True), IntegerGrid(4, False), E2M1Grid(), E4M3Grid()],
    ids=["int4", "uint4", "e2m1", "e4m3"],
)
def test_every_code_decodes_to_a_value_that_encodes_to_it(grid):
    codes = torch.arange(1 << grid.bits, dtype=torch.uint8)
    codes = (codes.to(torch.int16) - (8 if grid.signed else 0)).to(grid.code_dtype)
    values = grid.decode(codes)
    finite = torch.isfinite(values) & ~((values == 0) & torch.signbit(values))  # E4M3's NaN; zero has one code here
    assert torch.equal(grid.encode(values[finite]), codes[finite])
    assert torch.equal(grid.snap_(values[finite].clone()), values[finite])
    packed = pack_integers(codes.flip(0), grid.bits, grid.signed)
    assert torch.equal(unpack_integers(packed, grid.bits, grid.signed, len(codes)), codes.flip(0))


def test_e2m1_codes_are_packed_as_in_compressed_tensors():
    values = E2M1Grid().snap_(randn(6, 32) * 3)
    assert torch.equal(pack_integers(E2M1Grid().encode(values), 4, False), pack_fp4_to_uint8(values + 0.0))


def test_mxfp4_scales_equal_compressed_tensors():
    """A scale is the power of two that brings the largest value into [3.5, 7)."""
    largest = torch.cat((randn(500).abs() * torch.logspace(-9, 9, 500), torch.tensor([3.4999, 3.5, 7.0, 6.9999, 4.0])))
    scheme = preset_name_to_scheme("MXFP4", ["Linear"])
    expected, _ = calculate_qparams(-largest, largest, scheme.weights)
    scale, zero_point = choose_parameters(-largest, largest, MXFP4Grid())
    assert torch.equal(scale, expected)
    assert zero_point is None
    assert ((largest / scale >= 3.5) & (largest / scale < 7)).all()
    packed, common = MXFP4Grid().pack_scale(scale)
    assert torch.equal(packed, compress_mx_scale(scale, torch.uint8))
    assert common is None
    assert torch.equal(MXFP4Grid().unpack_scale(packed, None), scale)


def test_nvfp4_scales_are_e4m3_times_a_power_of_two_and_packed_exactly():
    low, high = measure_range(group(randn(5, 64) * torch.logspace(-2, 2, 5).unsqueeze(1), 16))
    scale, _ = choose_parameters(low, high, NVFP4Grid())
    assert (scale / (torch.maximum(-low, high) / 6) - 1).abs().max() <= 1 / 16
    packed, common = NVFP4Grid().pack_scale(scale)
    assert common.log2() == common.log2().round()
    assert 224 < scale.max() / common <= 448
    assert torch.equal(NVFP4Grid().unpack_scale(packed, common), scale)
    for moved in (scale, scale * common.item() ** 3, torch.tensor([[224.0, 1.0]])):  # rounded scales do not change
        once = NVFP4Grid().round_scale(moved)
        assert torch.equal(NVFP4Grid().round_scale(once), once)
    assert torch.equal(NVFP4Grid().round_scale(scale), scale)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_equal_compressed_tensors_given_their_scales(name):
    spec, weight = WEIGHTS[name], randn(6, 64, seed=3) + 0.1
    scale, zero_point = choose_parameters(*measure_range(group(weight, spec.group_size)), spec.grid)
    assert zero_point is None
    codes = quantize_weight(weight, scale, spec.grid)
    assert codes.dtype == torch.uint8
    args = QuantizationArgs(
        num_bits=spec.bits,
        type="float",
        strategy="channel" if spec.group_size == -1 else "group",
        group_size=None if spec.group_size == -1 else spec.group_size,
    )
    expected = ct_fake_quantize(weight, scale, torch.zeros_like(scale), args)
    dense = dequantize_weight(codes, scale, None, spec.grid)
    assert torch.equal(dense, expected)
    # Half the coarsest step of a value, in units of its scale: 1 of 6, 16 of 448. mxfp4 cuts off from 6 to 7.
    relative = (group(dense - weight, spec.group_size) / scale.unsqueeze(-1)).abs().max()
    assert relative <= {8: 16, 4: 1}[spec.bits] * 1.0001


def ct_dynamic(x, scheme: QuantizationScheme, global_scale=None):
    scale, zero_point = compute_dynamic_scales_and_zp(x, scheme.input_activations, None, global_scale)
    return ct_fake_quantize(x, scale, zero_point, scheme.input_activations, global_scale)


@pytest.mark.parametrize("heads", [None, 2])
def test_activations_in_nvfp4_equal_compressed_tensors(heads):
    """One static scale for the tensor, or one per head. Blocks get their scale at run time; some of them saturate."""
    x = randn(3, 64) * torch.logspace(-3, 1, 64) if heads is None else randn(2, 2, 3, 64) * torch.logspace(-3, 1, 64)
    quantizer = ActivationQuantizer(QuantizerSpec(4, format="nvfp4"), 64, heads)
    scale, _ = choose_parameters(-x.abs().amax(), x.abs().amax() * 0, BlockGrid())
    assert scale.log2() == scale.log2().round()
    for factor in (1.0, 1 / 16):  # at the second some blocks would need more than 448
        scales = (scale * factor).expand(heads or 1) * torch.tensor([1.0, 0.5][: heads or 1])
        quantizer.calibrate_(scale=scales)
        quantized = quantizer(x)
        for head in range(heads or 1):
            head_x, head_quantized = (x, quantized) if heads is None else (x[:, head], quantized[:, head])
            expected = ct_dynamic(head_x, preset_name_to_scheme("NVFP4", ["Linear"]), 1 / scales[head].reshape(1))
            assert torch.equal(head_quantized, expected)
    assert (quantizer(torch.zeros_like(x)) == 0).all()


def test_activations_in_mxfp4_equal_compressed_tensors():
    x = randn(3, 64) * torch.logspace(-3, 1, 64)
    quantizer = ActivationQuantizer(QuantizerSpec(4, group_size=32, dynamic=True, format="mxfp4"), 64)
    quantizer.calibrate_(clip_factor=torch.ones(2, 2))
    assert torch.equal(quantizer(x), ct_dynamic(x, preset_name_to_scheme("MXFP4", ["Linear"])))
    assert (quantizer(torch.zeros_like(x)) == 0).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_activations_in_fp8_equal_compressed_tensors(dynamic):
    x = randn(3, 64) * torch.logspace(-3, 1, 64)
    quantizer = ActivationQuantizer(QuantizerSpec(8, dynamic=dynamic, format="fp8_e4m3"), 64)
    scheme = preset_name_to_scheme("FP8_DYNAMIC" if dynamic else "FP8", ["Linear"])
    if dynamic:
        quantizer.calibrate_(clip_factor=torch.ones(1, 2))
        assert torch.equal(quantizer(x), ct_dynamic(x[None], scheme)[0])
        return
    scale, zero_point = calculate_qparams(x.min(), x.max(), scheme.input_activations)
    assert torch.equal(choose_parameters(x.min(), x.max(), E4M3Grid())[0].reshape(1), scale)
    for factor in (1.0, 0.3):
        quantizer.calibrate_(scale=scale * factor)
        assert torch.equal(quantizer(x), ct_fake_quantize(x, scale * factor, zero_point, scheme.input_activations))


@pytest.mark.parametrize("grid", [E2M1Grid(), E4M3Grid(), BlockGrid()], ids=lambda grid: type(grid).__name__)
def test_gradients_pass_straight_through_and_reach_the_scale(grid):
    """With a constant rounding offset, d/dx is 1 and d/dscale is that offset; beyond the range, 0 and its end."""
    x, scale = (randn(3, 32) * 2).requires_grad_(), torch.tensor(2.0 / grid.high, requires_grad=True)
    weights = randn(3, 32, seed=5)
    quantized = fake_quantize(x, scale, grid)
    assert torch.equal(quantized, fake_quantize(x.detach(), scale.detach(), grid))
    for_x, for_scale = torch.autograd.grad((quantized * weights).sum(), (x, scale))
    v = x.detach() / scale.detach()
    values = quantized.detach() / scale.detach()
    if isinstance(grid, BlockGrid):
        largest = group(v, 16).abs().amax(-1, keepdim=True)
        inside = (group(v, 16).abs() <= 6 * (largest / 6).clamp_max(448).to(torch.float8_e4m3fn).float()).flatten(-2)
    else:
        inside = v.abs() <= grid.high
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(for_x, weights * inside)
    assert for_scale.item() == pytest.approx((weights * (values - v * inside)).sum().item(), rel=1e-4)


@pytest.mark.parametrize("grid", [MXFP4Grid(), NVFP4Grid(), BlockGrid()], ids=lambda grid: type(grid).__name__)
def test_rounded_scales_keep_their_value_and_pass_gradients(grid):
    low = -randn(4, 3).abs()
    scale, _ = choose_parameters(low, torch.zeros(4, 3), grid)
    moved = scale.clone().requires_grad_()
    rounded = grid.round_scale(moved)
    assert torch.equal(rounded, scale)
    assert torch.equal(torch.autograd.grad(rounded.sum(), moved)[0], torch.ones(4, 3))
    ends = low.clone().requires_grad_()
    chosen, _ = choose_parameters(ends, torch.zeros(4, 3), grid)
    assert torch.equal(chosen, scale)
    assert torch.allclose(torch.autograd.grad(chosen.sum(), ends)[0], torch.tensor(-1 / grid.high))
    empty, _ = choose_parameters(torch.zeros(2), torch.zeros(2), grid)
    assert (empty > 0).all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_gptq_rounds_to_the_grid_and_lowers_the_error_of_the_output(name):
    spec, weight = WEIGHTS[name], randn(12, 64, seed=1)
    x = randn(300, 64, seed=2) @ randn(64, 64, seed=4)
    hessian = x.T @ x / len(x)
    scale, _ = choose_parameters(*measure_range(group(weight, spec.group_size)), spec.grid)
    codes = round_gptq(weight, factor_inverse(hessian, 0.01), scale, None, spec.grid)
    dense = dequantize_weight(codes, scale, None, spec.grid)
    assert torch.equal(quantize_weight(dense, scale, spec.grid), codes)

    def error(changed):
        return ((changed - weight) @ hessian * (changed - weight)).sum()

    nearest = dequantize_weight(quantize_weight(weight, scale, spec.grid), scale, None, spec.grid)
    assert error(dense) < 0.8 * error(nearest)  # measured: at most 0.62


def test_values_between_the_ends_are_within_the_range():
    for grid, beyond in ((IntegerGrid(4, True), 7.6), (E2M1Grid(), 7.1), (E4M3Grid(), 465.0)):
        low, high = grid.find_ends(None)
        assert low < -grid.high
        assert grid.high < high < beyond
