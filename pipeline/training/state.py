"""The state of a training run, saved from time to time: parameters, AdamW's moments, the best parameters, the history.

A killed run continues after the step that was saved last, and ends with the same bytes.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.runtime.artifacts import Header, load_unfinished, save_tensors, write_json
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


class TrainingError(PipelineError):
    """Training cannot start."""


def _finite(value: float | None) -> float | None:
    return value if math.isfinite(value or 0) else None


class TrainingState:
    """The parameters under training and everything that a killed run needs to continue.

    Attributes:
        history: a row per epoch, or per round where the trainer validates more often, each with at least "validation";
            row 0 is the start. Values that are not finite, which JSON cannot express, are None.
        best: the parameters' values after `best_epoch`, the epoch with the lowest validation loss.
        losses: losses of the steps of the current epoch; None for a failed step.
        failures: the number of steps that failed in a row, up to the last one.
    """

    def __init__(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
        """`optimizer` is None where there is no parameter."""
        self.parameters, self.optimizer = parameters, optimizer
        self.history: list[dict[str, Any]] = []
        self.best: list[torch.Tensor] = []
        self.best_epoch = 0
        self.losses: list[float | None] = []
        self.failures = 0

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Add a row to the history, and keep the parameters if its validation loss is the lowest so far.

        Raises:
            TrainingError: the first validation loss is not finite.
        """
        row = {name: value if isinstance(value, list) else _finite(value) for name, value in row.items()}
        if not self.history and row["validation"] is None:
            raise TrainingError(
                "the loss before training is not finite: the model to train from, or its prefix, is broken. "
                "Rerun the stage that wrote it."
            )
        lowest = self.history[self.best_epoch]["validation"] if self.history else None
        self.history.append(row)
        self.losses = []
        if row["validation"] is not None and (lowest is None or row["validation"] < lowest):
            self.best = [parameter.detach().clone() for parameter in self.parameters]
            self.best_epoch = len(self.history) - 1

    @torch.no_grad()
    def restore_best_(self) -> None:
        """Set the parameters to the values of the best epoch."""
        for parameter, value in zip(self.parameters, self.best, strict=True):
            parameter.copy_(value)

    def save(self, path: Path, header: Header, ranks: Ranks) -> None:
        """Write the state to `path` (.safetensors) and the history next to it (.json); only the first rank writes."""
        if not ranks.first:
            return
        losses = [math.nan if loss is None else loss for loss in self.losses]
        tensors = {
            "epochs": torch.tensor(len(self.history)),
            "best_epoch": torch.tensor(self.best_epoch),
            "failures": torch.tensor(self.failures),
            "ranks": torch.tensor(ranks.world),
            "highest": torch.tensor([group["highest"] for group in self._groups], dtype=torch.float64),
            "losses": torch.tensor(losses, dtype=torch.float64),
        }
        moments = {} if self.optimizer is None else self.optimizer.state
        for number, parameter in enumerate(self.parameters):
            tensors[f"now.{number}"], tensors[f"best.{number}"] = parameter.detach(), self.best[number]
            for name, value in moments.get(parameter, {}).items():
                tensors[f"adam.{number}.{name}"] = value
        # The history comes first: the state says how many rows of it count.
        write_json(path.with_suffix(".json"), self.history)
        save_tensors(path, tensors, header)

    @torch.no_grad()
    def load_(self, path: Path, header: Header, ranks: Ranks) -> bool:
        """Load the state that an unfinished run with the same header and as many ranks has saved; False if none has."""
        saved = load_unfinished(path, header)
        if saved is not None and int(saved["ranks"]) != ranks.world:
            logger.warning("starting over: the unfinished run in %s had another number of processes", path.parent)
            saved = None
        if saved is None:
            return False
        history = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.history, self.best_epoch = history[: int(saved["epochs"])], int(saved["best_epoch"])
        self.failures = int(saved["failures"])
        self.losses = [None if math.isnan(loss) else loss for loss in saved["losses"].tolist()]
        for group, highest in zip(self._groups, saved["highest"].tolist(), strict=True):
            group["highest"] = highest
        self.best = [saved[f"best.{number}"].to(p.device) for number, p in enumerate(self.parameters)]
        for number, parameter in enumerate(self.parameters):
            parameter.copy_(saved[f"now.{number}"])
            prefix = f"adam.{number}."
            moments = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
            if moments and self.optimizer is not None:
                self.optimizer.state[parameter] = {
                    name: value if name == "step" else value.to(parameter.device) for name, value in moments.items()
                }
        return True
