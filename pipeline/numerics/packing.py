"""Pack integers of 2 to 8 bits along the last dimension, without unused bits between them.

Bits are laid end to end, least significant first. With 4 bits, a byte holds two integers, the first in its low half.
With 3 bits, three bytes hold eight integers. Zero bits fill the last byte of a row, so every row begins at a byte:

    [1, 2, 3], 4 bits -> [0x21, 0x03]
"""

import math

import torch

from pipeline.numerics.grids import integer_range


def packed_width(width: int, bits: int) -> int:
    """Return the bytes that `width` integers take: 576 integers of 4 bits -> 288, 5 of 3 bits -> 2."""
    return math.ceil(width * bits / 8)


def pack_integers(integers: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """Pack integers.

    Args:
        integers: [..., n] in the range of `bits`, int8 if symmetric, otherwise uint8.

    Returns:
        uint8 [..., packed_width(n, bits)].

    Raises:
        ValueError: a value is out of range.
    """
    qmin, qmax = integer_range(bits, symmetric)
    if integers.numel() and not (qmin <= integers.min() and integers.max() <= qmax):
        raise ValueError(
            f"integers from {integers.min()} to {integers.max()} do not fit {bits} bits ({qmin} to {qmax})"
        )
    return pack_codes((integers.to(torch.int16) - qmin).to(torch.uint8), bits)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes uint8 [..., n] that are below 2^bits: uint8 [..., packed_width(n, bits)]."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    if per_byte * bits == 8:
        codes = _pad(codes, per_byte).unflatten(-1, (-1, per_byte))
        packed = codes[..., 0].clone()
        for place in range(1, per_byte):
            packed |= codes[..., place] << (place * bits)
        return packed
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    flags = (codes.unsqueeze(-1) >> places[:bits]) & 1
    flags = _pad(flags.flatten(-2), 8).unflatten(-1, (-1, 8))
    return (flags << places).sum(-1).to(torch.uint8)


def unpack_integers(packed: torch.Tensor, bits: int, symmetric: bool, width: int) -> torch.Tensor:
    """Undo `pack_integers`: uint8 [..., packed_width(width, bits)] -> [..., width], int8 if symmetric, else uint8."""
    qmin, _ = integer_range(bits, symmetric)
    codes = unpack_codes(packed, bits, width)
    return (codes.to(torch.int16) + qmin).to(torch.int8) if symmetric else codes


def unpack_codes(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Undo `pack_codes`: uint8 [..., packed_width(width, bits)] -> uint8 [..., width]."""
    per_byte = 8 // bits
    if per_byte * bits == 8:
        codes = torch.empty(*packed.shape, per_byte, dtype=torch.uint8, device=packed.device)
        for place in range(per_byte):
            codes[..., place] = packed >> (place * bits)
        codes = codes.flatten(-2)[..., :width]
        return codes & ((1 << bits) - 1) if bits < 8 else codes
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    flags = ((packed.unsqueeze(-1) >> places) & 1).flatten(-2)[..., : width * bits].unflatten(-1, (width, bits))
    return (flags << places[:bits]).sum(-1).to(torch.uint8)


def _pad(values: torch.Tensor, multiple: int) -> torch.Tensor:
    """Append zeros until the last dimension is a multiple of `multiple`."""
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % multiple))
