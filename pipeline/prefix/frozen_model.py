"""The original model with a prefix before the text, all frozen but the prefix, and the terms of the loss in it."""

import functools
import operator

import torch
from torch import nn

from pipeline.blocks.quantized import load_block
from pipeline.blocks.walk import BlockRunner, batches
from pipeline.models.architectures import UnsupportedModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.layers import DecoderLayer
from pipeline.prefix.losses import MEASURES, diversity, magnitude
from pipeline.prefix.params import PrefixTrainingParams
from pipeline.prefix.sites import hook_sites_
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.runtime.streams import IN_MEMORY, Offload
from pipeline.text.windows import prepend_start_token
from pipeline.training.divergence import mean_divergence
from pipeline.training.place import HIDDEN_STATES, Keeping
from pipeline.training.streamed import TrainedBlocks


class FrozenModel:
    """Runs the original model with a prefix and measures the terms of the loss."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        runner: BlockRunner,
        params: PrefixTrainingParams,
        keeping: Keeping = HIDDEN_STATES,
        offload: Offload = IN_MEMORY,
    ) -> None:
        """Load all blocks of the original model, and hook the sites of those in `prefix_training.target_layers`.

        Raises:
            UnsupportedModelError: the model has experts, whose inputs do not show which tokens belong to the prefix.
        """
        if checkpoint.architecture.experts is not None:
            raise UnsupportedModelError(
                f"prefix_training.enabled=true: model_type={checkpoint.config.model_type!r} has experts, and the terms "
                "of the loss are not measured in them. Set prefix_training.enabled: false; the found prefix is used."
            )
        self.checkpoint, self.runner, self.params = checkpoint, runner, params
        all_layers = range(checkpoint.block_count)
        self.layers = set(all_layers if params.target_layers is None else params.target_layers)
        self.table = checkpoint.scale_embeddings(checkpoint.load_tensor(checkpoint.architecture.embedding))
        self.table_norm = self.table.float().norm(dim=-1).max().item()
        self.measure = MEASURES[params.loss_type](checkpoint, params)
        self.weights: dict[str, float] = params.weights.model_dump()
        self._terms_count = any(self.weights[name] for name in self.measure.names)
        self.norm = checkpoint.load_final_norm().to(runner.device).requires_grad_(False)
        self.lm_head = checkpoint.load_lm_head().to(runner.device) if params.weights.kl else None
        self._terms: list[torch.Tensor] | None = None  # of the running block; None: nothing is measured
        self._prefix_tokens = 0
        architecture = checkpoint.architecture
        self.blocks = TrainedBlocks(architecture, checkpoint.load_block_tensors, runner.device, keeping, offload)
        for index in all_layers:
            block = load_block(checkpoint, index, runner.device)
            if index in self.layers:
                self._hook_block_(index, block)
            self.blocks.append(block)

    def _hook_block_(self, index: int, block: DecoderLayer) -> None:
        """Have the measure read and replace the values at its sites in block `index`, except prefix positions."""

        def measure_text(site: str, x: torch.Tensor) -> torch.Tensor:
            if self._terms is None:
                return x
            prefix, text = x[..., : self._prefix_tokens, :], x[..., self._prefix_tokens :, :]
            replaced, terms = self.measure.measure(index, site, text.float())
            # Terms without weight are only reported, so autograd need keep nothing for them.
            self._terms.append(terms if self._terms_count else terms.detach())
            return torch.cat((prefix, replaced.to(x.dtype)), dim=-2)

        hook_sites_(block, self.checkpoint.architecture, self.measure.sites, measure_text)

    @torch.no_grad()
    def run_original(self, token_ids: torch.Tensor, text_start_token_id: int | None = None) -> torch.Tensor | None:
        """Return final hidden states of windows without a prefix, [N, T, D] on the CPU; None if no term needs them.

        Args:
            token_ids: [N, T], content alone.
            text_start_token_id: the start token that is put before each window, or None. Its states are left out.
        """
        if not self.params.weights.kl:
            return None
        self._terms = None
        hidden = self.checkpoint.embed(prepend_start_token(token_ids, text_start_token_id))
        for index in range(len(self.blocks)):
            self.runner.advance_(self.blocks.bring(index), hidden)
        return hidden[:, -token_ids.shape[1] :]

    def losses(
        self, prefix: torch.Tensor, token_ids: torch.Tensor, reference: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return every term of a batch, unweighted: means over layers, terms of the prefix itself, and the divergence.

        Args:
            prefix: embeddings [P, D].
            token_ids: [B, T] after the prefix. They may begin with a start token that `reference` has no states of.
            reference: `run_original` of the same windows; None leaves `kl` out.
        """
        embedded = nn.functional.embedding(token_ids.cpu(), self.table).to(self.runner.device, self.checkpoint.dtype)
        self._prefix_tokens = len(prefix)
        self.measure.begin_batch()
        hidden = torch.cat((prefix.to(embedded.dtype).expand(len(token_ids), -1, -1), embedded), dim=1)
        layer_terms: list[torch.Tensor] = []
        for index in range(len(self.blocks)):
            hidden, terms = self.blocks.run(self._run_block, index, hidden)
            if index in self.layers:
                layer_terms.append(terms)
        means = torch.stack(layer_terms).mean(0)
        losses = dict(zip(self.measure.names, means, strict=True))
        losses["diversity"] = diversity(prefix)
        losses["magnitude"] = magnitude(prefix, self.table_norm)
        if reference is not None and self.lm_head is not None:
            normed_reference = self.norm(reference.to(self.runner.device))
            normed = self.norm(hidden[:, -reference.shape[1] :])
            losses["kl"] = mean_divergence(normed, normed_reference, self.lm_head)
        return losses

    def weigh(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum of the terms, []."""
        return functools.reduce(operator.add, (self.weights[name] * value for name, value in terms.items()))

    @torch.no_grad()
    def evaluate(
        self, prefix: torch.Tensor, token_ids: torch.Tensor, reference: torch.Tensor | None, ranks: Ranks = ALONE
    ) -> dict[str, float]:
        """Return means over the windows of all ranks: "validation", the weighted sum, and every term.

        Args:
            token_ids: [M, T], the windows of this rank.
        """
        totals: dict[str, float] = {}
        for rows in batches(len(token_ids), self.params.batch_size):
            terms = self.losses(prefix, token_ids[rows], None if reference is None else reference[rows])
            for name, value in ({"validation": self.weigh(terms)} | terms).items():
                totals[name] = totals.get(name, 0.0) + (rows.stop - rows.start) * value.item()
        sums = torch.tensor([*totals.values(), len(token_ids)], dtype=torch.float64)
        ranks.sum_(sums)
        *values, count = sums.tolist()
        return {name: value / count for name, value in zip(totals, values, strict=True)}

    def _run_block(self, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states after block `index`, and the mean of its terms over sites."""
        self._terms = []
        output = self.runner.run(self.blocks[index], hidden)
        return output, torch.stack(self._terms).mean(0) if self._terms else hidden.new_zeros(())
