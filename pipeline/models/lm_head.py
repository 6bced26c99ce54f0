"""From final hidden states to logits, as in the model's own class: lm_head, and in some families a soft cap.

    z = hidden W^T,   logits = cap tanh(z / cap)        (Gemma 2; without a cap: logits = z)

With `quantizer_init.lm_head_bits: 8` the product is one of integers, and the same one in every engine:

    x = hidden H                                        H: a Hadamard transform, where R1 is not merged
    n_x = round(x / s_x),   s_x = max |x| / 127         for each token
    n_w = round(W H / s_w), s_w = max |W H| / 127       for each row of W
    z = s_x s_w (n_x · n_w)

The transform spreads the few large channels of the final norm's output, which would take up the whole range. Sums of
integers are exact in float32 up to 2^24, which is beyond 1,040 channels of the largest product. So the order of sums
changes nothing in narrow models, and the last bits in wider ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipeline.kernels.integer_product import IntegerProduct
from pipeline.kernels.operands import IntegerOperands
from pipeline.kernels.row_codes import RowCodes
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.numerics.kept_dtype import KeepsDtype
from pipeline.numerics.quantizer import round_rows

BITS, ZERO = 8, 128  # integer + 128 is a code of 8 bits
_ROWS = 8192  # of the table that are in float64 at a time


@dataclass(frozen=True)
class LmHead:
    """The head of a model.

    Attributes:
        weight: [V, D]; integers of a quantized head are held as float32.
        cap: the bound of the logits; None: they have none.
        scale: float32 [V] of a quantized head, otherwise None.
        rotate: whether a quantized head has a Hadamard transform before it.
    """

    weight: torch.Tensor
    cap: float | None = None
    scale: torch.Tensor | None = None
    rotate: bool = False

    def to(self, device: torch.device | str) -> "LmHead":
        """Return the same head on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, weight=self.weight.to(device), scale=scale)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits [..., V], float32, of hidden states [..., D] after the final norm.

        The product is in the weight's dtype. That of a quantized head is rounded to the dtype of the hidden states.
        """
        if self.scale is None:
            logits = hidden.to(self.weight) @ self.weight.T
        else:
            logits = multiply_head(hidden.to(self.weight.device), self.weight, self.scale, self.rotate)
        return (logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)).float()

    def pull_back_(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turn a gradient [..., V] with respect to `logits` into one with respect to the hidden states [..., D].

        Rounding passes gradients straight through. Overwrites `gradient`.
        """
        if self.cap is not None:
            gradient *= 1 - (logits / self.cap).square()
        if self.scale is not None:
            gradient *= self.scale
        pulled = gradient.to(self.weight.dtype) @ self.weight
        return hadamard_transform(pulled, inverse=True) if self.rotate else pulled


def quantize_head(weight: torch.Tensor, rotate: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Round lm_head [V, D] to nearest.

    Args:
        rotate: whether a Hadamard transform comes before the head; its inverse is merged here.

    Returns:
        int8 [V, D] and the scale of each row, float32 [V].
    """
    integers = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float32)
    for start in range(0, len(weight), _ROWS):
        rows = weight[start : start + _ROWS].double()
        rows = (hadamard_transform(rows) if rotate else rows).float()
        rounded, scale = round_rows(rows, BITS)
        integers[start : start + _ROWS] = rounded.to(torch.int8)
        scales[start : start + _ROWS] = scale[:, 0]
    return integers, scales


def encode_hidden(hidden: torch.Tensor, rotate: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the integers [..., D] of hidden states, as float32, and the scale of each token, [..., 1]."""
    x = hidden.float()
    return round_rows(hadamard_transform(x) if rotate else x, BITS)


def multiply_head(hidden: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor, rotate: bool) -> torch.Tensor:
    """Return z [..., V] in the dtype of hidden states [..., D].

    Args:
        integers: [V, D], held as float32.
        scale: float32 [V].
        rotate: whether a Hadamard transform comes before the head.
    """
    codes, token_scale = encode_hidden(hidden, rotate)
    return ((codes @ integers.T) * token_scale * scale).to(hidden.dtype)


class QuantizedHead(KeepsDtype):
    """lm_head in 8 bits, in the place of the model's own linear: hidden [..., D] -> z [..., V], in the same dtype.

    Attributes:
        weight: int8 [V, D].
        weight_scale: float32 [V].
        rotate: whether a Hadamard transform comes before the head.
        keeps_unpacked: whether the integers are kept as float32 after a call.
        product: computes the same with integers; None: it is computed in float32.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, integers: torch.Tensor, scale: torch.Tensor, rotate: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = integers.shape
        self.register_buffer("weight", integers)
        self.register_buffer("weight_scale", scale)
        self.rotate, self.keeps_unpacked = rotate, False
        self.product: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._unpacked: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the unpacked integers out of copies and pickles."""
        return self.__dict__ | {"_unpacked": None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedHead":
        self._unpacked = None
        return super()._apply(fn, recurse)

    def unpack(self) -> torch.Tensor:
        """Return the integers as float32 [V, D]."""
        if not self.keeps_unpacked:
            return self.weight.float()
        if self._unpacked is None:
            self._unpacked = self.weight.float()
        return self._unpacked

    def forget_(self) -> None:
        """Drop the unpacked integers."""
        self._unpacked = None

    def multiply_integers_(self) -> None:
        """Compute with integers from now on, on a CPU."""
        self.forget_()
        self.product = IntegerHead(self.weight, self.weight_scale, self.rotate)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.product is not None:
            return self.product(hidden)
        return multiply_head(hidden, self.unpack(), self.weight_scale, self.rotate)


class IntegerHead(nn.Module):
    """Computes the same as `QuantizedHead` by a product of integers."""

    def __init__(self, integers: torch.Tensor, scale: torch.Tensor, rotate: bool) -> None:
        super().__init__()
        self.codes = RowCodes(integers.shape[1], rotate)
        constant = torch.zeros(len(scale), dtype=torch.float32)
        self.product = IntegerProduct(IntegerOperands(integers, scale, 1.0, ZERO, constant), torch.float32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        codes, token_scale = self.codes(hidden)
        return (self.product(codes.view(torch.uint8) ^ ZERO) * token_scale).to(hidden.dtype)


def find_head(head: nn.Module, cap: float | None) -> LmHead:
    """Return the head of a model in memory.

    Args:
        head: its module `lm_head`.
        cap: the bound of its logits.

    Raises:
        TypeError: there is another module.
    """
    if isinstance(head, QuantizedHead):
        return LmHead(head.weight.float(), cap, head.weight_scale, head.rotate)
    if not isinstance(head, nn.Linear):
        raise TypeError(f"lm_head is a {type(head).__name__}, not a linear")
    return LmHead(head.weight.detach(), cap)
