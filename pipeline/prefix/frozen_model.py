"""The original model with a prefix in front, frozen, and what a training step measures on it."""

import torch
from torch import nn

from pipeline.blocks.quantized import load_block
from pipeline.blocks.walk import BlockRunner, batches
from pipeline.models.checkpoint import Checkpoint
from pipeline.prefix.losses import MEASURES, Measure, diversity, magnitude
from pipeline.prefix.params import PrefixTrainingParams
from pipeline.prefix.sites import watch_sites_
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.runtime.streams import IN_MEMORY, Offload
from pipeline.text.windows import prepend_start_token
from pipeline.training.divergence import mean_divergence
from pipeline.training.place import HIDDEN_STATES, Keeping
from pipeline.training.streamed import TrainedBlocks


class FrozenModel:
    """The original model with a prefix in front, and what a training step measures on it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        runner: BlockRunner,
        params: PrefixTrainingParams,
        keeping: Keeping = HIDDEN_STATES,
        offload: Offload = IN_MEMORY,
    ) -> None:
        self.checkpoint, self.runner, self.params = checkpoint, runner, params
        every = range(checkpoint.block_count)
        self.layers = set(every if params.target_layers is None else params.target_layers)
        self.table = checkpoint.scale_embeddings(checkpoint.load_tensor(checkpoint.architecture.embedding))
        self.table_norm = self.table.float().norm(dim=-1).max().item()
        self.measure: Measure = MEASURES[params.loss_type](checkpoint, params)
        weights = params.weights.model_dump()
        self._counts = any(weights[name] for name in self.measure.names)
        self.norm = checkpoint.load_final_norm().to(runner.device).requires_grad_(False)
        self.lm_head = checkpoint.load_lm_head().to(runner.device) if params.weights.kl else None
        self._terms: list[torch.Tensor] | None = None  # of the block that runs; None: nobody is looking
        self._prefix_tokens = 0
        architecture = checkpoint.architecture
        self.blocks = TrainedBlocks(architecture, checkpoint.load_block_tensors, runner.device, keeping, offload)
        for index in every:
            block = load_block(checkpoint, index, runner.device)
            if index in self.layers:
                self._watch(index, block)
            self.blocks.append(block)

    def _watch(self, index: int, block: nn.Module) -> None:
        """Show the measure what passes its sites in block `index`, behind the prefix."""

        def see(site: str, x: torch.Tensor) -> torch.Tensor:
            if self._terms is None:
                return x
            before, behind = x[..., : self._prefix_tokens, :], x[..., self._prefix_tokens :, :]
            seen, terms = self.measure.see(index, site, behind.float())
            # Without weight terms are reported, and nothing is kept for their gradient.
            self._terms.append(terms if self._counts else terms.detach())
            return torch.cat((before, seen.to(x.dtype)), dim=-2)

        watch_sites_(block, self.checkpoint.architecture, self.measure.sites, see)

    @torch.no_grad()
    def run_original(self, token_ids: torch.Tensor, start_token: int | None = None) -> torch.Tensor | None:
        """Final hidden states [N, T, D] (CPU) of windows [N, T] without a prefix; None where no term asks for them.

        `start_token` stands in front of each window, where there is one; its own states are left out.
        """
        if not self.params.weights.kl:
            return None
        self._terms = None
        hidden = self.checkpoint.embed(prepend_start_token(token_ids, start_token))
        for index in range(len(self.blocks)):
            self.runner.advance_(self.blocks.bring(index), hidden)
        return hidden[:, -token_ids.shape[1] :]

    def losses(
        self, prefix: torch.Tensor, token_ids: torch.Tensor, original: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Every term of one batch [B, T], unweighted: the layers' means, and those of the prefix itself.

        The batch may begin with a start token that `original`, `run_original` of the same windows, has no states of.
        """
        embedded = nn.functional.embedding(token_ids.cpu(), self.table).to(self.runner.device, self.checkpoint.dtype)
        self._prefix_tokens = len(prefix)
        self.measure.begin_batch()
        hidden = torch.cat((prefix.to(embedded.dtype).expand(len(token_ids), -1, -1), embedded), dim=1)
        collected: list[torch.Tensor] = []
        for index in range(len(self.blocks)):
            hidden, terms = self.blocks.run(self._run_block, index, hidden)
            if index in self.layers:
                collected.append(terms)
        means = torch.stack(collected).mean(0)
        result = dict(zip(self.measure.names, means, strict=True))
        result["diversity"] = diversity(prefix)
        result["magnitude"] = magnitude(prefix, self.table_norm)
        if original is not None:
            reference = self.norm(original.to(self.runner.device))
            result["kl"] = mean_divergence(self.norm(hidden[:, -reference.shape[1] :]), reference, self.lm_head)
        return result

    def weigh(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = self.params.weights.model_dump()
        return sum(weights[name] * value for name, value in terms.items())

    @torch.no_grad()
    def evaluate(
        self, prefix: torch.Tensor, token_ids: torch.Tensor, original: torch.Tensor | None, ranks: Ranks = ALONE
    ) -> dict[str, float]:
        """Means over all ranks' windows, [M, T] of them this one's: `validation`, the weighted sum, and every term."""
        totals: dict[str, float] = {}
        for rows in batches(len(token_ids), self.params.batch_size):
            terms = self.losses(prefix, token_ids[rows], None if original is None else original[rows])
            for name, value in ({"validation": self.weigh(terms)} | terms).items():
                totals[name] = totals.get(name, 0.0) + (rows.stop - rows.start) * value.item()
        sums = torch.tensor([*totals.values(), len(token_ids)], dtype=torch.float64)
        ranks.sum_(sums)
        *values, count = sums.tolist()
        return {name: value / count for name, value in zip(totals, values, strict=True)}

    def _run_block(self, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._terms = []
        output = self.runner.run(self.blocks[index], hidden)
        return output, torch.stack(self._terms).mean(0) if self._terms else hidden.new_zeros(())
