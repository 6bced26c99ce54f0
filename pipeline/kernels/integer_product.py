"""Integers times integers on a CPU: a linear layer whose input arrives as codes of at most 8 bits.

    y = scale_x scale_w (n_x n_w) + constant      n_x = code - zero_point, n_w int8, summed exactly in int32

oneDNN's kernel scales, adds the constant and casts while the sums are still in registers. Its weights are repacked
once, when the product is created. Weights of 4 bits are packed a second time, for inputs of a few tokens
(`nibble_product.py`). Codes are uint8: with int8 codes, the kernel is thousands of times slower on processors without
AMX.

`torch.compile` cannot handle repacked weights, so the product is an operator that looks them up by name.
"""

import itertools
import weakref
from typing import Any

import torch
from torch import nn

from pipeline.kernels.compiler import DTYPES
from pipeline.kernels.nibble_product import FEW, pack_nibbles
from pipeline.kernels.operands import IntegerOperands

_OPERATORS = torch.library.Library("prefixquant", "DEF")
_OPERATORS.define("integer_product(Tensor codes, str name, int width, ScalarType dtype) -> Tensor")
_PRODUCTS: weakref.WeakValueDictionary[str, "IntegerProduct"] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class IntegerProduct(nn.Module):
    """Multiplies codes uint8 [..., in] by its weights: [..., out] in `dtype`."""

    def __init__(self, operands: IntegerOperands, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = len(operands.constant), dtype
        self.name = str(next(_NUMBERS))
        packed = torch.ops.onednn.qlinear_prepack(operands.integers, None)
        weights = packed, operands.weight_scale.contiguous(), torch.zeros(self.width, dtype=torch.int64)
        self.arguments = operands.scale, operands.zero_point, *weights, operands.constant
        self.nibbles = pack_nibbles(operands)
        _PRODUCTS[self.name] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntegerProduct":
        return self  # it is immutable

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the operands, because repacked weights cannot be pickled. Loading repacks them."""
        scale, zero_point, packed, weight_scale, _, constant = self.arguments
        integers = packed.to_dense().T.contiguous()
        return IntegerProduct, (IntegerOperands(integers, weight_scale, scale, zero_point, constant), self.dtype)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.ops.prefixquant.integer_product(codes, self.name, self.width, self.dtype)


def _multiply(codes: torch.Tensor, name: str, width: int, dtype: torch.dtype) -> torch.Tensor:
    product = _PRODUCTS[name]
    if product.nibbles is not None and codes.shape[:-1].numel() <= FEW and dtype in DTYPES:
        return product.nibbles.multiply(codes, dtype)
    return torch.ops.onednn.qlinear_pointwise(codes, *product.arguments, 1.0, 0, dtype, "none", [], "")


def _describe(codes: torch.Tensor, name: str, width: int, dtype: torch.dtype) -> torch.Tensor:
    return codes.new_empty((*codes.shape[:-1], width), dtype=dtype)


_OPERATORS.impl("integer_product", _multiply, "CPU")
torch.library.register_fake("prefixquant::integer_product", _describe, lib=_OPERATORS)
