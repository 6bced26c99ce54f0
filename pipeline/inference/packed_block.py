"""A quantized block with packed weights, and two ways to multiply by them.

    float     The weight is unpacked and dequantized when the layer is reached. It is kept for later calls where memory
              allows (`keep_unpacked_`). The same numbers, in the same order, as in the block that was evaluated.
    integer   Integers times integers, summed exactly in int32, scaled once (kernels/integer_product.py):
                  y = scale_x scale_w (n_x n_w) + bias + W shift
              The same product, except where float32 would have rounded it. Faster on CPUs with int8 instructions. The
              codes and the rotation before them are computed in one pass (kernels/rotated_codes.py).

`integer` needs integers, static ranges, one scale per input tensor and one per output channel. Layers with other
settings stay with `float`. Formats that round their scales have them packed too: as bytes, and in nvfp4 a common factor
(`weight_common`).
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from pipeline.blocks.quantized import QuantizedLinear, find_input_module, find_quantized_linear, find_site_quantizers
from pipeline.kernels.compiler import find_kernels
from pipeline.kernels.integer_product import IntegerProduct
from pipeline.kernels.operands import IntegerOperands
from pipeline.kernels.rotated_codes import RotatedCodes
from pipeline.models.architectures import Architecture
from pipeline.models.layers import DecoderLayer
from pipeline.models.lm_head import QuantizedHead
from pipeline.models.sites import RESIDUAL_SITES, Site
from pipeline.numerics.formats import INT
from pipeline.numerics.packing import pack_integers, packed_width, unpack_integers
from pipeline.numerics.quantizer import ActivationQuantizer, dequantize_weight
from pipeline.runtime.free_memory import measure_free


class PackedLinear(QuantizedLinear, nn.Linear):
    """A `QuantizedLinear` that holds `weight_packed`, uint8 [out, bytes], instead of `weight`.

    It is an `nn.Linear`, so that PEFT puts adapters around it. Its weight is constant, and gradients pass through it.

    Attributes:
        keeps_unpacked: whether the dequantized weight is kept after a call, in the dtype of the call.
    """

    weight_packed: torch.Tensor
    weight_common: torch.Tensor | None
    weight = None  # pyright: ignore[reportAssignmentType]  (a packed layer is a linear without it)

    @property
    def qweight(self) -> torch.Tensor:
        """The packed weight. PEFT looks for this name, to find the device of a layer that has no `weight`."""
        return self.weight_packed

    def __init__(self, source: QuantizedLinear) -> None:
        """Take the place of `source`, which is quantized. On the meta device its integers are loaded later."""
        nn.Module.__init__(self)
        for name in (
            "in_features",
            "out_features",
            "spec",
            "rotate_input",
            "rotation_block_size",
            "input_quantizer",
            "compute_dtype",
        ):
            setattr(self, name, getattr(source, name))
        if source.weight.is_meta:
            shape = (self.out_features, packed_width(self.in_features, self.spec.bits))
            packed = torch.empty(shape, dtype=torch.uint8, device="meta")
        else:
            packed = pack_integers(source.weight, self.spec.bits, self.spec.stored_grid.signed)
        self.register_buffer("weight_packed", packed)
        scale, common = self.spec.stored_grid.pack_scale(source.scales)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_common", common)
        for name in ("weight_zero_point", "bias"):
            self.register_buffer(name, getattr(source, name))
        self.product: IntegerProduct | None = None
        self.unfrozen = self.fired = self.keeps_unpacked = False
        self._dequantized = None
        self._forward_hooks.update(source._forward_hooks)  # quantizes keys before RoPE

    def unpack(self) -> torch.Tensor:
        """Return the integers or other codes [out, in], int8 or uint8."""
        return unpack_integers(self.weight_packed, self.spec.bits, self.spec.stored_grid.signed, self.in_features)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [out, in]; computed in every call again unless `keeps_unpacked`."""
        self.fired = True
        if not self.keeps_unpacked:
            return self._dequantize().to(dtype)
        sources = (self.weight_packed, self.weight_scale, self.weight_common, self.weight_zero_point)
        return self._keep_dequantized(dtype, sources)

    def forget_(self) -> None:
        """Drop the dequantized weight."""
        self._dequantized = None

    def _dequantize(self) -> torch.Tensor:
        grid = self.spec.stored_grid
        scale = grid.unpack_scale(self.scales, self.weight_common)
        return dequantize_weight(self.unpack(), scale, self.weight_zero_point, grid)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.product is None:
            return super().forward(input)
        self.fired = True
        return self.product(self.prepare_input(input))


