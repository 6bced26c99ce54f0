"""Integers times integers for a few tokens at a time, with weights of 4 bits. Reading the weights dominates the time.

    y = scale_x scale_w (n_x n_w) + constant      n_x = code - zero_point, n_w = -8 … 7, summed exactly in int32

Weights are stored as n_w + 8, two per byte. This is half of the memory that int8 kernels read. With z = zero_point:

    sum of (code - z) n_w = sum of code (n_w + 8)  -  8 sum of code  -  z sum of n_w

With more tokens the arithmetic dominates, and oneDNN's kernel is faster (`integer_product.py`).
"""

from dataclasses import dataclass

import torch

from pipeline.kernels.compiler import find_kernels
from pipeline.kernels.operands import IntegerOperands

FEW = 8  # up to this many tokens this product is the faster one
# The same constants as in kernels.cpp:
_TILE = 4  # outputs that are computed together
_PAIRED = 32  # bytes that hold 64 weights: weight j in the low half of byte j, weight 32 + j in the high half


@dataclass(frozen=True)
class NibbleOperands:
    """All arguments of the operator except the codes.

    Attributes:
        packed: uint8 [out, in / 2], `out` rounded up to a multiple of 4 and `in` to one of 64.
        scale: float32 [out], scale_x scale_w.
        offset: int32 [out], z sum of n_w.
        constant: float32 [out].
        width: `in`.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    constant: torch.Tensor
    width: int

    def multiply(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply codes uint8 [..., in] by the weights: [..., out] in `dtype`, float32 or bfloat16.

        Raises:
            ValueError: the codes have another number of inputs than the weights.
        """
        if codes.shape[-1] != self.width:
            raise ValueError(f"codes of {codes.shape[-1]} inputs for weights of {self.width}")
        return torch.ops.prefixquant.nibble_product(codes, self.packed, self.scale, self.offset, self.constant, dtype)


def pack_nibbles(operands: IntegerOperands) -> NibbleOperands | None:
    """Pack weights of 4 bits. Returns None if they have more bits, or if there are no kernels."""
    integers = operands.integers
    if integers.min() < -8 or integers.max() > 7 or not find_kernels():
        return None
    out, width = integers.shape
    padded = torch.zeros(_round_up(out, _TILE), _round_up(width, 2 * _PAIRED), dtype=torch.uint8)
    padded[:out, :width] = (integers + 8).to(torch.uint8)
    low, high = padded.unflatten(1, (-1, 2, _PAIRED)).unbind(2)
    return NibbleOperands(
        packed=(low | (high << 4)).flatten(1).contiguous(),
        scale=operands.weight_scale * operands.scale,
        offset=integers.sum(1, dtype=torch.int32) * operands.zero_point,
        constant=operands.constant.contiguous(),
        width=width,
    )


def _round_up(count: int, step: int) -> int:
    """Return the smallest multiple of `step` that is at least `count`."""
    return -(-count // step) * step
