"""Write one page about the run, and the numbers by which runs are compared.

Reads   metrics/ and metrics/runtime/ of all stages, artifacts/activation_plots/, losses and quantizers of
        artifacts/finetuning/, how well ranges fit (artifacts/quantizer_init/), samples of artifacts/evaluation/; with
        experts also the reports of quantizer_init and prefix_search, and the routing in artifacts/evaluation/
Writes  artifacts/report/ (report.html, which needs nothing else, and its pictures), metrics/report.json; minutes and
        peak memory of the run in metrics/runtime/report.json
Packaged model: about 10 seconds.
"""

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.quantized import find_site_quantizers, load_block, require_settings
from pipeline.export.model_card import describe_bits
from pipeline.inspection.routing import count_tokens
from pipeline.models.architectures import count_experts
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import Site
from pipeline.params import Params
from pipeline.pictures.activations import OUTLIER_SITE
from pipeline.pictures.experts import ExpertLists, draw_expert_tokens, list_agreement, list_experts, read_choices
from pipeline.pictures.plots import Measured, draw_all, draw_site_quality, find_levels, read_measured
from pipeline.pictures.report import Heading, build_page, draw_curves, list_changes, read_rows, summarise_run
from pipeline.runtime.artifacts import load_json, replacing_folder
from stages.opening import COSTS, METRICS, Run, open_stage

FINETUNING = Path("artifacts/finetuning")
QUANTIZER_INIT = Path("artifacts/quantizer_init/report.json")
SATURATION = Path("artifacts/quantizer_init/plots/saturation.json")
ACTIVATIONS = {
    name: Path("artifacts/activation_plots") / name for name in ("original", "rotated", "prefixed", "quantized")
}
VARIANTS = ("original", "original_prefix", "quantizer_init", "finetuning", "export")
SAMPLED = ("original", "quantizer_init", "finetuning")
EVALUATION = Path("artifacts/evaluation")
QUANTIZED = Path("artifacts/quantizer_init/report.json")
OUTLIERS = Path("artifacts/prefix_search/report.json")
REPORT = Path("artifacts/report")


def main(run: Run) -> None:
    params = run.params
    evaluations = {name: read_metrics(f"evaluation/{name}") for name in VARIANTS}
    costs = read_costs(params)
    prefix = read_metrics("prefix_search")
    tokens = evaluations["export"]["settings"]["prefix_tokens"]
    checkpoint = Checkpoint(FINETUNING, "finetuning")
    described = f"{params.prefix.use} ({tokens} tokens)"
    sizes = read_metrics("export")
    bits = describe_bits(require_settings(checkpoint, 0))
    run.metrics.update(summarise_run(bits, described, evaluations, costs, sizes["size_mib"]))
    saturation, measured, settings = read_rows(SATURATION), read_measured(ACTIVATIONS), read_settings(params)
    heading = Heading(
        model=params.model.source,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        revision=find_revision(),
        versions=checkpoint.header.versions,
        device=torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.processor() or "cpu",
        size_mib=sizes["size_mib"],
        original_mib=sizes["original_mib"],
        corpora={name: corpus.source for name, corpus in params.corpora.items()},
    )
    with replacing_folder(REPORT) as partial:
        quality = partial / "site_quality.png"
        draw_site_quality(quality, saturation, list(Site))
        pictures = draw_all(measured, partial, read_levels(checkpoint, measured["quantized"]))
        pictures = [*pictures[:1], quality, *pictures[1:], *draw_losses(partial, saturation)]
        pictures += draw_experts(checkpoint, partial)
        pictures += draw_budget(partial)
        page = build_page(
            run.metrics,
            heading=heading,
            evaluations=evaluations,
            samples={name: load_json(EVALUATION / f"{name}_samples.json", f"evaluation@{name}") for name in SAMPLED},
            prefix=prefix,
            saturation=saturation,
            costs=costs,
            settings=settings,
            changes=list_changes(settings, read_settings(Params())),
            pictures=pictures,
            experts=read_experts(checkpoint),
        )
        (partial / "report.html").write_text(page, encoding="utf-8")


