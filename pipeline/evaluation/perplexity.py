"""Perplexity and agreement with the original model. Memory holds one block, then one slice of logits, at a time.

Every window of T tokens has T - 1 targets. They are the same for all variants, whether a prefix, a start token, both or
nothing come before the window:

    perplexity = exp(sum over windows and targets of -log p(x_t | x_<t) / number of targets)

Agreement is measured at the same positions: the mean of KL(original ‖ variant) in nats, and the share of positions at
which both models rank the same token first. Final hidden states are kept, so a comparison of two variants takes two
products with lm_head and no forward pass.
"""

import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.blocks.quantized import block_settings, count_expected_quantizers, count_fired_quantizers, find_settings
from pipeline.blocks.walk import BlockRunner, batches, load_blocks
from pipeline.inference.prefixed_model import PrefixedModel, probe_saturation
from pipeline.inspection.routing import Choices, RoutingProbe, describe_routing, stack_choices
from pipeline.inspection.saturation import Report, advance_probed_, summarise_saturation
from pipeline.models.architectures import find_architecture, find_logit_cap
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.layers import list_layers
from pipeline.models.lm_head import LmHead, find_head
from pipeline.runtime.artifacts import ArtifactError, check_input, load_tensors
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.progress import show_progress
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.text.windows import prepend_start_token

LOGIT_POSITIONS = 256  # positions whose logits are in memory at a time: 50 MB for a vocabulary of 49,152
_HIGHEST_LOSS = 700.0  # nats a token; exp of more overflows float64, and JSON has no infinity


class QuantizerCountError(PipelineError):
    """The quantizers that took part in the forward pass are not those that the settings ask for."""


class NonFiniteError(PipelineError):
    """A forward pass ended in NaN or infinite values."""


@dataclass(frozen=True)
class Scores:
    """The scores of one variant on N windows of one corpus.

    Attributes:
        losses: [N] float64, mean -log p per target of each window, in nats.
        divergences: [N] float64, mean KL divergence from the original of each window in nats; None without an original.
        agreements: [N] float64, share of positions where both models rank the same token first; None as well.
    """

    losses: torch.Tensor
    divergences: torch.Tensor | None
    agreements: torch.Tensor | None

    @property
    def kl(self) -> float | None:
        """Return the mean divergence from the original, None if there is none to compare with."""
        return None if self.divergences is None else self.divergences.mean().item()

    @property
    def top1_agreement(self) -> float | None:
        """Return the share of positions where both models agree, None without an original to compare with."""
        return None if self.agreements is None else self.agreements.mean().item()

    def combine(self, ranks: Ranks, count: int) -> "Scores":
        """Return the scores of the `count` windows of all ranks."""
        return Scores(
            losses=ranks.collect(self.losses, count),
            divergences=None if self.divergences is None else ranks.collect(self.divergences, count),
            agreements=None if self.agreements is None else ranks.collect(self.agreements, count),
        )

    @property
    def perplexity(self) -> float:
        """Return exp of the mean loss. Windows are equally long, so this is the mean over targets.

        Raises:
            NonFiniteError: the loss is not a number, or too large.
        """
        loss = self.losses.mean().item()
        if not loss <= _HIGHEST_LOSS:
            raise NonFiniteError(
                f"a loss of {loss:.6g} nats a token has no finite perplexity. The model or its quantizers are broken."
            )
        return math.exp(loss)

    @property
    def standard_error(self) -> float | None:
        """Return the standard error of the perplexity, from the spread between windows; None for a single window.

        To first order it is the perplexity times the standard error of the loss.
        """
        count = len(self.losses)
        return self.perplexity * self.losses.std().item() / math.sqrt(count) if count > 1 else None


@dataclass(frozen=True)
class ModelRun:
    """A forward pass of a whole model over all corpora.

    Attributes:
        hidden: corpus -> hidden states of the content after the final norm, [N, T, D] on the CPU.
        fired: the number of quantizers of each kind that fired.
        saturation: corpus -> block -> saturation report.
        choices: corpus -> the experts that the routers chose for the content, [N, T, L, k]; None without experts.
    """

    hidden: dict[str, torch.Tensor]
    fired: Counter[str]
    saturation: dict[str, dict[int, Report]]
    choices: Choices


