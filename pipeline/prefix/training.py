"""Train prefix embeddings after which the text is easy to quantize: the trainable prefix.

P continuous embeddings come before every calibration window, and only they are trained; the model is frozen. Every loss
is computed at the positions after the prefix. It is the weighted sum of

    the terms of `loss_type`, means over layers (`losses.py`)
    diversity   squared cosine similarity between different rows of the prefix
    magnitude   norms beyond the largest norm of the embedding table
    kl          KL(reference ‖ model with prefix) in nats, where the reference is the original model without a prefix;
                with `simulate`, the model with the prefix is quantized

The activations that blocks keep for the backward pass stay in memory where there is room. Where not, blocks run inside
`torch.utils.checkpoint`, which keeps the hidden states between them. Where the blocks do not fit either, they are
streamed, forwards and backwards (`training/streamed.py`).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.blocks.prefix_kv import PREFIX, compute_prefix_kv
from pipeline.models.checkpoint import Checkpoint
from pipeline.prefix.candidates import resize_rows
from pipeline.prefix.frozen_model import FrozenModel
from pipeline.prefix.harm import Harm, Reader, choose_harm_windows, measure_harm
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
    """A prefix cannot be trained."""


class PrefixGateError(PipelineError):
    """A prefix changes the unquantized model more than `prefix_training.max_kl` allows."""


@dataclass(frozen=True)
class TrainedPrefix:
    """The result of training a prefix.

    Attributes:
        embeddings: [P, D] float32, from the best epoch.
        best_epoch: the epoch with the lowest validation loss; epoch 0 is the start.
        epochs: the number of epochs that were run.
        stopped: why training ended before its last epoch, or None.
        history: per epoch {"epoch", "train", "validation", and the mean of each term on validation windows}.
    """

    embeddings: torch.Tensor
    best_epoch: int
    epochs: int
    stopped: str | None
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Candidates:
    """Every candidate prefix as tensors, the outcome of training (None if disabled), and the report."""

    tensors: dict[str, torch.Tensor]
    trained: TrainedPrefix | None
    report: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """Return the stage's metrics."""
        if self.trained is None:
            tokens = len(self.tensors["found.token_ids"])
            return {"enabled": False, "prefix_tokens": tokens, "full_precision_kl": self._list_harm()}
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
            "discrete_token_ids": [token["id"] for token in self.report["nearest_tokens"]],
            "top1_median_ratio": {name: values["top1_median_ratio"] for name, values in worst.items()},
            "outlier_tokens_per_window": {name: values["outlier_tokens_per_window"] for name, values in worst.items()},
            "full_precision_kl": self._list_harm(),
        }

    def _list_harm(self) -> dict[str, float | None]:
        return {name: row["full_precision_kl"] for name, row in self.report.get("gate", {}).items()}


