"""Measure the activations of one variant: `python -m stages.activation_plots VARIANT`.

    original   the imported model
    rotated    the rotated one, without a prefix
    prefixed   the rotated one behind the prefix in use

Reads   the variant's checkpoint, artifacts/calibration/search.safetensors; `prefixed` also the prefix in use
Writes  artifacts/activation_plots/VARIANT/, metrics/activation_plots/VARIANT.json
`stages.report` draws the variants side by side. What arXiv:2410.05265 shows in its figures 1 to 4.
Packaged model: a few seconds, 0.7 GiB.
"""

from pathlib import Path

from pipeline.activations import measure_activations, write_activations
from pipeline.artifacts import make_header
from pipeline.checkpoint import Checkpoint
from pipeline.memory import Need, plan_walk
from pipeline.params import Params, load_params
from pipeline.prefix import load_prefix
from pipeline.progress import run_main, run_stage, select_device
from pipeline.rotation import compute_rotated_prefix_kv
from pipeline.walk import BlockRunner
from pipeline.windows import load_windows
from stages.arguments import parse_arguments

PARAMS = Path("params.yaml")
CHECKPOINTS = {"original": ("model", Path("artifacts/model"))} | dict.fromkeys(
    ("rotated", "prefixed"), ("rotation", Path("artifacts/rotation"))
)
PREFIX = Path("artifacts/prefix_training/prefix.safetensors")
WINDOWS = Path("artifacts/calibration/search.safetensors")
ACTIVATION_PLOTS = Path("artifacts/activation_plots")
METRICS = Path("metrics/activation_plots")


def main() -> None:
    arguments = parse_arguments(__doc__, CHECKPOINTS)
    variant = arguments.variant
    params = load_params(PARAMS)
    own = params.activation_plots
    if arguments.plan:
        print(plan(params, *reversed(CHECKPOINTS[variant])).describe())
        return
    with run_stage(f"activation_plots@{variant}", METRICS / f"{variant}.json", params.runtime) as metrics:
        stage, folder = CHECKPOINTS[variant]
        checkpoint, windows = Checkpoint(folder, stage), load_windows(WINDOWS)
        runner = BlockRunner(checkpoint, select_device(params.runtime), params.runtime.batch_size)
        inputs = {"checkpoint": checkpoint.header, "search": windows.header}
        prefix_kv = None
        if variant == "prefixed":
            _, embeddings, inputs["prefix_training"] = load_prefix(PREFIX, params.prefix.use, params.prefix.length)
            prefix_kv = compute_rotated_prefix_kv(checkpoint, embeddings, runner)
        last = checkpoint.block_count - 1
        blocks = [0, last // 2, last] if own.surface_blocks is None else own.surface_blocks
        token_ids = windows.token_ids[: own.windows]
        found = measure_activations(checkpoint, token_ids, runner, prefix_kv, own.outlier_threshold, blocks)
        values = own.model_dump() | (params.prefix.model_dump() if variant == "prefixed" else {})
        write_activations(
            ACTIVATION_PLOTS / variant, found, checkpoint, make_header("activation_plots", values, inputs)
        )
        metrics |= found.summary()


def plan(params: Params, folder: Path, stage: str) -> Need:
    """What a run will take."""
    token_ids = load_windows(WINDOWS).token_ids[: params.activation_plots.windows]
    batch = min(token_ids.numel(), params.runtime.batch_size * token_ids.shape[1])
    on_gpu = select_device(params.runtime).type == "cuda"
    return plan_walk(Checkpoint(folder, stage), token_ids.numel(), batch, on_gpu)


if __name__ == "__main__":
    run_main(main)
