"""Sums of products with weights of 4 bits are exact for every shape, and scaled once."""

import pytest
import torch

from pipeline.kernels import nibble_product
from pipeline.kernels.compiler import find_kernels
from pipeline.kernels.integer_product import IntegerProduct
from pipeline.kernels.nibble_product import FEW, pack_nibbles
from pipeline.kernels.operands import IntegerOperands

needs_kernels = pytest.mark.skipif(not find_kernels(), reason="no C++ compiler")


def make_operands(out, width, *, low=-8, high=8, zero_point=7, exact=False):
    generator = torch.Generator().manual_seed(out + width)
    integers = torch.randint(low, high, (out, width), generator=generator, dtype=torch.int8)
    integers[0] = low  # both ends, in every column
    integers[-1] = high - 1
    scale = torch.ones(out) if exact else torch.rand(out, generator=generator)
    constant = torch.zeros(out) if exact else torch.randn(out, generator=generator)
    return IntegerOperands(integers, scale, 1.0 if exact else 0.3, zero_point, constant)


def multiply_exactly(operands, codes):
    sums = (codes.long() - operands.zero_point) @ operands.integers.long().T
    return sums * (operands.weight_scale.double() * operands.scale) + operands.constant.double()


@needs_kernels
@pytest.mark.parametrize("zero_point", [0, 7, 128])
@pytest.mark.parametrize(("out", "width"), [(1, 1), (3, 63), (4, 64), (5, 65), (37, 100), (24, 576), (64, 1536)])
def test_sums_are_exact(out, width, zero_point):
    operands = make_operands(out, width, zero_point=zero_point, exact=True)
    nibbles = pack_nibbles(operands)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 11):
        codes = torch.randint(0, 256, (tokens, width), dtype=torch.uint8)
        codes[0] = 255
        expected = multiply_exactly(operands, codes)
        assert torch.equal(nibbles.multiply(codes, torch.float32).double(), expected)
        rounded = expected.float().bfloat16()
        assert torch.equal(nibbles.multiply(codes, torch.bfloat16), rounded)
    assert nibbles.packed.numel() <= (out + 3) * (width + 63) / 2


@needs_kernels
def test_product_is_scaled_once_and_includes_the_constant():
    operands = make_operands(300, 576)
    codes = torch.randint(0, 16, (2, 3, 576), dtype=torch.uint8)
    expected = multiply_exactly(operands, codes)
    product = pack_nibbles(operands).multiply(codes, torch.float32)
    assert (product - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(pack_nibbles(operands).multiply(codes[:, ::2], torch.float32), product[:, ::2])


@needs_kernels
def test_a_layer_uses_nibbles_for_a_few_tokens_only(monkeypatch):
    operands, calls = make_operands(24, 36), []
    product = IntegerProduct(operands, torch.float32)
    plain = type(product.nibbles).multiply
    monkeypatch.setattr(type(product.nibbles), "multiply", lambda *arguments: calls.append(1) or plain(*arguments))
    for shape, few in [((FEW,), True), ((FEW + 1,), False), ((2, FEW // 2), True), ((2, FEW), False)]:
        calls.clear()
        codes = torch.randint(0, 16, (*shape, 36), dtype=torch.uint8)
        expected = multiply_exactly(operands, codes)
        assert (product(codes) - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert bool(calls) == few


@pytest.mark.parametrize(("low", "high"), [(-9, 8), (-8, 9), (-128, 128)])
def test_weights_of_more_than_4_bits_have_no_nibbles(low, high):
    operands = make_operands(24, 36, low=low, high=high)
    assert pack_nibbles(operands) is None
    codes = torch.randint(0, 16, (2, 36), dtype=torch.uint8)
    expected = multiply_exactly(operands, codes)
    assert (IntegerProduct(operands, torch.float32)(codes) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_machine_without_kernels_has_no_nibbles(monkeypatch):
    monkeypatch.setattr(nibble_product, "find_kernels", lambda: False)
    assert pack_nibbles(make_operands(24, 36)) is None


@needs_kernels
def test_two_threads_give_the_product_of_one(two_threads):
    operands = make_operands(1000, 576)  # enough work for two threads
    codes = torch.randint(0, 16, (5, 576), dtype=torch.uint8)
    product = pack_nibbles(operands).multiply(codes, torch.float32)
    torch.set_num_threads(1)
    assert torch.equal(pack_nibbles(operands).multiply(codes, torch.float32), product)
    assert (product - multiply_exactly(operands, codes)).abs().max() <= 1e-6 * product.abs().max()


@needs_kernels
def test_operands_of_other_shapes_are_refused():
    nibbles = pack_nibbles(make_operands(24, 36))
    for width in (20, 60, 100):
        with pytest.raises(ValueError, match=f"codes of {width} inputs for weights of 36"):
            nibbles.multiply(torch.zeros(1, width, dtype=torch.uint8), torch.float32)
    codes = torch.zeros(1, 36, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        nibbles.multiply(codes, torch.float64)
    operator = torch.ops.prefixquant.nibble_product
    whole = [nibbles.packed, nibbles.scale, nibbles.offset, nibbles.constant]
    for place in range(4):
        with pytest.raises(RuntimeError):
            operator(codes, *whole[:place], whole[place][:-1], *whole[place + 1 :], torch.float32)
    with pytest.raises(RuntimeError):
        operator(torch.zeros(1, 65, dtype=torch.uint8), *whole, torch.float32)


@needs_kernels
def test_other_dtypes_use_onednn():
    operands = make_operands(24, 36)
    product = IntegerProduct(operands, torch.float16)
    codes = torch.randint(0, 16, (2, 36), dtype=torch.uint8)
    expected = multiply_exactly(operands, codes)
    assert (product(codes).double() - expected).abs().max() <= 2**-10 * expected.abs().max()
