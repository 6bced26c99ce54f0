"""What a product of integers is made of; integer_product.py and nibble_product.py multiply."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class IntegerOperands:
    """What a product is made of, beside the codes.

    Attributes:
        integers: int8 [out, in], n_w.
        weight_scale: float32 [out].
        scale, zero_point: of the codes.
        constant: float32 [out].
    """

    integers: torch.Tensor
    weight_scale: torch.Tensor
    scale: float
    zero_point: int
    constant: torch.Tensor
