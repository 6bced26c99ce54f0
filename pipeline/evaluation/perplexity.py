"""Perplexity and agreement with the original model, streamed: one block, then one slice of logits, in memory at a time.

Every window of T tokens gives T - 1 targets, the same for all variants, whatever stands in front: a prefix, a start
token, both or nothing:

    perplexity = exp(sum over windows and targets of -log p(x_t | x_<t) / number of targets)

Agreement looks at the same positions: the mean of KL(original ‖ variant) in nats, and how often both models rank the
same token first. Final hidden states are kept, so that comparing two variants costs two products with lm_head and no
forward pass.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.blocks.quantized import block_settings, count_expected_quantizers, count_fired_quantizers, find_settings
from pipeline.blocks.walk import BlockRunner, batches, load_blocks
from pipeline.inference.prefixed_model import probe_saturation
from pipeline.inspection.saturation import Report, advance_probed_, summarise_saturation
from pipeline.models.architectures import find_architecture, find_logit_cap
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.lm_head import LmHead
from pipeline.runtime.artifacts import ArtifactError, check_input, load_tensors
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.progress import show_progress
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.text.windows import put_in_front

LOGIT_POSITIONS = 256  # logits of so many positions at a time: 50 MB for a vocabulary of 49152
_HIGHEST_LOSS = 700.0  # nats a token; exp of more is beyond floating point, and JSON knows no infinity


class QuantizerCountError(PipelineError):
    """Not every quantizer that the settings ask for took part in the forward pass, or some did that should not."""


class NonFiniteError(PipelineError):
    """A forward pass ended in NaN or infinite values."""


@dataclass(frozen=True)
class Scores:
    """What one variant scores on one corpus.

    Attributes:
        losses: [N] mean -log p per target of each window, in nats, float64.
        divergences: [N] mean KL divergence from the original of each window in nats, float64; None when not compared.
        agreements: [N] share of positions with the same first choice, float64; None when not compared.
    """

    losses: torch.Tensor
    divergences: torch.Tensor | None
    agreements: torch.Tensor | None

    @property
    def kl(self) -> float:
        return self.divergences.mean().item()

    @property
    def top1_agreement(self) -> float:
        return self.agreements.mean().item()

    def combine(self, ranks: Ranks, count: int) -> "Scores":
        """Those of all ranks' `count` windows."""
        values = (self.losses, self.divergences, self.agreements)
        return Scores(*(None if own is None else ranks.collect(own, count) for own in values))

    @property
    def perplexity(self) -> float:
        """Windows are equally long, so the mean over windows is the mean over targets. Raises NonFiniteError."""
        loss = self.losses.mean().item()
        if not loss <= _HIGHEST_LOSS:
            raise NonFiniteError(
                f"a loss of {loss:.6g} nats a token has no perplexity; the model or its quantizers are broken"
            )
        return math.exp(loss)

    @property
    def standard_error(self) -> float | None:
        """Of the perplexity, from how much windows differ (first order: perplexity times the loss's); None for one."""
        count = len(self.losses)
        return self.perplexity * self.losses.std().item() / math.sqrt(count) if count > 1 else None


class Original:
    """The original model's side of a comparison: its final hidden states per corpus, and its lm_head."""

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        """`path` is the artifact of `evaluation@original`. Raises ArtifactError."""
        self.tensors, self.header = load_tensors(path, "evaluation")
        check_input(self.header, "checkpoint", checkpoint.header, path)
        self.lm_head = checkpoint.load_lm_head()

    def hidden(self, corpus: str, token_ids: torch.Tensor) -> torch.Tensor:
        """[N, T, D] on the same windows. Raises ArtifactError when it was evaluated on others."""
        if not torch.equal(self.tensors[f"token_ids.{corpus}"], token_ids):
            raise ArtifactError(
                f"evaluation@original saw other windows of {corpus}; rerun: dvc repro --force evaluation@original"
            )
        return self.tensors[f"hidden.{corpus}"]


