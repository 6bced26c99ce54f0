"""Integers times integers on a CPU: a linear layer whose input arrives as codes of at most 8 bits.

    y = scale_x scale_w (n_x n_w) + constant      n_x = code - zero_point, n_w int8, summed exactly in int32

oneDNN's kernel scales, adds the constant and casts while the sums are still in registers. Its weights are repacked
once, when the product is made. Codes are uint8: with int8 ones the kernel of processors without AMX is thousands of
times slower.

`torch.compile` does not know repacked weights, so the product is an operator that looks them up by number.
"""

import itertools
import weakref
from typing import Any

import torch
from torch import nn

_OPERATORS = torch.library.Library("prefixquant", "DEF")
_OPERATORS.define("integer_product(Tensor codes, int number, int width, ScalarType dtype) -> Tensor")
_PRODUCTS: dict[int, tuple] = {}
_NUMBERS = itertools.count()


class IntegerProduct(nn.Module):
    """codes uint8 [..., in] -> [..., out] in `dtype`."""

    def __init__(
        self,
        integers: torch.Tensor,
        weight_scale: torch.Tensor,
        scale: float,
        zero_point: int,
        constant: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            integers: int8 [out, in].
            weight_scale: float32 [out].
            scale, zero_point: of the codes.
            constant: float32 [out].
            dtype: of the output.
        """
        super().__init__()
        self.width, self.dtype = integers.shape[0], dtype
        self.number = next(_NUMBERS)
        packed = torch.ops.onednn.qlinear_prepack(integers, None)
        zero_points = torch.zeros(self.width, dtype=torch.int64)
        _PRODUCTS[self.number] = (scale, zero_point, packed, weight_scale.contiguous(), zero_points, constant)
        weakref.finalize(self, _PRODUCTS.pop, self.number)

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntegerProduct":
        return self  # it never changes

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.ops.prefixquant.integer_product(codes, self.number, self.width, self.dtype)


def _multiply(codes: torch.Tensor, number: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.ops.onednn.qlinear_pointwise(codes, *_PRODUCTS[number], 1.0, 0, dtype, "none", [], "")


def _describe(codes: torch.Tensor, number: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return codes.new_empty((*codes.shape[:-1], width), dtype=dtype)


_OPERATORS.impl("integer_product", _multiply, "CPU")
torch.library.register_fake("prefixquant::integer_product", _describe, lib=_OPERATORS)
