"""The group `evaluation` of params.yaml."""

from typing import Annotated

from pydantic import Field

from pipeline.runtime.params import Group


class TaskParams(Group):
    """How one lm-eval task is asked; null: as the task says, and all of its items."""

    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class EvaluationParams(Group):
    compare_with_original: bool
    tasks: dict[str, TaskParams]
    task_folder: str | None
    skip_unavailable: bool