def evaluate_windows(
    checkpoint: Checkpoint,
    windows: dict[str, torch.Tensor],
    runner: BlockRunner,
    prefix_kv: torch.Tensor | None,
    original: Original | None,
    ranks: Ranks = ALONE,
    start_token: int | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, dict[int, Report]]]:
    """Evaluate one variant on all corpora, in one walk.

    Args:
        windows: corpus -> token ids [N, T] of content, the same T everywhere.
        original: what to compare with, or None.
        ranks: each walks its own windows; all of them return the whole, but saturation is of the first one's.
        start_token: what stands in front of each window, behind the prefix, or None.

    Returns:
        Metrics (per corpus `perplexity`, its `standard_error`, `kl`, `top1_agreement`, `largest_saturation`,
        `lowest_sqnr`; `quantizers_fired`, `settings`); tensors to keep, of content: per corpus `hidden.`, `loss.` and
        `token_ids.`; corpus -> block -> saturation report (see `advance_probed_`).
    """
    own = {corpus: ids[ranks.slice_windows(len(ids))] for corpus, ids in windows.items()}
    run = compute_final_hidden(checkpoint, own, runner, prefix_kv, start_token)
    front = _describe_front(prefix_kv, start_token)
    return _score_run(run, checkpoint.load_lm_head(), windows, front, original, runner.device, ranks)


def evaluate_model(
    model: PreTrainedModel,
    windows: dict[str, torch.Tensor],
    batch_size: int,
    original: Original | None,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, dict[int, Report]]]:
    """As `evaluate_windows`, of a whole model in memory (see `inference/prefixed_model.py`)."""
    own = {corpus: ids[ranks.slice_windows(len(ids))] for corpus, ids in windows.items()}
    run = run_model(model, own, batch_size)
    front = _describe_front(model.prefix_kv, model.text_start_token_id)
    lm_head = LmHead(model.lm_head.weight.detach(), find_logit_cap(model.config))
    return _score_run(run, lm_head, windows, front, original, model.device, ranks)


def _describe_front(prefix_kv: torch.Tensor | None, start_token: int | None) -> dict[str, Any]:
    """For the metrics: what stands in front of every window."""
    special = "none added" if start_token is None else f"start token (id {start_token}) in front of each window"
    return {"prefix_tokens": 0 if prefix_kv is None else prefix_kv.shape[-2], "special_tokens": special}


def _score_run(
    run: tuple[dict[str, torch.Tensor], Counter[str], dict[str, dict[int, Report]]],
    lm_head: LmHead,
    windows: dict[str, torch.Tensor],
    front: dict[str, Any],
    original: Original | None,
    device: torch.device,
    ranks: Ranks,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, dict[int, Report]]]:
    hidden, fired, saturation = run
    metrics: dict[str, Any] = {"perplexity": {}, "standard_error": {}} | (
        {"kl": {}, "top1_agreement": {}} if original else {}
    )
    tensors: dict[str, torch.Tensor] = {}
    for corpus, ids in windows.items():
        own, part = ranks.slice_windows(len(ids)), hidden[corpus]
        reference = (original.hidden(corpus, ids)[own], original.lm_head) if original else None
        scores = score_hidden(part, lm_head, ids[own], reference, device).combine(ranks, len(ids))
        part = ranks.collect(part, len(ids))
        metrics["perplexity"][corpus] = round(scores.perplexity, 4)
        if scores.standard_error is not None:
            metrics["standard_error"][corpus] = round(scores.standard_error, 4)
        if original:
            metrics["kl"][corpus] = round(scores.kl, 5)
            metrics["top1_agreement"][corpus] = round(scores.top1_agreement, 4)
        tensors |= {f"hidden.{corpus}": part, f"loss.{corpus}": scores.losses, f"token_ids.{corpus}": ids}
    metrics |= summarise_saturation(saturation)
    metrics["quantizers_fired"] = sum(fired.values())
    metrics["settings"] = {
        "prefix_tokens": front["prefix_tokens"],
        "windows": {corpus: len(ids) for corpus, ids in windows.items()},
        "targets_per_window": next(iter(windows.values())).shape[1] - 1,
        "special_tokens": front["special_tokens"],
        "shorter_last_window": "left out",
    }
    return metrics, tensors, saturation


