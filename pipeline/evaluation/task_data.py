"""Which lm-eval tasks are asked, and their data, had before any work begins."""

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

import pipeline.evaluation.packaged_tasks  # noqa: F401  (tasks/*.yaml call it)
from pipeline.evaluation.params import EvaluationParams, TaskParams
from pipeline.runtime.errors import PipelineError, reading
from pipeline.runtime.sources import as_path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("tasks")


class TaskError(PipelineError):
    """A task is not known, or its data cannot be had; the message names it."""


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data is there.

    Attributes:
        asked: name -> how to ask it.
        manager: knows where they are.
        skipped: those that could not be had.
    """

    asked: dict[str, TaskParams]
    manager: TaskManager
    skipped: list[str]


def check_tasks(own: EvaluationParams) -> None:
    """See that the data of all tasks can be had. Raises TaskError."""
    if own.tasks:
        open_tasks(own.tasks, own.task_folder, own.skip_unavailable)


def check_task_tokenizer(params: EvaluationParams, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise TaskError if tasks are asked for and the tokenizer lacks the special tokens that lm-eval needs."""
    if params.tasks and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise TaskError(
            "evaluation.tasks: lm-eval needs a tokenizer with a start or end token, and the model's has neither. Set "
            "bos_token or eos_token in its tokenizer_config.json, or remove the tasks"
        )


def open_tasks(asked: Mapping[str, TaskParams], folder: str | None = None, skip_unavailable: bool = False) -> Tasks:
    """Load every task with its data, which lm-eval keeps, so that what is missing shows before the work begins.

    Args:
        asked: name of a task or group of lm-eval, of ours, or of a YAML file in `folder` -> how to ask it.
        skip_unavailable: go on without the tasks that cannot be had, saying which.

    Raises:
        TaskError: names all tasks that cannot be had, and why.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None and not as_path(folder).is_dir():
        raise TaskError(f"evaluation.task_folder={folder!r}: there is no such folder")
    paths = [str(FOLDER), *([str(as_path(folder))] if folder else [])]
    with reading(lambda why: TaskError(f"evaluation.task_folder={folder!r}: cannot be read ({why})")):
        manager = TaskManager(include_path=paths, include_defaults=False)
        if not asked.keys() <= set(manager.all_subtasks):  # lm-eval's own are 14,000 files to read
            manager = TaskManager(include_path=paths)
    problems = {}
    for name in asked:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            near = f"; near: {', '.join(close)}" if close else ""
            problems[name] = f"is no task of lm-eval or of this project{near}"
            continue
        try:
            with reading(TaskError):
                manager.load([name])
        except PipelineError as error:
            problems[name] = str(error)
    if problems and not skip_unavailable:
        listed = "\n".join(f"  evaluation.tasks.{name}: {reason}" for name, reason in problems.items())
        raise TaskError(f"tasks that cannot be had:\n{listed}\nremove them, or set evaluation.skip_unavailable: true")
    for name, reason in problems.items():
        logger.warning("going on without task %s: %s", name, reason)
    return Tasks({name: own for name, own in asked.items() if name not in problems}, manager, list(problems))
