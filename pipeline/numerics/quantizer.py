"""Quantization: choose a scale, quantize to integers, and dequantize back.

A quantizer with b bits maps a value x to an integer. The integer times the scale is close to x:

    integer = clip(round(x / scale) + zero_point)          quantize
    value   = (integer - zero_point) * scale               dequantize; both together are "fake quantization"

There are two kinds. A symmetric quantizer has no zero point. An asymmetric one has, and so it wastes no integers on a
range that is not centered at zero. With low = min(x, 0) and high = max(x, 0):

    symmetric   integers -2^(b-1) … 2^(b-1)-1     scale = max(-low, high) / (2^(b-1) - 1)
                x = [-3.5, 1, 7], 4 bits -> scale 1, integers [-4, 1, 7]
    asymmetric  integers 0 … 2^b-1                scale = (high - low) / (2^b - 1), zero_point = round(-low / scale)
                x = [-3, 0, 12], 4 bits -> scale 1, zero_point 3, integers [0, 3, 15]

Zero is always representable, because low <= 0 <= high. Rounding is half to even, as in torch.round. A clip factor f < 1
shrinks low and high before the scale is chosen. The outermost values then move to the edge of the range, and all others
get a finer step. 16 bits mean "not quantized" throughout the project.

Other number formats have floats of 4 or 8 bits in place of the integers. A *grid* defines their values and scales
(`grids.py`). Where a function below expects a grid, a number means integers of that many bits.

A *group* is a number of consecutive values along the last dimension that share a scale. A tensor [..., C] with groups
of size g is viewed as [..., G, g] and has scales [..., G]. group_size -1 is one group for the whole dimension.

A *centered* quantizer of activations subtracts the mean of each channel and adds it back afterwards: Q(x - mean) + mean
(channel-wise shifting, arXiv:2304.09145, Eq. 5). The mean is measured once, on calibration text. In the linears that
read the result, the constant part becomes a bias, W mean, which is known beforehand. So it costs nothing, and the
integers represent only the part that varies.

In training, rounding passes gradients straight through (`torch.autograd`). The value, the scale and the zero point
receive the gradient of the formulas above, in which the offset added by each rounding is held constant.
"""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from pipeline.numerics.formats import INT, is_quantized
from pipeline.numerics.grids import Grid, StoredGrid, as_grid, as_stored_grid, find_grid
from pipeline.numerics.grids import integer_range as integer_range  # may be imported from here, too
from pipeline.numerics.grids import round_through as round_through
from pipeline.numerics.kept_dtype import KeepsDtype
from pipeline.numerics.packing import pack_codes, unpack_codes


@dataclass(frozen=True)
class QuantizerSpec:
    """The settings of one quantizer.

    Attributes:
        bits: 2 to 8, or 16 for "not quantized". The format int16 has 16 and is quantized.
        symmetric: whether the quantizer lacks a zero point.
        group_size: number of consecutive channels that share a scale; -1: the whole last dimension.
        dynamic: whether the range is measured on every token (activations, keys and values only).
        centered: activations, keys and values: the mean of each channel is subtracted before quantization and added
            back afterwards. Weights: the layer's bias corrects the error that rounding causes for the mean input.
        format: a name in `formats.FORMATS`. Weights in nvfp4 have group_size 16 and store the scales of their blocks.
            Everything else in nvfp4 has one scale, static or per token, and finds the scales of blocks at run time.
    """

    bits: int = 16
    symmetric: bool = True
    group_size: int = -1
    dynamic: bool = False
    centered: bool = False
    format: str = INT

    @property
    def enabled(self) -> bool:
        """Whether anything is quantized."""
        return is_quantized(self.format, self.bits)

    @property
    def grid(self) -> Grid:
        """The values to round to."""
        return find_grid(self.format, self.bits, self.symmetric, self.group_size)

    @property
    def stored_grid(self) -> StoredGrid:
        """The values of a weight, which are stored."""
        return as_stored_grid(self.grid)

    def count_groups(self, width: int) -> int:
        """Return G, the number of groups in a last dimension of `width`."""
        return 1 if self.group_size == -1 else width // self.group_size

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they are stored in artifacts."""
        values = asdict(self)
        if self.format == INT:  # artifacts from before the other formats have no such key
            del values["format"]
        return values


def group(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """View by quantization groups: [..., C] -> [..., G, C / G]."""
    return x.unflatten(-1, (-1, x.shape[-1] if group_size == -1 else group_size))


def measure_range(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (low, high) of each group, float32: [..., G, g] -> [..., G] twice; low <= 0 <= high."""
    low, high = torch.aminmax(grouped, dim=-1)
    return low.float().clamp_max(0), high.float().clamp_min(0)


