"""From final hidden states to logits, as in the model's own class: lm_head, and in some families a soft cap.

z = hidden W^T,   logits = cap tanh(z / cap)        (Gemma 2; without a cap: logits = z)
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LmHead:
    """The head of a model.

    Attributes:
        weight: [V, D].
        cap: the bound of the logits; None: they have none.
    """

    weight: torch.Tensor
    cap: float | None = None

    def to(self, device: torch.device | str) -> "LmHead":
        """Return the same head on another device."""
        return LmHead(self.weight.to(device), self.cap)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits [..., V], float32, of hidden states [..., D] after the final norm.

        The product is in the weight's dtype.
        """
        logits = hidden.to(self.weight) @ self.weight.T
        return (logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)).float()

    def pull_back_(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turn a gradient [..., V] with respect to `logits` into one with respect to the hidden states [..., D].

        Overwrites `gradient`.
        """
        if self.cap is not None:
            gradient *= 1 - (logits / self.cap).square()
        return gradient.to(self.weight.dtype) @ self.weight
