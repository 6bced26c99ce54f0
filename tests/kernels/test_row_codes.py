"""Rows rounded to 8 bits in one pass equal the transform and the quantizer, one after the other."""

import pytest
import torch

from pipeline.kernels.row_codes import RowCodes
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.numerics.quantizer import round_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("width", [64, 576, 896, 156, 100])  # 156 and 100: blocks, and no vectors
def test_codes_equal_the_transform_and_rounding(width, rotate, dtype):
    x = torch.randn(3, 7, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0] = 0
    x[1, 1, 5] = 300
    codes, scale = RowCodes(width, rotate)(x)
    rows = x.float()
    expected, expected_scale = round_rows(hadamard_transform(rows) if rotate else rows, 8)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (3, 7, 1))
    assert torch.allclose(scale, expected_scale, rtol=1e-5)
    difference = (codes.float() - expected).abs()
    assert difference.max() <= 1
    assert difference.mean() <= 1e-3  # values at an edge; measured: 0 without a rotation, at most 3e-4 with one
    assert not codes[0, 0].any()
    assert scale[0, 0] == 1
    if not rotate:
        assert torch.equal(codes.float(), expected)


def test_gradients_of_rounded_rows_pass_straight_through():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    integers, scale = round_rows(x, 8)
    assert torch.equal(integers, integers.detach().round())
    (gradient,) = torch.autograd.grad((integers * scale).sum(), x)
    assert torch.allclose(gradient, torch.ones_like(x))
