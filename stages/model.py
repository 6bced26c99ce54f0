"""Import the model: a hub id, a local folder, a GGUF file or the packaged one, as a plain checkpoint folder.

Reads   the source in model.source
Writes  artifacts/model/, metrics/model.json
First checks that the data of all evaluation tasks is available, and last that transformers reads the same model.
Packaged model: about 25 seconds and 0.65 GiB.
"""

import functools
from pathlib import Path

import torch

from pipeline.evaluation.task_data import check_task_tokenizer, check_tasks
from pipeline.importing.import_model import import_model
from pipeline.inspection.import_gate import check_import
from pipeline.params import check_against_model
from pipeline.runtime.memory import memory_limit
from stages.opening import Run, open_stage

MODEL = Path("artifacts/model")


def main(run: Run) -> None:
    model = run.params.model
    check_tasks(run.params.evaluation)  # before hours of work
    metrics = import_model(
        model.source,
        model.revision,
        getattr(torch, model.dtype),
        MODEL,
        check_plan=functools.partial(check_against_model, run.params),
        check_tokenizer=functools.partial(check_task_tokenizer, run.params.evaluation),
        check_result=functools.partial(check_import, limit=memory_limit(run.params.runtime)),
    )
    run.metrics.update(metrics)


if __name__ == "__main__":
    open_stage("model", main, __doc__)
