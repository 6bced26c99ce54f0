"""Compute the prefix's KV in the rotated model, then choose every scale and round the weights, block by block.

Reads   artifacts/rotation/, artifacts/prefix_training/prefix.safetensors, artifacts/calibration/train.safetensors
Writes  artifacts/quantizer_init/ (a checkpoint of integers and scales, with the prefix in use, report.json
        and plots/saturation.json for dvc plots),
        metrics/quantizer_init.json
Finished blocks are kept in .work/quantizer_init/ until the end: a killed run continues where it was.
arXiv:2410.05265, §5. Packaged model: about 1.5 minutes for 16 windows of 512 tokens, 1 GiB.
"""

from pathlib import Path

from pipeline.artifacts import check_same_origin, make_header
from pipeline.checkpoint import Checkpoint
from pipeline.memory import Need, own_tokens, plan_quantizer_init
from pipeline.params import Params, check_against_model, load_params
from pipeline.prefix import load_prefix
from pipeline.progress import return_freed_memory, run_main, run_stage, select_device
from pipeline.quantizer_init import init_quantizers
from pipeline.walk import BlockRunner
from pipeline.windows import load_windows
from stages.arguments import parse_arguments
from stages.launcher import join_ranks, start_ranks

PARAMS = Path("params.yaml")
ROTATION = Path("artifacts/rotation")
PREFIX = Path("artifacts/prefix_training/prefix.safetensors")
TRAIN = Path("artifacts/calibration/train.safetensors")
WORK = Path(".work/quantizer_init")
QUANTIZER_INIT = Path("artifacts/quantizer_init")
METRICS = Path("metrics/quantizer_init.json")


def main() -> None:
    plan_only = parse_arguments(__doc__).plan
    params = load_params(PARAMS)
    init = params.quantizer_init
    if plan_only:
        print(plan(params).describe())
        return
    if start_ranks(params.runtime.processes):
        return
    return_freed_memory()
    with join_ranks(params.runtime) as (ranks, device), run_stage("quantizer_init", METRICS, params.runtime) as metrics:
        checkpoint, windows = Checkpoint(ROTATION, "rotation"), load_windows(TRAIN)
        widths = checkpoint.architecture.site_widths(checkpoint.build_block(0))
        check_against_model(params, widths, checkpoint.block_count, checkpoint.config.max_position_embeddings)
        token_ids, embeddings, prefix_header = load_prefix(PREFIX, params.prefix.use, params.prefix.length)
        check_same_origin(checkpoint.header, prefix_header, "model")
        header = make_header(
            "quantizer_init",
            init.model_dump() | {"prefix": params.prefix.model_dump()},
            {"rotation": checkpoint.header, "prefix_training": prefix_header, "windows": windows.header},
        )
        metrics |= init_quantizers(
            checkpoint,
            (token_ids, embeddings),
            windows.token_ids,
            init,
            BlockRunner(checkpoint, device, params.runtime.batch_size),
            WORK,
            QUANTIZER_INIT,
            header,
            ranks,
        )


def plan(params: Params) -> Need:
    """What a run will take."""
    count, length = load_windows(TRAIN).token_ids.shape
    runtime = params.runtime
    tokens = own_tokens(count, length, runtime.processes)
    on_gpu = select_device(runtime).type == "cuda"
    batch = min(tokens, runtime.batch_size * length)
    return plan_quantizer_init(Checkpoint(ROTATION, "rotation"), tokens, length, params.quantizer_init, batch, on_gpu)


if __name__ == "__main__":
    run_main(main)
