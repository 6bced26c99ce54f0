"""A product of integers is the exact int32 sum, scaled and rounded once."""

import copy
import gc
import pickle

import pytest
import torch

from pipeline.kernels import integer_product
from pipeline.kernels.integer_product import IntegerProduct
from pipeline.kernels.operands import IntegerOperands


def make_product(dtype=torch.float32, zero_point=8):
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-8, 8, (24, 36), generator=generator, dtype=torch.int8)
    weight_scale, constant = torch.rand(24, generator=generator), torch.randn(24, generator=generator)
    codes = torch.randint(0, 16, (5, 36), generator=generator, dtype=torch.uint8)
    sums = (codes.int() - zero_point) @ integers.int().T
    expected = sums * (weight_scale.double() * 0.3) + constant
    operands = IntegerOperands(integers, weight_scale, 0.3, zero_point, constant)
    return IntegerProduct(operands, dtype), codes, expected


@pytest.mark.parametrize("zero_point", [0, 8, 15])
def test_product_is_the_sum_in_int32_scaled_once(zero_point):
    product, codes, expected = make_product(zero_point=zero_point)
    assert (product(codes) - expected).abs().max() <= 1e-6 * expected.abs().max()  # measured: 1.5e-7
    assert torch.equal(product(codes[:1]), product(codes)[:1])
    assert torch.equal(product(codes.reshape(1, 5, 36)), product(codes)[None])


def test_product_is_rounded_to_bfloat16_once():
    product, codes, expected = make_product(torch.bfloat16)
    assert (product(codes) - expected.float().bfloat16()).abs().max() <= 2**-8 * expected.abs().max()
    assert product(codes).dtype == torch.bfloat16


def test_product_has_a_meta_result_can_be_pickled_and_is_freed_with_its_last_user():
    product, codes, _ = make_product()
    described = torch.ops.prefixquant.integer_product(codes.to("meta"), product.name, 24, torch.bfloat16)
    assert described.shape == (5, 24)
    assert described.dtype == torch.bfloat16
    pickled = pickle.loads(pickle.dumps(product))
    assert pickled.name != product.name
    assert torch.equal(pickled(codes), product(codes))
    again, name = copy.deepcopy(product), product.name
    del product
    gc.collect()
    assert again(codes).shape == (5, 24)
    del again
    gc.collect()
    assert name not in integer_product._PRODUCTS
