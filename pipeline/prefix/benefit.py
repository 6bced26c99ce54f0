"""Choose among candidate prefixes by what static quantizers cost behind each of them.

One walk over the original model takes all candidates along: the windows as they are, and behind each candidate the same
windows as a model with simulated static quantizers (`simulation.py`) reads them. What a candidate costs is

    KL(reference ‖ simulated behind the candidate), nats per token

of every window, so that two candidates are compared window by window. The reference is the original model without a
prefix. Means and scales of the quantizers are searched on other windows than those: a range fits the text it was
measured on.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.blocks.walk import BlockRunner, load_blocks
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import Site
from pipeline.prefix.simulation import SimulatedQuantizers
from pipeline.prefix.sites import watch_sites_
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.progress import show_progress
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.text.windows import find_text_start_token, prepend_start_token
from pipeline.training.divergence import mean_divergences

_BITS, _SEED = 4, 0  # of the simulated quantizers; as `prefix_training` has them by default
CALIBRATED, _JUDGED = 4, 4  # windows
_EVERY = 2  # of every so many positions one is judged: logits of a large vocabulary cost as much as all blocks
_CONTENT = 4  # tokens in front of the start token, at most
MOST_CANDIDATES, MOST_WINDOWS = _CONTENT + 2, CALIBRATED + _JUDGED

logger = logging.getLogger(__name__)


class PrefixSearchError(PipelineError):
    """No prefix can be chosen."""


@dataclass
class _Stream:
    """One candidate's hidden states: its own [1, P, D], and behind it the windows [N, T, D] of either kind."""

    prefix: torch.Tensor
    calibrated: torch.Tensor
    judged: torch.Tensor


@torch.no_grad()
def simulate_costs(
    checkpoint: Checkpoint,
    candidates: list[list[int]],
    calibrated: torch.Tensor,
    judged: torch.Tensor,
    runner: BlockRunner,
    ranks: Ranks = ALONE,
    window_start: int | None = None,
) -> torch.Tensor:
    """What simulated static quantizers cost behind each candidate, [C, M] float64, nats a token; inf where it diverges.

    Args:
        checkpoint: the original, unrotated model.
        candidates: C lists of token ids.
        calibrated: windows [N, T] the quantizers' means and scales are searched on, in one batch.
        judged: windows [M, T].
        ranks: each takes some of the candidates; all get the same numbers.
        window_start: the start token in front of every window that no candidate ends in, or None.
    """
    quantizers = SimulatedQuantizers(checkpoint, _BITS, _SEED)
    original = checkpoint.embed(prepend_start_token(judged, window_start))
    own = range(len(candidates))[ranks.rank :: ranks.world]
    streams = [
        _Stream(
            checkpoint.embed(torch.tensor([candidates[number]], dtype=torch.int64)).to(runner.device),
            *(
                checkpoint.embed(prepend_start_token(windows, find_text_start_token(window_start, candidates[number])))
                for windows in (calibrated, judged)
            ),
        )
        for number in own
    ]
    blocks = load_blocks(checkpoint, runner.device)
    for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "comparing prefixes"):
        block = next(blocks)
        runner.advance_(block, original)
        kept = [_advance_prefix_(runner, block, stream) for stream in streams]

        def see(site: str, x: torch.Tensor, index: int = index) -> torch.Tensor:
            return quantizers.act(index, site, x.float()).to(x.dtype)

        watch_sites_(block, checkpoint.architecture, Site, see)
        for stream, prefix_kv in zip(streams, kept, strict=True):
            quantizers.forget()
            stream.calibrated = runner.run(block, stream.calibrated.to(runner.device), prefix_kv)
            runner.advance_(block, stream.judged, prefix_kv)
        del block
    costs = torch.zeros(len(candidates), len(judged), dtype=torch.float64)
    norm, lm_head = checkpoint.load_final_norm().to(runner.device), checkpoint.load_lm_head().to(runner.device)
    content = slice(-judged.shape[1], None, _EVERY)
    for window, states in enumerate(original if streams else ()):
        reference = norm(states[content].to(runner.device))
        found = norm(torch.stack([stream.judged[window][content] for stream in streams]).to(runner.device))
        cost = mean_divergences(found, reference, lm_head).cpu()
        costs[list(own), window] = cost.where(cost.isfinite(), torch.inf)
    ranks.sum_(costs)
    return costs