class Original:
    """The original model's side of a comparison: its final hidden states per corpus, and its lm_head."""

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        """Read the artifact `path` of `evaluation@original`. Raise ArtifactError if it is not of `checkpoint`."""
        self.tensors, self.header = load_tensors(path, "evaluation")
        check_input(self.header, "checkpoint", checkpoint.header, path)
        self.lm_head = checkpoint.load_lm_head()

    def hidden(self, corpus: str, token_ids: torch.Tensor) -> torch.Tensor:
        """Return its hidden states [N, T, D] on these windows. Raise ArtifactError if it was evaluated on others."""
        if not torch.equal(self.tensors[f"token_ids.{corpus}"], token_ids):
            raise ArtifactError(
                f"evaluation@original was made with other windows of {corpus}. Rerun: dvc repro --force "
                "evaluation@original"
            )
        return self.tensors[f"hidden.{corpus}"]

    @property
    def choices(self) -> Choices:
        """Return corpus -> the experts that its routers chose, [N, T, L, k]; {} for a model without experts."""
        prefix = "experts."
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


def evaluate_windows(
    checkpoint: Checkpoint,
    windows: dict[str, torch.Tensor],
    runner: BlockRunner,
    *,
    prefix_kv: torch.Tensor | None,
    original: Original | None = None,
    ranks: Ranks = ALONE,
    text_start_token_id: int | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, dict[int, Report]]]:
    """Evaluate one variant on all corpora, in one walk.

    Args:
        windows: corpus -> token ids [N, T] of content, with the same T everywhere.
        prefix_kv: [L, 2, kv_heads, P, d] in the checkpoint's basis, or None.
        original: the model to compare with, or None.
        ranks: each walks a part of the windows. All of them return the whole result, except that saturation is that
            of the first rank's windows.
        text_start_token_id: the start token between the prefix and every window, or None.

    Returns:
        Metrics: per corpus `perplexity`, its `standard_error`, `kl`, `top1_agreement`, `largest_saturation` and
        `lowest_sqnr`, then `quantizers_fired` and `settings`, and `router_agreement` per corpus where there are
        experts. Tensors of content to keep: `hidden.CORPUS`, `loss.CORPUS` and `token_ids.CORPUS`, and with experts
        `experts.CORPUS`, the sorted numbers of the chosen ones, [N, T, L, k] int32. Corpus -> block -> saturation
        report (see `advance_probed_`).
    """
    rank_windows = {corpus: ids[ranks.slice_windows(len(ids))] for corpus, ids in windows.items()}
    return _score_run(
        compute_final_hidden(checkpoint, rank_windows, runner, prefix_kv, text_start_token_id),
        checkpoint.load_lm_head(),
        windows,
        settings=_describe_settings(windows, prefix_kv, text_start_token_id),
        original=original,
        device=runner.device,
        ranks=ranks,
    )


def evaluate_model(
    model: PrefixedModel,
    windows: dict[str, torch.Tensor],
    batch_size: int,
    original: Original | None,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, dict[int, Report]]]:
    """Evaluate a whole model in memory (see `inference/prefixed_model.py`), otherwise as `evaluate_windows`."""
    rank_windows = {corpus: ids[ranks.slice_windows(len(ids))] for corpus, ids in windows.items()}
    return _score_run(
        run_model(model, rank_windows, batch_size),
        find_head(model.lm_head, find_logit_cap(model.config)),
        windows,
        settings=_describe_settings(windows, model.prefix_kv, model.text_start_token_id),
        original=original,
        device=model.device,
        ranks=ranks,
    )


def _describe_settings(
    windows: dict[str, torch.Tensor], prefix_kv: torch.Tensor | None, text_start_token_id: int | None
) -> dict[str, Any]:
    """Return the entry `settings` of the metrics."""
    special_tokens = "none added"
    if text_start_token_id is not None:
        special_tokens = f"start token (id {text_start_token_id}) before each window"
    return {
        "prefix_tokens": 0 if prefix_kv is None else prefix_kv.shape[-2],
        "windows": {corpus: len(ids) for corpus, ids in windows.items()},
        "targets_per_window": next(iter(windows.values())).shape[1] - 1,
        "special_tokens": special_tokens,
        "shorter_last_window": "left out",
    }


