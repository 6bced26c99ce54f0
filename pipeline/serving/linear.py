"""A fused linear layer of vLLM: exported linears that read the same input, side by side.

    q_proj, k_proj, v_proj -> qkv_proj      gate_proj, up_proj -> gate_up_proj      o_proj      down_proj

Each output channel keeps its own scale, so fusing changes no result. With static ranges and one scale per channel,
integers are multiplied. Everything else is computed as in evaluation: the quantizer acts on the input, and weights are
dequantized once, when they are loaded. Exported linears are on the CPU; the tensors made of them go to the engine's
device.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from pipeline.inference.packed_block import PackedLinear, fits_integers, gather_operands
from pipeline.kernels.operands import IntegerOperands
from pipeline.kernels.rotated_codes import make_codes
from pipeline.numerics.hadamard import CPU, HadamardTransform
from pipeline.numerics.quantizer import ActivationQuantizer


class ServedLinear(nn.Module):
    """Compute [T, sum of outs] from x [T, in], in the dtype of x."""

    weight: torch.Tensor
    bias: torch.Tensor | None

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
        """
        super().__init__()
        self.width, width = sum(part.out_features for part in parts), parts[0].in_features
        self.codes: nn.Module | None = None
        self.product: nn.Module | None = None
        if make_product is not None and fits_integers(quantizer, parts):
            self.product = make_product(gather_operands(quantizer, parts), dtype).to(device)
            self.codes = make_codes(quantizer, width, rotate=rotate, dtype=dtype, block_size=block_size, device=device)
            return
        self.quantizer = quantizer.to(device)
        self.transform = HadamardTransform(width, dtype, block_size, device) if rotate else None
        weight, bias = torch.cat([part.dense_weight(dtype).to(dtype) for part in parts]).to(device), None
        if any(part.bias is not None for part in parts):
            biases = [torch.zeros(part.out_features) if part.bias is None else part.bias for part in parts]
            bias = torch.cat([part_bias.to(dtype) for part_bias in biases]).to(device)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.product is not None and self.codes is not None:
            return self.product(self.codes(x))
        if self.transform is not None:
            x = self.transform(x)
        return nn.functional.linear(self.quantizer(x), self.weight, self.bias)