def make_candidates(
    checkpoint: Checkpoint,
    found_prefix: dict[str, torch.Tensor],
    *,
    train: torch.Tensor,
    validation: torch.Tensor,
    params: PrefixTrainingParams,
    place: Place,
    text_start_token_id: int | None = None,
) -> Candidates:
    """Return the found prefix, unchanged, and, if training is enabled, the trained and the discretised one.

    Args:
        checkpoint: the original model.
        found_prefix: `token_ids` [P0] and `embeddings` [P0, D] of prefix_search; P0 may be 0.
        train: windows [N, T], content alone.
        validation: windows [M, T], content alone.
        text_start_token_id: the start token before every text, or None. It is left out after a prefix that ends in it.

    Raises:
        PrefixTrainingError: prefix_search found no prefix, and no length is set.
    """
    found_ids, found_embeddings = found_prefix["token_ids"], found_prefix["embeddings"]
    tensors = {"found.token_ids": found_ids, "found.embeddings": found_embeddings}
    if not params.enabled:
        return Candidates(tensors, None, {"enabled": False})
    table = checkpoint.load_tensor(checkpoint.architecture.embedding)
    initial = initial_embeddings(found_embeddings, checkpoint.scale_embeddings(table), params.length, params.seed)
    if len(initial) == 0:
        raise PrefixTrainingError(
            "prefix_training.length=null: prefix_search found no prefix to start from. Set a length, or "
            "prefix_training.enabled: false."
        )
    initial_token_ids = resize_rows(found_ids, len(initial))
    trained = train_prefix(
        checkpoint,
        initial,
        train=train,
        validation=validation,
        params=params,
        place=place,
        reference_start_token_id=text_start_token_id,
        text_start_token_id=find_text_start_token(text_start_token_id, initial_token_ids),
    )
    token_ids, similarities = discretise(trained.embeddings, table)
    tensors |= {
        "trained.embeddings": trained.embeddings.to(checkpoint.dtype),
        "trained.initial_token_ids": initial_token_ids,
        "discretised.token_ids": token_ids,
        "discretised.embeddings": checkpoint.scale_embeddings(table[token_ids]),
        "discretised.similarities": similarities,
    }
    decode = checkpoint.tokenizer.decode
    prefixes = {
        "none": (found_ids[:0], found_embeddings[:0]),
        "found": (found_ids, found_embeddings),
        "trained": (initial_token_ids, tensors["trained.embeddings"]),
        "discretised": (token_ids, tensors["discretised.embeddings"]),
    }
    outliers = {}
    for name, (prefix_token_ids, embeddings) in prefixes.items():
        layers = measure_outliers(
            checkpoint,
            prepend_start_token(validation, find_text_start_token(text_start_token_id, prefix_token_ids)),
            runner=place.runner,
            site="down_proj_input",
            threshold=params.outlier_threshold,
            prefix_kv=compute_prefix_kv(checkpoint, embeddings, place.runner),
            ranks=place.ranks,
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


def check_candidates(
    checkpoint: Checkpoint,
    candidates: Candidates,
    *,
    texts: Sequence[torch.Tensor],
    max_kl: float | None,
    place: Place,
    text_start_token_id: int | None = None,
) -> Candidates:
    """Compare the unquantized model with each candidate and without a prefix; return the candidates that pass.

    A discretised prefix that does not pass is left out, because it is only a by-product of the trained one.

    Args:
        checkpoint: the original model.
        texts: windows [N, T] of content. The first ones that are longer than any sliding window, when joined, are read,
            and otherwise the longest.
        max_kl: highest divergence in nats per token; None: only measure.
        text_start_token_id: the start token before every text, or None.

    Raises:
        PrefixGateError: the found or the trained prefix does not pass.
    """
    tensors = candidates.tensors
    names = [name for name in ("found", "trained", "discretised") if len(tensors.get(f"{name}.embeddings", ()))]
    if not names:
        return candidates
    readers = []
    for name in names:
        embeddings = tensors[f"{name}.embeddings"]
        no_tokens = torch.zeros(0, dtype=torch.int64)
        token_ids = tensors.get(f"{name}.token_ids", tensors.get(f"{name}.initial_token_ids", no_tokens))
        readers.append(Reader(embeddings, token_ids))
    windows = choose_harm_windows(checkpoint, texts, max(len(reader.embeddings) for reader in readers))
    if windows.shape[1] <= (checkpoint.widest_window or 0):
        logger.warning(
            "prefix_training: the text of calibration.train and calibration.validation is not longer than "
            "sliding_window=%d, so the gate does not read where the prefix has left",
            checkpoint.widest_window,
        )
    harms = measure_harm(
        checkpoint,
        readers,
        windows,
        runner=place.runner,
        ranks=place.ranks,
        text_start_token_id=text_start_token_id,
    )
    dropped = None
    for name, harm in zip(names, harms, strict=True):
        if max_kl is not None and not harm.worst <= max_kl:
            message = _describe_harm(name, harm, max_kl, windows)
            if name != "discretised":
                raise PrefixGateError(message)
            logger.warning("%s It is left out.", message)
            dropped = f"{name}."
    report = candidates.report | {"gate": {name: harm.row() for name, harm in zip(names, harms, strict=True)}}
    passed = {name: tensor for name, tensor in tensors.items() if dropped is None or not name.startswith(dropped)}
    return Candidates(passed, candidates.trained, report)


def _describe_harm(name: str, harm: Harm, max_kl: float, windows: torch.Tensor) -> str:
    after = ""
    if harm.after_leaving is not None:
        after = f", {harm.after_leaving:.3g} where it has left the sliding window"
    remedies = {
        "found": "Set prefix_search.choose: benefit, which never chooses such a prefix, or raise the bound",
        "trained": "Raise prefix_training.weights.kl, lower prefix_training.learning_rate, or raise the bound",
        "discretised": "Use the trained prefix instead",
    }
    return (
        f"prefix_training.max_kl={max_kl:g}: the {name} prefix changes the unquantized model by {harm.mean:.3g} nats "
        f"per token{after} (KL divergence on {len(windows)} windows of {windows.shape[1]} tokens). {remedies[name]}."
    )


def write_candidates(folder: Path, candidates: Candidates, header: Header) -> None:
    """Replace `folder` by prefix.safetensors, report.json and losses.json (a row per epoch; no row if disabled)."""
    history = candidates.report.get("history", [])
    with replacing_folder(folder) as partial:
        save_tensors(partial / PREFIX, candidates.tensors, header)
        write_json(partial / "report.json", candidates.report)
        write_rows(partial / LOSSES, history)


def initial_embeddings(
    found_embeddings: torch.Tensor, table: torch.Tensor, length: int | None, seed: int
) -> torch.Tensor:
    """Return the embeddings that training starts from, [P, D] float32.

    Args:
        found_embeddings: [P0, D], cut or repeated to `length` (None: P0). If P0 is 0, rows are drawn at random at the
            scale of the embedding table.
        table: the embedding table [V, D].
        seed: seed of the random rows.
    """
    length = len(found_embeddings) if length is None else length
    if len(found_embeddings):
        return resize_rows(found_embeddings, length).float().clone()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, table.shape[1], generator=generator) * table.float().std()


