"""Train prefix embeddings if enabled, and write every candidate prefix to one file; the found prefix is one of them.

Reads   artifacts/model/, artifacts/prefix_search/prefix.safetensors, artifacts/calibration/ (train and validation)
Writes  artifacts/prefix_training/prefix.safetensors, report.json and losses.json, metrics/prefix_training.json
Every eighth step the state is saved in .work/prefix_training/, so a killed run continues.
Last, the gate compares the unquantized model with each candidate and without a prefix (prefix_training.max_kl).
Packaged model: about 15 seconds if disabled. If enabled, the time of about six plain forward passes of the tokens
trained on as well, and 2.9 GiB.
"""

from pathlib import Path

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.need import Need
from pipeline.planning.prefix_training import plan_prefix_training
from pipeline.prefix.training import check_candidates, make_candidates, write_candidates
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
    prefix_training = run.params.prefix_training
    checkpoint, train, validation = Checkpoint(MODEL, "model"), load_windows(TRAIN), load_windows(VALIDATION)
    found_prefix, found_header = load_tensors(FOUND, "prefix_search")
    inputs = {"model": checkpoint.header, "prefix_search": found_header}
    if prefix_training.enabled:
        inputs |= {"train": train.header, "validation": validation.header}
    # The bound of the gate changes no tensor.
    settings = prefix_training.model_dump(exclude={"max_kl"}) if prefix_training.enabled else {"enabled": False}
    header = make_header("prefix_training", settings, inputs)
    need = plan(run)
    with Offload(Path(run.params.runtime.offload_dir) if need.offload else None) as offload:
        place = Place(
            runner=run.runner(checkpoint),
            offload=offload,
            work_folder=WORK,
            header=header,
            ranks=run.ranks,
            keeping=Keeping(need.recompute, need.stream),
        )
        candidates = make_candidates(
            checkpoint,
            found_prefix,
            train=train.token_ids,
            validation=validation.token_ids,
            params=prefix_training,
            place=place,
            text_start_token_id=train.text_start_token_id,
        )
        candidates = check_candidates(
            checkpoint,
            candidates,
            texts=(validation.token_ids, train.token_ids),
            max_kl=prefix_training.max_kl,
            place=place,
            text_start_token_id=train.text_start_token_id,
        )
    if run.ranks.first:
        write_candidates(PREFIX_TRAINING, candidates, header)
    run.metrics.update(candidates.summary())


def plan(run: Run) -> Need:
    workload = run.workload(load_windows(TRAIN).token_ids, load_windows(VALIDATION).token_ids)
    return plan_prefix_training(Checkpoint(MODEL, "model"), workload, run.params.prefix_training, run.params.runtime)


if __name__ == "__main__":
    open_stage("prefix_training", main, __doc__, plan, shared=True, work=WORK)