def read_metrics(name: str) -> dict[str, Any]:
    return load_json(METRICS / f"{name}.json", name.replace("/", "@"))


def read_levels(checkpoint: Checkpoint, measured: Measured) -> dict[int, torch.Tensor]:
    """Return block -> the levels of its quantizer at `mlp_hidden`, of the blocks with a histogram."""
    levels = {}
    for name in measured.tensors:
        if name.startswith("histogram."):
            block = int(name.removeprefix("histogram."))
            quantizer = find_site_quantizers(load_block(checkpoint, block), checkpoint.architecture)[OUTLIER_SITE]
            largest = measured.tensors[f"surface.{OUTLIER_SITE}.{block}"].max().item()
            if (values := find_levels(quantizer, 4 * largest)) is not None:
                levels[block] = values
    return levels


def find_revision() -> str | None:
    """Return the commit of the project, with -dirty if files were changed; None without git or a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_costs(params: Params) -> dict[str, dict[str, float]]:
    """Return stage -> its seconds and memory, in the order of the pipeline."""
    names = [
        "model",
        *(f"corpora/{name}" for name in params.corpora),
        "generation",
        "calibration",
        "rotation",
        "prefix_search",
    ]
    names += ["prefix_training", "quantizer_init", "finetuning", "export"]
    names += [f"evaluation/{name}" for name in VARIANTS] + [f"activation_plots/{name}" for name in ACTIVATIONS]
    return {name: load_json(COSTS / f"{name}.json", name.replace("/", "@")) for name in names}


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


def read_experts(checkpoint: Checkpoint) -> ExpertLists | None:
    """Return the report's lists of experts, None for a dense model."""
    if checkpoint.architecture.experts is None:
        return None
    blocks = load_json(QUANTIZED, "quantizer_init")["blocks"]
    return list_experts(blocks, load_json(OUTLIERS, "prefix_search")["layers"])


def draw_experts(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """Draw router agreement and tokens of experts, and return the files; [] for a dense model."""
    if checkpoint.architecture.experts is None:
        return []
    read = {name: read_choices(EVALUATION / f"{name}.safetensors") for name in VARIANTS}
    choices = {name: chosen for name, chosen in read.items() if chosen is not None}
    agreement, tokens = folder / "router_agreement.png", folder / "expert_tokens.png"
    draw_curves(
        agreement,
        list_agreement(choices),
        x="block",
        columns=[name for name in choices if name != "original"],
        title="Tokens with the same experts as in the original, held-out text",
        y_label="share of tokens",
    )
    draw_expert_tokens(tokens, count_tokens(choices["original"], count_experts(checkpoint.config)))
    return [agreement, tokens]


def draw_losses(folder: Path, saturation: list[dict[str, Any]]) -> list[Path]:
    """Draw curves of fine-tuning and of how well ranges fit, and return the files."""
    blocks = read_rows(FINETUNING / "plots/blocks.json")
    if all(row["before"] == row["after"] for row in blocks):  # finetuning.blocks was off
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
        "finetuning_steps": {
            "rows": read_rows(FINETUNING / "plots/steps.json"),
            "x": "step",
            "columns": ("loss",),
            "title": "End to end, loss of each training step",
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


def draw_budget(folder: Path) -> list[Path]:
    """Draw the estimated divergence over each bound of `quantizer_init.budget`, if any, and return the files."""
    paths = []
    for bound, spent in load_json(QUANTIZER_INIT, "quantizer_init").get("bits", {}).items():
        paths.append(folder / f"budget_{bound}.png")
        draw_curves(
            paths[-1],
            spent["curve"],
            x="value",
            columns=("nats",),
            title=f"Budget of {bound}: the choice at {spent['value']}, and others",
            y_label="estimated KL, nats",
        )
    return paths


if __name__ == "__main__":
    open_stage("report", main, __doc__)
