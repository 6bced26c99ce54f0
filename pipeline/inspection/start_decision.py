"""Whether every window gets a start token: as `calibration.start_token` says, or as the model itself decides.

`auto` follows the training of the model. It compares the model's loss on a few windows with and without the start
token, on the same targets. If one of the two is clearly lower, it is taken. Otherwise the tokenizer's own habit counts,
or the family's: lm-eval gives some families a start token in every case. A model that was trained with one loses a nat
or more without it (Gemma 3 270M: perplexity 36 instead of 13). A model that was trained without one loses or gains
little (SmolLM2-135M: 0.02 nats), or is worse with it (Qwen2.5-0.5B: 0.3 nats).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.blocks.walk import BlockRunner, load_blocks
from pipeline.models.checkpoint import Checkpoint
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.progress import show_progress
from pipeline.text.start_token import choose_start_token, find_added_token
from pipeline.text.windows import prepend_start_token

_WINDOWS, _LENGTH = 4, 256
# A clear difference exceeds both. With one standard error, four windows would find a difference by chance one time in
# five. One more token to attend to may be worth a few hundredths of a nat to any model.
_CLEAR_ERRORS, _CLEAR_NATS = 2.0, 0.05
_FAMILIES = ("gemma",)  # beginnings of model types


class StartTokenError(PipelineError):
    """The tokenizer has no start token."""


@dataclass(frozen=True)
class StartDecision:
    """The token before every window, and the reason for it.

    Attributes:
        token: its id, or None.
        why: the reason in words.
        measured: mean losses in nats without and with it, and the standard error of their difference if there are
            several windows; {} if nothing was measured.
    """

    token: int | None
    why: str
    measured: dict[str, float]

    def summary(self) -> dict[str, object]:
        return {"id": self.token, "why": self.why, **self.measured}


def decide_start_token(
    mode: str, checkpoint: Checkpoint, token_ids: torch.Tensor, runner: BlockRunner
) -> StartDecision:
    """Decide on the start token of every window.

    Args:
        mode: auto | never | always.
        checkpoint: the original model.
        token_ids: windows [N, T] of content; the loss is measured on the first few.

    Raises:
        StartTokenError: `always`, and the tokenizer has no start token.
    """
    token, name = choose_start_token(checkpoint)
    if mode == "always" and token is None:
        raise StartTokenError("calibration.start_token='always': the tokenizer has neither BOS nor EOS. Use auto.")
    if mode == "never" or token is None:
        return StartDecision(None, "never" if mode == "never" else f"auto: {name}", {})
    if mode == "always":
        return StartDecision(token, f"always: {name}", {})
    habit = find_added_token(checkpoint.tokenizer) == token
    usual = habit or checkpoint.config.model_type.startswith(_FAMILIES)
    custom = "the tokenizer puts it there" if habit else "usual in this family" if usual else "the tokenizer adds none"
    content = token_ids[:_WINDOWS, :_LENGTH]
    without, with_token = measure_losses(checkpoint, content, runner, token)
    change = with_token - without
    error = change.std().item() / math.sqrt(len(change)) if len(change) > 1 else math.inf
    clear = abs(change.mean().item()) > max(_CLEAR_ERRORS * error, _CLEAR_NATS)
    wanted = change.mean().item() < 0 if clear else usual
    losses = {"loss_without": without.mean().item(), "loss_with": with_token.mean().item(), "standard_error": error}
    measured = {name: round(value, 4) for name, value in losses.items() if math.isfinite(value)}
    judged = "lower" if clear and wanted else "higher" if clear else "no clear difference"
    why = f"auto: loss with {name} {judged}, {custom}"
    return StartDecision(token if wanted else None, why, measured)


@torch.no_grad()
def measure_losses(
    checkpoint: Checkpoint, token_ids: torch.Tensor, runner: BlockRunner, start_token: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss per target of each window [N, T], in nats, without and with a start token, [N] float64 each.

    The targets are the same: the content after its first token.
    """
    streams = [checkpoint.embed(prepend_start_token(token_ids, token)) for token in (None, start_token)]
    blocks = load_blocks(checkpoint, runner.device)
    for _ in show_progress(range(checkpoint.block_count), checkpoint.block_count, "with and without a start token"):
        block = next(blocks)
        for hidden in streams:
            runner.advance_(block, hidden)
        del block
    lm_head = checkpoint.load_lm_head().to(runner.device)
    losses = []
    for hidden in streams:
        checkpoint.apply_final_norm_(hidden)
        states = hidden[:, -token_ids.shape[1] : -1]
        pairs = zip(states, token_ids[:, 1:], strict=True)
        means = [
            nn.functional.cross_entropy(lm_head.logits(window.to(runner.device)), targets.to(runner.device))
            for window, targets in pairs
        ]
        losses.append(torch.stack(means).double().cpu())
    return losses[0], losses[1]
