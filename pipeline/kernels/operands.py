"""The operands of a product of integers. `integer_product.py` and `nibble_product.py` multiply them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class IntegerOperands:
    """All operands of a product except the codes of its input.

    Attributes:
        integers: int8 [out, in], n_w.
        weight_scale: float32 [out], scale_w.
        scale, zero_point: scale_x and zero point of the codes.
        constant: float32 [out].
        largest: the largest code that can occur, at most 255.
    """

    integers: torch.Tensor
    weight_scale: torch.Tensor
    scale: float
    zero_point: int
    constant: torch.Tensor
    largest: int = 255
