"""Rotate each row of activations and round it to integers of 8 bits with a scale of its own, in one pass.

    y = x H,   scale = max |y| / 127,   integer = round(y / scale)

The result equals `HadamardTransform` and `round_rows`. Sums of the transform are in float32 and in another order than
torch's. So a value at the edge between two integers may get either of them.
"""

from collections.abc import Callable

import torch
from torch import nn

from pipeline.kernels.compiler import DTYPES, find_kernels
from pipeline.numerics.hadamard import HadamardTransform, factor_hadamard, paley_matrix
from pipeline.numerics.quantizer import round_rows

_BITS = 8


class RowCodes(nn.Module):
    """Turns x [..., width] into integers int8 of the same shape and float32 scales [..., 1]."""

    def __init__(self, width: int, rotate: bool) -> None:
        super().__init__()
        self.transform = HadamardTransform(width, torch.float32) if rotate else None
        factors = factor_hadamard(width if rotate else 1)
        self.sylvester = factors.power_of_two
        self.paley = [paley_matrix(order).float().contiguous() for order in factors.paley]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RowCodes":
        """Move to another device. The transform stays float32."""
        if self.transform is not None:
            for name, buffer in self.transform.named_buffers():
                setattr(self.transform, name, buffer.to(fn(buffer).device))
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.device.type == "cpu" and x.dtype in DTYPES and find_kernels():
            codes, scale = torch.ops.prefixquant.row_codes(x.detach(), self.paley, self.sylvester)
            return codes, scale
        rows = x.detach().float()
        integers, scale = round_rows(rows if self.transform is None else self.transform(rows), _BITS)
        return integers.to(torch.int8), scale
