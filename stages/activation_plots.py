"""Measure the activations of one variant: `python -m stages.activation_plots VARIANT`.

    original   the imported model
    rotated    the rotated model, without a prefix
    prefixed   the rotated model after the prefix in use
    quantized  the fine-tuned model after its prefix; values before each quantizer

Reads   the variant's checkpoint, artifacts/calibration/search.safetensors; `prefixed` also the prefix in use
Writes  artifacts/activation_plots/VARIANT/, metrics/activation_plots/VARIANT.json
`stages.report` draws the variants side by side. They show the activations of figures 1 to 4 of arXiv:2410.05265.
Packaged model: a few seconds, 0.7 GiB.
"""

from pathlib import Path

from pipeline.blocks.prefix_kv import PREFIX as PREFIX_FILE
from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.models.checkpoint import Checkpoint
from pipeline.pictures.activations import measure_activations, write_activations
from pipeline.planning.need import Need
from pipeline.planning.walk import plan_walk
from pipeline.prefix.candidates import load_prefix
from pipeline.rotation.matrices import compute_rotated_prefix_kv
from pipeline.runtime.artifacts import make_header
from pipeline.text.windows import load_start_token, load_windows, prepend_start_token
from stages.opening import Run, open_stage

FINETUNING = Path("artifacts/finetuning")
CHECKPOINTS = (
    {"original": ("model", Path("artifacts/model"))}
    | dict.fromkeys(("rotated", "prefixed"), ("rotation", Path("artifacts/rotation")))
    | {"quantized": ("finetuning", FINETUNING)}
)
PREFIX = Path("artifacts/prefix_training/prefix.safetensors")
WINDOWS = Path("artifacts/calibration/search.safetensors")
ACTIVATION_PLOTS = Path("artifacts/activation_plots")


def main(run: Run) -> None:
    settings, prefix = run.params.activation_plots, run.params.prefix
    stage, folder = CHECKPOINTS[run.variant]
    checkpoint, windows = Checkpoint(folder, stage), load_windows(WINDOWS)
    runner, prefix_kv, token_ids = run.runner(checkpoint), None, windows.model_inputs()
    values, inputs = settings.model_dump(), {"checkpoint": checkpoint.header, "search": windows.header}
    if run.variant == "prefixed":
        candidate = load_prefix(PREFIX, prefix.use, prefix.length)
        inputs["prefix_training"] = candidate.header
        values |= prefix.model_dump()
        prefix_kv = compute_rotated_prefix_kv(checkpoint, candidate.embeddings, runner)
        token_ids = windows.model_inputs(candidate.initial_token_ids)
    elif run.variant == "quantized":
        prefix_kv = load_prefix_kv(folder, stage)
        token_ids = prepend_start_token(windows.token_ids, load_start_token(folder / PREFIX_FILE, stage))
    last = checkpoint.block_count - 1
    blocks = [0, last // 2, last] if settings.surface_blocks is None else settings.surface_blocks
    token_ids = token_ids[: settings.windows]
    activations = measure_activations(
        checkpoint,
        token_ids,
        runner,
        prefix_kv=prefix_kv,
        threshold=settings.outlier_threshold,
        surface_blocks=blocks,
    )
    header = make_header("activation_plots", values, inputs)
    write_activations(ACTIVATION_PLOTS / run.variant, activations, checkpoint, header)
    run.metrics.update(activations.summary())


def plan(run: Run) -> Need:
    stage, folder = CHECKPOINTS[run.variant]
    token_ids = load_windows(WINDOWS).token_ids[: run.params.activation_plots.windows]
    return plan_walk(Checkpoint(folder, stage), run.workload(token_ids))


if __name__ == "__main__":
    open_stage("activation_plots", main, __doc__, plan, CHECKPOINTS)
