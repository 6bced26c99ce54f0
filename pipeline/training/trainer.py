"""The training loop of fine-tuning: AdamW along a cosine, clipped, the best epoch kept, numerical failures survived.

Whoever trains says what the loss of a window is. A batch's loss is the mean over its windows, wherever they are: each
rank takes those of its own, and gradients are summed.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.blocks.walk import batches
from pipeline.runtime.progress import note_progress, show_progress
from pipeline.runtime.ranks import Ranks, shuffle
from pipeline.training.state import TrainingState

_FAILURES = 3  # steps without a finite loss and gradient, one after the other, that end training
_KEEP_EVERY = 8  # steps


class Schedule(Protocol):
    """The params a training run has, as in params.yaml; it runs no epoch unless `enabled`."""

    enabled: bool
    epochs: int
    batch_size: int
    min_lr_factor: float
    clip_grad: float
    early_stop: int


class Windows(Protocol):
    """Some windows: `inputs`, those of this rank, and `count` of all ranks."""

    inputs: Any
    count: int


@dataclass
class Outcome:
    """What training came to.

    Attributes:
        history: {"epoch", "train", "validation"} from epoch 0, the start, on.
        best_epoch: whose state everything is left in.
        failure: why training was given up, or None.
    """

    history: list[dict[str, Any]]
    best_epoch: int
    failure: str | None


def learning_rate(progress: float, highest: float, min_lr_factor: float) -> float:
    """`highest` at 0, along half a cosine to highest / min_lr_factor at 1."""
    lowest = highest / min_lr_factor
    return lowest + 0.5 * (highest - lowest) * (1 + math.cos(math.pi * progress))


def autocast(device: torch.device, kind: str) -> torch.autocast:
    """Products in bfloat16, weights and scales staying as they are; "none": in the model's dtype; "auto": on a GPU."""
    narrow = kind == "bfloat16" or (kind == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=narrow)


class Trainer:
    """Trains groups of parameters, each with a learning rate; 0 freezes a group.

    Subclasses say what `losses` are.

    Attributes:
        bar: what a bar over the batches of an epoch is called; None: there is none, a bar over blocks shows the loss.
    """

    bar: str | None = None

    def __init__(
        self,
        groups: list[tuple[list[nn.Parameter], float]],
        schedule: Schedule,
        weight_decay: float,
        device: torch.device,
        autocast: str,
        ranks: Ranks,
    ) -> None:
        """`autocast`: the kind of it, as in params.yaml."""
        self.schedule, self.device, self.autocast, self.ranks = schedule, device, autocast, ranks
        self.parameters: list[nn.Parameter] = []
        used = []
        for group, rate in groups:
            for parameter in group:
                parameter.requires_grad_(rate > 0)
            if group and rate > 0:
                used.append({"params": group, "lr": rate, "highest": rate})
                self.parameters += group
        # One parameter after the other: all at once would take temporaries of the size of all of them.
        self.optimizer = torch.optim.AdamW(used, weight_decay=weight_decay, foreach=False) if used else None
        self.state = TrainingState(self.parameters, self.optimizer)

    def losses(self, data: Windows, rows: Any) -> torch.Tensor:
        """Of each of this rank's windows `rows`, [B]."""
        raise NotImplementedError

    def keep(self) -> None:
        """Called behind each epoch, 0 included, and every few steps: keeps the state on disk, where it is kept."""

    def train_(self, train: Windows, validation: Windows, seed: int) -> Outcome:
        """Train, and leave the parameters in their best state.

        Args:
            train, validation: windows; the latter choose the epoch.
            seed: of the order of windows.
        """
        state, failure = self.state, None
        epochs = self.schedule.epochs if self.schedule.enabled and self.parameters else 0
        if not state.history:
            state.add({"epoch": 0, "train": None, "validation": self.evaluate(validation)})
            self.keep()
        for epoch in range(len(state.history), epochs + 1):
            if epoch - state.best_epoch > self.schedule.early_stop:
                break
            mean = self._train_epoch(train, seed, epoch)
            if state.failures >= _FAILURES:
                failure = f"{_FAILURES} steps in a row without a finite loss and gradient, epoch {epoch}"
                break
            state.add({"epoch": epoch, "train": mean, "validation": self.evaluate(validation)})
            self.keep()
        state.restore_best_()
        return Outcome(state.history, state.best_epoch, failure)

    def _train_epoch(self, train: Windows, seed: int, epoch: int) -> float | None:
        order = shuffle(train.count, torch.Generator().manual_seed(seed * 1000 + epoch))
        parts = list(batches(train.count, self.schedule.batch_size))
        left, losses = parts[len(self.state.losses) :], self.state.losses
        title = f"{self.bar}, epoch {epoch}/{self.schedule.epochs}"
        for rows in show_progress(left, len(left), title) if self.bar else left:
            progress = ((epoch - 1) * len(parts) + len(losses)) / (self.schedule.epochs * len(parts))
            losses.append(self.step(train, order[rows], progress))
            note_progress(epoch=epoch, loss=losses[-1], validation=self.state.history[-1]["validation"])
            if self.state.failures >= _FAILURES:
                break
            if len(losses) % _KEEP_EVERY == 0 and len(losses) < len(parts):
                self.keep()
        finite = [loss for loss in losses if loss is not None]
        return sum(finite) / len(finite) if finite else None

    def step(self, data: Windows, windows: torch.Tensor, progress: float) -> float | None:
        """One update on a batch; None where loss or gradient were not finite: nothing moved, the rates are halved.

        Args:
            windows: their numbers among all of `data.count`.
            progress: 0 at the first step, 1 behind the last.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progress, group["highest"], self.schedule.min_lr_factor)
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

    def differentiate(self, data: Windows, windows: torch.Tensor) -> float:
        """The loss of a batch, the mean over its windows on all ranks; its gradients are left in the parameters."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        own = self.ranks.locate(windows)
        total = torch.zeros((), device=self.device)
        if len(own):
            with autocast(self.device, self.autocast):
                loss = self.losses(data, own).sum() / len(windows)
            loss.backward()
            total += loss.detach()
        self.ranks.sum_(total, *(parameter.grad for parameter in self.parameters))
        return total.item()

    @torch.no_grad()
    def evaluate(self, data: Windows) -> float:
        """The mean loss over all windows of all ranks."""
        total = torch.zeros((), dtype=torch.float64)
        for rows in batches(len(data.inputs), self.schedule.batch_size):
            with autocast(self.device, self.autocast):
                total += self.losses(data, rows).double().sum().cpu()
        self.ranks.sum_(total)
        return total.item() / data.count
