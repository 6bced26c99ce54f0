"""The training loop: AdamW, clipped gradients, the best epoch kept, numerical failures survived, killed runs resumed.

    epoch 0     the validation loss before training
    epoch 1 …   for each batch of windows: gradients, clipping, a step of AdamW; then the validation loss
                (`validate_every` splits epochs into rounds of this many steps, with a validation after each)
    at the end  the parameters of the epoch with the lowest validation loss are restored

A subclass defines the loss of a window. The loss of a batch is the mean over its windows. Each rank computes the
windows that it holds, and gradients are summed over ranks.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from pipeline.blocks.walk import batches
from pipeline.runtime.artifacts import Header
from pipeline.runtime.progress import note_progress, show_progress
from pipeline.runtime.ranks import Ranks, shuffle
from pipeline.training.state import TrainingState

logger = logging.getLogger(__name__)

_KEEP_EVERY = 8  # steps between two saved states of an epoch

Rows = torch.Tensor | slice  # numbers of windows among those of this rank


class Schedule(Protocol):
    """The keys of params.yaml that every training run has; without `enabled` the start is measured and kept."""

    @property
    def enabled(self) -> bool: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def clip_grad(self) -> float: ...
    @property
    def early_stop(self) -> int: ...


class Windows(Protocol):
    """Windows to train on or to validate on: `inputs`, the ones of this rank, and their `count` on all ranks."""

    inputs: Any
    count: int


Data = TypeVar("Data", bound=Windows)


@dataclass
class Outcome:
    """The result of a training run.

    Attributes:
        history: {"epoch", "train", "validation", …} of each epoch; epoch 0 is the start.
        best_epoch: the epoch whose parameters were restored.
        failure: why training ended early in a numerical failure, or None.
    """

    history: list[dict[str, Any]]
    best_epoch: int
    failure: str | None


def decay_along_cosine(highest: float, progress: float, min_lr_factor: float) -> float:
    """Return the learning rate at `progress`: `highest` at 0, along half a cosine to highest / min_lr_factor at 1."""
    lowest = highest / min_lr_factor
    return lowest + 0.5 * (highest - lowest) * (1 + math.cos(math.pi * progress))


def autocast(device: torch.device, kind: str) -> torch.autocast:
    """Return the autocast of `finetuning.autocast`.

    Args:
        kind: bfloat16 (products in bfloat16; weights and scales keep their dtype) | none (all in the model's dtype) |
            auto (bfloat16 on a GPU, none on a CPU).
    """
    narrow = kind == "bfloat16" or (kind == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=narrow)


class Trainer(Generic[Data]):
    """Trains groups of parameters, each with its own learning rate; a rate of 0 freezes a group.

    Subclasses define `learning_rate` and `losses`, or where windows have no loss of their own, `batch_loss` and
    `evaluate`.

    Attributes:
        bar: title of the progress bar over the batches of an epoch. None: no bar; a bar over blocks shows the loss.
        failure_limit: how many failed steps in a row end training. A step fails where the loss or a gradient is not
            finite.
        needs_finite_validation: whether a validation loss that is not finite ends training.
        validate_every: steps between two validations; None: there is one after each epoch.
        keeps_step_losses: whether the history keeps the loss of each step, as "step_losses" of its epoch.
        foreach: argument of torch's AdamW. False updates one parameter at a time; True would take temporaries as
            large as all parameters together.
    """

    bar: str | None = None
    failure_limit: int = 3
    needs_finite_validation: bool = False
    keeps_step_losses: bool = False
    validate_every: int | None = None
    foreach: bool | None = False

    def __init__(
        self,
        groups: Iterable[tuple[list[nn.Parameter], float]],
        *,
        schedule: Schedule,
        weight_decay: float,
        device: torch.device,
        autocast: str,
        ranks: Ranks,
    ) -> None:
        """Set up AdamW for the groups whose learning rate is above 0.

        Args:
            groups: (parameters, learning rate at the start).
            schedule: epochs, batch size, clipping and early stop.
            device: device of the parameters.
            autocast: auto | none | bfloat16, as in params.yaml.
        """
        self.schedule, self.device, self.autocast, self.ranks = schedule, device, autocast, ranks
        self.parameters: list[nn.Parameter] = []
        trained_groups: list[dict[str, Any]] = []
        for parameters, rate in groups:
            for parameter in parameters:
                parameter.requires_grad_(rate > 0)
            if parameters and rate > 0:
                trained_groups.append({"params": parameters, "lr": rate, "highest": rate})
                self.parameters += parameters
        self.optimizer: torch.optim.AdamW | None = None
        if trained_groups:
            self.optimizer = torch.optim.AdamW(trained_groups, weight_decay=weight_decay, foreach=self.foreach)
        self.state = TrainingState(self.parameters, self.optimizer)
        self._state_file: tuple[Path, Header] | None = None

    def learning_rate(self, highest: float, step_index: int, step_count: int) -> float:
        """Return the rate of a step, for a group whose rate at the start is `highest`."""
        raise NotImplementedError

    def losses(self, data: Data, rows: Rows) -> torch.Tensor:
        """Return the loss of each of this rank's windows `rows`, [B]."""
        raise NotImplementedError

    def batch_loss(self, data: Data, rows: Rows, count: int) -> torch.Tensor:
        """Return the part of the loss of a batch of `count` windows that this rank's windows `rows` add, []."""
        return self.losses(data, rows).sum() / count

    def draw_order(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return the order in which an epoch visits `count` windows, [count] int64."""
        return shuffle(count, generator)

    def resume_(self, path: Path, header: Header) -> None:
        """Save the state to `path` (.safetensors) from now on; continue the run with the same header that is there."""
        self._state_file = path, header
        if self.state.load_(path, header, self.ranks):
            epoch, steps = len(self.state.history), len(self.state.losses)
            logger.info("%s: continuing epoch %d after step %d", self.bar, epoch, steps)

    def _save_state(self) -> None:
        if self._state_file is not None:
            path, header = self._state_file
            self.state.save(path, header, self.ranks)

    def train_(self, train: Data, validation: Data, seed: int) -> Outcome:
        """Train, and restore the parameters of the best epoch.

        Args:
            train: windows to train on.
            validation: windows whose loss chooses the epoch.
            seed: seed of the order of the windows.

        Raises:
            TrainingError: the validation loss before training is not finite.
        """
        state, failure = self.state, None
        epochs = self.schedule.epochs if self.schedule.enabled and self.parameters else 0
        rounds = self._split_epochs(train.count, epochs)
        if not state.history:
            state.end_epoch({"epoch": 0, "train": None, **self.evaluate(validation)})
            self._save_state()
        for number in range(len(state.history), len(rounds) + 1):
            if number - state.best_epoch > self.schedule.early_stop:
                break
            epoch, steps = rounds[number - 1]
            train_loss = self._train_round(train, seed, epoch, steps)
            if state.failures >= self.failure_limit:
                failure = self._describe_failure(epoch)
                break
            measured = self.evaluate(validation)
            if self.needs_finite_validation and not math.isfinite(measured["validation"]):
                failure = f"the validation loss was not finite after epoch {epoch}"
                break
            row = {"epoch": epoch, "train": train_loss, **measured}
            if self.validate_every is not None:
                parts = self._count_steps(train.count)
                row["epoch"] = epoch - 1 + steps.stop / parts
                row["step"] = (epoch - 1) * parts + steps.stop
            state.end_epoch(row | ({"step_losses": list(state.losses)} if self.keeps_step_losses else {}))
            self._save_state()
        state.restore_best_()
        return Outcome(state.history, state.best_epoch, failure)

    def _count_steps(self, count: int) -> int:
        """Return the steps of an epoch over `count` windows."""
        return math.ceil(count / self.schedule.batch_size)

    def _split_epochs(self, count: int, epochs: int) -> list[tuple[int, range]]:
        """Return (epoch from 1, steps in it) of each round: 7 steps, a validation every 3 -> 0..2, 3..5, 6."""
        steps = self._count_steps(count)
        every = self.validate_every or steps
        starts = range(0, steps, every)
        return [(epoch, range(start, min(start + every, steps))) for epoch in range(1, epochs + 1) for start in starts]

    def _describe_failure(self, epoch: int) -> str:
        if self.failure_limit == 1:
            return f"the loss was not finite in epoch {epoch}, step {len(self.state.losses) - 1}"
        return f"{self.failure_limit} steps in a row without a finite loss and gradient, epoch {epoch}"

    def _train_round(self, train: Data, seed: int, epoch: int, steps: range) -> float | None:
        """Take the `steps` of an epoch, or the ones that are left of them; return the mean loss of the finite ones."""
        order = self.draw_order(train.count, torch.Generator().manual_seed(seed * 1000 + epoch))
        parts = list(batches(train.count, self.schedule.batch_size))
        losses = self.state.losses
        left = parts[steps.start + len(losses) : steps.stop]
        title = f"{self.bar}, epoch {epoch}/{self.schedule.epochs}"
        for rows in show_progress(left, len(left), title, "step") if self.bar else left:
            step_index = (epoch - 1) * len(parts) + steps.start + len(losses)
            step_count = self.schedule.epochs * len(parts)
            losses.append(self.step(train, order[rows], step_index, step_count))
            note_progress(epoch=epoch, loss=losses[-1], validation=self.state.history[-1]["validation"])
            if self.state.failures >= self.failure_limit:
                break
            if len(losses) % _KEEP_EVERY == 0 and len(losses) < len(steps):
                self._save_state()
        finite = [loss for loss in losses if loss is not None]
        return sum(finite) / len(finite) if finite else None

    def step(self, data: Data, windows: torch.Tensor, step_index: int, step_count: int) -> float | None:
        """Update the parameters once and return the loss of the batch.

        Where the loss or a gradient is not finite, nothing moves, all rates are halved, and None is returned.

        Args:
            windows: [B] int64, numbers of windows among all `data.count`.
            step_index: index of this step, from 0.
            step_count: the steps of all epochs.
        """
        assert self.optimizer is not None, "a run without parameters takes no step"
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(group["highest"], step_index, step_count)
        loss = self.differentiate(data, windows)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip_grad)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.state.failures += 1
            for group in self.optimizer.param_groups:
                group["highest"] /= 2
            return None
        self.state.failures = 0
        self.optimizer.step()
        return loss

    def differentiate(self, data: Data, windows: torch.Tensor) -> float:
        """Return the loss of a batch, the mean over its windows on all ranks; leave its gradients in the parameters."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        rank_windows = self.ranks.locate(windows)
        total = torch.zeros((), device=self.device)
        if len(rank_windows):
            with autocast(self.device, self.autocast):
                loss = self.batch_loss(data, rank_windows, len(windows))
            loss.backward()
            total += loss.detach()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.ranks.sum_(total, *gradients)
        return total.item()

    @torch.no_grad()
    def evaluate(self, data: Data) -> dict[str, float]:
        """Return {"validation": the mean loss over the windows of all ranks}."""
        total = torch.zeros((), dtype=torch.float64)
        for rows in batches(len(data.inputs), self.schedule.batch_size):
            with autocast(self.device, self.autocast):
                total += self.losses(data, rows).double().sum().cpu()
        self.ranks.sum_(total)
        return {"validation": total.item() / data.count}