def find_packed_linear(block: nn.Module, name: str) -> PackedLinear:
    """Return a packed linear of a block.

    Raises:
        TypeError: there is another module of that name.
    """
    linear = block.get_submodule(name)
    if not isinstance(linear, PackedLinear):
        raise TypeError(f"{name} is a {type(linear).__name__}, not a packed linear")
    return linear


def pack_block_(block: nn.Module, architecture: Architecture) -> None:
    """Replace the quantized linears of a block by packed ones."""
    for name in architecture.of_block(block).linears:
        linear = find_quantized_linear(block, name)
        if linear.weight_scale is not None:
            block.set_submodule(name, PackedLinear(linear))


def keep_unpacked_(model: nn.Module, keep: bool | None, dtype: torch.dtype) -> None:
    """Have packed linears and a quantized lm_head keep unpacked weights after their first call, or drop them.

    Args:
        keep: None for a choice by memory: they are kept if all weights on a device take at most half of its free
            memory, and none is offloaded.
        dtype: in which the model computes.
    """
    linears = [module for module in model.modules() if isinstance(module, PackedLinear | QuantizedHead)]
    if keep is None:
        needed: Counter[torch.device] = Counter()
        for linear in linears:
            is_head = isinstance(linear, QuantizedHead)
            packed, itemsize = (linear.weight, 4) if is_head else (linear.weight_packed, dtype.itemsize)
            needed[packed.device] += linear.in_features * linear.out_features * itemsize
        keep = all(2 * size <= measure_free(device) for device, size in needed.items())
    for linear in linears:
        linear.keeps_unpacked = keep
        if not keep:
            linear.forget_()


def fits_integers(quantizer: ActivationQuantizer, readers: Sequence[QuantizedLinear]) -> bool:
    """Return whether linears that read the output of `quantizer` can multiply integers."""
    specs = [quantizer.spec, *(linear.spec for linear in readers)]
    one_scale = all(spec.enabled and spec.group_size == -1 and not spec.dynamic for spec in specs)
    one_scale = one_scale and all(spec.format == INT for spec in specs)
    return one_scale and all(spec.symmetric or spec.bits < 8 for spec in specs[1:])  # integer - zero_point fits int8


def gather_operands(quantizer: ActivationQuantizer, readers: Sequence[PackedLinear]) -> IntegerOperands:
    """Return the operands of the product of `readers`, side by side. From now on `quantizer` passes on codes."""
    quantizer.emit_codes_()
    integers, constants = [], []
    for linear in readers:
        constant = torch.zeros(linear.out_features, dtype=torch.float64)
        if linear.bias is not None:
            constant += linear.bias
        if quantizer.spec.centered:
            constant += linear._dequantize().double() @ quantizer.shift.double()
        offset = 0 if linear.weight_zero_point is None else linear.weight_zero_point.to(torch.int16)
        integers.append((linear.unpack().to(torch.int16) - offset).to(torch.int8))
        constants.append(constant.float())
    weight_scale = torch.cat([linear.scales[:, 0] for linear in readers])
    scale, zero_point = quantizer.scale.item(), quantizer.code_of_zero
    assert zero_point is not None, "emit_codes_ sets the code of zero"
    largest = (1 << quantizer.spec.bits) - 1
    return IntegerOperands(torch.cat(integers), weight_scale, scale, zero_point, torch.cat(constants), largest)


def multiply_integers_(block: DecoderLayer, architecture: Architecture) -> None:
    """Have the packed linears of a block multiply integers, wherever the settings of weights and inputs allow it."""
    architecture = architecture.of_block(block)
    quantizers = find_site_quantizers(block, architecture)
    for site, readers in architecture.site_readers.items():
        if site == Site.MLP_INPUT and architecture.experts is not None:  # experts gather and add values, not codes
            continue
        quantizer = quantizers[site]
        if not fits_integers(quantizer, [find_quantized_linear(block, name) for name in readers]):
            continue
        linears = [find_packed_linear(block, name) for name in readers]
        for linear in linears:
            linear.product = IntegerProduct(gather_operands(quantizer, [linear]), linear.compute_dtype)
        if find_kernels():
            quantizer.one_pass = RotatedCodes(
                quantizer, linears[0].in_features, *find_rotation(block, architecture, site)
            )


def find_rotation(block: nn.Module, architecture: Architecture, site: str) -> tuple[bool, int]:
    """Return whether there is an online rotation before the quantizer of a site, and its block size (-1: all)."""
    if site in RESIDUAL_SITES:
        return find_input_module(block, architecture, site).rotate_input, -1
    (reader,) = architecture.site_readers[site]
    linear = find_quantized_linear(block, reader)
    return linear.rotate_input, linear.rotation_block_size
