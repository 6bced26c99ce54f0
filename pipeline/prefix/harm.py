"""The divergence that a prefix causes in full precision: a prefix that changes the model itself is worse than none.

    harm = KL(original without a prefix ‖ original with it), nats per token

In a layer with a sliding window the prefix leaves like any other token. So the harm is measured on windows that are
longer than any sliding window, and apart for the positions that no longer read the prefix in such layers. A prefix that
stayed visible there would harm at those positions: it would be at distances for which these layers were never trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.blocks.walk import BlockRunner, load_blocks
from pipeline.models.architectures import find_max_positions
from pipeline.models.checkpoint import Checkpoint
from pipeline.runtime.progress import show_progress
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.text.lengths import reach_beyond
from pipeline.text.windows import find_text_start_token, prepend_start_token
from pipeline.training.divergence import mean_divergences

MAX_KL = 0.2  # nats per token; docs/prefix.md#the-gate has the measurements
_STRIDE = 2  # every second position is scored: logits of a large vocabulary cost as much as all blocks
_BEYOND = 512  # positions beyond a sliding window that are enough
HARM_TOKENS = 2048  # in all, but at least one window


@dataclass(frozen=True)
class Reader:
    """A prefix whose harm is measured.

    Attributes:
        embeddings: [P, D] in the original model's basis; P may be 0.
        token_ids: its tokens (of a continuous one, those that its training began with). They decide whether a start
            token comes between the prefix and the text.
    """

    embeddings: torch.Tensor
    token_ids: torch.Tensor


@dataclass(frozen=True)
class Harm:
    """The harm of one prefix in nats per token: at all positions, and at those that its tokens left (None: none)."""

    mean: float
    after_leaving: float | None

    @property
    def worst(self) -> float:
        """Return the larger of both."""
        return max(self.mean, self.after_leaving or 0.0)

    def row(self) -> dict[str, float | None]:
        """Return it as JSON values; infinite ones are None."""
        values = {"full_precision_kl": self.mean}
        if self.after_leaving is not None:
            values["full_precision_kl_after_leaving"] = self.after_leaving
        return {name: value if value < float("inf") else None for name, value in values.items()}


def join_windows(token_ids: torch.Tensor, length: int) -> torch.Tensor:
    """Return windows [N, T] joined to [N', T'] of at least `length` tokens, or to one of all where there are too few.

    Consecutive windows of one corpus are consecutive text.
    """
    count = min(-(-length // token_ids.shape[1]), len(token_ids))
    rows = len(token_ids) // count
    return token_ids[: rows * count].reshape(rows, -1)


def find_harm_length(checkpoint: Checkpoint, length: int, prefix_tokens: int) -> int:
    """Return the length of windows to measure harm on: `length`, or more to go beyond any sliding window.

    The model must have positions for it after the prefix and a start token.
    """
    length = max(length, reach_beyond(checkpoint.widest_window, min(length, _BEYOND)))
    return min(length, find_max_positions(checkpoint.config) - prefix_tokens - 1)


def choose_harm_windows(checkpoint: Checkpoint, texts: Sequence[torch.Tensor], prefix_tokens: int) -> torch.Tensor:
    """Return few windows to measure harm on, [N, T]: longer than any sliding window where there is such a text.

    Args:
        texts: windows [N, T] of content. The first text that is long enough is taken, and otherwise the longest.
        prefix_tokens: number of tokens of the longest prefix.
    """
    length = find_harm_length(checkpoint, texts[0].shape[1], prefix_tokens)
    joined = [join_windows(token_ids, length)[:, :length] for token_ids in texts]
    chosen = max(joined, key=lambda windows: windows.shape[1])
    return chosen[: max(1, HARM_TOKENS // chosen.shape[1])]


@torch.no_grad()
def measure_harm(
    checkpoint: Checkpoint,
    readers: list[Reader],
    token_ids: torch.Tensor,
    *,
    runner: BlockRunner,
    ranks: Ranks = ALONE,
    text_start_token_id: int | None = None,
) -> list[Harm]:
    """Measure prefixes in full precision, in one walk.

    Args:
        checkpoint: the original model.
        readers: the prefixes.
        token_ids: windows [N, T] of content.
        ranks: each takes some of the prefixes, and all return the same.
        text_start_token_id: the start token before every text, or None. The reference reads it. It is left out after a
            prefix that ends in it.
    """
    length = token_ids.shape[1]
    reference = checkpoint.embed(prepend_start_token(token_ids, text_start_token_id))
    rank_readers = range(len(readers))[ranks.rank :: ranks.world]
    prefixes, streams = [], []
    for number in rank_readers:
        reader = readers[number]
        start = find_text_start_token(text_start_token_id, reader.token_ids)
        prefixes.append(reader.embeddings.to(runner.device, checkpoint.dtype).unsqueeze(0))
        streams.append(checkpoint.embed(prepend_start_token(token_ids, start)))
    blocks = load_blocks(checkpoint, runner.device)
    for _ in show_progress(range(checkpoint.block_count), checkpoint.block_count, "prefix in full precision"):
        block = next(blocks)
        runner.advance_(block, reference)
        for place, prefix in enumerate(prefixes):
            prefix_kv = None
            if prefix.shape[1]:
                prefixes[place], prefix_kv = runner.run_prefix(block, prefix)
            runner.advance_(block, streams[place], prefix_kv)
        del block
    first_without = min(checkpoint.widest_window or length, length)
    parts = [slice(0, first_without, _STRIDE), slice(first_without, length, _STRIDE)]
    counts = [len(range(length)[part]) for part in parts]
    sums = torch.zeros(len(readers), 2, dtype=torch.float64)
    norm, lm_head = checkpoint.load_final_norm().to(runner.device), checkpoint.load_lm_head().to(runner.device)
    for window in range(len(token_ids) if streams else 0):
        for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
            if count:
                exact = norm(reference[window, -length:][part].to(runner.device))
                hidden = torch.stack([stream[window, -length:][part] for stream in streams])
                means = mean_divergences(norm(hidden.to(runner.device)), exact, lm_head).cpu()
                sums[list(rank_readers), number] += means.where(means.isfinite(), torch.inf) * count
    ranks.sum_(sums)
    means = sums.sum(1) / (len(token_ids) * sum(counts))
    after = sums[:, 1] / (len(token_ids) * counts[1]) if counts[1] else None
    return [Harm(means[place].item(), None if after is None else after[place].item()) for place in range(len(readers))]
