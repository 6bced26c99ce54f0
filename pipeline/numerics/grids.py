"""Grids: the values that a quantizer can represent, in units of its scale, and the scales that a format allows.

A quantizer computes grid(x / scale) * scale. Everything that differs between formats belongs to the grid: the values to
round to, the ends of the range, how a scale follows from a range, and which codes represent which values.

    IntegerGrid   integers with float32 scales; the only grid with zero points. Codes are the integers
    E4M3Grid      fp8_e4m3: 8-bit floats up to ±448 with float32 scales. Codes are the bytes
    E2M1Grid      4-bit floats up to ±6 whose scales are rounded, too: to powers of two (mxfp4), or to E4M3 times one
                  power of two for the whole tensor (nvfp4, weights). Codes are sign and index, 0 to 15
    BlockGrid     nvfp4 for activations, whose values are not known beforehand: the scale belongs to the tensor (static)
                  or to a token, and each block of 16 values gets its own scale when it is rounded

In E2M1 a range [-a, a] has the scale a / 6. mxfp4 is different: its scale is the power of two that brings a into
[3.5, 7), and values beyond 6 are clipped. (compressed-tensors does the same; OCP's own rule gives [4, 8).) The scale of
a whole nvfp4 tensor is a power of two, a choice of this project. E4M3 is equally fine anywhere in its range, and
products of values and scales are then exact in bfloat16 and in any order.

In training, all rounding passes gradients straight through, the rounding of scales too.
"""

import functools
from abc import ABC, abstractmethod
from typing import Any

import torch

TINY = torch.finfo(torch.float32).tiny
_E4M3_SMALLEST = 2.0**-9
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NVFP4_BLOCK = 16
_E8M0_BIAS = 127


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def round_through(x: torch.Tensor) -> torch.Tensor:
    """Return round(x) with the gradient of x: the straight-through estimator (arXiv:1308.3432)."""
    return _RoundThrough.apply(x) if x.requires_grad and torch.is_grad_enabled() else x.round()


