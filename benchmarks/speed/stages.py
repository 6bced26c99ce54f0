"""Time and memory of every walking stage, against one plain forward of the same tokens in the same run.

    python -m benchmarks.speed.stages                      # packaged model, 64 x 512 calibration tokens
    python -m benchmarks.speed.stages --json stages.json   # keeps finished rows, continues when restarted

The first table has seconds and peak memory per stage. The forward is transformers' own, logits included, in batches of
runtime.batch_size, measured just before and after the stage. The second table has the peak memory with twice the
blocks, on a model made of the packaged one's blocks repeated.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.workspace import Workspace, append_row, make_parser, override, read_params, read_rows
from pipeline.blocks.walk import batches
from pipeline.models.checkpoint import CONFIG, Checkpoint
from pipeline.runtime.errors import run_main
from pipeline.text.windows import load_windows

STAGES = ("rotation", "prefix_search", "quantizer_init", "evaluation@original", "evaluation@quantizer_init")
TOKENS_OF = {"prefix_search": "search", "quantizer_init": "train"}
FULL = {
    "evaluation.tasks": {},
    "calibration.search.windows": 64,
    "calibration.search.length": 512,
    "calibration.train.windows": 64,
    "calibration.train.length": 512,
    "calibration.evaluation.windows": 8,
}
SMALL = FULL | {
    "calibration.search.windows": 4,
    "calibration.train.windows": 4,
    "calibration.evaluation.windows": 1,
    "quantizer_init.mse_samples": 1,
}


def main() -> None:
    arguments = make_parser(__doc__, STAGES).parse_args()
    rows = read_rows(arguments.json)
    workspace, base = Workspace(arguments.work), read_params()
    full = override(base, FULL)
    for stage in arguments.rows:
        if stage not in rows:
            append_row(arguments.json, rows, stage, measure_stage(workspace, stage, full))
    small = override(base, SMALL)
    doubled = override(small, {"model.source": str(make_doubled_model(workspace, small))})
    for stage in arguments.rows:
        if (name := f"{stage}, twice the blocks") not in rows:
            peaks = [workspace.metrics(stage, params)["peak_rss_gib"] for params in (small, doubled)]
            append_row(arguments.json, rows, name, {"once": peaks[0], "twice": peaks[1]})
    print_tables(rows, arguments.rows)


def measure_stage(workspace: Workspace, stage: str, params: dict[str, Any]) -> dict[str, float]:
    """Return seconds and memory of a stage, with the plain forward of its tokens before and after it."""
    for upstream in ("calibration", *_upstream(stage)):
        workspace.run(upstream, params)
    model = workspace.run("model", params) / "artifacts/model"
    if stage == "rotation":
        return _pick(workspace.metrics(stage, params)) | {"planned_gib": workspace.plan(stage, params)}
    folder = workspace.run("calibration", params) / "artifacts/calibration"
    if stage in TOKENS_OF:
        token_ids = load_windows(folder / f"{TOKENS_OF[stage]}.safetensors").token_ids
    else:
        token_ids = torch.cat([load_windows(path).token_ids for path in sorted((folder / "evaluation").iterdir())])
    before = time_forward(model, token_ids, params["runtime"]["batch_size"])
    measured = _pick(workspace.metrics(stage, params))
    after = time_forward(model, token_ids, params["runtime"]["batch_size"])
    tokens, seconds = token_ids.numel(), (before + after) / 2
    return measured | {"tokens": tokens, "forward_seconds": seconds, "planned_gib": workspace.plan(stage, params)}


@torch.no_grad()
def time_forward(model_folder: Path, token_ids: torch.Tensor, batch_size: int) -> float:
    """Return the seconds of transformers for one forward of all windows, logits included, with a warm model."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    model(token_ids[:1])
    start = time.perf_counter()
    for rows in batches(len(token_ids), batch_size):
        model(token_ids[rows])
    return time.perf_counter() - start


def make_doubled_model(workspace: Workspace, params: dict[str, Any]) -> Path:
    """Write the packaged model with every block twice as an ordinary checkpoint, and return its folder."""
    source = Checkpoint(workspace.run("model", params) / "artifacts/model", "model")
    folder = workspace.folder / "doubled"
    if (folder / CONFIG).is_file():
        return folder
    folder.mkdir(exist_ok=True)
    names = (source.architecture.embedding, source.architecture.final_norm)
    save_file({name: source.load_tensor(name) for name in names}, folder / "rest.safetensors")
    for index in range(2 * source.block_count):
        prefix = source.architecture.tensor_prefix(index)
        tensors = source.load_block_tensors(index % source.block_count)
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / f"{index}.safetensors")
    for path in source.folder.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    config = source.read_config() | {"num_hidden_layers": 2 * source.block_count}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder


def print_tables(rows: dict[str, Any], stages: list[str]) -> None:
    """Print both Markdown tables."""
    print("| stage | seconds | tokens | plain forward, seconds | ratio | peak RSS, GiB | --plan, GiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for stage in stages:
        row = rows[stage]
        compared = "| | |"
        if "tokens" in row:
            forward = row["forward_seconds"]
            compared = f"{row['tokens']} | {forward:.1f} | {row['seconds'] / forward:.2f} |"
        print(f"| {stage} | {row['seconds']:.1f} | {compared} {row['peak_rss_gib']:.2f} | {row['planned_gib']:.2f} |")
    print("\n| peak RSS, GiB (4 x 512 tokens) | 30 blocks | 60 blocks | ratio |\n| --- | ---: | ---: | ---: |")
    for stage in stages:
        row = rows[f"{stage}, twice the blocks"]
        print(f"| {stage} | {row['once']:.2f} | {row['twice']:.2f} | {row['twice'] / row['once']:.2f} |")


def _upstream(stage: str) -> tuple[str, ...]:
    """Return the stages to run before, so that only the stage itself runs between the two forwards."""
    ready = {"quantizer_init": ("rotation", "prefix_training")}
    return ready.get(stage, ("quantizer_init", "evaluation@original") if stage.endswith("@quantizer_init") else ())


def _pick(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: metrics[key] for key in ("seconds", "peak_rss_gib")}


if __name__ == "__main__":
    run_main(main)
