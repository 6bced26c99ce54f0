"""Learn prefix embeddings that leave the rest of the sequence easy to quantize: the trainable prefix.

P continuous embeddings stand in front of every calibration window and are the only thing that is trained; the model is
frozen, and every loss looks at the positions behind the prefix only. The loss is the weighted sum of

    the terms of `loss_type`, mean over layers (`prefix_losses.py`)
    diversity   squared cosine similarity between different rows of the prefix
    magnitude   norms beyond the largest of the embedding table
    kl          KL(original without prefix ‖ with prefix), in nats; with `simulate`, of the model as quantized

What blocks keep for the backward pass stays in memory where there is room; where not, they run inside
`torch.utils.checkpoint`, and only the hidden states between them stay.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.artifacts import Header, replacing_folder, save_tensors, write_json, write_rows
from pipeline.checkpoint import Checkpoint
from pipeline.divergence import mean_divergence
from pipeline.errors import PipelineError
from pipeline.params import PrefixTrainingParams
from pipeline.place import Place, run_differentiably
from pipeline.prefix import PREFIX, resize_rows
from pipeline.prefix_losses import MEASURES, Measure, diversity, magnitude
from pipeline.prefix_search import measure_outliers
from pipeline.progress import note_progress, show_progress
from pipeline.quantized_block import load_block
from pipeline.ranks import ALONE, Ranks
from pipeline.training_state import TrainingState
from pipeline.walk import BlockRunner, batches, compute_prefix_kv

logger = logging.getLogger(__name__)

LOSSES = "losses.json"
_STATE = "state.safetensors"


class PrefixTrainingError(PipelineError):
    """There is nothing to train."""


@dataclass(frozen=True)
class TrainedPrefix:
    """The outcome.

    Attributes:
        embeddings: [P, D] float32, of the epoch with the least validation loss (0: the initial ones).
        best_epoch, epochs: which that was, and how many were run.
        stopped: why training ended before its last epoch, or None.
        history: per epoch {"epoch", "train", "validation", and each term's mean on validation windows}.
    """

    embeddings: torch.Tensor
    best_epoch: int
    epochs: int
    stopped: str | None
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Candidates:
    """Every candidate prefix as tensors, and what was measured; `trained` None when training is disabled."""

    tensors: dict[str, torch.Tensor]
    trained: TrainedPrefix | None
    report: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """The stage's metrics."""
        if self.trained is None:
            return {"enabled": False, "prefix_tokens": len(self.tensors["found.token_ids"])}
        history, best = self.trained.history, self.trained.best_epoch
        worst = {
            name: {
                kind: max(layer[kind] for layer in layers)
                for kind in ("top1_median_ratio", "outlier_tokens_per_window")
            }
            for name, layers in self.report["outliers"].items()
        }
        return {
            "enabled": True,
            "prefix_tokens": len(self.trained.embeddings),
            "best_epoch": best,
            "validation_loss": {"before": history[0]["validation"], "after": history[best]["validation"]},
            "discrete_token_ids": self.tensors["discretised.token_ids"].tolist(),
            "top1_median_ratio": {name: values["top1_median_ratio"] for name, values in worst.items()},
            "outlier_tokens_per_window": {name: values["outlier_tokens_per_window"] for name, values in worst.items()},
        }


def make_candidates(
    checkpoint: Checkpoint,
    found: dict[str, torch.Tensor],
    train: torch.Tensor,
    validation: torch.Tensor,
    params: PrefixTrainingParams,
    place: Place,
) -> Candidates:
    """The found prefix, unchanged, and when training is enabled the trained and the discretised one.

    Args:
        found: `token_ids` [P0] and `embeddings` [P0, D] of prefix_search; P0 may be 0.
        train, validation: windows [N, T] and [M, T].

    Raises:
        PrefixTrainingError: nothing was found and no length is set, so that there is nothing to train.
    """
    tensors = {"found.token_ids": found["token_ids"], "found.embeddings": found["embeddings"]}
    if not params.enabled:
        return Candidates(tensors, None, {"enabled": False})
    table = checkpoint.load_tensor(checkpoint.architecture.embedding)
    initial = initial_embeddings(found["embeddings"], checkpoint.scale_embeddings(table), params.length, params.seed)
    if len(initial) == 0:
        raise PrefixTrainingError(
            "prefix_search found no prefix to start from; set prefix_training.length, or prefix_training.enabled: false"
        )
    trained = train_prefix(checkpoint, initial, train, validation, params, place)
    token_ids, similarities = discretise(trained.embeddings, table)
    tensors |= {
        "trained.embeddings": trained.embeddings.to(checkpoint.dtype),
        "trained.initial_token_ids": resize_rows(found["token_ids"], len(initial)),
        "discretised.token_ids": token_ids,
        "discretised.embeddings": checkpoint.scale_embeddings(table[token_ids]),
        "discretised.similarities": similarities,
    }
    decode = checkpoint.tokenizer.decode
    outliers = {}
    for name in ("none", "found", "trained", "discretised"):
        embeddings = tensors["found.embeddings"][:0] if name == "none" else tensors[f"{name}.embeddings"]
        prefix_kv = compute_prefix_kv(checkpoint, embeddings, place.runner)
        layers = measure_outliers(
            checkpoint, validation, place.runner, "down_proj_input", params.outlier_threshold, prefix_kv, place.ranks
        )
        outliers[name] = [
            {
                "layer": layer.layer,
                "top1_median_ratio": layer.mean_top1_ratio,
                "outlier_tokens_per_window": layer.mean_count,
            }
            for layer in layers
        ]
    report = {
        "enabled": True,
        "best_epoch": trained.best_epoch,
        "epochs": trained.epochs,
        "stopped": trained.stopped,
        "history": trained.history,
        "nearest_tokens": [
            {"id": token, "text": decode([token]), "similarity": similarity}
            for token, similarity in zip(token_ids.tolist(), similarities.tolist(), strict=True)
        ],
        "outliers": outliers,
    }
    return Candidates(tensors, trained, report)


def write_candidates(folder: Path, candidates: Candidates, header: Header) -> None:
    """Replace `folder` by prefix.safetensors, report.json and losses.json (a row per epoch; none when disabled)."""
    history = candidates.report.get("history", [])
    with replacing_folder(folder) as partial:
        save_tensors(partial / PREFIX, candidates.tensors, header)
        write_json(partial / "report.json", candidates.report)
        write_rows(partial / LOSSES, history)


def initial_embeddings(found: torch.Tensor, table: torch.Tensor, length: int | None, seed: int) -> torch.Tensor:
    """Where training starts: the found prefix [P0, D] cut or repeated to `length` (None: P0).

    Without a found prefix random rows are drawn at the scale of the embedding table [V, D].
    """
    length = len(found) if length is None else length
    if len(found):
        return resize_rows(found, length).float().clone()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, table.shape[1], generator=generator) * table.float().std()


