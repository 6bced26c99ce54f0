"""The two operators that represent a QDQ pair give the same values as this project's quantizers.

The graphs of `build_graph` are tested in test_onnx_session.py.
"""

import pytest
import torch

from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec, dequantize_weight

for package in ("onnx", "onnxscript", "onnx_ir"):
    pytest.importorskip(package, reason="the extra onnx is not installed")

from pipeline.interop.onnx_graph import GraphQuantizer, make_rotation  # noqa: E402  (needs onnx)
from pipeline.numerics.hadamard import hadamard_transform  # noqa: E402


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("heads", [None, 2])
def test_a_pair_computes_the_fake_quantized_values(symmetric, bits, heads):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 2, 5, 16, generator=generator) * 3
    spec = QuantizerSpec(bits, symmetric, centered=True, format="int16" if bits == 16 else "int")
    quantizer = ActivationQuantizer(spec, 16, heads)
    scales = torch.rand(heads or 1, generator=generator) * 2.0 ** (2 - bits) + 2.0 ** (1 - bits)
    buffers = {"scale": scales, "shift": torch.randn(heads or 1, 16, generator=generator)}
    quantizer.calibrate_(
        **buffers, **({} if symmetric else {"zero_point": torch.full((heads or 1,), 2.0 ** (bits - 1))})
    )
    assert torch.equal(GraphQuantizer(quantizer)(x), quantizer(x))
    codes = GraphQuantizer(quantizer)
    codes.codes_only = True
    assert codes(x).dtype == {(8, True): torch.int8, (8, False): torch.uint8, (16, True): torch.int16}.get(
        (bits, symmetric), torch.uint16
    )


def test_weights_by_group_are_dequantized_along_the_input():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (6, 16), dtype=torch.int8, generator=generator)
    scale = torch.rand(6, 4, generator=generator)
    zeros = torch.zeros(4, 6, dtype=torch.int8)
    weight = torch.ops.prefixquant.dequantize_linear(codes.T.contiguous(), scale.T.contiguous(), zeros, 0, 4)
    assert torch.equal(weight.T, dequantize_weight(codes, scale))


@pytest.mark.parametrize(("width", "block_size"), [(12, -1), (12, 4), (16, -1)])
def test_an_online_rotation_is_its_matrix(width, block_size):
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    expected = hadamard_transform(x, block_size=block_size)
    assert torch.allclose(x @ make_rotation(width, block_size), expected, atol=1e-6)
