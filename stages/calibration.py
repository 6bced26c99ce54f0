"""Cut the corpora into token windows: for the outlier search, calibration, validation and held-out evaluation.

Reads   data/, the tokenizer in artifacts/model/
Writes  artifacts/calibration/{search,train,validation}.safetensors and evaluation/CORPUS.safetensors,
        metrics/calibration.json
Packaged model: a few seconds.
"""

from pathlib import Path

from pipeline.artifacts import replacing_folder
from pipeline.calibration import cut_calibration_windows, cut_evaluation_windows, load_tokenizer
from pipeline.params import load_params
from pipeline.progress import run_main, run_stage
from pipeline.windows import save_windows

PARAMS = Path("params.yaml")
DATA = Path("data")
MODEL = Path("artifacts/model")
CALIBRATION = Path("artifacts/calibration")
METRICS = Path("metrics/calibration.json")


def main() -> None:
    params = load_params(PARAMS)
    calibration = params.calibration
    with run_stage("calibration", METRICS, params.runtime) as metrics:
        tokenizer, tokenizer_id = load_tokenizer(MODEL)
        with replacing_folder(CALIBRATION) as partial:
            for name in ("search", "train", "validation"):
                split = getattr(calibration, name)
                cut = cut_calibration_windows(
                    name, split.corpora, split.windows, split.length, calibration.seed, DATA, tokenizer, tokenizer_id
                )
                save_windows(partial / f"{name}.safetensors", cut)
                metrics[f"{name}_tokens"] = cut.token_ids.numel()
            held_out = calibration.evaluation
            for corpus in held_out.corpora:
                cut = cut_evaluation_windows(corpus, held_out.windows, held_out.length, DATA, tokenizer, tokenizer_id)
                save_windows(partial / "evaluation" / f"{corpus}.safetensors", cut)
                metrics[f"evaluation_{corpus}_tokens"] = cut.token_ids.numel()


if __name__ == "__main__":
    run_main(main)
