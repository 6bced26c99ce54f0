"""Record the inputs of the down projections of routed experts, with true routing, and top up experts with few tokens.

An expert's statistics come from the tokens that the router sends to it. If these are fewer than `FLOOR`, tokens with
the next best routing scores are added: those with the smallest distance between the expert's logit and the last chosen
one's. Where a correction bias decides, scores with it take the place of logits, whatever the expert's group. These
tokens run only through this expert and only for its statistics. No output of an expert that the router did not choose
reaches the hidden states. So every expert gets a range, whatever the router does.

Nothing depends on batches or ranks. The sampled tokens of an expert have the smallest hashes of their numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.blocks.quantized import find_quantized_linear, find_site_quantizers
from pipeline.blocks.walk import BlockRunner, batches
from pipeline.models.architectures import Architecture
from pipeline.models.experts import RoutedExperts
from pipeline.models.layers import DecoderLayer
from pipeline.models.routing import ExpertScores, find_correction_bias, rank_experts
from pipeline.models.sites import Site
from pipeline.quantization.site_statistics import SiteStatistics
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.streams import Stream

FLOOR = 512  # tokens, below which an expert is topped up
_HASH, _BITS = 2654435761, 32  # Knuth's multiplicative hash


@dataclass
class ExpertUse:
    """The use of one routed expert by the calibration windows.

    Attributes:
        tokens: how many the router sent to it.
        added: how many more its statistics are of.
    """

    tokens: int
    added: int = 0


RouterOutput = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # logits [n, E], weights and indices [n, k]


class ExpertRecorder:
    """Records the statistics of all routed experts of a block while it runs over this rank's windows [N, T]."""

    def __init__(
        self,
        block: DecoderLayer,
        architecture: Architecture,
        sites: dict[str, SiteStatistics],
        *,
        gram_sites: set[str],
        samples: int,
        length: int,
        ranks: Ranks,
    ) -> None:
        """Prepare to record into the entries of `sites` that belong to routed experts.

        Args:
            architecture: architecture of the block (`Architecture.of_block`).
            gram_sites: sites whose Gram matrix is needed.
            samples: how many tokens are sampled at a site that all tokens pass.
            length: T.
        """
        assert architecture.experts is not None
        experts = block.get_submodule(architecture.experts)
        assert isinstance(experts, RoutedExperts)
        self.experts, self.router = experts, block.get_submodule(architecture.router)
        self.scores: ExpertScores = architecture.expert_scores
        name = architecture.experts.removeprefix(f"{architecture.mlp}.")
        self.names = [f"{Site.MLP_HIDDEN}.{name}.{index}" for index in range(len(experts))]
        self.statistics = [sites[site] for site in self.names]
        self.downs = [find_quantized_linear(block, architecture.mlps[site][2]) for site in self.names]
        quantizers = find_site_quantizers(block, architecture)
        self._quantizers = [quantizers[site] for site in self.names]
        self.gram_sites, self.length, self.ranks = gram_sites, length, ranks
        top_k = self.router.top_k
        assert isinstance(top_k, int)
        self.capacity = max(FLOOR, samples * top_k // len(experts))
        self.uses: list[ExpertUse] = []
        self._numbers = [torch.zeros(0, dtype=torch.int64) for _ in self.names]
        self._distances: list[torch.Tensor] = []  # of each batch, [n, E]
        self._first = 0  # this rank's number of the first window of the batch that runs
        self._tokens = torch.zeros(0, dtype=torch.int64)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record whatever the block computes inside the context."""

        def locate(index: int, tokens: torch.Tensor, inner: torch.Tensor) -> None:
            self._tokens = tokens

        def make_hook(index: int) -> Any:
            return lambda module, args: self._add_(index, args[0], self._tokens)

        def keep_distances(module: nn.Module, args: tuple[torch.Tensor, ...], output: RouterOutput) -> None:
            self._keep_distances(args, output)

        handles = [
            quantizer.register_forward_pre_hook(make_hook(index)) for index, quantizer in enumerate(self._quantizers)
        ]
        handles.append(self.router.register_forward_hook(keep_distances))
        self.experts.watchers.append(locate)
        try:
            yield
        finally:
            self.experts.watchers.remove(locate)
            for handle in handles:
                handle.remove()

    def begin_batch(self, first: int) -> None:
        """Say which of this rank's windows is the first of the batch that runs next."""
        self._first = first

    def _keep_distances(self, args: tuple[torch.Tensor, ...], output: RouterOutput) -> None:
        """Keep how far each expert ranks below the last chosen one, [n, E]; -inf for the chosen ones."""
        logits, _, indices = output
        ranks = rank_experts(self.scores, logits, find_correction_bias(self.router, args))
        last = ranks.gather(1, indices).amin(1, keepdim=True)
        self._distances.append((ranks - last).float().scatter(1, indices, -torch.inf).cpu())

    def _number(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the numbers of tokens of the batch that runs among the tokens of all ranks."""
        windows = self._first + tokens // self.length
        return ((windows * self.ranks.world + self.ranks.rank) * self.length + tokens % self.length).cpu()

    def _add_(self, index: int, x: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add the values x [m, I] of some tokens at an expert's site."""
        statistics, values = self.statistics[index], x.float()
        statistics.channels.update(values)
        if self.names[index] in self.gram_sites:
            statistics.add_gram_(values)
        self._sample_(index, values, self._number(tokens))

    def _sample_(self, index: int, values: torch.Tensor, numbers: torch.Tensor) -> None:
        """Add values to an expert's sample, and leave the `capacity` ones with the smallest hash of their number."""
        statistics = self.statistics[index]
        numbers = torch.cat((self._numbers[index], numbers))
        values = torch.cat((*statistics.samples, values))
        if len(numbers) > self.capacity:
            chosen = ((numbers * _HASH) % (1 << _BITS)).argsort(stable=True)[: self.capacity].sort().values
            numbers, values = numbers[chosen], values[chosen.to(values.device)]
        self._numbers[index], statistics.samples = numbers, [values]

    def top_up_(self, block: DecoderLayer, hidden: Stream, prefix_kv: torch.Tensor | None, runner: BlockRunner) -> None:
        """Add the next best tokens to the statistics of experts with few, and set `uses`.

        Args:
            hidden: [N, T, D], as recorded.
        """
        distances = torch.cat(self._distances)
        counts = torch.tensor([statistics.channels.count for statistics in self.statistics])
        tokens = torch.tensor(len(distances))
        self.ranks.sum_(counts, tokens)
        self.uses = [ExpertUse(count) for count in counts.tolist()]
        # This rank's tokens: window by window, as they ran.
        numbers = torch.arange(len(distances))
        numbers = (numbers // self.length * self.ranks.world + self.ranks.rank) * self.length + numbers % self.length
        chosen: dict[int, torch.Tensor] = {}
        for index, use in enumerate(self.uses):
            if use.tokens < min(FLOOR, int(tokens)):
                added = self._choose(distances[:, index], numbers, min(FLOOR, int(tokens)) - use.tokens)
                use.added = len(added)
                chosen[index] = torch.isin(numbers, added).nonzero().squeeze(1)
        if any(len(places) for places in chosen.values()):
            self._run_chosen_(block, chosen, hidden, prefix_kv, runner)

    def _choose(self, distances: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
        """Return the numbers of the `count` tokens of all ranks with the largest distances, the first of equal ones."""
        best = distances.argsort(descending=True, stable=True)[:count]
        best = best[distances[best].isfinite()]
        all_numbers, all_distances = self.ranks.join(numbers[best]), self.ranks.join(distances[best])
        order = all_numbers.argsort()
        order = order[all_distances[order].argsort(descending=True, stable=True)]
        return all_numbers[order[:count]]

    def _run_chosen_(
        self,
        block: DecoderLayer,
        chosen: dict[int, torch.Tensor],
        hidden: Stream,
        prefix_kv: torch.Tensor | None,
        runner: BlockRunner,
    ) -> None:
        """Run the chosen tokens through their experts. `chosen`: expert -> places among this rank's tokens."""
        places_by_expert: dict[int, torch.Tensor] = {}

        def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            for index, places in places_by_expert.items():
                tokens = places.to(x.device)
                inner = self.experts.compute_inner(index, x[tokens])
                self._add_(index, self.downs[index].rotate(inner), tokens)

        handle = self.experts.register_forward_pre_hook(record)
        try:
            for rows in batches(len(hidden), runner.batch_size):
                start, stop = rows.start * self.length, rows.stop * self.length
                places_by_expert.clear()
                for index, places in chosen.items():
                    inside = places[(places >= start) & (places < stop)]
                    if len(inside):
                        places_by_expert[index] = inside - start
                if places_by_expert:
                    self.begin_batch(rows.start)
                    runner.run(block, hidden[rows].to(runner.device), prefix_kv)
        finally:
            handle.remove()

    def combine_(self) -> None:
        """Extend the experts' statistics to the tokens of all ranks."""
        for index, (site, statistics) in enumerate(zip(self.names, self.statistics, strict=True)):
            width, device = self.downs[index].in_features, self.downs[index].weight.device
            statistics.channels.prepare_(width, device)
            if site in self.gram_sites and statistics.gram is None:
                statistics.gram = torch.zeros(width, width, device=device)
            if not statistics.samples:
                statistics.samples = [torch.zeros(0, width, device=device)]
            numbers = self.ranks.join(self._numbers[index])
            statistics.combine_(self.ranks)
            values, statistics.samples = statistics.sample, []
            self._numbers[index] = torch.zeros(0, dtype=torch.int64)
            order = numbers.argsort()
            self._sample_(index, values[order.to(device)], numbers[order])
