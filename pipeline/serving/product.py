"""Integers times integers by kernels of vLLM: oneDNN's on CPUs, CUTLASS's on NVIDIA GPUs.

oneDNN's keeps what has been prepared from call to call: of a few tokens it takes half the time of PyTorch's
(kernels/integer_product.py), and `torch.compile` needs no name to find its weights. CUTLASS's multiplies int8; integers
of 4 bits are such.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import nn
from vllm import _custom_ops as kernels

from pipeline.kernels.nibble_product import FEW, pack_nibbles
from pipeline.kernels.operands import IntegerOperands

logger = logging.getLogger(__name__)
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


class CutlassProduct(nn.Module):
    """What `ServedProduct` computes, of widths that are multiples of 16, in bfloat16: others the kernel has not."""

    def __init__(self, operands: IntegerOperands, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        zero = operands.zero_point - _SIGNED
        held = {
            "weight": operands.integers.T,  # column by column: as the kernel reads it
            "scales": (operands.weight_scale * operands.scale).unsqueeze(1),
            "input_scale": torch.ones(1, 1, dtype=torch.float32),
            "zero_product": zero * operands.integers.sum(1, keepdim=True, dtype=torch.int32).T,
            "constant": operands.constant,
        }
        for name, tensor in held.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        signed = (codes ^ _SIGNED).view(torch.int8)  # code - 128
        product = kernels.cutlass_scaled_mm_azp(
            signed, self.weight, self.input_scale, self.scales, self.dtype, self.zero_product
        )
        return (product.float() + self.constant).to(self.dtype)


def find_product(
    dtype: torch.dtype, device: torch.device, widths: Sequence[int]
) -> type[ServedProduct | CutlassProduct] | None:
    """What multiplies integers exactly for a layer of `widths`, if anything does; else weights are dequantized."""
    if device.type == "cpu":
        return ServedProduct if is_exact(ServedProduct, torch.float32, device) else None
    fits = dtype == torch.bfloat16 and all(width % 16 == 0 for width in widths)
    return CutlassProduct if fits and is_exact(CutlassProduct, dtype, device) else None


@functools.cache
def is_exact(product: type[nn.Module], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine has the kernel, and it computes what it should.

    Where a processor has no instructions for it (VNNI, AMX), oneDNN may halve weights to keep sums within 16 bits; of
    NVIDIA's GPUs the older ones and Blackwell have no int8 kernel.
    """
    integers = torch.arange(1, 128, 2, dtype=torch.int8).repeat(16, 1)  # odd: half of it is no integer
    codes = torch.arange(0, 256, 4, dtype=torch.uint8)[None]
    one, zero = torch.ones(16, dtype=torch.float32), torch.zeros(16, dtype=torch.float32)
    try:
        found = product(IntegerOperands(integers, one, 1.0, 0, zero), dtype).to(device)(codes.to(device))
    except (AttributeError, RuntimeError) as error:  # vLLM has no such kernel, or not for this GPU
        logger.warning("vLLM has no exact int8 kernel here, weights are dequantized: %s", error)
        return False
    exact = (codes.long() * integers.long()).sum(1)  # below 2^24: float32 sums it exactly, and rounds once
    return torch.equal(found.cpu()[0], exact.to(dtype))
