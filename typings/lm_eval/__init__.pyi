from collections.abc import Mapping, Sequence
from typing import TypedDict

from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

Results = TypedDict(
    "Results", {"results": Mapping[str, Mapping[str, object]], "n-samples": Mapping[str, Mapping[str, int]]}
)

def simple_evaluate(
    model: LM,
    *,
    tasks: Sequence[str],
    num_fewshot: int | None = None,
    limit: float | None = None,
    task_manager: TaskManager | None = None,
    bootstrap_iters: int = 100000,
    log_samples: bool = True,
) -> Results | None: ...
