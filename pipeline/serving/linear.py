"""A fused linear layer of vLLM: exported linears that read the same input, side by side.

    q_proj, k_proj, v_proj -> qkv_proj      gate_proj, up_proj -> gate_up_proj      o_proj      down_proj

Each output channel keeps its own scale, so fusing changes no result. With static ranges and one scale per channel,
integers are multiplied. Everything else is computed as in evaluation: the quantizer acts on the input, and weights are
dequantized once, when they are loaded. Exported linears are on the CPU; the tensors made of them go to the engine's
device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from pipeline.inference.packed_block import PackedLinear, fits_integers, gather_operands
from pipeline.kernels.operands import IntegerOperands
from pipeline.kernels.rotated_codes import make_codes
from pipeline.numerics.hadamard import CPU, HadamardTransform
from pipeline.numerics.quantizer import ActivationQuantizer


@dataclass(frozen=True)
class LayerPart:
    """The part of a fused linear that one of several processes computes.

    Attributes:
        rows: int64, output channels, in the order of the process's own output; None for all.
        columns: input channels; None for all.
        adds_bias: whether this process adds bias and constants. One of the processes that split the input does.
        gather: makes the whole input [T, in] of this process's part of it; None where it gets the whole.
    """

    rows: torch.Tensor | None = None
    columns: slice | None = None
    adds_bias: bool = True
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None

    def cut_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the columns of an input [T, in] that this process multiplies."""
        return x if self.columns is None else x[:, self.columns].contiguous()

    def cut_operands(self, operands: IntegerOperands) -> IntegerOperands:
        """Return this process's part of the operands of a product of integers."""
        integers, constant = self.cut(operands.integers, operands.constant)
        assert constant is not None
        scale = operands.weight_scale if self.rows is None else operands.weight_scale[self.rows]
        return replace(operands, integers=integers, weight_scale=scale, constant=constant)

    def cut(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return this process's part of weight [out, in] and bias [out]."""
        if self.rows is not None:
            weight, bias = weight[self.rows], None if bias is None else bias[self.rows]
        if self.columns is not None:
            weight = weight[:, self.columns].contiguous()
        return weight, bias if bias is None or self.adds_bias else torch.zeros_like(bias)


WHOLE = LayerPart()


class ServedInput(nn.Module):
    """Turn the input x [T, in] of linears into the input of `ServedWeights`: rotated, then as codes or rounded."""

    def __init__(
        self,
        quantizer: ActivationQuantizer,
        width: int,
        *,
        rotate: bool,
        dtype: torch.dtype,
        block_size: int = -1,
        device: torch.device = CPU,
    ) -> None:
        """Take the settings of a quantizer. It gives codes if it is set to (`emit_codes_`).

        Args:
            width: channels of the input.
            rotate, dtype, block_size, device: as in `ServedLinear`.
        """
        super().__init__()
        self.codes: nn.Module | None = None
        if quantizer.code_of_zero is not None:
            self.codes = make_codes(quantizer, width, rotate=rotate, dtype=dtype, block_size=block_size, device=device)
            return
        self.quantizer = quantizer.to(device)
        self.transform = HadamardTransform(width, dtype, block_size, device) if rotate else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.codes is not None:
            return self.codes(x)
        return self.quantizer(x if self.transform is None else self.transform(x))


class ServedWeights(nn.Module):
    """Compute [T, sum of outs] from the output [T, in] of a `ServedInput`.

    Attributes:
        width: output channels of all parts together, in all processes.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        parts: Sequence[PackedLinear],
        quantizer: ActivationQuantizer,
        *,
        dtype: torch.dtype,
        make_product: Callable[[IntegerOperands, torch.dtype], nn.Module] | None,
        device: torch.device = CPU,
        layer_part: LayerPart = WHOLE,
    ) -> None:
        """Fuse exported linears, as `ServedLinear` does. Where integers are multiplied, `quantizer` gives codes."""
        super().__init__()
        self.width = sum(part.out_features for part in parts)
        self.product: nn.Module | None = None
        if make_product is not None and fits_integers(quantizer, parts):
            operands = layer_part.cut_operands(gather_operands(quantizer, parts))
            self.product = make_product(operands, dtype).to(device)
            return
        weight, bias = torch.cat([part.dense_weight(dtype).to(dtype) for part in parts]), None
        if any(part.bias is not None for part in parts):
            biases = [torch.zeros(part.out_features) if part.bias is None else part.bias for part in parts]
            bias = torch.cat([part_bias.to(dtype) for part_bias in biases])
        weight, bias = layer_part.cut(weight, bias)
        self.register_buffer("weight", weight.to(device), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(device), persistent=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.product is not None:
            return self.product(values)
        return nn.functional.linear(values, self.weight, self.bias)


class ServedLinear(nn.Module):
    """Compute [T, sum of outs] from x [T, in], in the dtype of x, or the part of one process (parallel.py)."""

    def __init__(
        self,
        parts: Sequence[PackedLinear],
        quantizer: ActivationQuantizer,
        *,
        rotate: bool,
        dtype: torch.dtype,
        make_product: Callable[[IntegerOperands, torch.dtype], nn.Module] | None,
        block_size: int = -1,
        device: torch.device = CPU,
        layer_part: LayerPart = WHOLE,
    ) -> None:
        """Fuse exported linears.

        Args:
            parts: exported linears that read the same input.
            quantizer: the quantizer of that input.
            rotate: whether a Hadamard transform comes before the quantizer.
            dtype: the dtype in which the model computes.
            make_product: builds a product of integers (product.py has vLLM's). None: no exact one exists here.
            block_size: consecutive channels that the transform acts on together; -1 for all.
            device: the device on which the model computes.
            layer_part: the part that this process computes.
        """
        super().__init__()
        self.layer_part = layer_part
        self.weights = ServedWeights(
            parts, quantizer, dtype=dtype, make_product=make_product, device=device, layer_part=layer_part
        )
        width = parts[0].in_features
        self.input = ServedInput(quantizer, width, rotate=rotate, dtype=dtype, block_size=block_size, device=device)

    @property
    def width(self) -> int:
        """Output channels, in all processes together."""
        return self.weights.width

    @property
    def product(self) -> nn.Module | None:
        """The product of integers, or None."""
        return self.weights.product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.layer_part.gather is not None:
            x = self.layer_part.gather(x)
        return self.weights(self.layer_part.cut_input(self.input(x)))
