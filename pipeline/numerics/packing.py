"""Integers of 2 to 8 bits in as few bytes, along the last dimension.

Bits are laid end to end, least significant first: of 4 bits, two to a byte, the first in the low half; of 3 bits, eight
to three bytes. A row that does not fill its last byte is padded with zero bits, so rows always begin at a byte:

    [1, 2, 3], 4 bits -> [0x21, 0x03]
"""

import math

import torch

from pipeline.numerics.grids import integer_range


def packed_width(width: int, bits: int) -> int:
    """Bytes that `width` integers take: 576 of 4 bits -> 288, 5 of 3 bits -> 2."""
    return math.ceil(width * bits / 8)


def pack_integers(integers: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """[..., n] int8 (symmetric) or uint8 in the range of `bits` -> uint8 [..., packed_width(n, bits)].

    Raises:
        ValueError: a value is out of range.
    """
    qmin, qmax = integer_range(bits, symmetric)
    if integers.numel() and not (qmin <= integers.min() and integers.max() <= qmax):
        raise ValueError(
            f"integers from {integers.min()} to {integers.max()} do not fit {bits} bits ({qmin} to {qmax})"
        )
    codes = (integers.to(torch.int16) - qmin).to(torch.uint8)
    if bits == 8:
        return codes
    per_byte = 8 // bits
    if per_byte * bits == 8:
        codes = _pad(codes, per_byte).unflatten(-1, (-1, per_byte))
        packed = codes[..., 0].clone()
        for place in range(1, per_byte):
            packed |= codes[..., place] << (place * bits)
        return packed
    flags = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8)) & 1
    flags = _pad(flags.flatten(-2), 8).unflatten(-1, (-1, 8))
    return (flags << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def unpack_integers(packed: torch.Tensor, bits: int, symmetric: bool, width: int) -> torch.Tensor:
    """Undo `pack_integers`: uint8 [..., packed_width(width, bits)] -> [..., width], int8 (symmetric) or uint8."""
    qmin, _ = integer_range(bits, symmetric)
    per_byte = 8 // bits
    if per_byte * bits == 8:
        codes = torch.empty(*packed.shape, per_byte, dtype=torch.uint8, device=packed.device)
        for place in range(per_byte):
            codes[..., place] = packed >> (place * bits)
        codes = codes.flatten(-2)[..., :width]
        codes = codes & ((1 << bits) - 1) if bits < 8 else codes
    else:
        places = torch.arange(8, dtype=torch.uint8, device=packed.device)
        flags = ((packed.unsqueeze(-1) >> places) & 1).flatten(-2)[..., : width * bits].unflatten(-1, (width, bits))
        codes = (flags << places[:bits]).sum(-1).to(torch.uint8)
    return (codes.to(torch.int16) + qmin).to(torch.int8) if symmetric else codes


def _pad(values: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % multiple))
