"""Choose a prefix among candidates by the cost of static quantizers after each of them.

One walk over the original model carries all candidates along. It computes the hidden states of the windows in the
original model, and, after each candidate, those in a model with simulated static quantizers (`simulation.py`). The cost
of a candidate on a window is

    KL(reference ‖ simulated after the candidate), nats per token,

where the reference is the original model without a prefix. Costs are paired by window to compare two candidates. The
quantizers get their means and scales from other windows, because a range fits the text that it was measured on better
than any other.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.blocks.walk import BlockRunner, load_blocks
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.layers import DecoderLayer
from pipeline.models.sites import Site
from pipeline.prefix.harm import MAX_KL, Harm, Reader, choose_harm_windows, measure_harm
from pipeline.prefix.simulation import SimulatedQuantizers
from pipeline.prefix.sites import hook_sites_
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.progress import show_progress
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.text.windows import find_text_start_token, prepend_start_token
from pipeline.training.divergence import mean_divergences

_BITS, _SEED = 4, 0  # of the simulated quantizers; the defaults of `prefix_training`
CALIBRATION_WINDOWS, _SCORED_WINDOWS = 4, 4
_SCORED_STRIDE = 2  # every second position is scored: logits of a large vocabulary cost as much as all blocks
_MOST_CONTENT_TOKENS = 4  # in a candidate, before the start token
MOST_CANDIDATES, MOST_WINDOWS = _MOST_CONTENT_TOKENS + 2, CALIBRATION_WINDOWS + _SCORED_WINDOWS

logger = logging.getLogger(__name__)


class PrefixSearchError(PipelineError):
    """No prefix can be chosen."""


@dataclass
class _Stream:
    """Hidden states of one candidate: of its tokens [1, P, D], and after it of both kinds of windows [N, T, D]."""

    prefix: torch.Tensor
    calibration: torch.Tensor
    scored: torch.Tensor

    def advance_prefix_(self, runner: BlockRunner, block: DecoderLayer) -> torch.Tensor | None:
        """Run the candidate's tokens through a block, unquantized; return their keys and values, None if P is 0."""
        if self.prefix.shape[1] == 0:
            return None
        self.prefix, prefix_kv = runner.run_prefix(block, self.prefix)
        return prefix_kv


