"""What a layer that multiplies integers reads of its input, in one pass: rotated, centered, rounded to codes.

    code = clip(round((x H - shift) / scale) + zero_point, 0, 2^b - 1)

as `ActivationQuantizer.to_codes` behind `HadamardTransform`, for which torch takes eight passes or more. Sums are in
float32 whatever the dtype of x, in an order of their own: a value on the edge between two codes may fall to either.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeline.kernels.compiler import DTYPES, find_kernels
from pipeline.numerics.hadamard import CPU, HadamardTransform, paley_matrix, plan_hadamard
from pipeline.numerics.quantizer import ActivationQuantizer


class RotatedCodes(nn.Module):
    """x [..., width], float32 or bfloat16 -> codes uint8 of the same shape."""

    def __init__(self, quantizer: ActivationQuantizer, width: int, rotate: bool, block_size: int = -1) -> None:
        """
        Args:
            quantizer: static, one scale, set to emit codes.
            rotate: a Hadamard transform stands in front of it.
            block_size: that acts on so many channels at a time; -1: on all.
        """
        super().__init__()
        plan = plan_hadamard((width if block_size == -1 else block_size) if rotate else 1)
        self.sylvester, self.count = plan.power_of_two, len(plan.paley)
        for place, order in enumerate(plan.paley):
            self.register_buffer(f"paley_{place}", paley_matrix(order).float().contiguous(), persistent=False)
        shift = quantizer.shift if quantizer.spec.centered else torch.zeros(width)
        self.register_buffer("shift", shift / quantizer.scale, persistent=False)  # in steps
        self.scale, self.zero_point = quantizer.scale.item(), quantizer.code_of_zero
        self.largest = (1 << quantizer.spec.bits) - 1
        self.found = find_kernels()

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `forward` can have x here."""
        return self.found and x.device.type == "cpu" and x.dtype in DTYPES

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RotatedCodes":
        return self  # it stays float32, and here, whatever the model is cast or moved to

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.found = find_kernels()  # another process, or machine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        paley = [getattr(self, f"paley_{place}") for place in range(self.count)]
        return torch.ops.prefixquant.rotated_codes(
            x, paley, self.sylvester, self.shift, self.scale, self.zero_point, self.largest
        )


class CodesByTorch(nn.Module):
    """`RotatedCodes` where there are no kernels, and on other devices than CPUs; rotated in float32 as there."""

    def __init__(
        self,
        quantizer: ActivationQuantizer,
        width: int,
        rotate: bool,
        block_size: int = -1,
        device: torch.device = CPU,
    ) -> None:
        super().__init__()
        self.quantizer = quantizer.to(device)
        self.transform = HadamardTransform(width, torch.float32, block_size, device) if rotate else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quantizer.to_codes(x if self.transform is None else self.transform(x.float()))


def make_codes(
    quantizer: ActivationQuantizer,
    width: int,
    rotate: bool,
    dtype: torch.dtype,
    block_size: int = -1,
    device: torch.device = CPU,
) -> nn.Module:
    """The faster of the two that there is for `dtype` and `device`, those of x."""
    if device.type == "cpu" and dtype in DTYPES and find_kernels():
        return RotatedCodes(quantizer, width, rotate, block_size)
    return CodesByTorch(quantizer, width, rotate, block_size, device)
