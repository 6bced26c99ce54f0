"""One page for the run, and the numbers runs are compared by.

Reads   metrics/ of all stages, artifacts/activation_plots/, losses of artifacts/finetuning/, how well ranges fit
        (artifacts/quantizer_init/)
Writes  artifacts/report/ (report.html, which needs nothing else, and its pictures), metrics/report.json
Packaged model: about 10 seconds.
"""

from pathlib import Path
from typing import Any

from pipeline.blocks.quantized import block_settings
from pipeline.export.model_card import describe_bits
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import Site
from pipeline.params import Params
from pipeline.pictures.plots import draw_all, read_measured
from pipeline.pictures.report import build_page, draw_curves, read_rows, summarise_run
from pipeline.runtime.artifacts import load_json, replacing_folder
from stages.opening import METRICS, Run, open_stage

FINETUNING = Path("artifacts/finetuning")
SATURATION = Path("artifacts/quantizer_init/plots/saturation.json")
ACTIVATIONS = {name: Path("artifacts/activation_plots") / name for name in ("original", "rotated", "prefixed")}
VARIANTS = ("original", "original_prefix", "quantizer_init", "finetuning", "export")
REPORT = Path("artifacts/report")


def main(run: Run) -> None:
    params = run.params
    evaluations = {name: read_metrics(f"evaluation/{name}") for name in VARIANTS}
    costs = read_costs(params)
    prefix = read_metrics("prefix_search")
    tokens = evaluations["export"]["settings"]["prefix_tokens"]
    bits = describe_bits(block_settings(Checkpoint(FINETUNING, "finetuning"), 0))
    described = f"{params.prefix.use} ({tokens} tokens)"
    size = read_metrics("export")["size_mib"]
    run.metrics.update(summarise_run(bits, described, evaluations, costs, size))
    saturation = read_rows(SATURATION)
    with replacing_folder(REPORT) as partial:
        pictures = draw_all(read_measured(ACTIVATIONS), partial) + draw_losses(partial, saturation)
        page = build_page(
            run.metrics,
            evaluations=evaluations,
            prefix=prefix,
            saturation=saturation,
            costs=costs,
            settings=read_settings(params),
            pictures=pictures,
        )
        (partial / "report.html").write_text(page, encoding="utf-8")


def read_metrics(name: str) -> dict[str, Any]:
    return load_json(METRICS / f"{name}.json", name.replace("/", "@"))


def read_costs(params: Params) -> dict[str, dict[str, float]]:
    """Return {stage: its cost} in the order of the pipeline."""
    names = ["model", *(f"corpora/{name}" for name in params.corpora), "calibration", "rotation", "prefix_search"]
    names += ["prefix_training", "quantizer_init", "finetuning", "export"]
    names += [f"evaluation/{name}" for name in VARIANTS] + [f"activation_plots/{name}" for name in ACTIVATIONS]
    keys = ("seconds", "peak_rss_gib")  # Windows gives no peak
    return {name: {key: value for key, value in read_metrics(name).items() if key in keys} for name in names}


def read_settings(params: Params) -> dict[str, Any]:
    """Return the groups of params.yaml that change results."""
    groups = {
        "model": params.model,
        "calibration": params.calibration,
        "rotation": params.rotation,
        "prefix_search": params.prefix_search,
        "prefix_training": params.prefix_training,
        "prefix": params.prefix,
        "quantizer_init": params.quantizer_init,
        "finetuning": params.finetuning,
        "export": params.export,
        "evaluation": params.evaluation,
    }
    return {name: group.model_dump() for name, group in groups.items()}


def draw_losses(folder: Path, saturation: list[dict[str, Any]]) -> list[Path]:
    """Draw curves of fine-tuning and of the fit of ranges. Return the paths of the pictures."""
    blocks = read_rows(FINETUNING / "plots/blocks.json")
    if all(row["before"] == row["after"] for row in blocks):  # none was trained by itself
        blocks = []
    together = read_rows(FINETUNING / "plots/end_to_end.json")
    curves = {
        "finetuning_blocks": {
            "rows": blocks,
            "x": "block",
            "columns": ("before", "after"),
            "title": "Loss of each block",
            "y_label": "validation loss",
        },
        "finetuning_end_to_end": {
            "rows": together,
            "x": "epoch",
            "columns": ("train", "validation"),
            "title": "End to end",
            "y_label": "KL, nats",
        },
        "sqnr": {
            "rows": saturation,
            "x": "block",
            "columns": [f"{site}_sqnr" for site in Site],
            "title": "Signal to quantization noise, calibration text",
            "y_label": "SQNR, dB",
        },
    }
    return [path for name, curve in curves.items() if draw_curves(path := folder / f"{name}.png", **curve)]


if __name__ == "__main__":
    open_stage("report", main, __doc__)
