"""Number formats equal torchao, a reference that shares no code with compressed-tensors (test_grids.py)."""

import sys
from pathlib import Path

import pytest
import torch

from pipeline.numerics.grids import MXFP4Grid, NVFP4Grid
from pipeline.numerics.packing import pack_integers
from pipeline.numerics.quantizer import (
    ActivationQuantizer,
    QuantizerSpec,
    choose_parameters,
    dequantize_weight,
    group,
    measure_range,
    quantize_weight,
)

REFERENCES = str(Path(sys.prefix) / "references")  # `make setup` puts it there
sys.path.append(REFERENCES)
pytest.importorskip("torchao", reason="torchao is not installed (make setup)")
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32  # noqa: E402
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx  # noqa: E402
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize  # noqa: E402
from torchao.quantization.quant_primitives import (  # noqa: E402
    _dequantize_affine_float8,
    _quantize_affine_float8,
    dequantize_affine,
    quantize_affine,
)

sys.path.remove(REFERENCES)


def make_values(rows=6, width=64):
    spread = torch.logspace(-3, 1, width)
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3)) * spread


def test_mxfp4_equals_torchao():
    """Compare packed codes, packed scales and values of weights and dynamic activations."""
    x = make_values()
    scale, _ = choose_parameters(*measure_range(group(x, 32)), MXFP4Grid())
    codes = quantize_weight(x, scale, MXFP4Grid())
    their_scale, their_codes = to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.EVEN)
    assert torch.equal(MXFP4Grid().pack_scale(scale)[0], their_scale.view(torch.uint8))
    assert torch.equal(pack_integers(codes, 4, False), unsigned_zeros(their_codes))
    expected = to_dtype(their_codes, their_scale, torch.float4_e2m1fn_x2, 32, torch.float32)
    assert torch.equal(dequantize_weight(codes, scale, None, MXFP4Grid()), expected)
    quantizer = ActivationQuantizer(QuantizerSpec(4, group_size=32, dynamic=True, format="mxfp4"), x.shape[1])
    quantizer.calibrate_(clip_factor=torch.ones(2, 2))
    assert torch.equal(quantizer(x), expected)


def test_nvfp4_equals_torchao_given_the_scale_of_the_tensor():
    """torchao multiplies by the scale's reciprocal, so halfway values may round either way. Here there are none."""
    x = make_values()
    scale, _ = choose_parameters(*measure_range(group(x, 16)), NVFP4Grid())
    packed, common = NVFP4Grid().pack_scale(scale)
    codes = quantize_weight(x, scale, NVFP4Grid())
    their_scale, their_codes = nvfp4_quantize(x, 16, common)
    assert torch.equal(packed, their_scale.view(torch.uint8))
    assert torch.equal(pack_integers(codes, 4, False), unsigned_zeros(their_codes))
    low, high = their_codes & 15, their_codes >> 4
    values = f4_unpacked_to_f32(torch.stack((low, high), dim=-1).flatten(1))
    expected = (group(values, 16) * (their_scale.float() * common).unsqueeze(-1)).flatten(1)
    assert torch.equal(dequantize_weight(codes, scale, None, NVFP4Grid()), expected)
    quantizer = ActivationQuantizer(QuantizerSpec(4, format="nvfp4"), x.shape[1])
    quantizer.calibrate_(scale=common)
    assert torch.equal(quantizer(x), expected)


def unsigned_zeros(packed):
    """Remove the sign of zeros: torchao keeps it for values that round to zero; here zero has one code."""
    low, high = packed & 15, packed >> 4
    return torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_fp8_equals_torchao(dynamic):
    x = make_values()
    quantizer = ActivationQuantizer(QuantizerSpec(8, dynamic=dynamic, format="fp8_e4m3"), x.shape[1])
    largest = x.abs().amax(dim=-1, keepdim=True) if dynamic else x.abs().amax().reshape(1, 1)
    scale = largest / 448
    quantizer.calibrate_(**({"clip_factor": torch.ones(1, 2)} if dynamic else {"scale": scale}))
    codes = _quantize_affine_float8(x, scale, torch.float8_e4m3fn)
    assert torch.equal(quantizer(x), _dequantize_affine_float8(codes, scale, torch.float32))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (4, -1), (3, 8), (8, -1)])
def test_integers_equal_torchao(bits, group_size, symmetric):
    x, spec = make_values(), QuantizerSpec(bits, symmetric, group_size)
    scale, zero_point = choose_parameters(*measure_range(group(x, group_size)), spec.grid)
    codes = quantize_weight(x, scale, spec.grid, zero_point)
    block = (1, x.shape[1] if group_size == -1 else group_size)
    ends = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)
    dtype = torch.int8 if symmetric else torch.uint8
    zero = torch.zeros_like(scale) if zero_point is None else zero_point
    # torchao multiplies by the reciprocal of the scale, so a value halfway may fall to either side.
    theirs = quantize_affine(x, block, scale, zero.to(torch.int32), dtype, *ends)
    assert (codes != theirs).float().mean() <= 0.01
    expected = dequantize_affine(codes, block, scale, zero.to(torch.int32), dtype, *ends)
    assert torch.equal(dequantize_weight(codes, scale, zero_point, spec.grid), expected)