def _score_run(
    run: ModelRun,
    lm_head: LmHead,
    windows: dict[str, torch.Tensor],
    *,
    settings: dict[str, Any],
    original: Original | None,
    device: torch.device,
    ranks: Ranks,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, dict[int, Report]]]:
    """Score this rank's hidden states, and return the result of `evaluate_windows` for the windows of all ranks."""
    metrics: dict[str, Any] = {"perplexity": {}, "standard_error": {}} | (
        {"kl": {}, "top1_agreement": {}} if original else {}
    )
    tensors: dict[str, torch.Tensor] = {}
    choices: Choices = {}
    for corpus, ids in windows.items():
        rows = ranks.slice_windows(len(ids))
        original_side = (original.hidden(corpus, ids)[rows], original.lm_head) if original else None
        rank_scores = score_hidden(run.hidden[corpus], lm_head, ids[rows], original_side, device)
        scores = rank_scores.combine(ranks, len(ids))
        all_hidden = ranks.collect(run.hidden[corpus], len(ids))
        metrics["perplexity"][corpus] = round(scores.perplexity, 4)
        if scores.standard_error is not None:
            metrics["standard_error"][corpus] = round(scores.standard_error, 4)
        if scores.kl is not None and scores.top1_agreement is not None:
            metrics["kl"][corpus] = round(scores.kl, 5)
            metrics["top1_agreement"][corpus] = round(scores.top1_agreement, 4)
        tensors |= {f"hidden.{corpus}": all_hidden, f"loss.{corpus}": scores.losses, f"token_ids.{corpus}": ids}
        rank_choices = run.choices[corpus]
        if rank_choices is not None:
            choices[corpus] = tensors[f"experts.{corpus}"] = ranks.collect(rank_choices, len(ids))
    metrics |= describe_routing(choices, original.choices) if original is not None else {}
    metrics |= summarise_saturation(run.saturation)
    metrics["quantizers_fired"] = sum(run.fired.values())
    metrics["settings"] = settings
    return metrics, tensors, run.saturation


@torch.no_grad()
def compute_final_hidden(
    checkpoint: Checkpoint,
    windows: dict[str, torch.Tensor],
    runner: BlockRunner,
    prefix_kv: torch.Tensor | None,
    text_start_token_id: int | None = None,
) -> ModelRun:
    """Walk all corpora through the model, window by window of content, [N, T] each.

    Args:
        text_start_token_id: the start token between the prefix and every window, or None.

    Raises:
        QuantizerCountError: the number differs from the one that the checkpoint's settings ask for.
        NonFiniteError: a hidden state is NaN or infinite.
    """
    hidden = {
        corpus: checkpoint.embed(prepend_start_token(ids, text_start_token_id)) for corpus, ids in windows.items()
    }
    saturation: dict[str, dict[int, Report]] = {corpus: {} for corpus in windows}
    chosen: dict[str, list[torch.Tensor | None]] = {corpus: [] for corpus in windows}
    fired, expected = Counter[str](), Counter[str]()
    blocks = load_blocks(checkpoint, runner.device)
    for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "evaluating"):
        block = next(blocks)
        block_prefix = runner.take_prefix(prefix_kv, index)
        for corpus, states in hidden.items():
            with RoutingProbe(block, checkpoint.architecture) as probe:
                report = advance_probed_(runner, block, checkpoint.architecture, states, block_prefix)
            saturation[corpus][index] = report
            chosen[corpus].append(probe.read(*windows[corpus].shape))
        fired += count_fired_quantizers(block, checkpoint.architecture)
        expected += count_expected_quantizers(block_settings(checkpoint, index))
        del block
    _check_run(hidden, fired, expected)
    hidden = {corpus: states[:, -windows[corpus].shape[1] :] for corpus, states in hidden.items()}
    for states in hidden.values():
        checkpoint.apply_final_norm_(states)
    choices = {corpus: stack_choices(by_block) for corpus, by_block in chosen.items()}
    return ModelRun(hidden, fired, saturation, choices)


