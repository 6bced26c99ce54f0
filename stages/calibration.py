"""Cut the corpora into token windows: for the outlier search, calibration, validation and held-out evaluation.

Reads   data/, the tokenizer in artifacts/model/
Writes  artifacts/calibration/{search,train,validation}.safetensors and evaluation/CORPUS.safetensors,
        metrics/calibration.json
Packaged model: a few seconds.
"""

from pathlib import Path

from pipeline.runtime.artifacts import replacing_folder
from pipeline.text.calibration import cut_calibration_windows, cut_evaluation_windows, load_tokenizer
from pipeline.text.windows import save_windows
from stages.opening import Run, open_stage

DATA = Path("data")
MODEL = Path("artifacts/model")
CALIBRATION = Path("artifacts/calibration")


def main(run: Run) -> None:
    calibration = run.params.calibration
    tokenizer, tokenizer_id = load_tokenizer(MODEL)
    with replacing_folder(CALIBRATION) as partial:
        for name in ("search", "train", "validation"):
            split = getattr(calibration, name)
            cut = cut_calibration_windows(
                name, split.corpora, split.windows, split.length, calibration.seed, DATA, tokenizer, tokenizer_id
            )
            save_windows(partial / f"{name}.safetensors", cut)
            run.metrics[f"{name}_tokens"] = cut.token_ids.numel()
        held_out = calibration.evaluation
        for corpus in held_out.corpora:
            cut = cut_evaluation_windows(corpus, held_out.windows, held_out.length, DATA, tokenizer, tokenizer_id)
            save_windows(partial / "evaluation" / f"{corpus}.safetensors", cut)
            run.metrics[f"evaluation_{corpus}_tokens"] = cut.token_ids.numel()


if __name__ == "__main__":
    open_stage("calibration", main, __doc__)
