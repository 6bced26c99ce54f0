"""Rotating, centering and rounding in one pass gives the codes of float64, except for values at an edge."""

import pickle

import pytest
import torch

from pipeline.kernels import rotated_codes
from pipeline.kernels.compiler import find_kernels
from pipeline.kernels.rotated_codes import CodesByTorch, RotatedCodes, make_codes
from pipeline.numerics.hadamard import factor_hadamard, hadamard_matrix
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec

needs_kernels = pytest.mark.skipif(not find_kernels(), reason="no C++ compiler")
# Sylvester's matrix alone, below and above 16 lanes; with one and with two of Paley's matrices, of both constructions.
WIDTHS = [1, 4, 8, 32, 64, 128, 512, 20, 48, 144, 576, 1296, 1536, 1904, 4864, 156, 172]


def make_quantizer(width, bits=4, symmetric=True, centered=True, scale=0.3):
    generator = torch.Generator().manual_seed(width)
    quantizer = ActivationQuantizer(QuantizerSpec(bits, symmetric, centered=centered), width)
    values = {"scale": torch.tensor([scale])}
    if centered:
        values["shift"] = 0.2 * torch.randn(width, generator=generator)
    if not symmetric:
        values["zero_point"] = torch.tensor([5.0])
    quantizer.calibrate_(**values)
    quantizer.emit_codes_()
    return quantizer


def make_input(tokens, width, dtype):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def code_exactly(quantizer, x, matrix):
    """Return the codes in float64, and the distance of each value to the edge between two codes."""
    values = x.double() @ matrix
    if quantizer.spec.centered:
        values = values - quantizer.shift.double()
    values = values / quantizer.scale.double() + quantizer.code_of_zero
    return values.round().clamp(0, 2**quantizer.spec.bits - 1), (values - values.floor() - 0.5).abs()


def check(codes, quantizer, x, matrix, tolerance):
    exact, distance = code_exactly(quantizer, x, matrix)
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    wrong = codes != exact
    assert (codes.double() - exact).abs().max() <= 1
    assert (distance[wrong] <= tolerance).all()
    assert wrong.double().mean() <= max(2 * tolerance, 1 / wrong.numel())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_codes_equal_float64_for_every_kind_of_width(width, dtype):
    quantizer = make_quantizer(width)
    for tokens in (1, 3, 200):
        x = make_input(tokens, width, dtype)
        check(RotatedCodes(quantizer, width, True)(x), quantizer, x, hadamard_matrix(width), 1e-5)
    all_factors = [factor_hadamard(width) for width in WIDTHS]
    assert {len(factors.paley) for factors in all_factors} == {0, 1, 2}
    assert any(factors.blocks > 1 and factors.paley for factors in all_factors)


@needs_kernels
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("centered", [True, False])
def test_every_integer_quantizer_gives_the_codes_of_float64(bits, symmetric, centered):
    quantizer = make_quantizer(48, bits, symmetric, centered, scale=2.0 / 2**bits)
    x = make_input(50, 48, torch.float32)
    codes = RotatedCodes(quantizer, 48, True)(x)
    check(codes, quantizer, x, hadamard_matrix(48), 1e-4)
    assert codes.min() == 0  # beyond the range on both sides
    assert codes.max() == 2**bits - 1
    check(RotatedCodes(quantizer, 48, False)(x), quantizer, x, torch.eye(48, dtype=torch.float64), 1e-4)
    blocks = torch.block_diag(*[hadamard_matrix(16)] * 3)
    check(RotatedCodes(quantizer, 48, True, 16)(x), quantizer, x, blocks, 1e-4)


@needs_kernels
def test_input_may_have_any_shape_and_strides():
    quantizer = make_quantizer(64)
    codes = RotatedCodes(quantizer, 64, True)
    x = make_input(64, 64, torch.float32)
    assert torch.equal(codes(x.T), codes(x.T.contiguous()))
    assert torch.equal(codes(x.reshape(2, 4, 8, 64)).reshape(64, 64), codes(x))
    assert codes(x[:0]).shape == (0, 64)


@needs_kernels
def test_compiled_code_gives_the_same_codes():
    quantizer = make_quantizer(576)
    codes = RotatedCodes(quantizer, 576, True)
    compiled = torch.compile(lambda x: codes(x * 2).float(), fullgraph=True, dynamic=True)
    for tokens in (2, 5):
        x = make_input(tokens, 576, torch.float32)
        assert torch.equal(compiled(x), codes(x * 2).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_kernels", [True, False])
def test_torch_gives_the_codes_without_kernels(monkeypatch, has_kernels, dtype):
    """torch rotates in float32 for every dtype of x, as the kernel does. Rounding to bfloat16 would change codes."""
    monkeypatch.setattr(rotated_codes, "find_kernels", lambda: has_kernels and find_kernels())
    quantizer = make_quantizer(48)
    codes = make_codes(quantizer, 48, rotate=True, dtype=dtype)
    assert has_kernels == isinstance(codes, RotatedCodes) or not find_kernels()
    assert isinstance(codes, RotatedCodes | CodesByTorch)
    x = make_input(200, 48, dtype)
    check(codes(x), quantizer, x, hadamard_matrix(48), 1e-5)


@needs_kernels
@pytest.mark.parametrize("width", [64, 576])
def test_two_threads_give_the_codes_of_one(width, two_threads):
    codes = RotatedCodes(make_quantizer(width), width, True)
    x = make_input(2048, width, torch.float32)  # enough work for two threads
    assert torch.equal(codes(x), torch.cat([codes(row[None]) for row in x]))


@needs_kernels
def test_input_of_another_shape_or_dtype_is_refused():
    quantizer = make_quantizer(48)
    codes = RotatedCodes(quantizer, 48, True)
    for shape, message in {
        (2, 96): "shift needs 96 values",
        (2, 0): "no values in a row",
        (): "no values in a row",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            codes(torch.zeros(shape))
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        codes(torch.zeros(2, 48, dtype=torch.float64))
    assert [codes.takes(torch.zeros(2, 48, dtype=dtype)) for dtype in (torch.float32, torch.float64)] == [True, False]
    operator, x = torch.ops.prefixquant.rotated_codes, torch.zeros(2, 48)
    for paley, sylvester in ([], 0), ([], 3), ([torch.ones(4, 8)], 4), ([torch.ones(6, 6)], 8):
        with pytest.raises(RuntimeError):
            operator(x, paley, sylvester, torch.zeros(48), 1.0, 7, 15)


@needs_kernels
def test_codes_do_not_change_when_a_model_is_cast_or_pickled(monkeypatch):
    codes = RotatedCodes(make_quantizer(576), 576, True)
    x = make_input(3, 576, torch.float32)
    expected = codes(x)
    again = pickle.loads(pickle.dumps(torch.nn.Sequential(codes).double()))[0]
    assert torch.equal(again(x), expected)
    assert again.takes(x)
    monkeypatch.setattr(rotated_codes, "find_kernels", lambda: False)
    assert not pickle.loads(pickle.dumps(codes)).takes(x)
