"""The values a quantizer may leave, in units of its scale, and the scales it may have: all that a number format is.

A quantizer computes grid(x / scale) * scale. Everything that differs from format to format is asked of the grid: where
values are rounded to and where the range ends, how a scale follows from a range, and what codes stand for values:

    IntegerGrid   integers, float32 scales; the only one with zero points. Codes are the integers
    E4M3Grid      fp8_e4m3: 8-bit floats to ±448, float32 scales. Codes are the bytes
    E2M1Grid      4-bit floats to ±6, of scales that are themselves rounded: to powers of two (mxfp4), or to E4M3 times
                  one power of two for the whole tensor (nvfp4, weights). Codes are sign and place, 0 to 15
    BlockGrid     nvfp4 where values are not known beforehand (activations): the scale is the tensor's, static or of a
                  token, and every 16 values get theirs as they come

A range [-a, a] has scale a / 6 in E2M1, but for mxfp4, where it is the power of two that brings a into [3.5, 7): what
lies beyond 6 is cut off (as compressed-tensors does; OCP's own rule leaves [4, 8)). The scale for a whole tensor of
nvfp4 is a power of two by our choice: E4M3 is as fine anywhere in its range, and values times scales are then exact in
bfloat16 and in any order.

In training all rounding, that of scales too, passes gradients straight through.
"""

import functools
from abc import ABC, abstractmethod
from typing import Any

import torch

TINY = torch.finfo(torch.float32).tiny
_E4M3_LEAST = 2.0**-9
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NVFP4_BLOCK = 16
_E8M0_BIAS = 127


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def round_through(x: torch.Tensor) -> torch.Tensor:
    """round(x) whose gradient is 1: the straight-through estimator (arXiv:1308.3432)."""
    return _RoundThrough.apply(x) if x.requires_grad and torch.is_grad_enabled() else x.round()


