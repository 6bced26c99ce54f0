"""Rotate, center and round activations to codes in one pass, for layers that multiply integers.

    code = clip(round((x H - shift) / scale) + zero_point, 0, 2^b - 1)

The result equals `HadamardTransform` followed by `ActivationQuantizer.to_codes`, for which torch takes eight passes
or more. Sums are in float32 for every dtype of x, and in another order than torch's. So a value at the edge between two
codes may get either of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeline.kernels.compiler import DTYPES, find_kernels
from pipeline.numerics.hadamard import CPU, HadamardTransform, factor_hadamard, paley_matrix
from pipeline.numerics.quantizer import ActivationQuantizer


class RotatedCodes(nn.Module):
    """Turns x [..., width], float32 or bfloat16, into codes uint8 of the same shape."""

    def __init__(self, quantizer: ActivationQuantizer, width: int, rotate: bool, block_size: int = -1) -> None:
        """Copy the settings of a quantizer and build the matrices of the rotation before it.

        Args:
            quantizer: static, with one scale, set to emit codes.
            width: width of x.
            rotate: whether a Hadamard transform comes before the quantizer.
            block_size: channels that are rotated together; -1: all.
        """
        super().__init__()
        factors = factor_hadamard((width if block_size == -1 else block_size) if rotate else 1)
        self.sylvester, self.count = factors.power_of_two, len(factors.paley)
        for place, order in enumerate(factors.paley):
            self.register_buffer(f"paley_{place}", paley_matrix(order).float().contiguous(), persistent=False)
        shift = quantizer.shift if quantizer.spec.centered else torch.zeros(width)
        self.register_buffer("shift", shift / quantizer.scale, persistent=False)  # in units of the scale
        self.scale, self.zero_point = quantizer.scale.item(), quantizer.code_of_zero
        self.largest = (1 << quantizer.spec.bits) - 1
        self.has_kernels = find_kernels()

    def takes(self, x: torch.Tensor) -> bool:
        """Return whether `forward` supports x on this machine."""
        return self.has_kernels and x.device.type == "cpu" and x.dtype in DTYPES

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RotatedCodes":
        return self  # stays float32 and on the CPU when the model is cast or moved

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.has_kernels = find_kernels()  # the process or the machine may be another one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        paley = [getattr(self, f"paley_{place}") for place in range(self.count)]
        return torch.ops.prefixquant.rotated_codes(
            x, paley, self.sylvester, self.shift, self.scale, self.zero_point, self.largest
        )


class CodesByTorch(nn.Module):
    """Does the same as `RotatedCodes` without kernels and on other devices. It rotates in float32, too."""

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
    *,
    rotate: bool,
    dtype: torch.dtype,
    block_size: int = -1,
    device: torch.device = CPU,
) -> nn.Module:
    """Return the fastest module that makes codes of x with this `dtype` and `device`."""
    if device.type == "cpu" and dtype in DTYPES and find_kernels():
        return RotatedCodes(quantizer, width, rotate, block_size)
    return CodesByTorch(quantizer, width, rotate, block_size, device)
