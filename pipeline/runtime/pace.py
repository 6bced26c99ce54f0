"""The time that is left for a run, estimated from the stages that are done.

Stages differ in length by a factor of a thousand, and their length depends on the machine, the model and the
settings. So the seconds of finished stages, which are in metrics/runtime/, are compared with those of the packaged
model, and the rest of the run is taken to be slower or faster by the same factor.
"""

import json
from collections.abc import Sequence
from pathlib import Path

# Seconds of the default run on two CPU cores, from its metrics/runtime/.
_TYPICAL = {
    "model": 12,
    "corpora": 8,
    "calibration": 8,
    "rotation": 7,
    "prefix_search": 79,
    "prefix_training": 1,
    "quantizer_init": 206,
    "finetuning": 540,
    "export": 1,
    "evaluation": 70,
    "activation_plots": 22,
    "report": 8,
}
_ENOUGH = 0.03  # of the whole run: less says nothing about the rest


def estimate_run(stages: Sequence[str], name: str, costs: Path) -> float | None:
    """Return the seconds that the stages after `name` will take, or None where too little of the run is done.

    Args:
        stages: names of all stages, in order.
        name: the running stage.
        costs: the folder of files with the stages' cost.
    """
    if name not in stages:
        return None
    place = stages.index(name)
    done = {stage: seconds for stage in stages[:place] if (seconds := _read_seconds(stage, costs)) is not None}
    typical = sum(map(_get_typical, done))
    if typical < _ENOUGH * sum(map(_get_typical, stages)):
        return None
    return sum(done.values()) / typical * sum(map(_get_typical, stages[place + 1 :]))


def format_duration(seconds: float) -> str:
    """Return a duration as 0:07, 12:05 or 1:02:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _get_typical(stage: str) -> float:
    return _TYPICAL.get(stage.partition("@")[0], 0)


def _read_seconds(stage: str, costs: Path) -> float | None:
    path = costs / f"{stage.replace('@', '/')}.json"
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