def choose_parameters(
    low: torch.Tensor, high: torch.Tensor, grid: Grid | int, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choose scale and zero point of a range. For finite ranges the scale is never zero, infinite or NaN.

    Args:
        low, high: float32 of any shape, low <= 0 <= high, already multiplied by clip factors. Each element is a
            separate range, except for weights in nvfp4, whose scales depend on the whole tensor.
        grid: the values to round to, or the bits of integers.
        symmetric: whether those integers are symmetric; not used if `grid` is a Grid.

    Returns:
        scale, float32; 1 for an empty range, in which every value is zero. zero_point, integers of `integer_range` held
        as float32, or None if symmetric. Both are differentiable (straight through the rounding).
    """
    return as_grid(grid, symmetric).choose(low, high)


def require_finite(low: torch.Tensor, high: torch.Tensor) -> None:
    """Check a measured range.

    Raises:
        ValueError: it holds NaN or infinities.
    """
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("a measured range is not finite. The calibration data or the model overflow.")


def quantize(
    x: torch.Tensor, scale: torch.Tensor, grid: Grid | int, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Round x / scale to values of the grid, in its dtype. `scale` and `zero_point` broadcast. No gradients."""
    return as_grid(grid, zero_point is None).snap_(x / scale, zero_point)


def dequantize(integers: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
    """Return (integers - zero_point) * scale, in place. `integers` are floats, or values of another grid."""
    if zero_point is not None:
        integers -= zero_point
    return integers.mul_(scale)


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, grid: Grid | int, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantize and dequantize: move x to the nearest representable value. Same shape and dtype.

    The arithmetic is in float32 at least, so that bfloat16 activations do not get other integers. If gradients are
    needed, they reach x (1 inside the range, 0 beyond it), scale and zero_point. The values are the same with and
    without gradients.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scale, zero_point)):
        return _FakeQuantize.apply(wide, scale, as_grid(grid, zero_point is None), zero_point).to(x.dtype)
    return dequantize(quantize(wide, scale, grid, zero_point), scale, zero_point).to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization with straight-through gradients, written out so that autograd keeps one tensor and not six.

    Let v = x / scale, z the rounded zero point and n = clip(round(v) + z) - z. The output is n * scale. Its gradients:

                            to x      to scale      to the zero point
        inside the range    1         n - v         0
        beyond it           0         n             -scale             (n is the end of the range)

    The same holds for any grid. Block scales that are found at run time count as constants.
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
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (upstream,) = gradients
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
        grid: the values to round to, or the bits of integers.

    Returns:
        Codes [out, in]. Codes of integers are the integers themselves, int8 if symmetric, otherwise uint8.
    """
    stored = as_stored_grid(grid, zero_point is None)
    grouped = weight.float().reshape(*scale.shape, -1)
    zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
    return stored.encode(quantize(grouped, scale.unsqueeze(-1), stored, zero_point)).reshape(weight.shape)


def dequantize_weight(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None, grid: Grid | None = None
) -> torch.Tensor:
    """Undo `quantize_weight`: return float32 [out, in]. `grid` None: codes are integers."""
    values = codes.float() if grid is None else as_stored_grid(grid).decode(codes)
    grouped = values.reshape(*scale.shape, -1)
    zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
    return dequantize(grouped, scale.unsqueeze(-1), zero_point).reshape(codes.shape)


def round_rows(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of x [..., C], float32, to symmetric integers whose largest is its largest value.

    Returns:
        The integers, held as float32, and the scale of each row [..., 1]. The integers pass gradients straight through.
    """
    fixed = x.detach()
    scale, _ = choose_parameters(*measure_range(fixed.unsqueeze(-2)), bits)
    integers = quantize(fixed, scale, bits)
    if x.requires_grad and torch.is_grad_enabled():
        through = x / scale
        integers = integers + (through - through.detach())
    return integers, scale


class OnePass(Protocol):
    """Applies the rotation before a quantizer and returns the codes, in one pass."""

    def takes(self, x: torch.Tensor) -> bool:
        """Return whether it can take x [..., C]."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return codes, of the shape of x [..., C]."""
        ...


