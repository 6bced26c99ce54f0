"""A quantized block with its weights packed, and two ways to multiply by them.

    float     unpacked and dequantized when the layer is reached, dropped behind it: the same numbers, in the same
              order, as the block that was evaluated
    integer   int8 activations times int8 weights, summed exactly in int32, scaled once (`torch._int_mm`):
                  y = scale_x scale_w (n_x n_w) + bias + W shift
              the same product, up to where float32 would have rounded it; faster on CPUs with int8 instructions

The second needs static ranges and one scale a tensor and output channel; layers that have others stay with the first.
"""

from typing import Any

import torch
from torch import nn

from pipeline.blocks.quantized import QuantizedLinear, find_site_quantizers
from pipeline.models.architectures import Architecture
from pipeline.numerics.packing import pack_integers, packed_width, unpack_integers
from pipeline.numerics.quantizer import ActivationQuantizer, dequantize_weight


class PackedLinear(QuantizedLinear, nn.Linear):
    """A `QuantizedLinear` that holds `weight_packed`, uint8 [out, bytes], instead of `weight`.

    A Linear by name, so that adapters (PEFT) are put around it as around any; it stands still, gradients pass it.
    """

    weight = None

    @property
    def qweight(self) -> torch.Tensor:
        """What PEFT takes for the weight of a layer that has none, to see where it lies."""
        return self.weight_packed if self.integers is None else self.integers

    def __init__(self, source: QuantizedLinear) -> None:
        """Take the place of `source`, which is quantized; on the meta device its integers are yet to come."""
        nn.Module.__init__(self)
        for name in ("in_features", "out_features", "spec", "rotate_input", "input_quantizer", "compute_dtype"):
            setattr(self, name, getattr(source, name))
        if source.weight.is_meta:
            shape = (self.out_features, packed_width(self.in_features, self.spec.bits))
            packed = torch.empty(shape, dtype=torch.uint8, device="meta")
        else:
            packed = pack_integers(source.weight, self.spec.bits, self.spec.symmetric)
        self.register_buffer("weight_packed", packed)
        for name in ("weight_scale", "weight_zero_point", "bias"):
            self.register_buffer(name, getattr(source, name))
        for name in ("integers", "product_scale", "constant"):
            self.register_buffer(name, None, persistent=False)
        self.unfrozen = self.fired = False
        self._forward_hooks.update(source._forward_hooks)  # quantizes keys before RoPE

    def unpack(self) -> torch.Tensor:
        """The integers [out, in], int8 or uint8."""
        if self.integers is None:
            return unpack_integers(self.weight_packed, self.spec.bits, self.spec.symmetric, self.in_features)
        if self.spec.symmetric:
            return self.integers
        return (self.integers + self.weight_zero_point).to(torch.uint8)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in], computed anew."""
        self.fired = True
        return dequantize_weight(self.unpack(), self.weight_scale, self.weight_zero_point).to(dtype)

    def multiply_integers_(self, site: ActivationQuantizer) -> None:
        """From now on take what `site` emits as integers; the packed weight gives way to int8."""
        constant = torch.zeros(self.out_features, dtype=torch.float64) if self.bias is None else self.bias.double()
        if site.spec.centered:
            constant += self.dense_weight(torch.float64) @ site.shift.double()
        offset = 0 if self.weight_zero_point is None else self.weight_zero_point.to(torch.int16)
        self.integers = (self.unpack().to(torch.int16) - offset).to(torch.int8)
        self.product_scale = site.scale * self.weight_scale[:, 0]
        self.constant = constant.float()
        self.weight_packed = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.integers is None:
            return super().forward(x)
        self.fired = True
        x = self.prepare_input(x)
        product = torch._int_mm(x.flatten(0, -2), self.integers.T)
        return (product * self.product_scale + self.constant).to(self.compute_dtype).unflatten(0, x.shape[:-1])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_packed is None:
            destination[f"{prefix}weight_packed"] = pack_integers(self.unpack(), self.spec.bits, self.spec.symmetric)


def pack_block_(block: nn.Module, architecture: Architecture) -> None:
    """Replace the quantized linears of a block by packed ones."""
    for name in architecture.linears:
        linear = block.get_submodule(name)
        if linear.weight_scale is not None:
            block.set_submodule(name, PackedLinear(linear))


def multiply_integers_(block: nn.Module, architecture: Architecture) -> None:
    """Have the packed linears of a block multiply integers, wherever their settings and their inputs' allow it."""
    quantizers = find_site_quantizers(block, architecture)
    for site, readers in architecture.site_readers.items():
        linears, quantizer = [block.get_submodule(name) for name in readers], quantizers[site]
        specs = [quantizer.spec, *(linear.spec for linear in linears)]
        one_scale = all(spec.enabled and spec.group_size == -1 and not spec.dynamic for spec in specs)
        if one_scale and all(spec.symmetric or spec.bits < 8 for spec in specs):  # integer - zero_point fits int8
            quantizer.emits_integers = True
            for linear in linears:
                linear.multiply_integers_(quantizer)
