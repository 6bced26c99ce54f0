"""Unpacking returns the packed integers, which take no more bytes than their bits need."""

import pytest
import torch

from pipeline.numerics.packing import pack_integers, packed_width, unpack_integers
from pipeline.numerics.quantizer import integer_range

GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 1), (3, 8), (4, 13), (2, 3, 33), (16, 576), (2, 0)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_unpacking_undoes_packing(bits, symmetric, shape):
    low, high = integer_range(bits, symmetric)
    dtype = torch.int8 if symmetric else torch.uint8
    integers = torch.randint(low, high + 1, shape, generator=GENERATOR).to(dtype)
    if integers.numel() > 2:
        integers.view(-1)[0], integers.view(-1)[-1] = low, high
    packed = pack_integers(integers, bits, symmetric)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], packed_width(shape[-1], bits))
    unpacked = unpack_integers(packed, bits, symmetric, shape[-1])
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, integers)


def test_bytes_equal_cases_written_by_hand():
    def packed(values, bits):
        return pack_integers(torch.tensor(values, dtype=torch.uint8), bits, symmetric=False).tolist()

    assert packed([1, 2, 3], 4) == [0x21, 0x03]
    assert packed([1, 2, 3, 0, 3], 2) == [0b00111001, 0b11]
    assert packed([5, 0, 7], 3) == [0b11000101, 0b1]  # 101, 000, 111: bits 0-2, 3-5, 6-8
    assert packed([200, 7], 8) == [200, 7]
    signed = pack_integers(torch.tensor([-8, 7], dtype=torch.int8), 4, symmetric=True)
    assert signed.tolist() == [0xF0]


@pytest.mark.parametrize("value", [-9, 8])
def test_integers_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match=r"do not fit 4 bits \(-8 to 7\)"):
        pack_integers(torch.tensor([0, value], dtype=torch.int8), 4, symmetric=True)
