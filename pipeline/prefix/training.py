"""Learn prefix embeddings that leave the rest of the sequence easy to quantize: the trainable prefix.

P continuous embeddings stand in front of every calibration window and are the only thing that is trained; the model is
frozen, and every loss looks at the positions behind the prefix only. The loss is the weighted sum of

    the terms of `loss_type`, mean over layers (`losses.py`)
    diversity   squared cosine similarity between different rows of the prefix
    magnitude   norms beyond the largest of the embedding table
    kl          KL(reference ‖ with prefix), in nats; with `simulate`, of the model as quantized. The reference is the
                original model without a prefix

What blocks keep for the backward pass stays in memory where there is room; where not, they run inside
`torch.utils.checkpoint`, and only the hidden states between them stay; where the blocks do not fit either, they are
streamed, forwards and backwards (`training/streamed.py`).
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.blocks.prefix_kv import PREFIX, compute_prefix_kv
from pipeline.models.checkpoint import Checkpoint
from pipeline.prefix.candidates import resize_rows
from pipeline.prefix.frozen_model import FrozenModel
from pipeline.prefix.params import PrefixTrainingParams
from pipeline.prefix.search import measure_outliers
from pipeline.runtime.artifacts import Header, replacing_folder, save_tensors, write_json, write_rows
from pipeline.runtime.errors import PipelineError
from pipeline.text.windows import find_text_start_token, prepend_start_token
from pipeline.training.place import Place
from pipeline.training.trainer import Rows, Trainer

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
    start_token: int | None = None,
) -> Candidates:
    """The found prefix, unchanged, and when training is enabled the trained and the discretised one.

    Args:
        found: `token_ids` [P0] and `embeddings` [P0, D] of prefix_search; P0 may be 0.
        train, validation: windows [N, T] and [M, T], content alone.
        start_token: in front of every window that no prefix ends in, or None.

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
    begun_from = resize_rows(found["token_ids"], len(initial))
    starts = start_token, find_text_start_token(start_token, begun_from)
    trained = train_prefix(checkpoint, initial, train, validation, params, place, *starts)
    token_ids, similarities = discretise(trained.embeddings, table)
    tensors |= {
        "trained.embeddings": trained.embeddings.to(checkpoint.dtype),
        "trained.initial_token_ids": begun_from,
        "discretised.token_ids": token_ids,
        "discretised.embeddings": checkpoint.scale_embeddings(table[token_ids]),
        "discretised.similarities": similarities,
    }
    decode = checkpoint.tokenizer.decode
    outliers = {}
    ends = {"none": token_ids[:0], "found": found["token_ids"], "trained": begun_from, "discretised": token_ids}
    for name, end in ends.items():
        embeddings = tensors["found.embeddings"][:0] if name == "none" else tensors[f"{name}.embeddings"]
        prefix_kv = compute_prefix_kv(checkpoint, embeddings, place.runner)
        windows = prepend_start_token(validation, find_text_start_token(start_token, end))
        layers = measure_outliers(
            checkpoint, windows, place.runner, "down_proj_input", params.outlier_threshold, prefix_kv, place.ranks
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


@dataclass
class PrefixData:
    """Windows that a prefix is trained or validated on.

    Attributes:
        inputs: [N, T] int64, this rank's windows as they are read after the prefix.
        reference: [N, T, D], final hidden states of their content in the original model without a prefix; None where no
            term of the loss needs them.
        count: windows of all ranks.
    """

    inputs: torch.Tensor
    reference: torch.Tensor | None
    count: int


class PrefixTrainer(Trainer[PrefixData]):
    """Trains the embeddings of a prefix [P, D]; a loss that is not finite ends training."""

    bar = "prefix"
    failure_limit = 1
    needs_finite_validation = True
    foreach = None  # there is one parameter, and a GPU's rounding depends on the choice

    def __init__(
        self, model: FrozenModel, embeddings: torch.Tensor, params: PrefixTrainingParams, place: Place
    ) -> None:
        device = place.runner.device
        self.model, self.prefix = model, nn.Parameter(embeddings.to(device, torch.float32).clone())
        super().__init__(
            [([self.prefix], params.learning_rate)],
            schedule=params,
            weight_decay=0.0,
            device=device,
            autocast="none",
            ranks=place.ranks,
        )
        self.resume_(place.work / _STATE, place.header)

    def learning_rate(self, highest: float, step_index: int, step_count: int) -> float:
        return highest * cosine(step_index, step_count)

    def draw_order(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(count, generator=generator)

    def batch_loss(self, data: PrefixData, rows: Rows, count: int) -> torch.Tensor:
        reference = None if data.reference is None else data.reference[rows]
        token_ids = data.inputs[rows]
        return self.model.weigh(self.model.losses(self.prefix, token_ids, reference)) * (len(token_ids) / count)

    def evaluate(self, data: PrefixData) -> dict[str, float]:
        """Return the means over the windows of all ranks: "validation", the weighted sum, and every term."""
        return self.model.evaluate(self.prefix, data.inputs, data.reference, self.ranks)


def train_prefix(
    checkpoint: Checkpoint,
    embeddings: torch.Tensor,
    train: torch.Tensor,
    validation: torch.Tensor,
    params: PrefixTrainingParams,
    place: Place,
    original_start: int | None = None,
    start_token: int | None = None,
) -> TrainedPrefix:
    """Train a prefix; a killed run with the same header continues behind the step that was saved last.

    Args:
        checkpoint: the original model.
        embeddings: [P, D] to start from.
        train, validation: windows [N, T] and [M, T], content alone.
        original_start, start_token: in front of windows without a prefix, and behind the one that is trained, or None.
        place: its `work` keeps the state, and is removed by the caller at the end.
    """
    model = FrozenModel(checkpoint, place.runner, params, place.keeping, place.offload)

    def prepare(windows: torch.Tensor) -> PrefixData:
        rank_windows = windows[place.ranks.slice_windows(len(windows))]
        reference = model.run_original(rank_windows, original_start)
        return PrefixData(prepend_start_token(rank_windows, start_token), reference, len(windows))

    train_data, validation_data = prepare(train), prepare(validation)
    trainer = PrefixTrainer(model, embeddings, params, place)
    outcome = trainer.train_(train_data, validation_data, params.seed)
    epochs, stopped = len(outcome.history) - 1, outcome.failure
    if stopped is None and epochs - outcome.best_epoch >= params.early_stop:
        stopped = f"no lower validation loss for {params.early_stop} epochs"
    if stopped:
        logger.warning("prefix training stopped: %s; keeping epoch %d", stopped, outcome.best_epoch)
    return TrainedPrefix(trainer.prefix.detach().cpu(), outcome.best_epoch, epochs, stopped, outcome.history)


def cosine(step: int, steps: int) -> float:
    """1 at step 0, falling to 0 at `steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
