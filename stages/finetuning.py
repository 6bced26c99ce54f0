"""Fine-tune the quantized model (arXiv:2410.05265, §5): block by block, then end to end, each phase if enabled.

Reads   artifacts/rotation/, artifacts/quantizer_init/ (with the prefix in use), artifacts/calibration/ (train,
        end_to_end and validation); end to end also artifacts/model/
Writes  artifacts/finetuning/ (a checkpoint as in quantizer_init, with report.json and losses for dvc plots),
        metrics/finetuning.json
`--plan` prints the memory and disk that a run needs, and stops. Finished work stays in .work/finetuning/ until the end,
so a killed run continues. Packaged model: 8 to 10 minutes for 96 windows of 512 tokens.
"""

from pathlib import Path

from pipeline.inspection.saturation import PROBED_WINDOWS
from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.finetuning import plan_finetuning
from pipeline.planning.need import Need
from pipeline.runtime.artifacts import check_input, make_header, read_header
from pipeline.runtime.streams import Offload
from pipeline.text.windows import load_windows, open_token_ids
from pipeline.training.block_wise import Models
from pipeline.training.finetuning import FinetuningWindows, finetune
from pipeline.training.params import list_values
from pipeline.training.place import Keeping, Place
from stages.opening import Run, open_stage

MODEL = Path("artifacts/model")
ROTATION = Path("artifacts/rotation")
QUANTIZER_INIT = Path("artifacts/quantizer_init")
TRAIN = Path("artifacts/calibration/train.safetensors")
END_TO_END = Path("artifacts/calibration/end_to_end.safetensors")
VALIDATION = Path("artifacts/calibration/validation.safetensors")
WORK = Path(".work/finetuning")
FINETUNING = Path("artifacts/finetuning")


def main(run: Run) -> None:
    finetuning, need = run.params.finetuning, plan(run)
    original, rotated = Checkpoint(MODEL, "model"), Checkpoint(ROTATION, "rotation")
    initial = Checkpoint(QUANTIZER_INIT, "quantizer_init")
    train, validation, end_to_end = load_windows(TRAIN), load_windows(VALIDATION), open_token_ids(END_TO_END)
    check_input(initial.header, "rotation", rotated.header, QUANTIZER_INIT)
    check_input(rotated.header, "model", original.header, ROTATION)
    inputs = {"quantizer_init": initial.header, "train": train.header, "validation": validation.header}
    if finetuning.end_to_end.enabled:
        inputs["end_to_end"] = read_header(END_TO_END, "calibration")
    header = make_header("finetuning", list_values(finetuning), inputs)
    with Offload(Path(run.params.runtime.offload_dir) if need.offload else None) as offload:
        place = Place(
            runner=run.runner(rotated),
            offload=offload,
            work_folder=WORK,
            header=header,
            ranks=run.ranks,
            keeping=Keeping(need.recompute, need.stream),
        )
        windows = FinetuningWindows(
            train=train.token_ids,
            end_to_end=end_to_end,
            validation=validation.token_ids,
            text_start_token_id=train.text_start_token_id,
        )
        models = Models(original, rotated, initial)
        run.metrics.update(finetune(models, windows, finetuning, place, FINETUNING))


def plan(run: Run) -> Need:
    train, end_to_end, validation = (load_windows(path).token_ids for path in (TRAIN, END_TO_END, VALIDATION))
    if not run.params.finetuning.blocks.enabled:
        train = train[: PROBED_WINDOWS * run.params.runtime.processes]
    return plan_finetuning(
        Checkpoint(ROTATION, "rotation"),
        blocks=run.workload(train, validation),
        end_to_end=run.workload(end_to_end, validation),
        params=run.params.finetuning,
        quantizer_init=run.params.quantizer_init,
        runtime=run.params.runtime,
    )


if __name__ == "__main__":
    open_stage("finetuning", main, __doc__, plan, shared=True, work=WORK)
