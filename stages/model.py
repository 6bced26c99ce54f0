"""Import the model: a hub id, a local folder, a GGUF file or the packaged one, as a plain checkpoint folder.

Reads   what model.source names
Writes  artifacts/model/, metrics/model.json
Sees first that the data of all evaluation tasks can be had.
Packaged model: about 35 seconds (most of it spent converting the GGUF file) and 2 GiB.
"""

import functools
from pathlib import Path

import torch

from pipeline.model_import import import_model
from pipeline.params import check_against_model, load_params
from pipeline.progress import run_main, run_stage
from pipeline.task_data import check_tasks

PARAMS = Path("params.yaml")
MODEL = Path("artifacts/model")
METRICS = Path("metrics/model.json")


def main() -> None:
    params = load_params(PARAMS)
    check_tasks(params)  # before hours of work, not behind them
    with run_stage("model", METRICS, params.runtime) as metrics:
        metrics |= import_model(
            params.model.source,
            params.model.revision,
            getattr(torch, params.model.dtype),
            MODEL,
            check_plan=functools.partial(check_against_model, params),
        )


if __name__ == "__main__":
    run_main(main)
