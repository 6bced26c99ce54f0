"""Quantization: choose a scale, quantize, dequantize, and the two in one (fake quantization).

A b-bit quantizer maps x to the integer round(x / scale) + zero_point, clipped to its range; the value it stands for is
(integer - zero_point) * scale. Two kinds, told apart by whether there is a zero point:

    symmetric   integers -2^(b-1) … 2^(b-1)-1     scale = max|x| / (2^(b-1) - 1)
                x = [-3.5, 1, 7], 4 bits -> scale 1, integers [-4, 1, 7]
    asymmetric  integers 0 … 2^b-1                scale = (high - low) / (2^b - 1), zero_point = round(-low / scale)
                x = [-3, 0, 12], 4 bits -> scale 1, zero_point 3, integers [0, 3, 15]

with low = min(x, 0) and high = max(x, 0), so that zero is always representable. Rounding is half to even, as
torch.round. A clip factor f < 1 shrinks low and high before the scale is chosen: the outermost values move to the edge
and all others get a finer step. 16 bits means "not quantized" throughout the project.

Floats of 4 and 8 bits take the place of the integers in other formats. What differs is asked of the grid (`grids.py`);
where one is expected below, a number is the bits of integers.

A *centered* quantizer of activations acts on x - mean, with the mean of each channel measured once on calibration text,
and adds the mean back: Q(x - mean) + mean (channel-wise shifting, arXiv:2304.09145, Eq. 5). In the layers that follow,
the constant part is a bias, W mean, known beforehand; it costs nothing and leaves the integers the part that varies.

Values that share a scale are consecutive along the last dimension: a *group*. [..., C] with groups of g is seen as
[..., G, g] and has scales [..., G]; group_size -1 is one group for the whole dimension.

In training, rounding passes gradients straight through (`torch.autograd`): the value, the scale and the zero point all
receive the gradient of the formula above with each round's own offset held constant.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pipeline.numerics.formats import INT
from pipeline.numerics.grids import Grid, as_grid, find_grid
from pipeline.numerics.grids import integer_range as integer_range  # known from here, too
from pipeline.numerics.grids import round_through as round_through
from pipeline.numerics.kept_dtype import KeepsDtype


@dataclass(frozen=True)
class QuantizerSpec:
    """What one quantizer is asked for.

    Attributes:
        bits: 2 to 8, or 16 for "not quantized".
        symmetric: without (True) or with a zero point.
        group_size: consecutive channels that share a scale; -1 for all of the last dimension.
        dynamic: the range is measured on every token anew (activations, keys and values only) instead of fixed.
        centered: activations, keys and values: the mean of each channel is subtracted before quantization and added
            back behind it. Weights: the mean input's share of the rounding error goes into the layer's bias.
        format: of `formats.FORMATS`. A weight in nvfp4 has group_size 16, its blocks' scales being kept; all else in
            nvfp4 has one scale, static or of a token, under which blocks get theirs as they come.
    """

    bits: int = 16
    symmetric: bool = True
    group_size: int = -1
    dynamic: bool = False
    centered: bool = False
    format: str = INT

    @property
    def enabled(self) -> bool:
        return self.bits < 16

    @property
    def grid(self) -> Grid:
        return find_grid(self.format, self.bits, self.symmetric, self.group_size)

    def count_groups(self, width: int) -> int:
        """G for a last dimension of `width`."""
        return 1 if self.group_size == -1 else width // self.group_size

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if self.format == INT:  # as written before there were others
            del values["format"]
        return values


def group(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """View by quantization groups: [..., C] -> [..., G, C / G]."""
    return x.unflatten(-1, (-1, x.shape[-1] if group_size == -1 else group_size))


def measure_range(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high) of each group, float32: [..., G, g] -> [..., G] twice; low <= 0 <= high."""
    low, high = torch.aminmax(grouped, dim=-1)
    return low.float().clamp_max(0), high.float().clamp_min(0)