class Grid(ABC):
    """The values of a format.

    Attributes:
        bits: bits of a value.
        high: the largest value, in units of the scale.
    """

    bits: int
    high: float

    @abstractmethod
    def snap_(self, x: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        """Round x, in units of the scale, to the nearest values of the grid, half to even. Overwrites x."""

    @abstractmethod
    def locate(self, x: torch.Tensor, zero_point: torch.Tensor | int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `snap_` of a copy of x, and a mask of the values inside the range."""

    @abstractmethod
    def find_ends(self, zero_point: torch.Tensor | None) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Return the two ends of the range, in units of the scale. Values beyond them are clipped."""

    def choose(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scale and zero point of a range; see `quantizer.choose_parameters`."""
        scale = torch.maximum(-low, high) / self.high
        scale = torch.where((low < 0) | (high > 0), scale.clamp_min(TINY), torch.ones_like(scale))
        return self.round_scale(scale), None

    def round_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """Return the nearest scales [...] that the format has. Differentiable. Scales of the format do not change."""
        return scale


class StoredGrid(Grid):
    """A grid whose values can be stored as codes, as weights are.

    Attributes:
        signed: codes are int8 and start at -2^(bits-1); otherwise they are uint8 and start at 0.
    """

    signed = False

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype of codes."""
        return torch.int8 if self.signed else torch.uint8

    @abstractmethod
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return the codes of values of the grid."""

    @abstractmethod
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the values of codes, float32, in new memory."""

    def pack_scale(
        self, scale: torch.Tensor, common: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scales as stored (float32 or bytes), and their common factor, float32 [1], or None.

        `common` replaces the factor that would be chosen from `scale`.
        """
        return scale, None

    def unpack_scale(self, packed: torch.Tensor, common: torch.Tensor | None) -> torch.Tensor:
        """Undo `pack_scale`. Returns float32."""
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
        # Divide before adding, because the difference of two huge finite numbers may overflow.
        scale = torch.maximum(-low, high) / self.high if self.signed else high / self.high - low / self.high
        scale = torch.where((low < 0) | (high > 0), scale.clamp_min(TINY), torch.ones_like(scale))
        return scale, None if self.signed else round_through(-low / scale).clamp(self.low, self.high)


class _FloatGrid(StoredGrid):
    """Floats on both sides of zero. Values beyond `high` are clipped."""

    def locate(self, x: torch.Tensor, zero_point: torch.Tensor | int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return self.snap_(x.clone()), x.abs() <= self.high


class E4M3Grid(_FloatGrid):
    """The values of torch.float8_e4m3fn."""

    bits, high = 8, 448.0

    def snap_(self, x: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        return x.copy_(x.clamp_(-self.high, self.high).to(torch.float8_e4m3fn))

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.float8_e4m3fn).view(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.float8_e4m3fn).float()

    def find_ends(self, zero_point: torch.Tensor | None) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        return -464.0, 464.0  # half-way to the next value, 480, which the format lacks


class E2M1Grid(_FloatGrid):
    """4-bit floats. Codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6, and codes 8 to 15 are their negatives."""

    bits, high = 4, 6.0

    def snap_(self, x: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        magnitude = x.clamp_(-self.high, self.high).abs()
        step = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
        return x.div_(step).round_().mul_(step)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        indices = torch.searchsorted(torch.tensor(_MAGNITUDES, device=values.device), values.abs().contiguous())
        return (indices + 8 * (values < 0)).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], device=codes.device)
        return table[codes.int()]

    def find_ends(self, zero_point: torch.Tensor | None) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        return -7.0, 7.0


class MXFP4Grid(E2M1Grid):
    """E2M1 with powers of two as scales, stored as their exponent plus 127 (E8M0)."""

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
    """E2M1 with scales in E4M3, times one power of two that brings the tensor's largest scale into (224, 448]."""

    def round_scale(self, scale: torch.Tensor) -> torch.Tensor:
        common = self._find_common(scale.detach())
        rounded = (scale.detach() / common).clamp_(_E4M3_SMALLEST, E4M3Grid.high).to(torch.float8_e4m3fn).float()
        return _pass_through(scale, rounded.mul_(common))

    def pack_scale(
        self, scale: torch.Tensor, common: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        common = self._find_common(scale) if common is None else common
        return (scale / common).to(torch.float8_e4m3fn).view(torch.uint8), common

    def unpack_scale(self, packed: torch.Tensor, common: torch.Tensor | None) -> torch.Tensor:
        assert common is not None, "nvfp4 scales have a common factor"
        return packed.view(torch.float8_e4m3fn).float() * common

    @staticmethod
    def _find_common(scale: torch.Tensor) -> torch.Tensor:
        return _power_of_two_above(scale.max().reshape(1) / E4M3Grid.high)


class BlockGrid(Grid):
    """nvfp4 in units of the tensor's scale: E2M1 whose scale, in E4M3, follows from the largest of each 16 values."""

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
        """Return the scales of blocks: [..., 16] -> [..., 1]. One that rounds to 0 becomes 1; its values become 0."""
        scales = (blocks.abs().amax(-1, keepdim=True) / _E2M1.high).clamp_max_(E4M3Grid.high)
        scales = scales.to(torch.float8_e4m3fn).to(blocks.dtype)
        return scales.where(scales > 0, 1.0)


_E2M1 = E2M1Grid()


def integer_range(bits: int, symmetric: bool = True) -> tuple[int, int]:
    """Return (qmin, qmax): 4 bits -> (-8, 7) if symmetric, else (0, 15)."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)


@functools.cache
def find_grid(name: str, bits: int, symmetric: bool = True, group_size: int = -1) -> Grid:
    """Return the grid of a format. nvfp4 has two: block scales are stored (group_size 16), or computed later (-1)."""
    if name == "fp8_e4m3":
        return E4M3Grid()
    if name == "mxfp4":
        return MXFP4Grid()
    if name == "nvfp4":
        return BlockGrid() if group_size == -1 else NVFP4Grid()
    return IntegerGrid(bits, symmetric)


def as_grid(grid: Grid | int, symmetric: bool = True) -> Grid:
    """Return `grid` itself, or the grid of integers with this number of bits."""
    return grid if isinstance(grid, Grid) else find_grid("int", grid, symmetric)


def as_stored_grid(grid: Grid | int, symmetric: bool = True) -> StoredGrid:
    """Do the same as `as_grid`, for weights, whose values are stored."""
    stored = as_grid(grid, symmetric)
    assert isinstance(stored, StoredGrid), f"weights cannot be stored in {type(stored).__name__}"
    return stored


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent exactly, float32. Exponents are clamped to the normal range."""
    exponent = exponent.int().clamp(-126, 127)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _power_of_two_above(x: torch.Tensor) -> torch.Tensor:
    """Return the smallest power of two that is at least x > 0."""
    mantissa, exponent = torch.frexp(x)
    return _power_of_two(exponent - (mantissa == 0.5).int())


def _pass_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Return `rounded` with the gradient of x."""
    return rounded + (x - x.detach()) if x.requires_grad and torch.is_grad_enabled() else rounded
