"""The invariance gate: a rotated model must compute what the original does, or nothing is written.

Hidden states of the same windows go through the original and the rotated blocks in **float64**: an error shows as such,
and rounding as 1e-12. In float32 the two cannot be told apart: massive activations alone make logits differ by 3e-4.
What float32 and a narrower dtype add is measured beside it, and reported: `float32_logit_deviation` of the rotated
model, next to `float32_original_deviation` of the original model from itself.

transformers computes norms, and softmax where scores are capped, in float32 whatever their input. Here they are
computed as they are defined, in the input's dtype.
"""

import functools
import math
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from pipeline.blocks.quantized import BlockSettings, fill_block
from pipeline.blocks.walk import BlockRunner
from pipeline.models.architectures import find_architecture
from pipeline.models.checkpoint import Checkpoint
from pipeline.rotation.matrices import Rotation, count_rows
from pipeline.runtime.errors import PipelineError

GATE_TOLERANCE = 1e-9
_WINDOWS, _LENGTH = 2, 64
_EAGER = "prefixquant_exact_eager"


class RotationError(PipelineError):
    """The rotated model does not compute what the original does."""


class InvarianceGate:
    """Streams of the same random windows through the original and the rotated model, block by block.

    Two of them in float64, which are judged; the original in float32, the rotated model in float32, and the rotated
    model in the dtype it is written in, where that is narrower.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: BlockSettings,
        r1: Rotation,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self.checkpoint, self.settings, self.dtype = checkpoint, settings, dtype
        self.runners = {kind: BlockRunner(checkpoint, device, _WINDOWS) for kind in (torch.float64, torch.float32)}
        token_ids = torch.randint(0, checkpoint.config.vocab_size, (_WINDOWS, _LENGTH), generator=generator)
        self.original = checkpoint.embed(token_ids).double()
        self.rotated = r1.apply(self.original.clone())
        self.rounded = {"original": self.original.float(), "float32": self.rotated.float()}
        if dtype != torch.float32:
            self.rounded["dtype"] = self.rotated.to(dtype).float()

    def advance_original_(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Through block `index` of the original, in float64 and in float32."""
        self._advance_(index, tensors, self.original, None)
        self._advance_(index, tensors, self.rounded["original"], None)

    def advance_rotated_(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Through the rotated block's float64 `tensors`."""
        self._advance_(index, tensors, self.rotated, self.settings)

    def advance_rounded_(self, index: int, single: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> None:
        """Through the rotated block's tensors in float32, and as they are written."""
        self._advance_(index, single, self.rounded["float32"], self.settings)
        if "dtype" in self.rounded:
            self._advance_(index, written, self.rounded["dtype"], self.settings)

    def _advance_(
        self, index: int, tensors: dict[str, torch.Tensor], hidden: torch.Tensor, settings: BlockSettings | None
    ) -> None:
        runner = self.runners[hidden.dtype]
        block = fill_block(self.checkpoint, index, tensors, settings, runner.device, hidden.dtype)
        if hidden.dtype == torch.float64:
            compute_exactly_(block)
        runner.advance_(block, hidden)

    @torch.no_grad()
    def judge(self, r1: Rotation, folded: torch.Tensor | None) -> dict[str, float]:
        """Compare logits, a slice of the vocabulary at a time.

        Args:
            folded: the final norm's weight [D] float64 that goes into lm_head, or None: it stays where it is.

        Returns:
            Metrics, all relative to the largest logit: see `merging.rotate_model`.

        Raises:
            RotationError: the rotated model's logits are not the original's.
        """
        head = self.checkpoint.load_lm_head()
        gain = find_gain(self.checkpoint.load_final_norm(), self.checkpoint.architecture.norm_offset)
        eps = find_eps(self.checkpoint.load_final_norm())
        folds = folded is not None
        original, rotated = (
            normalise(hidden, own, eps).flatten(0, 1)
            for hidden, own in ((self.original, gain), (self.rotated, torch.ones_like(gain) if folds else gain))
        )
        rounded = {
            name: normalise(hidden, (torch.ones_like(gain) if folds and name != "original" else gain).float(), eps)
            for name, hidden in self.rounded.items()
        }
        largest, deviations = 0.0, dict.fromkeys(("exact", *rounded), 0.0)
        count = count_rows(head.weight)
        for start in range(0, len(head.weight), count):
            rows = head.weight[start : start + count].double()
            rotated_rows = r1.apply(rows if folded is None else rows * folded)
            exact = multiply(original, rows, head.cap)
            found = {"exact": multiply(rotated, rotated_rows, head.cap)}
            for name, hidden in rounded.items():
                own = rows if name == "original" else rotated_rows
                own = own.to(self.dtype).float() if name == "dtype" else own.float()
                found[name] = multiply(hidden.flatten(0, 1), own, head.cap)
            largest = max(largest, exact.abs().max().item())
            for name, logits in found.items():
                # max(a, nan) is a: what is not finite must not pass.
                deviation = torch.nan_to_num((logits - exact).abs(), nan=math.inf).max().item()
                deviations[name] = max(deviations[name], deviation)
        relative = {name: deviation / largest for name, deviation in deviations.items()}
        if not relative["exact"] <= GATE_TOLERANCE:
            raise RotationError(
                f"the rotated model is not the original: logits differ by {relative['exact']:.2e} of max |logit| "
                f"({largest:.4g}), in float64, allowed are {GATE_TOLERANCE:.0e}; nothing was written"
            )
        metrics = {
            "max_logit_deviation": relative["exact"],
            "float32_logit_deviation": relative["float32"],
            "float32_original_deviation": relative["original"],
        }
        return metrics | ({"dtype_logit_deviation": relative["dtype"]} if "dtype" in relative else {})


def compute_exactly_(block: nn.Module) -> None:
    """Let a float64 block's norms, and its attention where transformers' would not, compute in float64."""
    config = block.self_attn.config
    offset = find_architecture(config).norm_offset
    for module in block.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(normalise, gain=find_gain(module, offset), eps=find_eps(module))
    if config._attn_implementation == "eager":
        config._attn_implementation = _EAGER


def normalise(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in x's own dtype: x / sqrt(mean of squares + eps) · gain, over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def find_gain(norm: nn.Module, offset: float) -> torch.Tensor:
    """What an RMSNorm multiplies by, float64: its weight and the family's `norm_offset`."""
    gain = norm.weight.detach().double() + offset
    x = torch.linspace(1, 2, len(gain), device=gain.device)
    expected = type(norm).forward(norm, x.to(norm.weight.dtype)).double()
    error = (normalise(x.double(), gain, find_eps(norm)) - expected).abs().max() / expected.abs().max()
    assert error < 0.02, f"{type(norm).__name__} is not the norm it is taken for"  # bfloat16 at worst
    return gain


def find_eps(norm: nn.Module) -> float:
    """An RMSNorm's eps; transformers' families have two names for it."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def multiply(hidden: torch.Tensor, rows: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits [T, V'] of hidden states [T, D] and rows [V', D] of lm_head, capped where the family does."""
    logits = hidden @ rows.T
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with softly capped scores in the queries' dtype, heads shared in groups; [B, T, heads, d]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_EAGER, _attend)  # the runner makes its masks, as eager's