def choose_parameters(
    low: torch.Tensor, high: torch.Tensor, grid: Grid | int, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point of a range; the scale is never zero, infinite or NaN for finite ranges.

    Args:
        low, high: any shape, float32, low <= 0 <= high; already multiplied by clip factors. Elementwise, but for
            weights in nvfp4, where it is that of the whole tensor.
        symmetric: of integers, where `grid` is their bits.

    Returns:
        scale, float32; where the range is empty it is 1: every value is zero anyway. zero_point, float32 holding
        integers in `integer_range`, or None when symmetric. Both differentiable (straight through the rounding).
    """
    return as_grid(grid, symmetric).choose(low, high)


def require_finite(low: torch.Tensor, high: torch.Tensor) -> None:
    """Raises ValueError where a measured range holds NaN or infinities: nothing sensible can follow."""
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("a range is not finite; the calibration data or the model overflow")


def quantize(
    x: torch.Tensor, scale: torch.Tensor, grid: Grid | int, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Values of the grid, in the dtype of x / scale. `scale` and `zero_point` broadcast; no gradients."""
    return as_grid(grid, zero_point is None).snap_(x / scale, zero_point)


def dequantize(integers: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
    """What float `integers`, or values of another grid, stand for; overwrites them."""
    if zero_point is not None:
        integers -= zero_point
    return integers.mul_(scale)


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, grid: Grid | int, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """quantize, then dequantize: x moved to the nearest representable value, same shape and dtype.

    Computed in float32 at least, so that bfloat16 activations do not pick another integer. Where gradients are wanted
    they reach x (1 inside the range, 0 beyond), scale and zero_point; the values are the same.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scale, zero_point)):
        return _FakeQuantize.apply(wide, scale, as_grid(grid, zero_point is None), zero_point).to(x.dtype)
    return dequantize(quantize(wide, scale, grid, zero_point), scale, zero_point).to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    """quantize and dequantize with their straight-through gradients, written out so that one tensor is kept, not six.

    With v = x / scale, z the rounded zero point and n = clip(round(v) + z) - z, the output is n * scale. Inside the
    range its gradients are 1 (x), n - v (scale), 0 (zero point); beyond it 0, n, -scale: n is the end of the range.
    The same holds for any grid; scales that blocks get as they come are held.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, grid: Grid, zero_point: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.grid = grid
        ctx.save_for_backward(x, scale, zero_point)
        offset = None if zero_point is None else zero_point.round()
        return dequantize(quantize(x, scale, grid, offset), scale, offset)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        offset = 0 if zero_point is None else zero_point.round()
        v = x / scale
        n, inside = ctx.grid.locate(v, offset)
        for_x = upstream * inside if ctx.needs_input_grad[0] else None
        for_scale = for_zero_point = None
        if ctx.needs_input_grad[1]:
            n = n - offset
            for_scale = (upstream * n.sub_(v.mul_(inside))).sum_to_size(scale.shape)
        if zero_point is not None and ctx.needs_input_grad[3]:
            for_zero_point = (upstream * scale * inside.logical_not()).neg_().sum_to_size(zero_point.shape)
        return for_x, for_scale, None, for_zero_point


def quantize_weight(
    weight: torch.Tensor, scale: torch.Tensor, grid: Grid | int, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Round a weight to the nearest values of the grid.

    Args:
        weight: [out, in] float.
        scale, zero_point: [out, G], G groups along the input: weight [8, 16], group_size 4 -> scale [8, 4].

    Returns:
        Codes [out, in]: of integers themselves, int8 when symmetric, otherwise uint8.
    """
    grid = as_grid(grid, zero_point is None)
    grouped = weight.float().reshape(*scale.shape, -1)
    zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
    return grid.encode(quantize(grouped, scale.unsqueeze(-1), grid, zero_point)).reshape(weight.shape)


def dequantize_weight(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None, grid: Grid | None = None
) -> torch.Tensor:
    """float32 [out, in] from codes [out, in] of a grid (None: integers) with scale and zero point [out, G]."""
    values = codes.float() if grid is None else grid.decode(codes)
    grouped = values.reshape(*scale.shape, -1)
    zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
    return dequantize(grouped, scale.unsqueeze(-1), zero_point).reshape(codes.shape)


class ActivationQuantizer(KeepsDtype):
    """Fake-quantizes whatever passes: activations [..., C], or keys and values [B, heads, T, d] when it has `heads`.

    Until it is calibrated (and always at 16 bits) it passes its input on unchanged, which is how statistics are taken:
    a forward hook on the quantizer sees exactly the values it will be asked to quantize.

    Attributes:
        spec: what it was asked for.
        scale, zero_point: static only; float32 [G], or [heads, 1, G] against [B, heads, T, G, g]; the zero point only
            when asymmetric.
        shift: centered only; float32 [C] or [heads, 1, d], the mean of each channel.
        clip_factor: dynamic only; float32 [G, 2] or [heads, 1, G, 2]: what the low and the high end of the range
            measured on a token are multiplied by.
        fired: how many times it has quantized, so that an evaluation can check that every quantizer took part.
        code_of_zero: what passes on is `to_codes`, for layers that multiply integers, and zero's code is this; None:
            what passes on is what the integers stand for.
        one_pass: gives `to_codes` of what comes before the rotation in front, with that in it; None: there is none.
    """

    def __init__(self, spec: QuantizerSpec, width: int, heads: int | None = None) -> None:
        """`width` is C or d."""
        super().__init__()
        self.spec = spec
        self.fired = 0
        self.calibrated = False
        self.code_of_zero: int | None = None
        self.one_pass: nn.Module | None = None
        if not spec.enabled:
            return
        if spec.centered:
            self.register_buffer("shift", _unknown((width,) if heads is None else (heads, 1, width)))
        groups = spec.count_groups(width)
        shape = (groups,) if heads is None else (heads, 1, groups)
        if spec.dynamic:
            self.register_buffer("clip_factor", _unknown((*shape, 2)))
            return
        self.register_buffer("scale", _unknown(shape))
        if not spec.symmetric:
            self.register_buffer("zero_point", _unknown(shape))

    def calibrate_(self, **buffers: torch.Tensor) -> None:
        """Fix the buffers (any shape with the right number of elements); from now on the quantizer acts."""
        expected = dict(self.named_buffers(recurse=False))
        assert buffers.keys() == expected.keys(), (buffers.keys(), expected.keys())
        for name, value in buffers.items():
            setattr(self, name, value.detach().float().reshape(expected[name].shape).to(expected[name].device))
        self.calibrated = True

    def find_parameters(self, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point for x [..., G, g], each [..., G, 1] (or broadcasting to it)."""
        if self.spec.dynamic:
            low, high = measure_range(grouped)
            low, high = low * self.clip_factor[..., 0], high * self.clip_factor[..., 1]
            scale, zero_point = choose_parameters(low, high, self.spec.grid)
        else:
            scale, zero_point = self.scale, None if self.spec.symmetric else self.zero_point
        return scale.unsqueeze(-1), None if zero_point is None else zero_point.unsqueeze(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.spec.enabled or not self.calibrated:
            return x
        self.count_()
        if self.code_of_zero is not None:
            return self.to_codes(x)
        grouped = group(self.center(x), self.spec.group_size)
        scale, zero_point = self.find_parameters(grouped)
        quantized = fake_quantize(grouped, scale, self.spec.grid, zero_point).flatten(-2)
        return quantized if not self.spec.centered else (quantized + self.shift).to(x.dtype)

    def count_(self) -> None:
        """Once more it has quantized."""
        if not torch.compiler.is_compiling():  # a count would make compiled code another at every call
            self.fired += 1

    def emit_codes_(self) -> None:
        """From now on pass on `to_codes`: integers less the lowest one. Static, one scale."""
        qmin, _ = integer_range(self.spec.bits, self.spec.symmetric)
        self.code_of_zero = -qmin if self.spec.symmetric else int(self.zero_point)

    def to_codes(self, x: torch.Tensor) -> torch.Tensor:
        """uint8, as x: 0 … 2^b - 1, which stand for (code - code_of_zero) * scale."""
        codes = (self.center(x).float() / self.scale).round_()
        return codes.add_(self.code_of_zero).clamp_(0, (1 << self.spec.bits) - 1).to(torch.uint8)

    def from_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """float32, what `to_codes` gave stands for: what the quantizer passes on otherwise."""
        values = (codes.float() - self.code_of_zero) * self.scale
        return values + self.shift if self.spec.centered else values

    def center(self, x: torch.Tensor) -> torch.Tensor:
        """x - shift in float32 at least, or x itself when the quantizer is not centered."""
        return x - self.shift if self.spec.centered else x


def _unknown(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float32)
