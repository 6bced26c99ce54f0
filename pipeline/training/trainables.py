"""Turn a calibrated block into parameters to train, and back: scales, zero points, clip factors, weights, norms.

Quantizer parameters and norms are trained relative to their values at the start, by a parameter theta that begins at 0:

    scale, clip factor   initial * exp(theta); a scale is then rounded to its format, straight-through
    gain of a norm       initial * exp(theta); norms carry the scales of equalized channels
    zero point           round(initial + (qmax - qmin) * theta), clamped to the range

Integers are trained, where they are, by a parameter theta in steps (`LearnedIntegers`). Its start is the value that
GPTQ had before rounding, so the first steps need not undo that rounding:

    straight_through     round(theta), clamped to the range; the gradient is 1 inside the range
    soft_rounding        lower neighbour + sigmoid(theta / temperature) with gradients; without, as in evaluation,
                         lower neighbour + (theta >= 0). The temperature falls, so the two meet (compare
                         arXiv:2004.10568)

So one learning rate suits a scale of 0.001 and a scale of 10, and no step makes a scale negative: a step of 0.001 is a
thousandth of the scale, or of the range. All trained parameters are float32, whatever dtype the block computes in.
Values that are rounded in the end are rounded in training too, so the block under training computes the same as the
frozen one.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from pipeline.blocks.quantized import QuantizedLinear, find_quantized_linear, find_site_quantizers
from pipeline.models.architectures import Architecture
from pipeline.models.layers import DecoderLayer, as_norm
from pipeline.numerics.formats import INT
from pipeline.numerics.grids import Grid
from pipeline.numerics.quantizer import ActivationQuantizer, integer_range, quantize_weight, round_through
from pipeline.training.state import TrainingError

_ALMOST_HALF = 0.49  # of a step: an offset within it rounds back to its integer
Method = Literal["straight_through", "soft_rounding"]


@dataclass(frozen=True)
class LearnedIntegers:
    """How the integers of a block's linears are trained.

    Attributes:
        method: see the module's docstring.
        offsets: linear -> [out, in], the value before rounding less the integer, in steps (`gptq.measure_offsets`).
    """

    method: Method
    offsets: dict[str, torch.Tensor]


@dataclass
class Trainables:
    """The trained parameters of a block.

    Attributes:
        quantizers: thetas of scales, zero points and clip factors.
        weights: weights [out, in] and biases [out].
        norms: thetas of the gains of norms, [D].
        integers: thetas of integers [out, in].
    """

    quantizers: list[nn.Parameter] = field(default_factory=list)
    weights: list[nn.Parameter] = field(default_factory=list)
    norms: list[nn.Parameter] = field(default_factory=list)
    integers: list[nn.Parameter] = field(default_factory=list)


class _Cast(nn.Module):
    """Gives a module a float32 parameter in the dtype that it computes in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.dtype)

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        return value.float()


class _Relative(nn.Module):
    """Gives a module initial * exp(theta), rounded as `grid` rounds scales."""

    initial: torch.Tensor

    def __init__(self, initial: torch.Tensor, grid: Grid | None = None) -> None:
        super().__init__()
        self.register_buffer("initial", initial.clone())
        self.grid = grid

    def forward(self, theta: torch.Tensor) -> torch.Tensor:
        moved = self.initial * theta.exp()
        return moved if self.grid is None else self.grid.round_scale(moved)

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(value)


class _RelativeGain(_Relative):
    """Gives a norm its weight in the norm's dtype. The gain, weight + `offset`, is its initial value * exp(theta)."""

    def __init__(self, initial: torch.Tensor, offset: float, dtype: torch.dtype) -> None:
        super().__init__(initial)
        self.offset, self.dtype = offset, dtype

    def forward(self, theta: torch.Tensor) -> torch.Tensor:
        return (self.initial + (self.initial + self.offset) * theta.expm1()).to(self.dtype)  # exact at theta = 0


