"""The lm-eval tasks of a run. They are loaded with their data before any other work."""

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

import pipeline.evaluation.packaged_tasks  # noqa: F401  (tasks/*.yaml call it)
from pipeline.evaluation.params import EvaluationParams, TaskParams
from pipeline.runtime.errors import PipelineError, reading
from pipeline.runtime.sources import as_path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("tasks")
PACKAGED = {path.stem for path in FOLDER.glob("*.yaml")}


class TaskError(PipelineError):
    """A task is unknown, or its data cannot be loaded; the message names the task."""


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data can be loaded.

    Attributes:
        asked: task -> its params.
        manager: lm-eval's manager, which finds them.
        skipped: tasks that cannot be loaded.
    """

    asked: dict[str, TaskParams]
    manager: TaskManager
    skipped: list[str]


def check_tasks(params: EvaluationParams) -> None:
    """Raise TaskError unless all tasks can be loaded with their data, or may be skipped."""
    if params.tasks:
        open_tasks(params.tasks, params.task_folder, params.skip_unavailable)


class _TaskLoader(yaml.SafeLoader):
    """Reads task files, in which lm-eval has tags of its own such as `!function`. Their values are left out."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def find_own_tasks(folder: Path) -> dict[str, list[Path]]:
    """Return the tasks that YAML files in a folder define -> the files, relative to the folder.

    Of several files with one task lm-eval takes the first. Files that it could not read either are left out.
    """
    places: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            task = yaml.load(path.read_text(encoding="utf-8"), _TaskLoader)
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(task, dict) and isinstance(task.get("task"), str) and "group" not in task:
            places.setdefault(task["task"], []).append(path.relative_to(folder))
    return places


def check_task_tokenizer(params: EvaluationParams, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise TaskError if tasks are asked for and the tokenizer lacks the special tokens that lm-eval needs."""
    if params.tasks and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise TaskError(
            "evaluation.tasks: lm-eval needs a start or an end token, and the model's tokenizer has neither. Set "
            "bos_token or eos_token in its tokenizer_config.json, or remove the tasks."
        )


def open_tasks(asked: Mapping[str, TaskParams], folder: str | None = None, skip_unavailable: bool = False) -> Tasks:
    """Load every task with its data, which the library datasets caches, so that missing data is noticed first.

    Args:
        asked: name of a task or group of lm-eval, of this project, or of a YAML file in `folder` -> its params.
        folder: folder of YAML files with further tasks, or None.
        skip_unavailable: log tasks that cannot be loaded, and go on without them.

    Raises:
        TaskError: names all tasks that cannot be loaded, and why.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None and not as_path(folder).is_dir():
        raise TaskError(f"evaluation.task_folder={folder!r}: there is no such folder. Use an existing one, or null.")
    paths: list[str | Path] = [str(FOLDER), *([str(as_path(folder))] if folder else [])]
    with reading(lambda why: TaskError(f"evaluation.task_folder={folder!r}: cannot be read ({why}). Repair it.")):
        manager = TaskManager(include_path=paths, include_defaults=False)
        if not asked.keys() <= set(manager.all_subtasks):  # reading lm-eval's 14,000 files takes seconds
            manager = TaskManager(include_path=paths)
    problems = {}
    places = find_own_tasks(as_path(folder)) if folder else {}
    for name in asked:
        if len(places.get(name, [])) > 1:
            files = " and ".join(str(path) for path in places[name])
            problems[name] = f"{files} in evaluation.task_folder both define it. Rename one."
            continue
        if name in places and name in PACKAGED:
            problems[name] = f"{places[name][0]} in evaluation.task_folder has the name of a packaged task. Rename it."
            continue
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            similar = f" Similar: {', '.join(close)}." if close else ""
            problems[name] = f"neither lm-eval nor this project has such a task.{similar}"
            continue
        try:
            with reading(TaskError):
                manager.load([name])
        except PipelineError as error:
            problems[name] = str(error)
    if problems and not skip_unavailable:
        listed = "\n".join(f"  evaluation.tasks.{name}: {reason}" for name, reason in problems.items())
        raise TaskError(
            f"some tasks cannot be loaded:\n{listed}\nRemove them, or set evaluation.skip_unavailable: true."
        )
    for name, reason in problems.items():
        logger.warning("evaluation.tasks.%s is skipped: %s", name, reason)
    return Tasks({name: params for name, params in asked.items() if name not in problems}, manager, list(problems))