class Grid(ABC):
    """What a format lets a value be.

    Attributes:
        bits: of a value.
        high: the largest value, in units of the scale.
    """

    bits: int
    high: float

    @abstractmethod
    def snap_(self, x: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        """The nearest values of the grid to x, in units of the scale; half to even; overwrites x."""

    @abstractmethod
    def locate(self, x: torch.Tensor, zero_point: torch.Tensor | int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """`snap_` of a copy, and where x lies inside the range."""

    @abstractmethod
    def find_ends(self, zero_point: torch.Tensor | None) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Between what, in units of the scale, x is rounded; beyond, it is cut off."""

    def choose(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `quantizer.choose_parameters`."""
        scale = torch.maximum(-low, high) / self.high
        scale = torch.where((low < 0) | (high > 0), scale.clamp_min(TINY), torch.ones_like(scale))
        return self.round_scale(scale), None

    def round_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest scales [...] that the format has; differentiable; what is one already stays as it is."""
        return scale


class StoredGrid(Grid):
    """A grid whose values are stored: weights have one.

    Attributes:
        signed: codes are int8, from -2^(bits-1) on; otherwise uint8, from 0 on.
    """

    signed = False

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    @abstractmethod
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the grid -> codes."""

    @abstractmethod
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes -> float32 values, in memory of their own."""

    def pack_scale(
        self, scale: torch.Tensor, common: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As stored: the scales, float32 or bytes, and what all of them are multiplied by, float32 [1], or None.

        `common` is that factor, where it is not to be the scales' own.
        """
        return scale, None

    def unpack_scale(self, packed: torch.Tensor, common: torch.Tensor | None) -> torch.Tensor:
        """Undo `pack_scale`: float32."""
        return packed


class IntegerGrid(StoredGrid):
    """-2^(b-1) … 2^(b-1)-1 (symmetric), or 0 … 2^b-1 with a zero point."""

    def __init__(self, bits: int, symmetric: bool) -> None:
        self.bits, self.signed = bits, symmetric
        self.low, self.high = integer_range(bits, symmetric)

    def snap_(self, x: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        x.round_()
        if zero_point is not None:
            x += zero_point
        return x.clamp_(self.low, self.high)

    def locate(self, x: torch.Tensor, zero_point: torch.Tensor | int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        n = x.round() + zero_point
        inside = (n >= self.low) & (n <= self.high)
        return n.clamp_(self.low, self.high), inside

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.code_dtype)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.float()

    def find_ends(self, zero_point: torch.Tensor | None) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        offset = 0 if zero_point is None else zero_point
        return self.low - 0.5 - offset, self.high + 0.5 - offset

    def choose(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Divided before they are added: the difference of two huge finite numbers may overflow.
        scale = torch.maximum(-low, high) / self.high if self.signed else high / self.high - low / self.high
        scale = torch.where((low < 0) | (high > 0), scale.clamp_min(TINY), torch.ones_like(scale))
        return scale, None if self.signed else round_through(-low / scale).clamp(self.low, self.high)


class _FloatGrid(StoredGrid):
    """Values on both sides of zero, those beyond `high` cut off."""

    def locate(self, x: torch.Tensor, zero_point: torch.Tensor | int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return self.snap_(x.clone()), x.abs() <= self.high


class E4M3Grid(_FloatGrid):
    """torch.float8_e4m3fn."""

    bits, high = 8, 448.0

    def snap_(self, x: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        return x.copy_(x.clamp_(-self.high, self.high).to(torch.float8_e4m3fn))

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.float8_e4m3fn).view(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.float8_e4m3fn).float()

    def find_ends(self, zero_point: torch.Tensor | None) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        return -464.0, 464.0  # half way to what would come next


class E2M1Grid(_FloatGrid):
    """Codes 0 to 7 stand for 0, 0.5, 1, 1.5, 2, 3, 4, 6, and 8 to 15 for their negatives."""

    bits, high = 4, 6.0

    def snap_(self, x: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        magnitude = x.clamp_(-self.high, self.high).abs()
        step = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
        return x.div_(step).round_().mul_(step)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        places = torch.searchsorted(torch.tensor(_MAGNITUDES, device=values.device), values.abs().contiguous())
        return (places + 8 * (values < 0)).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], device=codes.device)
        return table[codes.int()]

    def find_ends(self, zero_point: torch.Tensor | None) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        return -7.0, 7.0


class MXFP4Grid(E2M1Grid):
    """E2M1 of powers of two; stored as their exponents, 127 added (E8M0)."""

    def choose(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        largest = torch.maximum(-low, high)
        mantissa, exponent = torch.frexp(largest.detach())  # [0.5, 1) times a power of two
        scale = _power_of_two(exponent - 3 + (mantissa >= 0.875))
        scale = torch.where(largest > 0, scale, torch.ones_like(scale))
        if largest.requires_grad and torch.is_grad_enabled():
            scale = scale + (largest - largest.detach()) / self.high
        return scale, None

    def round_scale(self, scale: torch.Tensor) -> torch.Tensor:
        return _pass_through(scale, _power_of_two(scale.detach().log2().round()))

    def pack_scale(
        self, scale: torch.Tensor, common: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (torch.frexp(scale).exponent - 1 + _E8M0_BIAS).to(torch.uint8), None

    def unpack_scale(self, packed: torch.Tensor, common: torch.Tensor | None) -> torch.Tensor:
        return _power_of_two(packed.int() - _E8M0_BIAS)


class NVFP4Grid(E2M1Grid):
    """E2M1 of scales in E4M3 times the power of two that brings the tensor's largest into (224, 448]."""

    def round_scale(self, scale: torch.Tensor) -> torch.Tensor:
        common = self._find_common(scale.detach())
        rounded = (scale.detach() / common).clamp_(_E4M3_LEAST, E4M3Grid.high).to(torch.float8_e4m3fn).float()
        return _pass_through(scale, rounded.mul_(common))

    def pack_scale(
        self, scale: torch.Tensor, common: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        common = self._find_common(scale) if common is None else common
        return (scale / common).to(torch.float8_e4m3fn).view(torch.uint8), common

    def unpack_scale(self, packed: torch.Tensor, common: torch.Tensor | None) -> torch.Tensor:
        return packed.view(torch.float8_e4m3fn).float() * common

    @staticmethod
    def _find_common(scale: torch.Tensor) -> torch.Tensor:
        return _power_of_two_above(scale.max().reshape(1) / E4M3Grid.high)


class BlockGrid(Grid):
    """nvfp4 in units of the tensor's scale: E2M1 of a scale in E4M3 that every 16 values get from their largest."""

    bits, high = 4, 448.0 * 6.0

    def snap_(self, x: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        blocks = x.unflatten(-1, (-1, _NVFP4_BLOCK))
        scales = self._find_scales(blocks)
        _E2M1.snap_(blocks.div_(scales)).mul_(scales)
        return x

    def locate(self, x: torch.Tensor, zero_point: torch.Tensor | int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = x.unflatten(-1, (-1, _NVFP4_BLOCK))
        inside = blocks.abs() <= _E2M1.high * self._find_scales(blocks)
        return self.snap_(x.clone()), inside.flatten(-2)

    def find_ends(self, zero_point: torch.Tensor | None) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        return -448.0 * 7.0, 448.0 * 7.0

    def round_scale(self, scale: torch.Tensor) -> torch.Tensor:
        return _pass_through(scale, _power_of_two_above(scale.detach()))

    @staticmethod
    def _find_scales(blocks: torch.Tensor) -> torch.Tensor:
        """[..., 16] -> [..., 1]; where it rounds to 0, so do the values, whatever it is."""
        scales = (blocks.abs().amax(-1, keepdim=True) / _E2M1.high).clamp_max_(E4M3Grid.high)
        scales = scales.to(torch.float8_e4m3fn).to(blocks.dtype)
        return scales.where(scales > 0, 1.0)


_E2M1 = E2M1Grid()


def integer_range(bits: int, symmetric: bool = True) -> tuple[int, int]:
    """(qmin, qmax): 4 bits -> (-8, 7) symmetric, (0, 15) asymmetric."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)


@functools.cache
def find_grid(name: str, bits: int, symmetric: bool = True, group_size: int = -1) -> Grid:
    """The grid of a format; nvfp4's depends on whether the scales of its blocks are kept (group_size 16) or not."""
    if name == "fp8_e4m3":
        return E4M3Grid()
    if name == "mxfp4":
        return MXFP4Grid()
    if name == "nvfp4":
        return BlockGrid() if group_size == -1 else NVFP4Grid()
    return IntegerGrid(bits, symmetric)


def as_grid(grid: Grid | int, symmetric: bool = True) -> Grid:
    """The grid itself, or that of integers of so many bits."""
    return grid if isinstance(grid, Grid) else find_grid("int", grid, symmetric)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """float32 2^exponent, within what is neither subnormal nor infinite; exact."""
    exponent = exponent.int().clamp(-126, 127)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _power_of_two_above(x: torch.Tensor) -> torch.Tensor:
    """The least power of two that is at least x > 0."""
    mantissa, exponent = torch.frexp(x)
    return _power_of_two(exponent - (mantissa == 0.5).int())


def _pass_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, with the gradient of x."""
    return rounded + (x - x.detach()) if x.requires_grad and torch.is_grad_enabled() else rounded
