"""Integers times integers by the oneDNN kernel of vLLM for CPUs.

It keeps what oneDNN has prepared from call to call: of a few tokens it takes half the time of PyTorch's
(numerics/integer_product.py), and `torch.compile` needs no name to find its weights.
"""

import functools

import torch
from torch import nn
from vllm import _custom_ops as kernels

_SIGNED = 128


class ServedProduct(nn.Module):
    """What `IntegerProduct` computes: codes uint8 [T, in] -> [T, out] in `dtype`.

    The constant is added behind the kernel, which takes it in `dtype` alone.
    """

    def __init__(
        self,
        integers: torch.Tensor,
        weight_scale: torch.Tensor,
        scale: float,
        zero_point: int,
        constant: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        """Args: as `gather_operands` gives them; `dtype`: of the output."""
        super().__init__()
        self.dtype, self.width = dtype, len(constant)
        scales = (weight_scale * scale).unsqueeze(1)  # the kernel reads them where they lie
        self.handler = kernels.create_onednn_scaled_mm(integers.T, scales, dtype, dynamic_quant=False, use_azp=True)
        held = {
            "scales": scales,
            "address": self.handler.handler_tensor,
            "one": torch.ones(1, dtype=torch.float32),
            "zero": torch.tensor([zero_point - _SIGNED], dtype=torch.int32),
            "constant": constant,
        }
        for name, tensor in held.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        product = torch.empty(len(codes), self.width, dtype=self.dtype)
        signed = (codes ^ _SIGNED).view(torch.int8)  # code - 128
        torch.ops._C.onednn_scaled_mm(product, signed, self.one, self.zero, None, None, self.address)
        return (product.float() + self.constant).to(self.dtype)


@functools.cache
def find_product() -> type[ServedProduct] | None:
    """`ServedProduct` where its kernel is exact, else None: layers multiply dequantized weights then.

    Where a processor has no instructions for it (VNNI, AMX), oneDNN may halve weights to keep sums within 16 bits.
    """
    integers = torch.arange(1, 128, 2, dtype=torch.int8)[None]  # odd: half of it is no integer
    codes = torch.arange(0, 256, 4, dtype=torch.uint8)[None]
    one, zero = torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.float32)
    found = ServedProduct(integers, one, 1.0, 0, zero, torch.float32)(codes).item()
    return ServedProduct if found == (codes.long() * integers.long()).sum().item() else None
