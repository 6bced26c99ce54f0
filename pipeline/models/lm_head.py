"""From final hidden states to logits, as the model's own class does it: lm_head, and in some families a soft cap.

z = hidden W^T,   logits = cap tanh(z / cap)        (Gemma 2; without a cap: logits = z)
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LmHead:
    """lm_head's weight [V, D], and the cap of the logits or None."""

    weight: torch.Tensor
    cap: float | None = None

    def to(self, device: torch.device | str) -> "LmHead":
        return LmHead(self.weight.to(device), self.cap)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] behind the final norm -> [..., V] float32; multiplied in the weight's dtype."""
        logits = hidden.to(self.weight) @ self.weight.T
        return (logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)).float()

    def pull_back_(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What a gradient [..., V] with respect to `logits` is with respect to the hidden states; overwrites it."""
        if self.cap is not None:
            gradient *= 1 - (logits / self.cap).square()
        return gradient.to(self.weight.dtype) @ self.weight