@torch.no_grad()
def compute_final_hidden(
    checkpoint: Checkpoint,
    windows: dict[str, torch.Tensor],
    runner: BlockRunner,
    prefix_kv: torch.Tensor | None,
    start_token: int | None = None,
) -> tuple[dict[str, torch.Tensor], Counter[str], dict[str, dict[int, Report]]]:
    """Walk all corpora, [N, T] each, through the model, with a start token in front of each window where there is one.

    Returns:
        Corpus -> hidden states of the content behind the final norm, [N, T, D] on the CPU; how many quantizers of
        each kind fired; corpus -> block -> saturation report.

    Raises:
        QuantizerCountError: the count differs from what the checkpoint's settings ask for.
        NonFiniteError: a hidden state is NaN or infinite.
    """
    hidden = {corpus: checkpoint.embed(put_in_front(ids, start_token)) for corpus, ids in windows.items()}
    saturation: dict[str, dict[int, Report]] = {corpus: {} for corpus in windows}
    fired, expected = Counter[str](), Counter[str]()
    blocks = load_blocks(checkpoint, runner.device)
    for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "evaluating"):
        block = next(blocks)
        own_prefix = runner.take_prefix(prefix_kv, index)
        for corpus, states in hidden.items():
            saturation[corpus][index] = advance_probed_(runner, block, checkpoint.architecture, states, own_prefix)
        fired += count_fired_quantizers(block, checkpoint.architecture)
        expected += count_expected_quantizers(block_settings(checkpoint, index))
        del block
    _check_run(hidden, fired, expected)
    hidden = {corpus: states[:, -windows[corpus].shape[1] :] for corpus, states in hidden.items()}
    for states in hidden.values():
        checkpoint.apply_final_norm_(states)
    return hidden, fired, saturation


@torch.no_grad()
def run_model(
    model: PreTrainedModel, windows: dict[str, torch.Tensor], batch_size: int
) -> tuple[dict[str, torch.Tensor], Counter[str], dict[str, dict[int, Report]]]:
    """As `compute_final_hidden`, of a whole model in memory that was loaded from an exported folder."""
    architecture, layers = find_architecture(model.config), model.model.layers
    seen: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output.cpu()))
    hidden, saturation = {}, {}
    for corpus, content in windows.items():
        ids = put_in_front(content, model.text_start_token_id)
        parts = list(batches(len(ids), batch_size))
        with probe_saturation(model) as probes:
            model(ids[parts[0]].to(model.device), logits_to_keep=1)
        for rows in show_progress(parts[1:], len(parts) - 1, f"evaluating {corpus}"):
            model(ids[rows].to(model.device), logits_to_keep=1)
        hidden[corpus] = torch.cat(seen)[:, -content.shape[1] :]
        saturation[corpus] = {index: probe.report() for index, probe in enumerate(probes)}
        seen.clear()
    handle.remove()
    fired = sum((count_fired_quantizers(block, architecture) for block in layers), Counter[str]())
    described = model.config.quantization_config.blocks
    settings = [find_settings(described, index) for index in range(len(layers))]
    _check_run(hidden, fired, sum(map(count_expected_quantizers, settings), Counter[str]()))
    return hidden, fired, saturation


def _check_run(hidden: dict[str, torch.Tensor], fired: Counter[str], expected: Counter[str]) -> None:
    if fired != expected:
        raise QuantizerCountError(f"quantizers that fired: {dict(fired)}, the params ask for {dict(expected)}")
    if not all(torch.isfinite(window).all() for states in hidden.values() for window in states):
        raise NonFiniteError("the final hidden states are not finite; the model or its quantizers are broken")


@torch.no_grad()
def score_hidden(
    hidden: torch.Tensor,
    lm_head: LmHead,
    token_ids: torch.Tensor,
    original: tuple[torch.Tensor, LmHead] | None = None,
    device: torch.device | str = "cpu",
) -> Scores:
    """Score final hidden states.

    Args:
        hidden: [N, T, D] behind the final norm.
        token_ids: [N, T] int64.
        original: the original model's final hidden states [N, T, D'] on the same windows and its lm_head, to compare
            with; None skips the comparison.
    """
    lm_head = lm_head.to(device)
    if original is not None:
        original = original[0], original[1].to(device)
    totals = torch.zeros(3, len(token_ids), dtype=torch.float64)  # of losses, divergences, agreements
    for row, ids in enumerate(token_ids):
        for start in range(0, len(ids) - 1, LOGIT_POSITIONS):
            part = slice(start, min(start + LOGIT_POSITIONS, len(ids) - 1))
            log_p = lm_head.logits(hidden[row, part].to(device)).log_softmax(dim=-1)
            targets = ids[part.start + 1 : part.stop + 1].to(device)
            totals[0, row] -= log_p.gather(1, targets.unsqueeze(1)).sum(dtype=torch.float64).item()
            if original is not None:
                exact = original[1].logits(original[0][row, part].to(device)).log_softmax(dim=-1)
                totals[1, row] += nn.functional.kl_div(log_p, exact, reduction="sum", log_target=True).item()
                totals[2, row] += (exact.argmax(-1) == log_p.argmax(-1)).sum().item()
    losses, divergences, agreements = totals / (token_ids.shape[1] - 1)
    return Scores(losses, *((divergences, agreements) if original is not None else (None, None)))
