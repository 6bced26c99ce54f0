"""lm_head in 8 bits (`quantizer_init.lm_head_bits`), in the place of vLLM's own: hidden states [T, D] -> logits [T, V].

The input is rotated and rounded in one pass (kernels/row_codes.py), and integers are multiplied (product.py). Without
an exact product, they are multiplied as floats of the model's dtype, which holds them exactly. Soft caps and factors of
logits are vLLM's own, after this. models/lm_head.py has the formulas.
"""

from collections.abc import Callable

import torch
from torch import nn

from pipeline.kernels.row_codes import RowCodes
from pipeline.models.lm_head import QuantizedHead

# Takes integers int8 [V, D], their scales [V], and the dtype of the logits.
MakeHeadProduct = Callable[[torch.Tensor, torch.Tensor, torch.dtype], nn.Module]


class ServedHead(nn.Module):
    """Compute the logits of some rows of the vocabulary, [T, rows], in the dtype of the model."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        head: QuantizedHead,
        *,
        dtype: torch.dtype,
        make_product: MakeHeadProduct | None,
        device: torch.device,
        first: int = 0,
        count: int | None = None,
    ) -> None:
        """Take the rows of an exported head.

        Args:
            dtype, device: the dtype and device of the model's computations.
            make_product: builds a product of integers; None: no exact one exists here.
            first, count: the rows of this process; rows after the vocabulary are zeros. `count` None: all.
        """
        super().__init__()
        count = head.out_features if count is None else count
        rows = slice(first, first + count)
        missing = count - len(head.weight[rows])
        integers = nn.functional.pad(head.weight[rows], (0, 0, 0, missing)).contiguous()
        scale = nn.functional.pad(head.weight_scale[rows], (0, missing), value=1.0)
        self.codes = RowCodes(head.in_features, head.rotate).to(device)
        self.product = None if make_product is None else make_product(integers, scale, dtype)
        if self.product is None:
            self.register_buffer("weight", integers.to(device, dtype), persistent=False)
            self.register_buffer("scale", scale.to(device), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        codes, token_scale = self.codes(hidden)
        if self.product is not None:
            return self.product(codes, token_scale)
        product = nn.functional.linear(codes.to(self.weight.dtype), self.weight)
        return (product.float() * token_scale * self.scale).to(hidden.dtype)
