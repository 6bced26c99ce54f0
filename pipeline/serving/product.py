"""Integers times integers by the oneDNN kernel of vLLM for CPUs.

It keeps what oneDNN has prepared from call to call: of a few tokens it takes half the time of PyTorch's
(kernels/integer_product.py), and `torch.compile` needs no name to find its weights.
"""

import functools

import torch
from torch import nn
from vllm import _custom_ops as kernels

from pipeline.kernels.nibble_product import FEW, pack_nibbles
from pipeline.kernels.operands import IntegerOperands

_SIGNED = 128


class ServedProduct(nn.Module):
    """What `IntegerProduct` computes: codes uint8 [T, in] -> [T, out] in `dtype`.

    The constant is added behind vLLM's kernel, which takes it in `dtype` alone: in bfloat16 what is computed of many
    tokens is rounded twice, what is computed of a few once.
    """

    def __init__(self, operands: IntegerOperands, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = len(operands.constant), dtype
        scales = (operands.weight_scale * operands.scale).unsqueeze(1)  # the kernel reads them where they lie
        weight = operands.integers.T
        self.handler = kernels.create_onednn_scaled_mm(weight, scales, dtype, dynamic_quant=False, use_azp=True)
        held = {
            "handler_scales": scales,
            "address": self.handler.handler_tensor,
            "input_scale": torch.ones(1, dtype=torch.float32),
            "input_zero_point": torch.tensor([operands.zero_point - _SIGNED], dtype=torch.int32),
            "constant": operands.constant,
        }
        self.has_nibbles = (nibbles := pack_nibbles(operands)) is not None
        if self.has_nibbles:
            held |= {"nibbles": nibbles.packed, "scale": nibbles.scale, "offset": nibbles.offset}
        for name, tensor in held.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        if self.has_nibbles:
            own = self.nibbles, self.scale, self.offset, self.constant, self.dtype, FEW
            return torch.ops.prefixquant.served_product(
                codes, *own, self.input_scale, self.input_zero_point, self.address
            )
        product = torch.empty(len(codes), self.width, dtype=self.dtype)
        signed = (codes ^ _SIGNED).view(torch.int8)  # code - 128
        torch.ops._C.onednn_scaled_mm(
            product, signed, self.input_scale, self.input_zero_point, None, None, self.address
        )
        return (product.float() + self.constant).to(self.dtype)


@functools.cache
def find_product() -> type[ServedProduct] | None:
    """`ServedProduct` where its kernel is exact, else None: layers multiply dequantized weights then.

    Where a processor has no instructions for it (VNNI, AMX), oneDNN may halve weights to keep sums within 16 bits.
    """
    integers = torch.arange(1, 128, 2, dtype=torch.int8)[None]  # odd: half of it is no integer
    codes = torch.arange(0, 256, 4, dtype=torch.uint8)[None]
    one, zero = torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.float32)
    found = ServedProduct(IntegerOperands(integers, one, 1.0, 0, zero), torch.float32)(codes).item()
    return ServedProduct if found == (codes.long() * integers.long()).sum().item() else None
