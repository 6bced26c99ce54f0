"""Symmetric integer quantization: choose a scale, quantize, dequantize, and the two in one (fake quantization).

A b-bit quantizer maps x to the integer round(x / scale), clipped to [-2^(b-1), 2^(b-1) - 1]; the value it stands for
is integer * scale. The scale puts the largest magnitude on the largest *positive* integer:

    scale = factor * max|x| / (2^(b-1) - 1)          x = [-3.5, 1, 7], 4 bits -> scale 1, integers [-4, 1, 7]

(round half to even, as torch.round). `factor` < 1 clips: the outermost values move to the edge and all others get a
finer step. 16 bits means "not quantized" throughout the project. Zero is always representable.
"""

import torch
from torch import nn


def integer_range(bits: int) -> tuple[int, int]:
    """(qmin, qmax) of a signed `bits`-bit integer: 4 -> (-8, 7)."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def choose_scale(max_abs: torch.Tensor, bits: int, factor: torch.Tensor | float = 1.0) -> torch.Tensor:
    """The scale for a largest magnitude, elementwise; never zero, infinite or NaN.

    Args:
        max_abs: largest |x| per quantizer, any shape, finite and >= 0, float32.
        bits: 2 to 8.
        factor: clip factor, broadcast against `max_abs`.

    Returns:
        float32, shape of `max_abs` (broadcast). Where `max_abs` is 0 the scale is 1: every value is zero anyway.

    Raises:
        ValueError: `max_abs` holds NaN or infinities (the statistics are broken; nothing sensible can follow).
    """
    if not torch.isfinite(max_abs).all():
        raise ValueError("the largest magnitude is not finite; the calibration data or the model overflow")
    scale = max_abs.float() * factor / integer_range(bits)[1]
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(max_abs > 0, scale.clamp_min(tiny), torch.ones_like(scale))


def quantize(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers in `integer_range(bits)`, still in x's dtype (a cast to int8 loses nothing). `scale` broadcasts."""
    qmin, qmax = integer_range(bits)
    return (x / scale).round_().clamp_(qmin, qmax)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """quantize, then dequantize: x moved to the nearest representable value, same shape and dtype.

    The division runs in float32 at least, so that bfloat16 activations do not pick another integer.
    """
    return quantize(x.float(), scale, bits).mul_(scale).to(x.dtype)


def group_weight(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """View a weight by quantization groups: [out, in] -> [out, G, in / G]; group_size -1 is one group a row."""
    size = weight.shape[1] if group_size == -1 else group_size
    return weight.reshape(weight.shape[0], -1, size)


def quantize_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Round a weight to the nearest integers.

    Args:
        weight: [out, in] float.
        scale: [out, G] float32, G groups along the input: weight [8, 16], group_size 4 -> scale [8, 4].

    Returns:
        int8 [out, in].
    """
    grouped = weight.float().reshape(*scale.shape, -1)
    return quantize(grouped, scale.unsqueeze(-1), bits).to(torch.int8).reshape(weight.shape)


def dequantize_weight(integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [out, in] from int8 [out, in] and scale [out, G]."""
    grouped = integers.float().reshape(*scale.shape, -1)
    return (grouped * scale.unsqueeze(-1)).reshape(integers.shape)


class StaticQuantizer(nn.Module):
    """Fake-quantizes whatever passes with a fixed scale: one for the tensor, or one per head.

    Until it has a scale (and always at 16 bits) it passes its input on unchanged, which is how statistics are taken:
    a forward hook on the quantizer sees exactly the values it will be asked to quantize.

    Attributes:
        bits: 2-8, or 16 for "not quantized".
        scale: float32 of the shape given, [] per tensor or [heads, 1, 1] against [B, heads, T, d].
        fired: how many times it has quantized, so that an evaluation can check that every quantizer took part.
    """

    def __init__(self, bits: int, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.bits = bits
        self.fired = 0
        if bits < 16:
            self.register_buffer("scale", torch.full(shape, torch.nan, dtype=torch.float32))
        self.calibrated = False

    def set_scale_(self, scale: torch.Tensor) -> None:
        """Fix the scale (any shape with the right number of elements); from now on the quantizer acts."""
        self.scale = scale.detach().float().reshape(self.scale.shape).to(self.scale.device)
        self.calibrated = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bits >= 16 or not self.calibrated:
            return x
        self.fired += 1
        return fake_quantize(x, self.scale, self.bits)
