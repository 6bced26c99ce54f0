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
from vllm.platforms import current_platform

from pipeline.kernels.nibble_product import FEW, pack_nibbles
from pipeline.kernels.operands import IntegerOperands

logger = logging.getLogger(__name__)
_SIGNED = 128
_FIRST, _BEYOND = 80, 100  # capabilities of GPUs with int8 kernels


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
    """What `ServedProduct` computes, in bfloat16, of widths that are multiples of 16, as the kernel asks."""

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
    if dtype != torch.bfloat16 or any(width % 16 for width in widths):
        _say_once(f"in {dtype}, of widths {tuple(widths)}, which it does not multiply")
        return None
    return CutlassProduct if is_exact(CutlassProduct, dtype, device) else None


@functools.cache
def is_exact(product: type[nn.Module], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine has the kernel, and it computes what it should.

    Where a processor has no instructions for it (VNNI, AMX), oneDNN may halve weights to keep sums within 16 bits; of
    NVIDIA's GPUs those from Ampere to Hopper have int8 kernels, another one for a few tokens than for many.
    """
    if product is CutlassProduct and not _FIRST <= find_capability() < _BEYOND:
        _say_once(f"on a GPU of capability {find_capability() / 10}, for which vLLM has none")
        return False
    integers = torch.arange(1, 128, 2, dtype=torch.int8).repeat(16, 1)  # odd: half of it is no integer
    one, zero = torch.ones(16, dtype=torch.float32), torch.zeros(16, dtype=torch.float32)
    codes = torch.arange(0, 256, 4, dtype=torch.uint8)
    exact = (codes.long() * integers.long()).sum(1).to(dtype)  # below 2^24: float32 sums it exactly, and rounds once
    try:
        probed = product(IntegerOperands(integers, one, 1.0, 0, zero), dtype).to(device)
        found = [probed(codes.repeat(tokens, 1).to(device)).cpu() for tokens in (1, 64, 1024)]
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError) as error:  # vLLM was built without it
        _say_once(f"here: {error}")
        return False
    if not all(torch.equal(own, exact.expand_as(own)) for own in found):
        _say_once("here that is exact")
        return False
    return True


def find_capability() -> int:
    """Of the GPU: 90 for a Hopper."""
    capability = current_platform.get_device_capability()
    return 0 if capability is None else capability.to_int()


@functools.cache
def _say_once(where: str) -> None:
    logger.warning("weights are dequantized: vLLM has no kernel for integers %s", where)
