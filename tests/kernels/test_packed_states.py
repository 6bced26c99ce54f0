"""The operators give the same codes and states as the quantizer."""

import pytest
import torch

from pipeline.kernels.compiler import find_kernels
from pipeline.kernels.packed_states import fits_kernels, pack_states, unpack_states_
from pipeline.numerics.hadamard import find_single_matrix, hadamard_transform
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec

pytestmark = pytest.mark.skipif(not find_kernels(), reason="no C++ compiler")


def make_quantizer(bits, width, *, heads=3, **options):
    generator = torch.Generator().manual_seed(bits)
    quantizer = ActivationQuantizer(QuantizerSpec(bits, **options), width, heads)
    values = {
        "scale": (torch.rand(heads, generator=generator) + 0.5) / 2 ** (bits - 2),
        "zero_point": torch.tensor([1.0, 2.0, 3.0]),
        "shift": torch.randn(heads, width, generator=generator),
    }
    quantizer.calibrate_(**{name: values[name] for name, _ in quantizer.named_buffers()})
    return quantizer


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [64, 20, 7])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_and_values_equal_the_quantizer(bits, width, symmetric, centered):
    quantizer = make_quantizer(bits, width, symmetric=symmetric, centered=centered)
    for dtype in (torch.float32, torch.bfloat16):
        x = (3 * torch.randn(2, 3, 11, width, generator=torch.Generator().manual_seed(1))).to(dtype)
        assert fits_kernels(quantizer, x)
        packed = pack_states(quantizer, x)
        assert torch.equal(packed, quantizer.encode(x))
        out = torch.full((2, 3, 14, width), 9.0, dtype=dtype)
        unpack_states_(out, packed, 2, quantizer)
        assert torch.equal(out[:, :, 2:13], quantizer(x))
        assert (out[:, :, [0, 1, 13]] == 9).all()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_a_matrix_and_a_turned_mean_are_added_as_torch_does(width, rows):
    quantizer, generator = make_quantizer(4, width), torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 11, width, generator=generator)
    mean, table = torch.randn(3, width, generator=generator), torch.randn(40, width, generator=generator)
    places = torch.randint(0, 40, (rows, 11), generator=generator, dtype=torch.int32)
    cos, sin = (half.repeat(1, 1, 2).unsqueeze(1) for half in table[places.long()].chunk(2, -1))
    turned = torch.cat((-mean[:, width // 2 :], mean[:, : width // 2]), -1)
    constant = mean[:, None] * cos + turned[:, None] * sin
    expected = hadamard_transform(quantizer(x), True) + constant
    out = torch.empty_like(x)
    matrix = find_single_matrix(width, True)
    unpack_states_(out, pack_states(quantizer, x), 0, quantizer, matrix=matrix, mean=mean, places=places, table=table)
    assert torch.allclose(out, expected, rtol=0, atol=2e-6)  # measured: 0; torch may add in another order
    unpack_states_(out, pack_states(quantizer, x), 0, quantizer, mean=mean)
    assert torch.equal(out, quantizer(x) + mean[:, None])


def test_operands_that_do_not_fit_are_refused():
    quantizer = make_quantizer(4, 16)
    packed, out = pack_states(quantizer, torch.zeros(1, 3, 5, 16)), torch.empty(1, 3, 5, 16)
    with pytest.raises(RuntimeError, match="do not fit states"):
        unpack_states_(out, packed, 1, quantizer)
    places = torch.full((1, 5), 9, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="place 9 is outside a table of 4"):
        unpack_states_(out, packed, 0, quantizer, mean=torch.zeros(3, 16), places=places, table=torch.zeros(4, 16))


def test_formats_groups_and_ranges_per_token_are_left_to_torch():
    x = torch.zeros(1, 3, 5, 16)
    for options in ({"format": "fp8_e4m3"}, {"group_size": 8}):
        quantizer = ActivationQuantizer(QuantizerSpec(8, **options), 16, 3)
        quantizer.calibrate_(scale=torch.ones(quantizer.scale.shape))
        assert quantizer.stores_codes
        assert not fits_kernels(quantizer, x)
        assert torch.equal(pack_states(quantizer, x), quantizer.encode(x))
    assert not fits_kernels(make_quantizer(4, 16), x.double())