class _RelativeZeroPoint(_Relative):
    """Gives a module its zero point, moved by theta of the range."""

    def __init__(self, initial: torch.Tensor, bits: int) -> None:
        super().__init__(initial)
        self.qmin, self.qmax = integer_range(bits, symmetric=False)

    def forward(self, theta: torch.Tensor) -> torch.Tensor:
        moved = round_through(self.initial + (self.qmax - self.qmin) * theta)
        return moved.clamp(self.qmin, self.qmax)


class StraightThrough(nn.Module):
    """Gives a linear integers, held as floats: theta rounded and clamped to the range."""

    def __init__(self, codes: torch.Tensor, offset: torch.Tensor, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.start = codes.float() + offset.float().clamp(-_ALMOST_HALF, _ALMOST_HALF)

    def forward(self, theta: torch.Tensor) -> torch.Tensor:
        return round_through(theta).clamp(self.low, self.high)

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        start, self.start = self.start, value.new_empty(0)  # the parameter holds it from here on
        return start


class SoftRounding(nn.Module):
    """Gives a linear values between two neighbouring integers, held as floats.

    Attributes:
        temperature: temperature of the sigmoid; the lower, the closer to integers.
    """

    lower: torch.Tensor

    def __init__(self, codes: torch.Tensor, offset: torch.Tensor, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high, self.temperature = low, high, HIGHEST_TEMPERATURE
        offset = offset.float().clamp(-_ALMOST_HALF, _ALMOST_HALF)
        self.register_buffer("lower", codes.to(torch.int16) - (offset < 0).to(torch.int16))
        self.start = torch.where(offset < 0, offset + 0.5, offset - 0.5)

    def forward(self, theta: torch.Tensor) -> torch.Tensor:
        upward = (theta / self.temperature).sigmoid() if torch.is_grad_enabled() else (theta >= 0).float()
        return (self.lower + upward).clamp(self.low, self.high)

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        start, self.start = self.start, value.new_empty(0)
        return start


HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE = 0.2, 0.02
_METHODS: dict[Method, type[StraightThrough] | type[SoftRounding]] = {
    "straight_through": StraightThrough,
    "soft_rounding": SoftRounding,
}


def lower_temperature_(block: nn.Module, progress: float) -> None:
    """Set the temperature of soft rounding at `progress` from 0 to 1; it falls geometrically."""
    for module in block.modules():
        if isinstance(module, SoftRounding):
            module.temperature = HIGHEST_TEMPERATURE * (LOWEST_TEMPERATURE / HIGHEST_TEMPERATURE) ** progress


def unfreeze_(
    block: DecoderLayer,
    architecture: Architecture,
    weights: dict[str, torch.Tensor] | None = None,
    norms: bool = False,
    integers: LearnedIntegers | None = None,
) -> Trainables:
    """Turn scales, zero points, clip factors, and weights and norms if asked for, into parameters, in place.

    Args:
        block: calibrated, from `load_block`.
        weights: linear -> float weight [out, in] to start from, rounded with the linear's scales; None: the integers
            do not change.
        norms: whether the weights of the norms are trained.
        integers: how integers are trained; None: they are not. Excludes `weights`.

    Raises:
        TrainingError: integers are to be trained, and a linear has another format.
    """
    trainables, architecture = Trainables(), architecture.of_block(block)
    for name in architecture.linears:
        linear = find_quantized_linear(block, name)
        linear.unfrozen = True
        if weights is not None:
            # A weight that is rounded is cast after the rounding.
            dtype = None if linear.spec.enabled else linear.weight.dtype
            linear.weight = weights[name].to(linear.weight.device)
            trainables.weights.append(_make_parameter_(linear, "weight", dtype))
            if linear.bias is not None:
                trainables.weights.append(_make_parameter_(linear, "bias", linear.bias.dtype))
        if integers is not None and linear.spec.enabled:
            trainables.integers.append(_make_integers_(linear, integers, name))
        if linear.spec.enabled:
            trainables.quantizers.append(_make_relative_(linear, "weight_scale", _Relative, linear.spec.grid))
            if linear.weight_zero_point is not None:
                bits = linear.spec.bits
                trainables.quantizers.append(_make_relative_(linear, "weight_zero_point", _RelativeZeroPoint, bits))
    for quantizer in find_site_quantizers(block, architecture).values():
        for name, grid in (("scale", quantizer.spec.grid), ("clip_factor", None)):
            if _has(quantizer, name):
                trainables.quantizers.append(_make_relative_(quantizer, name, _Relative, grid))
        if _has(quantizer, "zero_point"):
            trainables.quantizers.append(
                _make_relative_(quantizer, "zero_point", _RelativeZeroPoint, quantizer.spec.bits)
            )
    for name in (*architecture.norms, *architecture.post_norms) if norms else ():
        norm, offset = as_norm(block.get_submodule(name)), architecture.norm_offset
        trainables.norms.append(_make_relative_(norm, "weight", _RelativeGain, offset, norm.weight.dtype))
    return trainables


@torch.no_grad()
def freeze_(block: DecoderLayer) -> None:
    """Undo `unfreeze_` with the trained values; float weights become integers. The block computes the same."""
    for module in block.modules():
        if parametrize.is_parametrized(module):
            for name in list(_read_parametrizations(module)):
                value = getattr(module, name).detach()
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                setattr(module, name, nn.Parameter(value))
        has_buffers = isinstance(module, QuantizedLinear | ActivationQuantizer)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if has_buffers:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
            else:  # of a norm
                parameter.requires_grad_(False)
        if isinstance(module, QuantizedLinear):
            module.unfrozen = False
        if isinstance(module, QuantizedLinear) and module.weight_scale is not None:
            integers, scale, zero_point = module.weight, module.weight_scale, module.weight_zero_point
            if module.levels_are_trained:
                integers, module.levels_are_trained = module.spec.stored_grid.encode(integers), False
            elif integers.is_floating_point():
                integers = quantize_weight(integers, scale, module.spec.grid, zero_point)
            module.set_integers_(integers, scale, zero_point)


def _read_parametrizations(module: nn.Module) -> nn.ModuleDict:
    """Return the parametrized tensors of a module, by name."""
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    return parametrizations


def _read_original(module: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter that a parametrized tensor is computed from."""
    original = _read_parametrizations(module)[name].original
    assert isinstance(original, nn.Parameter)
    return original


def _has(module: nn.Module, name: str) -> bool:
    return getattr(module, name, None) is not None


def _make_parameter_(module: nn.Module, name: str, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Replace a buffer or parameter by a float32 parameter, which the module reads in `dtype` (None: float32)."""
    value = getattr(module, name).detach()
    if name in module._buffers:
        del module._buffers[name]
    setattr(module, name, nn.Parameter(value.float().clone()))
    if dtype in (None, torch.float32):
        return getattr(module, name)
    parametrize.register_parametrization(module, name, _Cast(dtype), unsafe=True)
    return _read_original(module, name)


def _make_integers_(linear: QuantizedLinear, integers: LearnedIntegers, name: str) -> nn.Parameter:
    """Replace the codes of a linear by theta; the linear reads its integers of it, as floats."""
    spec, codes = linear.spec, linear.weight
    if spec.format != INT:
        raise TrainingError(
            f"finetuning.end_to_end.weights={integers.method}: {name} has format {spec.format}, and only integers are "
            "trained. Set weights: fixed, or quantizer_init.weights.format: int."
        )
    low, high = integer_range(spec.bits, spec.symmetric)
    offset = integers.offsets[name].to(codes.device)
    parametrization = _METHODS[integers.method](codes, offset, low, high)
    del linear._buffers["weight"]
    linear.weight = nn.Parameter(codes.float())
    parametrize.register_parametrization(linear, "weight", parametrization, unsafe=True)
    linear.levels_are_trained = True
    return _read_original(linear, "weight")


def _make_relative_(module: nn.Module, name: str, kind: type[_Relative], *options: Any) -> nn.Parameter:
    """Replace a buffer or parameter by theta; the module reads `kind(initial value, *options)` of it."""
    initial = _make_parameter_(module, name).detach()
    parametrize.register_parametrization(module, name, kind(initial, *options), unsafe=True)
    return _read_original(module, name)