class ActivationQuantizer(KeepsDtype):
    """Fake-quantizes its input: activations [..., C], or keys and values [B, heads, T, d] if it has `heads`.

    Before calibration, and always with 16 bits, it returns its input unchanged. Statistics are taken in this state: a
    forward hook on the quantizer receives exactly the values that will be quantized.

    Attributes:
        spec: its settings.
        scale, zero_point: static only. float32 [G], or [heads, 1, G] for inputs [B, heads, T, G, g]. The zero point
            exists only if asymmetric.
        shift: centered only. float32 [C] or [heads, 1, d], the mean of each channel.
        clip_factor: dynamic only. float32 [G, 2] or [heads, 1, G, 2], factors for the low and the high end of the range
            that is measured on a token.
        fired: how often it has quantized, so that an evaluation can check that every quantizer took part.
        code_of_zero: the code of zero, if it returns codes (`to_codes`) for layers that multiply integers; None: it
            returns fake-quantized values.
        one_pass: a module that applies the rotation before this quantizer and returns the codes, in one pass; None: the
            two are separate.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    shift: torch.Tensor
    clip_factor: torch.Tensor

    def __init__(self, spec: QuantizerSpec, width: int, heads: int | None = None) -> None:
        """Create an uncalibrated quantizer for a last dimension of `width`, C or d."""
        super().__init__()
        self.spec = spec
        self.fired = 0
        self.calibrated = False
        self.code_of_zero: int | None = None
        self.one_pass: OnePass | None = None
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
        """Set the buffers, in any shape with the right number of elements. From now on the quantizer quantizes."""
        expected = dict(self.named_buffers(recurse=False))
        assert buffers.keys() == expected.keys(), (buffers.keys(), expected.keys())
        for name, value in buffers.items():
            setattr(self, name, value.detach().float().reshape(expected[name].shape).to(expected[name].device))
        self.calibrated = True

    def find_parameters(self, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scale and zero point for x [..., G, g], each [..., G, 1] or broadcasting to it."""
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
        """Count one more use."""
        if not torch.compiler.is_compiling():  # compiled code would be compiled again for each count
            self.fired += 1

    def emit_codes_(self) -> None:
        """Return codes from now on: integers minus the lowest integer. Only for static quantizers with one scale."""
        qmin, _ = integer_range(self.spec.bits, self.spec.symmetric)
        self.code_of_zero = -qmin if self.spec.symmetric else int(self.zero_point)

    def to_codes(self, x: torch.Tensor) -> torch.Tensor:
        """Return the codes of x, uint8 of the same shape, 0 … 2^b - 1. Their values: (code - code_of_zero) * scale."""
        assert self.code_of_zero is not None, "call emit_codes_ first"
        codes = (self.center(x).float() / self.scale).round_()
        return codes.add_(self.code_of_zero).clamp_(0, (1 << self.spec.bits) - 1).to(torch.uint8)

    def from_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Undo `to_codes`: return the fake-quantized values, float32."""
        assert self.code_of_zero is not None, "call emit_codes_ first"
        values = (codes.float() - self.code_of_zero) * self.scale
        return values + self.shift if self.spec.centered else values

    @property
    def stores_codes(self) -> bool:
        """Whether its values can be stored as codes (`encode`): the ranges are known before the values."""
        spec = self.spec
        return spec.enabled and self.calibrated and not spec.dynamic and isinstance(spec.grid, StoredGrid)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the codes of x [..., d], packed: uint8 [..., packed_width(d, bits)]. No gradients.

        Call it only if it `stores_codes`. `decode` then returns the values of `forward`, bit for bit.
        """
        grid = self.spec.stored_grid
        grouped = group(self.center(x.detach()), self.spec.group_size)
        grouped = grouped if grouped.dtype == torch.float64 else grouped.float()
        scale, zero_point = self.find_parameters(grouped)
        codes = grid.encode(quantize(grouped, scale, grid, zero_point)).flatten(-2)
        lowest, _ = integer_range(self.spec.bits, grid.signed)
        return pack_codes((codes.to(torch.int16) - lowest).to(torch.uint8) if grid.signed else codes, self.spec.bits)

    def decode(self, packed: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Undo `encode`: return the fake-quantized values [..., d]. `dtype` is the dtype of the encoded values."""
        grid = self.spec.stored_grid
        codes = unpack_codes(packed, self.spec.bits, width)
        if grid.signed:
            lowest, _ = integer_range(self.spec.bits, True)
            codes = (codes.to(torch.int16) + lowest).to(torch.int8)
        grouped = group(grid.decode(codes), self.spec.group_size)
        grouped = grouped.double() if dtype == torch.float64 else grouped
        values = dequantize(grouped, *self.find_parameters(grouped)).flatten(-2)
        return (values + self.shift).to(dtype) if self.spec.centered else values.to(dtype)

    def center(self, x: torch.Tensor) -> torch.Tensor:
        """Return x - shift, in float32 at least, or x itself if the quantizer is not centered."""
        return x - self.shift if self.spec.centered else x


def _unknown(shape: tuple[int, ...]) -> torch.Tensor:
    """Return a float32 buffer of NaN: one that was never calibrated cannot go unnoticed."""
    return torch.full(shape, torch.nan, dtype=torch.float32)
