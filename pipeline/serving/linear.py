"""A linear layer as vLLM has it: what several exported ones compute of the same input, side by side.

    q_proj, k_proj, v_proj -> qkv_proj      gate_proj, up_proj -> gate_up_proj      o_proj      down_proj

Each output channel keeps its own scale, so nothing changes by putting them together. With static ranges and one scale a
channel integers are multiplied; everything else is computed as it was evaluated, with the input's quantizer acting and
weights that are dequantized once, when they are loaded. Exported linears lie on the CPU; what is made of them goes to
the device of the engine.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from pipeline.blocks.quantized import QuantizedLinear
from pipeline.inference.packed_block import fits_integers, gather_operands
from pipeline.kernels.operands import IntegerOperands
from pipeline.kernels.rotated_codes import make_codes
from pipeline.numerics.hadamard import CPU, HadamardTransform
from pipeline.numerics.quantizer import ActivationQuantizer


class ServedLinear(nn.Module):
    """x [T, in] -> [T, sum of outs], in the dtype of x."""

    def __init__(
        self,
        parts: Sequence[QuantizedLinear],
        quantizer: ActivationQuantizer,
        rotate: bool,
        dtype: torch.dtype,
        multiply: Callable[[IntegerOperands, torch.dtype], nn.Module] | None,
        block_size: int = -1,
        device: torch.device = CPU,
    ) -> None:
        """
        Args:
            parts: exported linears that read the same input.
            quantizer: of that input.
            rotate: a Hadamard transform stands in front of the quantizer.
            dtype: in which the model computes.
            multiply: makes a product of integers (product.py has vLLM's); None: none is exact here.
            block_size: the transform acts on so many channels at a time; -1: on all.
            device: where the model computes.
        """
        super().__init__()
        self.width, width = sum(part.out_features for part in parts), parts[0].in_features
        self.codes = self.product = None
        if multiply is not None and fits_integers(quantizer, parts):
            self.product = multiply(gather_operands(quantizer, parts), dtype).to(device)
            self.codes = make_codes(quantizer, width, rotate=rotate, dtype=dtype, block_size=block_size, device=device)
            return
        self.quantizer = quantizer.to(device)
        self.transform = HadamardTransform(width, dtype, block_size, device) if rotate else None
        weight, bias = torch.cat([part.dense_weight(dtype).to(dtype) for part in parts]).to(device), None
        if any(part.bias is not None for part in parts):
            own = [torch.zeros(part.out_features) if part.bias is None else part.bias for part in parts]
            bias = torch.cat([bias.to(dtype) for bias in own]).to(device)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.product is not None:
            return self.product(self.codes(x))
        if self.transform is not None:
            x = self.transform(x)
        return nn.functional.linear(self.quantizer(x), self.weight, self.bias)
