"""The invariance gate: a rotated model must compute what the original does, or nothing is written."""

import math

import torch
from torch import nn

from pipeline.blocks.quantized import BlockSettings, fill_block
from pipeline.blocks.walk import BlockRunner
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.lm_head import LmHead
from pipeline.rotation.matrices import Rotation, count_rows
from pipeline.runtime.errors import PipelineError

_GATE_WINDOWS, _GATE_LENGTH = 2, 64
GATE_TOLERANCE = 1e-4


class RotationError(PipelineError):
    """The rotated model does not compute what the original does."""


class InvarianceGate:
    """Streams of the same windows through the original and the rotated model, block by block, in float32."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: BlockSettings,
        r1: Rotation,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self.checkpoint = checkpoint
        self.settings = settings
        self.narrow = None if dtype == torch.float32 else dtype
        self.runner = BlockRunner(checkpoint, device, _GATE_WINDOWS)
        shape = (_GATE_WINDOWS, _GATE_LENGTH)
        token_ids = torch.randint(0, checkpoint.config.vocab_size, shape, generator=generator)
        self.original = checkpoint.embed(token_ids).float()
        self.rotated = r1.apply(self.original.double()).float()
        self.narrowed = self.rotated.clone() if self.narrow is None else self.rotated.to(self.narrow).float()

    def advance_original_(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        self._advance_(index, tensors, self.original, None)

    def advance_rotated_(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        self._advance_(index, tensors, self.rotated, self.settings)

    def advance_narrowed_(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        if self.narrow is not None:
            self._advance_(index, tensors, self.narrowed, self.settings)

    def _advance_(
        self, index: int, tensors: dict[str, torch.Tensor], hidden: torch.Tensor, settings: BlockSettings | None
    ) -> None:
        block = fill_block(self.checkpoint, index, tensors, settings, self.runner.device, torch.float32)
        self.runner.advance_(block, hidden)

    @torch.no_grad()
    def judge(self, r1: Rotation, folded: torch.Tensor | None) -> dict[str, float]:
        """Compare logits, a slice of the vocabulary at a time. Raises RotationError.

        Args:
            folded: the final norm's weight [D] float64 that goes into lm_head, or None: it stays where it is.
        """
        norm: nn.Module = self.checkpoint.load_final_norm().float().requires_grad_(False)
        original = norm(self.original).flatten(0, 1)
        if folded is not None:
            norm.weight = nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)
        rotated, narrowed = (norm(hidden).flatten(0, 1) for hidden in (self.rotated, self.narrowed))
        head = self.checkpoint.load_lm_head()
        cap, head = head.cap, head.weight
        largest, deviation, narrow_deviation = 0.0, 0.0, 0.0
        count = count_rows(head)
        for start in range(0, len(head), count):
            rows = head[start : start + count]
            rotated_rows = r1.apply(rows.double() if folded is None else rows.double() * folded).float()
            logits = LmHead(rows.float(), cap).logits(original)
            largest = max(largest, logits.abs().max().item())
            deviation = max(deviation, (LmHead(rotated_rows, cap).logits(rotated) - logits).abs().max().item())
            if self.narrow is not None:
                change = LmHead(rotated_rows.to(self.narrow).float(), cap).logits(narrowed) - logits
                narrow_deviation = max(narrow_deviation, change.abs().max().item())
        relative = deviation / largest
        if not math.isfinite(relative) or relative > GATE_TOLERANCE:
            raise RotationError(
                f"the rotated model is not the original: logits differ by {relative:.2e} of max |logit| "
                f"({largest:.4g}), allowed are {GATE_TOLERANCE:.0e}; nothing was written"
            )
        metrics = {"max_logit_deviation": relative}
        if self.narrow is not None:
            metrics["dtype_logit_deviation"] = narrow_deviation / largest
        return metrics
