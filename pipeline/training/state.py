"""Where a training run stands, on disk from time to time: parameters, AdamW's moments, the best so far, the history.

A killed run continues behind the step that was kept last and ends with the same bytes.
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
    """There is nothing to train from."""


class TrainingState:
    """Parameters under training, and what of their past is needed.

    Attributes:
        history: a row per epoch, from epoch 0, the start, on; each has at least "validation". What is not finite, which
            JSON cannot say, is None.
        best, best_epoch: the parameters' values where that was least, and when.
        losses: of the steps of the epoch that is under way, None where one failed.
        failures: how many steps failed last, one after the other.
    """

    def __init__(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
        self.parameters, self.optimizer = parameters, optimizer
        self.history: list[dict[str, Any]] = []
        self.best: list[torch.Tensor] = []
        self.best_epoch = 0
        self.losses: list[float | None] = []
        self.failures = 0

    def add(self, row: dict[str, Any]) -> None:
        """End an epoch; its values are kept if none before did better on validation windows.

        Raises:
            TrainingError: there is no loss to begin with.
        """
        row = {name: value if math.isfinite(value or 0) else None for name, value in row.items()}
        if not self.history and row["validation"] is None:
            raise TrainingError("the loss before training is not finite; the quantized model, or its prefix, is broken")
        best = self.history[self.best_epoch]["validation"] if self.history else None
        self.history.append(row)
        self.losses = []
        if row["validation"] is not None and (best is None or row["validation"] < best):
            self.best = [parameter.detach().clone() for parameter in self.parameters]
            self.best_epoch = len(self.history) - 1

    @torch.no_grad()
    def restore_best_(self) -> None:
        for parameter, value in zip(self.parameters, self.best, strict=True):
            parameter.copy_(value)

    def save(self, path: Path, header: Header, ranks: Ranks) -> None:
        """Write `path` (.safetensors) and its history beside it; the first rank does."""
        if not ranks.first:
            return
        groups = self.optimizer.param_groups if self.optimizer else []
        tensors = {
            "epochs": torch.tensor(len(self.history)),
            "best_epoch": torch.tensor(self.best_epoch),
            "failures": torch.tensor(self.failures),
            "ranks": torch.tensor(ranks.world),
            "highest": torch.tensor([group["highest"] for group in groups], dtype=torch.float64),
            "losses": torch.tensor([math.nan if loss is None else loss for loss in self.losses], dtype=torch.float64),
        }
        for number, parameter in enumerate(self.parameters):
            tensors[f"now.{number}"], tensors[f"best.{number}"] = parameter.detach(), self.best[number]
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{number}.{name}"] = value
        # The history first: the state says how much of it counts.
        write_json(path.with_suffix(".json"), self.history)
        save_tensors(path, tensors, header)

    @torch.no_grad()
    def load_(self, path: Path, header: Header, ranks: Ranks) -> bool:
        """Continue an unfinished run of the same header and as many processes, if there is one."""
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
        groups = self.optimizer.param_groups if self.optimizer else []
        for group, highest in zip(groups, saved["highest"].tolist(), strict=True):
            group["highest"] = highest
        self.best = [saved[f"best.{number}"].to(p.device) for number, p in enumerate(self.parameters)]
        for number, parameter in enumerate(self.parameters):
            parameter.copy_(saved[f"now.{number}"])
            prefix = f"adam.{number}."
            adam = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
            if adam:
                self.optimizer.state[parameter] = {
                    name: value if name == "step" else value.to(parameter.device) for name, value in adam.items()
                }
        return True
