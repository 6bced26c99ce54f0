"""Tensors that keep their dtype when the model around them is cast: the ranges and means of quantizers.

A scale is chosen in float32. Rounded to bfloat16, it would turn values into other integers than those that were
evaluated. So `.to(torch.bfloat16)`, `.half()` and the like move these tensors between devices, and do not change their
dtype.
"""

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import nn


class KeepsDtype(nn.Module):
    """A module whose `kept_tensors` are never cast. This does not apply to the tensors of its submodules.

    Attributes:
        kept_tensors: names of parameters and buffers; None for all.
    """

    kept_tensors: ClassVar[frozenset[str] | None] = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        if recurse:
            for module in self.children():
                module._apply(fn)
        tensors = self._parameters | self._buffers
        kept_ids = {id(tensors[name]) for name in tensors if self.kept_tensors is None or name in self.kept_tensors}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept_ids and moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse=False)
