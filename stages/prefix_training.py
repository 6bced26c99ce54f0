"""Train prefix embeddings, or pass the found prefix on: every candidate prefix in one file.

Reads   artifacts/model/, artifacts/prefix_search/prefix.safetensors, artifacts/calibration/ (train and validation)
Writes  artifacts/prefix_training/prefix.safetensors, report.json and losses.json, metrics/prefix_training.json
The state is saved in .work/prefix_training/ every eighth step: a killed run continues there.
Packaged model: a second when disabled; when enabled about six plain forwards of the tokens trained on, 2.9 GiB.
"""

from pathlib import Path

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.need import Need
from pipeline.planning.prefix_training import plan_prefix_training
from pipeline.prefix.training import make_candidates, write_candidates
from pipeline.runtime.artifacts import load_tensors, make_header
from pipeline.runtime.streams import Offload
from pipeline.text.windows import load_windows
from pipeline.training.place import Keeping, Place
from stages.opening import Run, open_stage

MODEL = Path("artifacts/model")
FOUND = Path("artifacts/prefix_search/prefix.safetensors")
TRAIN = Path("artifacts/calibration/train.safetensors")
VALIDATION = Path("artifacts/calibration/validation.safetensors")
WORK = Path(".work/prefix_training")
PREFIX_TRAINING = Path("artifacts/prefix_training")


def main(run: Run) -> None:
    own = run.params.prefix_training
    checkpoint, train, validation = Checkpoint(MODEL, "model"), load_windows(TRAIN), load_windows(VALIDATION)
    found, found_header = load_tensors(FOUND, "prefix_search")
    inputs = {"model": checkpoint.header, "prefix_search": found_header}
    if own.enabled:
        inputs |= {"train": train.header, "validation": validation.header}
    header = make_header("prefix_training", own.model_dump() if own.enabled else {"enabled": False}, inputs)
    need = plan(run)
    keeping = Keeping(need.recompute, need.stream)
    windows = train.token_ids, validation.token_ids
    with Offload(Path(run.params.runtime.offload_dir) if need.offload else None) as offload:
        place = Place(run.runner(checkpoint), offload, WORK, header, run.ranks, keeping)
        candidates = make_candidates(checkpoint, found, *windows, own, place, train.text_start_token_id)
    if run.ranks.first:
        write_candidates(PREFIX_TRAINING, candidates, header)
    run.metrics.update(candidates.summary())


def plan(run: Run) -> Need:
    workload = run.workload(load_windows(TRAIN).token_ids, load_windows(VALIDATION).token_ids)
    return plan_prefix_training(Checkpoint(MODEL, "model"), workload, run.params.prefix_training, run.params.runtime)


if __name__ == "__main__":
    open_stage("prefix_training", main, __doc__, plan, shared=True, work=WORK)