@torch.no_grad()
def simulate_costs(
    checkpoint: Checkpoint,
    candidates: list[list[int]],
    *,
    calibration: torch.Tensor,
    scored: torch.Tensor,
    runner: BlockRunner,
    ranks: Ranks = ALONE,
    text_start_token_id: int | None = None,
) -> torch.Tensor:
    """Return the cost of simulated static quantizers after each candidate on each scored window.

    Args:
        checkpoint: the original model.
        candidates: C lists of token ids.
        calibration: windows [N, T] of content for the means and scales of the quantizers; they run as one batch.
        scored: windows [M, T] of content.
        ranks: each takes some of the candidates, and all return the same costs.
        text_start_token_id: the start token before every text, or None. It is left out after a candidate that ends in
            it.

    Returns:
        [C, M] float64, nats per token; inf where the model diverges.
    """
    quantizers = SimulatedQuantizers(checkpoint, _BITS, _SEED)
    reference = checkpoint.embed(prepend_start_token(scored, text_start_token_id))
    rank_candidates = range(len(candidates))[ranks.rank :: ranks.world]
    streams = []
    for number in rank_candidates:
        token_ids = candidates[number]
        start_after_candidate = find_text_start_token(text_start_token_id, token_ids)
        streams.append(
            _Stream(
                prefix=checkpoint.embed(_make_ids(token_ids).unsqueeze(0)).to(runner.device),
                calibration=checkpoint.embed(prepend_start_token(calibration, start_after_candidate)),
                scored=checkpoint.embed(prepend_start_token(scored, start_after_candidate)),
            )
        )
    blocks = load_blocks(checkpoint, runner.device)
    for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "comparing prefixes"):
        block = next(blocks)
        # The reference and the candidates' own tokens run before the block gets its hooks.
        runner.advance_(block, reference)
        block_kvs = [stream.advance_prefix_(runner, block) for stream in streams]

        def quantize(site: str, x: torch.Tensor, index: int = index) -> torch.Tensor:
            return quantizers.simulate(index, site, x.float()).to(x.dtype)

        hook_sites_(block, checkpoint.architecture, Site, quantize)
        for stream, prefix_kv in zip(streams, block_kvs, strict=True):
            quantizers.reset()
            stream.calibration = runner.run(block, stream.calibration.to(runner.device), prefix_kv)
            runner.advance_(block, stream.scored, prefix_kv)
        del block
    costs = torch.zeros(len(candidates), len(scored), dtype=torch.float64)
    norm, lm_head = checkpoint.load_final_norm().to(runner.device), checkpoint.load_lm_head().to(runner.device)
    positions = slice(-scored.shape[1], None, _SCORED_STRIDE)
    for window in range(len(scored) if streams else 0):
        normed_reference = norm(reference[window, positions].to(runner.device))
        hidden = torch.stack([stream.scored[window, positions] for stream in streams])
        cost = mean_divergences(norm(hidden.to(runner.device)), normed_reference, lm_head).cpu()
        costs[list(rank_candidates), window] = cost.where(cost.isfinite(), torch.inf)
    ranks.sum_(costs)
    return costs


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, and the table that it was chosen from.

    Attributes:
        token_ids: the candidate.
        table: a row per candidate: "token_ids", "kl" in nats per token (None if the model diverges), "kl_above_best"
            with its "standard_error" over paired windows, its harm in full precision ("full_precision_kl", and with
            sliding layers "full_precision_kl_after_leaving"), "refused" if that is above `MAX_KL`, and "chosen".
    """

    token_ids: list[int]
    table: list[dict[str, Any]]


def choose_candidate(candidates: list[list[int]], costs: torch.Tensor, harms: list[Harm]) -> Choice:
    """Choose the shortest candidate within one standard error of the best; among equally short ones, the first.

    Candidates that harm the unquantized model are refused.

    Args:
        candidates: C lists of token ids.
        costs: [C, M] from `simulate_costs`.
        harms: C of them, from `measure_harm`.

    Raises:
        PrefixSearchError: the model diverges after all candidates that are not refused.
    """
    means = costs.mean(1)
    refused = [not harm.worst <= MAX_KL for harm in harms]
    best = int(means.masked_fill(torch.tensor(refused), torch.inf).argmin())
    if refused[best] or not torch.isfinite(means[best]):
        raise PrefixSearchError(
            "prefix_search.choose=benefit: with simulated quantizers the model diverges after every candidate"
            f"{' that does not harm the unquantized model' if any(refused) else ''}. "
            "Set prefix_search.choose: threshold."
        )
    table: list[dict[str, Any]] = []
    rows = zip(candidates, means.tolist(), costs, harms, refused, strict=True)
    for token_ids, mean, window_costs, harm, harmful in rows:
        above = window_costs - costs[best]
        finite = math.isfinite(mean)
        error = above.std().item() / math.sqrt(len(above)) if finite and len(above) > 1 else 0.0
        row = {"kl": mean, "kl_above_best": above.mean().item(), "standard_error": error} if finite else {"kl": None}
        table.append({"token_ids": token_ids} | row | harm.row() | {"refused": harmful})
    near_best = [
        row
        for row in table
        if row["kl"] is not None and not row["refused"] and row["kl_above_best"] <= row["standard_error"]
    ]
    chosen = min(near_best, key=lambda row: len(row["token_ids"]))
    return Choice(chosen["token_ids"], [row | {"chosen": row is chosen} for row in table])


def _make_ids(token_ids: list[int]) -> torch.Tensor:
    return torch.tensor(token_ids, dtype=torch.int64)  # an empty list would become float32


def list_candidates(ranked_token_ids: list[int], start_token_id: int | None) -> list[list[int]]:
    """Return the candidates: no prefix, the start token, and one to four ranked tokens followed by the start token."""
    end = [] if start_token_id is None else [start_token_id]
    content = [token for token in ranked_token_ids if token != start_token_id][:_MOST_CONTENT_TOKENS]
    candidates = [[], *([*content[:count], *end] for count in range(len(content) + 1))]
    return [candidate for number, candidate in enumerate(candidates) if candidate not in candidates[:number]]


def choose_by_benefit(
    checkpoint: Checkpoint,
    ranked_token_ids: list[int],
    *,
    start_token_id: int | None,
    token_ids: torch.Tensor,
    runner: BlockRunner,
    ranks: Ranks = ALONE,
    text_start_token_id: int | None = None,
) -> Choice:
    """Choose the prefix after which simulated quantizers cost least.

    Args:
        ranked_token_ids: content tokens; the ones most likely to help come first.
        start_token_id: the start token that candidates end in, or None.
        token_ids: search windows [N, T]. The first ones calibrate, and the next ones are scored. If there are too few,
            all of them do both.
        text_start_token_id: the start token before every text, or None.
    """
    candidates = list_candidates(ranked_token_ids, start_token_id)
    calibration = token_ids[:CALIBRATION_WINDOWS]
    scored = token_ids[CALIBRATION_WINDOWS : CALIBRATION_WINDOWS + _SCORED_WINDOWS]
    if len(scored) < 2:
        calibration = scored = token_ids
    costs = simulate_costs(
        checkpoint,
        candidates,
        calibration=calibration,
        scored=scored,
        runner=runner,
        ranks=ranks,
        text_start_token_id=text_start_token_id,
    )
    harms = measure_harm(
        checkpoint,
        [Reader(checkpoint.embed(ids), ids) for ids in map(_make_ids, candidates)],
        choose_harm_windows(checkpoint, (scored, token_ids), max(map(len, candidates))),
        runner=runner,
        ranks=ranks,
        text_start_token_id=text_start_token_id,
    )
    choice = choose_candidate(candidates, costs, harms)
    for row, harm in zip(choice.table, harms, strict=True):
        logger.info(
            "prefix %s: %s nats per token, in full precision %.4f%s",
            [checkpoint.tokenizer.decode([token]) for token in row["token_ids"]],
            "diverges" if row["kl"] is None else f"{row['kl']:.4f} (+{row['kl_above_best']:.4f})",
            harm.worst,
            f" (refused: above {MAX_KL:g})" if row["refused"] else "",
        )
    return choice