@torch.no_grad()
def run_model(model: PrefixedModel, windows: dict[str, torch.Tensor], batch_size: int) -> ModelRun:
    """Run a whole model in memory, loaded from an exported folder, and return the same as `compute_final_hidden`."""
    architecture, layers = find_architecture(model.config), list_layers(model)
    choices: Choices = {}
    batch_hidden: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda module, args, output: batch_hidden.append(output.cpu()))
    hidden, saturation = {}, {}
    for corpus, content in windows.items():
        ids = prepend_start_token(content, model.text_start_token_id)
        parts = list(batches(len(ids), batch_size))
        with ExitStack() as routing:
            routers = [routing.enter_context(RoutingProbe(block, architecture)) for block in layers]
            with probe_saturation(model) as probes:
                model(ids[parts[0]].to(model.device), logits_to_keep=1)
            for rows in show_progress(parts[1:], len(parts) - 1, f"evaluating {corpus}", "batch"):
                model(ids[rows].to(model.device), logits_to_keep=1)
        choices[corpus] = stack_choices([router.read(*content.shape) for router in routers])
        hidden[corpus] = torch.cat(batch_hidden)[:, -content.shape[1] :]
        saturation[corpus] = {index: probe.report() for index, probe in enumerate(probes)}
        batch_hidden.clear()
    handle.remove()
    fired = sum((count_fired_quantizers(block, architecture) for block in layers), Counter[str]())
    blocks = model.config.quantization_config.blocks
    settings = [find_settings(blocks, index) for index in range(len(layers))]
    _check_run(hidden, fired, sum(map(count_expected_quantizers, settings), Counter[str]()))
    return ModelRun(hidden, fired, saturation, choices)


def _check_run(hidden: dict[str, torch.Tensor], fired: Counter[str], expected: Counter[str]) -> None:
    if fired != expected:
        raise QuantizerCountError(
            f"quantizers that fired: {dict(fired)}. The params ask for {dict(expected)}. This is a bug of this project."
        )
    if not all(torch.isfinite(window).all() for states in hidden.values() for window in states):
        raise NonFiniteError("the final hidden states are not finite. The model or its quantizers are broken.")


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
        hidden: [N, T, D], after the final norm.
        token_ids: [N, T] int64.
        original: the original model's final hidden states [N, T, D'] on the same windows, and its lm_head. None skips
            the comparison.
    """
    lm_head = lm_head.to(device)
    if original is not None:
        original = original[0], original[1].to(device)
    totals = torch.zeros(3, len(token_ids), dtype=torch.float64)  # rows: losses, divergences, agreements
    for row, ids in enumerate(token_ids):
        for start in range(0, len(ids) - 1, LOGIT_POSITIONS):
            part = slice(start, min(start + LOGIT_POSITIONS, len(ids) - 1))
            log_p = lm_head.logits(hidden[row, part].to(device)).log_softmax(dim=-1)
            targets = ids[part.start + 1 : part.stop + 1].to(device)
            original_log_p = None
            if original is not None:
                original_log_p = original[1].logits(original[0][row, part].to(device)).log_softmax(dim=-1)
            add_scores_(totals[:, row], log_p, targets, original_log_p)
    losses, divergences, agreements = totals / (token_ids.shape[1] - 1)
    return Scores(losses, divergences, agreements) if original is not None else Scores(losses, None, None)


def add_scores_(
    totals: torch.Tensor, log_p: torch.Tensor, targets: torch.Tensor, original_log_p: torch.Tensor | None
) -> None:
    """Add the sums over some positions of one window to its totals [3]: losses, divergences, agreements.

    Args:
        log_p, original_log_p: [N, V] of N positions; None skips the comparison.
        targets: [N] int64, the tokens that follow.
    """
    totals[0] -= log_p.gather(1, targets.unsqueeze(1)).sum(dtype=torch.float64).item()
    if original_log_p is not None:
        totals[1] += nn.functional.kl_div(log_p, original_log_p, reduction="sum", log_target=True).item()
        totals[2] += (original_log_p.argmax(-1) == log_p.argmax(-1)).sum().item()
