"""Integers times integers, weights of 4 bits, for a few tokens at a time: what takes the time is reading the weights.

    y = scale_x scale_w (n_x n_w) + constant      n_x = code - zero_point, n_w = -8 … 7, summed exactly in int32

They are kept as n_w + 8, two to a byte, half of what int8 kernels read:

    sum of (code - z) n_w = sum of code (n_w + 8)  -  8 sum of code  -  z sum of n_w

Of more tokens the products themselves take the time, and oneDNN's are faster (integer_product.py).
"""

from dataclasses import dataclass

import torch

from pipeline.kernels.compiler import find_kernels
from pipeline.kernels.operands import IntegerOperands

FEW = 8  # tokens up to which it is the faster one
# As kernels.cpp has them:
_TILE = 4  # outputs that are computed together
_PAIRED = 32  # bytes that hold 64 weights: number j in the low half of byte j, 32 + j in the high one


@dataclass(frozen=True)
class NibbleOperands:
    """Arguments of the operator, beside the codes.

    Attributes:
        packed: uint8 [out, in / 2], both rounded up to whole tiles.
        scale: float32 [out], of input and weights.
        offset: int32 [out], z sum of n_w.
        constant: float32 [out].
        width: in.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    constant: torch.Tensor
    width: int

    def multiply(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """codes uint8 [..., in] -> [..., out] in `dtype`, float32 or bfloat16."""
        if codes.shape[-1] != self.width:
            raise ValueError(f"codes of {codes.shape[-1]} inputs for weights of {self.width}")
        arguments = self.packed, self.scale, self.offset, self.constant
        return torch.ops.prefixquant.nibble_product(codes, *arguments, dtype)


def pack_nibbles(operands: IntegerOperands) -> NibbleOperands | None:
    """None where weights have more than 4 bits, or there are no kernels."""
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
    return -(-count // step) * step