@dataclass(frozen=True)
class Choice:
    """The candidate taken, and the table it was taken from.

    Attributes:
        token_ids: the candidate.
        table: a row per candidate: "token_ids", "kl" in nats a token (None where it diverges), "kl_above_best" and its
            "standard_error", over windows paired, and "chosen".
    """

    token_ids: list[int]
    table: list[dict[str, Any]]


def choose_candidate(candidates: list[list[int]], costs: torch.Tensor) -> Choice:
    """The shortest candidate within one standard error of the best, the first of equally short ones.

    Args:
        candidates: C lists of token ids.
        costs: [C, M] of `simulate_costs`.

    Raises:
        PrefixSearchError: the model diverges behind all of them.
    """
    means = costs.mean(1)
    best = int(means.argmin())
    if not torch.isfinite(means[best]):
        raise PrefixSearchError(
            "prefix_search.choose: benefit: with simulated quantizers the model diverges behind every candidate; "
            "set prefix_search.choose: threshold"
        )
    table = []
    for token_ids, mean, own in zip(candidates, means.tolist(), costs, strict=True):
        above = own - costs[best]
        finite = math.isfinite(mean)
        error = above.std().item() / math.sqrt(len(above)) if finite and len(above) > 1 else 0.0
        row = {"kl": mean, "kl_above_best": above.mean().item(), "standard_error": error} if finite else {"kl": None}
        table.append({"token_ids": token_ids} | row)
    near = [row for row in table if row["kl"] is not None and row["kl_above_best"] <= row["standard_error"]]
    taken = min(near, key=lambda row: len(row["token_ids"]))
    return Choice(taken["token_ids"], [row | {"chosen": row is taken} for row in table])


def list_candidates(ranked: list[int], start_token: int | None) -> list[list[int]]:
    """None; the start token; one to four of the `ranked` content tokens and the start token."""
    end = [] if start_token is None else [start_token]
    content = [token for token in ranked if token != start_token][:_CONTENT]
    found = [[], *([*content[:count], *end] for count in range(len(content) + 1))]
    return [candidate for place, candidate in enumerate(found) if candidate not in found[:place]]


def choose_by_benefit(
    checkpoint: Checkpoint,
    ranked: list[int],
    start_token: int | None,
    token_ids: torch.Tensor,
    runner: BlockRunner,
    ranks: Ranks = ALONE,
    window_start: int | None = None,
) -> Choice:
    """The prefix that simulated static quantizers ask for.

    Args:
        ranked: content tokens, the likeliest to help first.
        token_ids: search windows [N, T]; the first ones calibrate, those behind them judge (all of them do both where
            there are too few).
    """
    candidates = list_candidates(ranked, start_token)
    calibrated, judged = token_ids[:CALIBRATED], token_ids[CALIBRATED : CALIBRATED + _JUDGED]
    if len(judged) < 2:
        calibrated = judged = token_ids
    costs = simulate_costs(checkpoint, candidates, calibrated, judged, runner, ranks, window_start)
    choice = choose_candidate(candidates, costs)
    for row in choice.table:
        logger.info(
            "prefix %s: %s nats a token",
            [checkpoint.tokenizer.decode([token]) for token in row["token_ids"]],
            "diverges" if row["kl"] is None else f"{row['kl']:.4f} (+{row['kl_above_best']:.4f})",
        )
    return choice


def _advance_prefix_(runner: BlockRunner, block: torch.nn.Module, stream: _Stream) -> torch.Tensor | None:
    """Take a candidate itself through a block, unquantized; its keys and values there, None without a token."""
    if stream.prefix.shape[1] == 0:
        return None
    stream.prefix, prefix_kv = runner.run_prefix(block, stream.prefix)
    return prefix_kv
