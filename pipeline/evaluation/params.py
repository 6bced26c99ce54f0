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

    compare_with_original: bool = True
    tasks: dict[str, TaskParams] = Field(
        default_factory=lambda: {
            "word_analogies": TaskParams(limit=64),
            "last_word_wikipedia": TaskParams(limit=48),
        }
    )
    task_folder: str | None = None
    skip_unavailable: bool = False
