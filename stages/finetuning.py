"""Fine-tune the quantized model block by block, and optionally end to end.

Reads   artifacts/rotation/, artifacts/quantizer_init/ (with the prefix in use), artifacts/calibration/ (train and
        validation); end to end also artifacts/model/
Writes  artifacts/finetuning/ (a checkpoint as quantizer_init's, with report.json and losses for dvc plots),
        metrics/finetuning.json
Finished blocks are kept in .work/finetuning/ until the end: a killed run continues where it was.
arXiv:2410.05265, §5.
"""

from pathlib import Path

from pipeline.artifacts import check_input, make_header
from pipeline.checkpoint import Checkpoint
from pipeline.finetuning import Models, finetune
from pipeline.params import load_params
from pipeline.progress import run_main, run_stage, select_device
from pipeline.ranks import Ranks
from pipeline.streams import Offload
from pipeline.walk import BlockRunner
from pipeline.windows import load_windows

PARAMS = Path("params.yaml")
MODEL = Path("artifacts/model")
ROTATION = Path("artifacts/rotation")
QUANTIZER_INIT = Path("artifacts/quantizer_init")
CALIBRATION = Path("artifacts/calibration")
WORK = Path(".work/finetuning")
FINETUNING = Path("artifacts/finetuning")
METRICS = Path("metrics/finetuning.json")


def main() -> None:
    params = load_params(PARAMS)
    with run_stage("finetuning", METRICS, params.runtime) as metrics:
        rotated, initial = Checkpoint(ROTATION, "rotation"), Checkpoint(QUANTIZER_INIT, "quantizer_init")
        check_input(initial.header, "rotation", rotated.header, QUANTIZER_INIT)
        train, validation = (load_windows(CALIBRATION / f"{name}.safetensors") for name in ("train", "validation"))
        inputs = {"quantizer_init": initial.header, "train": train.header, "validation": validation.header}
        with Offload(None) as offload:
            metrics |= finetune(
                Models(Checkpoint(MODEL, "model"), rotated, initial),
                train.token_ids,
                validation.token_ids,
                params.finetuning,
                BlockRunner(rotated, select_device(params.runtime), params.runtime.batch_size),
                offload,
                Ranks(),
                WORK,
                FINETUNING,
                make_header("finetuning", params.finetuning.model_dump(), inputs),
            )


if __name__ == "__main__":
    run_main(main)
