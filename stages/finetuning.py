"""Fine-tune the quantized model block by block, and optionally end to end.

Reads   artifacts/rotation/, artifacts/quantizer_init/ (with the prefix in use), artifacts/calibration/ (train and
        validation); end to end also artifacts/model/
Writes  artifacts/finetuning/ (a checkpoint as quantizer_init's, with report.json and losses for dvc plots),
        metrics/finetuning.json
`--plan` says what a run will take, without running. Finished blocks are kept in .work/finetuning/ until the end: a
killed run continues where it was. arXiv:2410.05265, §5. Packaged model: 4 to 6 minutes for 16 windows of 512 tokens.
"""

import math
from pathlib import Path

import torch

from pipeline.artifacts import check_input, make_header
from pipeline.checkpoint import Checkpoint
from pipeline.finetuning import Models, finetune
from pipeline.memory import Need, plan_finetuning
from pipeline.params import Params, load_params
from pipeline.place import Place
from pipeline.progress import return_freed_memory, run_main, run_stage, select_device
from pipeline.streams import Offload
from pipeline.walk import BlockRunner
from pipeline.windows import Windows, load_windows
from stages.arguments import parse_arguments
from stages.launcher import join_ranks, start_ranks

PARAMS = Path("params.yaml")
MODEL = Path("artifacts/model")
ROTATION = Path("artifacts/rotation")
QUANTIZER_INIT = Path("artifacts/quantizer_init")
CALIBRATION = Path("artifacts/calibration")
WORK = Path(".work/finetuning")
FINETUNING = Path("artifacts/finetuning")
METRICS = Path("metrics/finetuning.json")


def main() -> None:
    plan_only = parse_arguments(__doc__).plan
    params = load_params(PARAMS)
    if not plan_only and start_ranks(params.runtime.processes):
        return
    if plan_only:
        print(prepare(params, select_device(params.runtime))[-1].describe())
        return
    return_freed_memory()
    with join_ranks(params.runtime) as (ranks, device), run_stage("finetuning", METRICS, params.runtime) as metrics:
        rotated, train, validation, need = prepare(params, device)
        initial = Checkpoint(QUANTIZER_INIT, "quantizer_init")
        original = Checkpoint(MODEL, "model")
        check_input(initial.header, "rotation", rotated.header, QUANTIZER_INIT)
        check_input(rotated.header, "model", original.header, ROTATION)
        inputs = {"quantizer_init": initial.header, "train": train.header, "validation": validation.header}
        with Offload(Path(params.runtime.offload_dir) if need.offload else None) as offload:
            header = make_header("finetuning", params.finetuning.model_dump(), inputs)
            runner = BlockRunner(rotated, device, params.runtime.batch_size)
            place = Place(runner, offload, WORK, header, ranks, need.recompute)
            models = Models(original, rotated, initial)
            metrics |= finetune(models, train.token_ids, validation.token_ids, params.finetuning, place, FINETUNING)


def prepare(params: Params, device: torch.device) -> tuple[Checkpoint, Windows, Windows, Need]:
    """The rotated model, the windows to train on and to validate on, and what the run will take."""
    rotated = Checkpoint(ROTATION, "rotation")
    train, validation = (load_windows(CALIBRATION / f"{name}.safetensors") for name in ("train", "validation"))
    count = math.ceil((len(train.token_ids) + len(validation.token_ids)) / params.runtime.processes)
    length = max(train.token_ids.shape[1], validation.token_ids.shape[1])
    need = plan_finetuning(rotated, count, length, params.finetuning, params.runtime, device.type == "cuda")
    return rotated, train, validation, need


if __name__ == "__main__":
    run_main(main)
