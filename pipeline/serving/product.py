"""Products of integers by kernels of vLLM: oneDNN's on CPUs, CUTLASS's on NVIDIA GPUs.

oneDNN's kernel keeps prepared weights from call to call. For a few tokens it takes half the time of PyTorch's
(kernels/integer_product.py), and `torch.compile` needs no name to find its weights. CUTLASS's kernel multiplies int8;
integers of 4 bits are stored as int8.
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
_SIGNED = 128  # code - 128 is int8
_PROBE = torch.arange(1, 128, 2, dtype=torch.int8).repeat(16, 1)  # odd, so that halved weights give other results
_FIRST, _BEYOND = 80, 100  # compute capabilities with int8 kernels: from Ampere to Hopper


class ServedProduct(nn.Module):
    """Compute [T, out] in `dtype` from codes uint8 [T, in], as `IntegerProduct` does.

    vLLM's kernel takes the constant in `dtype`. In bfloat16 it is therefore rounded for many tokens, but not for a few.
    Codes below 128 are int8 as they are, without a pass over them.
    """

    bias: torch.Tensor

    def __init__(self, operands: IntegerOperands, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = len(operands.constant), dtype
        self.offset = _SIGNED if operands.largest >= _SIGNED else 0
        scales = (operands.weight_scale * operands.scale).unsqueeze(1)  # kept as a buffer: the kernel reads this memory
        weight = operands.integers.T
        self.handler = kernels.create_onednn_scaled_mm(weight, scales, dtype, dynamic_quant=False, use_azp=True)
        buffers = {
            "handler_scales": scales,
            "address": self.handler.handler_tensor,
            "input_scale": torch.ones(1, dtype=torch.float32),
            "input_zero_point": torch.tensor([operands.zero_point - self.offset], dtype=torch.int32),
            "bias": operands.constant.to(dtype),
        }
        nibbles = pack_nibbles(operands)
        self.has_nibbles = nibbles is not None
        if nibbles is not None:
            buffers |= {"nibbles": nibbles.packed, "scale": nibbles.scale, "weight_offset": nibbles.offset}
            buffers |= {"constant": operands.constant}
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        if self.has_nibbles:
            return torch.ops.prefixquant.served_product(
                codes,
                self.nibbles,
                self.scale,
                self.weight_offset,
                self.constant,
                self.dtype,
                FEW,
                self.offset,
                self.input_scale,
                self.input_zero_point,
                self.bias,
                self.address,
            )
        product = torch.empty(len(codes), self.width, dtype=self.dtype)
        signed = (codes ^ self.offset if self.offset else codes).view(torch.int8)
        torch.ops._C.onednn_scaled_mm(
            product, signed, self.input_scale, self.input_zero_point, None, self.bias, self.address
        )
        return product


class HeadProduct(nn.Module):
    """Compute [T, out] in `dtype` from integers int8 [T, in] with a scale for each row [T, 1]."""

    def __init__(self, integers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = len(scale), dtype
        scales = scale.unsqueeze(1).contiguous()  # kept as a buffer: the kernel reads this memory
        self.handler = kernels.create_onednn_scaled_mm(integers.T, scales, dtype, dynamic_quant=True, use_azp=False)
        self.register_buffer("handler_scales", scales, persistent=False)

    def forward(self, codes: torch.Tensor, token_scale: torch.Tensor) -> torch.Tensor:
        product = torch.empty(len(codes), self.width, dtype=self.dtype)
        return kernels.onednn_scaled_mm(self.handler, codes, product, token_scale, None, None, None)


class CutlassProduct(nn.Module):
    """Compute the same as `ServedProduct` on a GPU, in bfloat16. The kernel needs widths that are multiples of 16."""

    weight: torch.Tensor
    input_scale: torch.Tensor
    scales: torch.Tensor
    zero_product: torch.Tensor
    constant: torch.Tensor

    def __init__(self, operands: IntegerOperands, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        zero = operands.zero_point - _SIGNED
        buffers = {
            "weight": operands.integers.T,  # column-major, as the kernel needs it
            "scales": (operands.weight_scale * operands.scale).unsqueeze(1),
            "input_scale": torch.ones(1, 1, dtype=torch.float32),
            "zero_product": zero * operands.integers.sum(1, keepdim=True, dtype=torch.int32).T,
            "constant": operands.constant,
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        signed = (codes ^ _SIGNED).view(torch.int8)
        product = kernels.cutlass_scaled_mm_azp(
            signed, self.weight, self.input_scale, self.scales, self.dtype, self.zero_product
        )
        return (product.float() + self.constant).to(self.dtype)


def find_product(
    dtype: torch.dtype, device: torch.device, widths: Sequence[int]
) -> type[ServedProduct | CutlassProduct] | None:
    """Return the class that multiplies integers exactly for layers of these widths. None: weights are dequantized."""
    if device.type == "cpu":
        return ServedProduct if is_exact(ServedProduct, torch.float32, device) else None
    if dtype != torch.bfloat16 or any(width % 16 for width in widths):
        _warn_once(f"for {dtype} and widths {tuple(widths)}")
        return None
    return CutlassProduct if is_exact(CutlassProduct, dtype, device) else None


def find_head_product(device: torch.device) -> type[HeadProduct] | None:
    """Return the class that multiplies the integers of lm_head exactly on this device, or None."""
    if device.type != "cpu" or not is_exact(ServedProduct, torch.float32, device):
        return None
    codes = torch.arange(-127, 128, 4, dtype=torch.int8)
    exact = (codes.long() * _PROBE.long()).sum(1).float()
    ones = torch.ones(64, 1, dtype=torch.float32)  # vLLM loads with the model's dtype as the default one
    product = HeadProduct(_PROBE, ones[:16, 0], torch.float32)
    rows = [product(codes.repeat(tokens, 1), ones[:tokens]) for tokens in (1, 64)]
    if all(torch.equal(found, exact.expand_as(found)) for found in rows):
        return HeadProduct
    _warn_once("for lm_head that is exact on this machine")
    return None


@functools.cache
def is_exact(product: type[nn.Module], dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether this machine has the kernel, and it computes exact results.

    On processors without VNNI or AMX instructions, oneDNN may halve weights to keep sums within 16 bits. NVIDIA's GPUs
    from Ampere to Hopper have int8 kernels, one for a few tokens and another for many.
    """
    if product is CutlassProduct and not _FIRST <= find_capability() < _BEYOND:
        _warn_once(f"for GPUs of compute capability {find_capability() / 10}")
        return False
    one, zero = torch.ones(16, dtype=torch.float32), torch.zeros(16, dtype=torch.float32)
    codes = torch.arange(0, 256, 4, dtype=torch.uint8)
    exact = (codes.long() * _PROBE.long()).sum(1).to(dtype)  # below 2^24, so float32 sums are exact
    try:
        probed = product(IntegerOperands(_PROBE, one, 1.0, 0, zero), dtype).to(device)
        products = [probed(codes.repeat(tokens, 1).to(device)).cpu() for tokens in (1, 64, 1024)]
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError) as error:  # vLLM was built without the kernel
        _warn_once(f"that runs here ({error})")
        return False
    if not all(torch.equal(rows, exact.expand_as(rows)) for rows in products):
        _warn_once("that is exact on this machine")
        return False
    return True


def find_capability() -> int:
    """Return the compute capability of the GPU, 90 for a Hopper; 0 without a GPU."""
    capability = current_platform.get_device_capability()
    return 0 if capability is None else capability.to_int()


@functools.cache
def _warn_once(condition: str) -> None:
    logger.warning("vLLM has no integer kernel %s: weights are dequantized, which is slower", condition)
