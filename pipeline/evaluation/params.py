"""The group `evaluation` of params.yaml."""

from typing import Annotated

from pydantic import Field

from pipeline.runtime.params import Group


class TaskParams(Group):
    """Settings of one lm-eval task; null keeps the task's own number of examples, and asks all of its items."""

    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class EvaluationParams(Group):
    """The comparison with the original model, and the lm-eval tasks."""

    compare_with_original: bool
    tasks: dict[str, TaskParams]
    task_folder: str | None
    skip_unavailable: bool