def discretise(embeddings: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vocabulary's nearest tokens by cosine similarity, ids [P] int64, and the similarities [P]."""
    normed = nn.functional.normalize(embeddings.float(), dim=-1)
    similarity = normed @ nn.functional.normalize(table.float(), dim=-1).T
    best = similarity.max(dim=-1)
    return best.indices, best.values


@dataclass
class PrefixData:
    """Windows that a prefix is trained or validated on.

    Attributes:
        inputs: [N, T] int64, this rank's windows, as they are read after the prefix.
        reference: [N, T, D], final hidden states of their content in the original model without a prefix; None if no
            term of the loss needs them.
        count: the windows of all ranks.
    """

    inputs: torch.Tensor
    reference: torch.Tensor | None
    count: int


class PrefixTrainer(Trainer[PrefixData]):
    """Trains the embeddings of a prefix [P, D]; a loss that is not finite ends training."""

    bar = "prefix"
    failure_limit = 1
    needs_finite_validation = True
    foreach = None  # torch's default: there is one parameter, and on a GPU the last bit depends on the choice

    def __init__(
        self, model: FrozenModel, embeddings: torch.Tensor, params: PrefixTrainingParams, place: Place
    ) -> None:
        """Start from `embeddings`, or from the state of an unfinished run with the same header."""
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
        self.resume_(place.work_folder / _STATE, place.header)

    def learning_rate(self, highest: float, step_index: int, step_count: int) -> float:
        return highest * cosine(step_index, step_count)

    def draw_order(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(count, generator=generator)

    def batch_loss(self, data: PrefixData, rows: Rows, count: int) -> torch.Tensor:
        """Return the loss of this rank's windows `rows`, weighted by their part of a batch of `count` windows, []."""
        token_ids = data.inputs[rows]
        reference = None if data.reference is None else data.reference[rows]
        terms = self.model.losses(self.prefix, token_ids, reference)
        return self.model.weigh(terms) * (len(token_ids) / count)

    def evaluate(self, data: PrefixData) -> dict[str, float]:
        """Return means over the windows of all ranks: "validation", the weighted sum, and every term."""
        return self.model.evaluate(self.prefix, data.inputs, data.reference, self.ranks)


def train_prefix(
    checkpoint: Checkpoint,
    embeddings: torch.Tensor,
    *,
    train: torch.Tensor,
    validation: torch.Tensor,
    params: PrefixTrainingParams,
    place: Place,
    reference_start_token_id: int | None = None,
    text_start_token_id: int | None = None,
) -> TrainedPrefix:
    """Train a prefix. A killed run with the same header continues after the step that was saved last.

    Args:
        checkpoint: the original model.
        embeddings: [P, D] to start from.
        train: windows [N, T], content alone.
        validation: windows [M, T], content alone.
        place: the caller removes its work folder at the end.
        reference_start_token_id: the start token before every text where the model reads no prefix, or None.
        text_start_token_id: the start token between the trained prefix and every text, or None.
    """
    model = FrozenModel(checkpoint, place.runner, params, place.keeping, place.offload)

    def prepare(windows: torch.Tensor) -> PrefixData:
        rank_windows = windows[place.ranks.slice_windows(len(windows))]
        reference = model.run_original(rank_windows, reference_start_token_id)
        return PrefixData(prepend_start_token(rank_windows, text_start_token_id), reference, len(windows))

    train_data, validation_data = prepare(train), prepare(validation)
    trainer = PrefixTrainer(model, embeddings, params, place)
    outcome = trainer.train_(train_data, validation_data, params.seed)
    epochs, stopped = len(outcome.history) - 1, outcome.failure
    if stopped is None and epochs - outcome.best_epoch >= params.early_stop:
        stopped = f"no lower validation loss for {params.early_stop} epochs"
    if stopped:
        logger.warning("prefix training stopped: %s; keeping epoch %d", stopped, outcome.best_epoch)
    return TrainedPrefix(
        embeddings=trainer.prefix.detach().cpu(),
        best_epoch=outcome.best_epoch,
        epochs=epochs,
        stopped=stopped,
        history=outcome.history,
    )


def cosine(step_index: int, step_count: int) -> float:
    """Return the factor of the learning rate: 1 at the first step, falling along a cosine to 0 at `step_count`."""
    return 0.5 * (1 + math.cos(math.pi * step_index / step_count))