def discretise(embeddings: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest vocabulary tokens by cosine similarity: ids [P] int64 and similarities [P]."""
    normed = nn.functional.normalize(embeddings.float(), dim=-1)
    similarity = normed @ nn.functional.normalize(table.float(), dim=-1).T
    best = similarity.max(dim=-1)
    return best.indices, best.values


def train_prefix(
    checkpoint: Checkpoint,
    embeddings: torch.Tensor,
    train: torch.Tensor,
    validation: torch.Tensor,
    params: PrefixTrainingParams,
    place: Place,
) -> TrainedPrefix:
    """Train a prefix; a killed run with the same header continues behind its last finished epoch.

    Ranks differentiate their own windows of a batch; gradients are summed, weighed by how many there are.

    Args:
        checkpoint: the original model.
        embeddings: [P, D] to start from.
        train, validation: windows [N, T] and [M, T].
        place: its `work` keeps the state between epochs, and is removed by the caller at the end.
    """
    runner, ranks, state_file = place.runner, place.ranks, place.work / _STATE
    model = FrozenModel(checkpoint, runner, params, place.recompute)
    prefix = nn.Parameter(embeddings.to(runner.device, torch.float32).clone())
    group = {"params": [prefix], "lr": params.learning_rate, "highest": params.learning_rate}
    optimizer = torch.optim.AdamW([group], weight_decay=0.0)
    steps = params.epochs * math.ceil(len(train) / params.batch_size)
    state = TrainingState([prefix], optimizer)
    own_train, own_validation = (windows[ranks.own(len(windows))] for windows in (train, validation))
    exact, exact_validation = model.run_original(own_train), model.run_original(own_validation)
    if state.load_(state_file, place.header):
        logger.info("continuing behind epoch %d", len(state.history) - 1)
    else:
        state.add({"epoch": 0, "train": None, **model.evaluate(prefix, own_validation, exact_validation, ranks)})
        state.save(state_file, place.header, ranks)
    stopped = None
    for epoch in range(len(state.history), params.epochs + 1):
        generator = torch.Generator().manual_seed(params.seed * 1000 + epoch)
        order = torch.randperm(len(train), generator=generator)
        losses = []
        parts = list(batches(len(train), params.batch_size))
        for number, rows in enumerate(show_progress(parts, len(parts), f"prefix epoch {epoch}/{params.epochs}")):
            step = (epoch - 1) * len(parts) + number
            optimizer.param_groups[0]["lr"] = params.learning_rate * cosine(step, steps)
            own = ranks.locate(order[rows])
            prefix.grad, total = torch.zeros_like(prefix), torch.zeros((), device=runner.device)
            if len(own):
                terms = model.losses(prefix, own_train[own], None if exact is None else exact[own])
                loss = model.weigh(terms) * (len(own) / len(order[rows]))
                loss.backward()
                total += loss.detach()
            ranks.sum_(prefix.grad, total)
            norm = nn.utils.clip_grad_norm_([prefix], params.clip_grad)
            if not (torch.isfinite(total) and torch.isfinite(norm)):
                stopped = f"the loss was not finite in epoch {epoch}, step {number}"
                break
            optimizer.step()
            losses.append(total.item())
            note_progress(loss=losses[-1], validation=state.history[-1]["validation"])
        if stopped:
            break
        measured = model.evaluate(prefix, own_validation, exact_validation, ranks)
        if not math.isfinite(measured["validation"]):
            stopped = f"the validation loss was not finite after epoch {epoch}"
            break
        state.add({"epoch": epoch, "train": sum(losses) / len(losses), **measured})
        state.save(state_file, place.header, ranks)
        if epoch - state.best_epoch >= params.early_stop:
            stopped = f"no lower validation loss for {params.early_stop} epochs"
            break
    if stopped:
        logger.warning("prefix training stopped: %s; keeping epoch %d", stopped, state.best_epoch)
    return TrainedPrefix(state.best[0].cpu(), state.best_epoch, len(state.history) - 1, stopped, state.history)


def cosine(step: int, steps: int) -> float:
    """1 at step 0, falling to 0 at `steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


class FrozenModel:
    """The original model with a prefix in front, and what a training step measures on it."""

    def __init__(
        self, checkpoint: Checkpoint, runner: BlockRunner, params: PrefixTrainingParams, recompute: bool = True
    ) -> None:
        self.checkpoint, self.runner, self.params, self.recompute = checkpoint, runner, params, recompute
        self.blocks = [load_block(checkpoint, index, runner.device) for index in range(checkpoint.block_count)]
        self.layers = set(range(len(self.blocks)) if params.target_layers is None else params.target_layers)
        self.table = checkpoint.scale_embeddings(checkpoint.load_tensor(checkpoint.architecture.embedding))
        self.table_norm = self.table.float().norm(dim=-1).max().item()
        self.measure: Measure = MEASURES[params.loss_type](checkpoint, params)
        weights = params.weights.model_dump()
        self._counts = any(weights[name] for name in self.measure.names)
        self.norm = checkpoint.load_final_norm().to(runner.device).requires_grad_(False)
        self.lm_head = checkpoint.load_lm_head().to(runner.device) if params.weights.kl else None
        self._terms: list[torch.Tensor] | None = None  # of the block that runs; None: nobody is looking
        self._prefix_tokens = 0
        for index in sorted(self.layers):
            self._watch(index)

    def _watch(self, index: int) -> None:
        """Show the measure what passes its sites in block `index`, behind the prefix."""
        block, architecture = self.blocks[index], self.checkpoint.architecture

        def see(site: str, x: torch.Tensor) -> torch.Tensor:
            if self._terms is None:
                return x
            before, behind = x[..., : self._prefix_tokens, :], x[..., self._prefix_tokens :, :]
            seen, terms = self.measure.see(index, site, behind.float())
            # Without weight terms are reported, and nothing is kept for their gradient.
            self._terms.append(terms if self._counts else terms.detach())
            return torch.cat((before, seen.to(x.dtype)), dim=-2)

        def watch_input(site: str, name: str) -> None:
            block.get_submodule(name).register_forward_pre_hook(lambda module, args: (see(site, args[0]),))

        def watch_site(site: str) -> None:
            architecture.watch_input_(block, site, lambda module, x: see(site, x))

        def watch_output(site: str, name: str) -> None:
            block.get_submodule(name).register_forward_hook(lambda module, args, output: see(site, output))

        hang = {
            "attention_input": watch_site,
            "key": lambda site: setattr(block.self_attn, "key_quantizer", _CacheSite(see, site)),
            "value": lambda site: setattr(block.self_attn, "value_quantizer", _CacheSite(see, site)),
            "attention_output": lambda site: watch_input(site, architecture.attention_output),
            "o_proj": lambda site: watch_output(site, architecture.attention_output),
            "mlp_input": watch_site,
            "mlp_hidden": lambda site: watch_input(site, architecture.mlp_output),
        }
        for site in self.measure.sites:
            hang[site](site)

    @torch.no_grad()
    def run_original(self, token_ids: torch.Tensor) -> torch.Tensor | None:
        """Final hidden states [N, T, D] (CPU) of windows without a prefix; None where no term asks for them."""
        if not self.params.weights.kl:
            return None
        self._terms = None
        hidden = self.checkpoint.embed(token_ids)
        for block in self.blocks:
            self.runner.advance_(block, hidden)
        return hidden

    def losses(
        self, prefix: torch.Tensor, token_ids: torch.Tensor, original: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Every term of one batch [B, T], unweighted: the layers' means, and those of the prefix itself.

        `original` is `run_original` of the same windows.
        """
        embedded = nn.functional.embedding(token_ids.cpu(), self.table).to(self.runner.device, self.checkpoint.dtype)
        self._prefix_tokens = count = len(prefix)
        self.measure.begin_batch()
        hidden = torch.cat((prefix.to(embedded.dtype).expand(len(token_ids), -1, -1), embedded), dim=1)
        collected: list[torch.Tensor] = []
        for index in range(len(self.blocks)):
            hidden, terms = run_differentiably(self.recompute, self._run_block, index, hidden)
            if index in self.layers:
                collected.append(terms)
        means = torch.stack(collected).mean(0)
        result = dict(zip(self.measure.names, means, strict=True))
        result["diversity"] = diversity(prefix)
        result["magnitude"] = magnitude(prefix, self.table_norm)
        if original is not None:
            exact = self.norm(original.to(self.runner.device))
            result["kl"] = mean_divergence(self.norm(hidden[:, count:]), exact, self.lm_head)
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


class _CacheSite(nn.Module):
    """Stands where a block's cache looks for the quantizer of keys or values, and shows them to `see`."""

    before_rope = False

    def __init__(self, see: Callable[[str, torch.Tensor], torch.Tensor], site: str) -> None:
        super().__init__()
        self.see, self.site = see, site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.see(self.site, x)
