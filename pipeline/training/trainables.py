"""Turn a calibrated block into parameters to train, and back: scales, zero points, clip factors, weights, norms.

Quantizer parameters and norms are trained relative to their values at the start, by a parameter theta that begins at 0:

    scale, clip factor   initial * exp(theta); a scale is then rounded to its format, straight-through
    gain of a norm       initial * exp(theta); norms carry the scales of equalized channels
    zero point           round(initial + (qmax - qmin) * theta), clamped to the range

So one learning rate suits a scale of 0.001 and a scale of 10, and no step makes a scale negative: a step of 0.001 is a
thousandth of the scale, or of the range. All trained parameters are float32, whatever dtype the block computes in.
Values that are rounded in the end are rounded in training too, so the block under training computes the same as the
frozen one.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from pipeline.blocks.quantized import QuantizedLinear, find_quantized_linear, find_site_quantizers
from pipeline.models.architectures import Architecture
from pipeline.models.layers import DecoderLayer, as_norm
from pipeline.numerics.grids import Grid
from pipeline.numerics.quantizer import ActivationQuantizer, integer_range, quantize_weight, round_through


@dataclass
class Trainables:
    """The trained parameters of a block.

    Attributes:
        quantizers: thetas of scales, zero points and clip factors.
        weights: weights [out, in] and biases [out].
        norms: thetas of the gains of norms, [D].
    """

    quantizers: list[nn.Parameter] = field(default_factory=list)
    weights: list[nn.Parameter] = field(default_factory=list)
    norms: list[nn.Parameter] = field(default_factory=list)


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


def unfreeze_(
    block: DecoderLayer,
    architecture: Architecture,
    weights: dict[str, torch.Tensor] | None = None,
    norms: bool = False,
) -> Trainables:
    """Turn scales, zero points, clip factors, and weights and norms if asked for, into parameters, in place.

    Args:
        block: calibrated, from `load_block`.
        weights: linear -> float weight [out, in] to start from, rounded with the linear's scales; None: the integers
            do not change.
        norms: whether the weights of the norms are trained.
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
            if integers.is_floating_point():
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


def _make_relative_(module: nn.Module, name: str, kind: type[_Relative], *options: Any) -> nn.Parameter:
    """Replace a buffer or parameter by theta; the module reads `kind(initial value, *options)` of it."""
    initial = _make_parameter_(module, name).detach()
    parametrize.register_parametrization(module, name, kind(initial, *options), unsafe=True)
    return _read_original(module, name)
