"""Train prefix embeddings, or pass the found prefix on: every candidate prefix in one file.

Reads   artifacts/model/, artifacts/prefix_search/prefix.safetensors, artifacts/calibration/ (train and validation)
Writes  artifacts/prefix_training/prefix.safetensors, report.json and losses.json, metrics/prefix_training.json
After each epoch the state is kept in .work/prefix_training/: a killed run continues behind its last epoch.
Packaged model: a second when disabled; when enabled about six plain forwards of the tokens trained on, 2.9 GiB.
"""

import shutil
from pathlib import Path

import torch

from pipeline.artifacts import load_tensors, make_header
from pipeline.checkpoint import Checkpoint
from pipeline.memory import Need, own_tokens, plan_prefix_training
from pipeline.params import Params, load_params
from pipeline.place import Place
from pipeline.prefix_training import make_candidates, write_candidates
from pipeline.progress import return_freed_memory, run_main, run_stage, select_device
from pipeline.streams import Offload
from pipeline.walk import BlockRunner
from pipeline.windows import Windows, load_windows
from stages.arguments import parse_arguments
from stages.launcher import join_ranks, start_ranks

PARAMS = Path("params.yaml")
MODEL = Path("artifacts/model")
FOUND = Path("artifacts/prefix_search/prefix.safetensors")
CALIBRATION = Path("artifacts/calibration")
WORK = Path(".work/prefix_training")
PREFIX_TRAINING = Path("artifacts/prefix_training")
METRICS = Path("metrics/prefix_training.json")


def main() -> None:
    plan_only = parse_arguments(__doc__).plan
    params = load_params(PARAMS)
    training = params.prefix_training
    if plan_only:
        print(prepare(params, select_device(params.runtime))[-1].describe())
        return
    if training.enabled and start_ranks(params.runtime.processes):
        return
    return_freed_memory()
    with (
        join_ranks(params.runtime) as (ranks, device),
        run_stage("prefix_training", METRICS, params.runtime) as metrics,
    ):
        checkpoint, train, validation, need = prepare(params, device)
        found, found_header = load_tensors(FOUND, "prefix_search")
        inputs = {"model": checkpoint.header, "prefix_search": found_header}
        if training.enabled:
            inputs |= {"train": train.header, "validation": validation.header}
        settings = training.model_dump() if training.enabled else {"enabled": False}
        header = make_header("prefix_training", settings, inputs)
        runner = BlockRunner(checkpoint, device, params.runtime.batch_size)
        place = Place(runner, Offload(None), WORK, header, ranks, need.recompute)
        candidates = make_candidates(checkpoint, found, train.token_ids, validation.token_ids, training, place)
        if ranks.first:
            write_candidates(PREFIX_TRAINING, candidates, header)
            shutil.rmtree(WORK, ignore_errors=True)
        metrics |= candidates.summary()


def prepare(params: Params, device: torch.device) -> tuple[Checkpoint, Windows, Windows, Need]:
    """The model, the windows to train on and to validate on, and what the run will take."""
    checkpoint = Checkpoint(MODEL, "model")
    train, validation = (load_windows(CALIBRATION / f"{name}.safetensors") for name in ("train", "validation"))
    count, length = train.token_ids.shape
    tokens = own_tokens(count + len(validation.token_ids), length, params.runtime.processes)
    on_gpu = device.type == "cuda"
    need = plan_prefix_training(checkpoint, tokens, length, params.prefix_training, params.runtime, on_gpu)
    return checkpoint, train, validation, need


if __name__ == "__main__":
    run_main(main)
