"""Find the outlier tokens of the original model and choose the prefix.

Reads   artifacts/model/, artifacts/calibration/search.safetensors
Writes  artifacts/prefix_search/prefix.safetensors and report.json, metrics/prefix_search.json
arXiv:2410.05265, §5.1 and Eq. 3. Packaged model: about 20 seconds for 16 windows of 512 tokens, 0.7 GiB.
"""

from pathlib import Path

from pipeline.artifacts import make_header, replacing_folder, save_tensors, write_json
from pipeline.checkpoint import Checkpoint
from pipeline.memory import Need, own_tokens, plan_walk
from pipeline.params import Params, load_params
from pipeline.prefix_search import search_prefix
from pipeline.progress import run_main, run_stage, select_device
from pipeline.walk import BlockRunner
from pipeline.windows import load_windows
from stages.arguments import parse_arguments
from stages.launcher import join_ranks, start_ranks

PARAMS = Path("params.yaml")
MODEL = Path("artifacts/model")
SEARCH = Path("artifacts/calibration/search.safetensors")
PREFIX_SEARCH = Path("artifacts/prefix_search")
METRICS = Path("metrics/prefix_search.json")


def main() -> None:
    plan_only = parse_arguments(__doc__).plan
    params = load_params(PARAMS)
    search = params.prefix_search
    if plan_only:
        print(plan(params).describe())
        return
    if start_ranks(params.runtime.processes):
        return
    with join_ranks(params.runtime) as (ranks, device), run_stage("prefix_search", METRICS, params.runtime) as metrics:
        checkpoint, windows = Checkpoint(MODEL, "model"), load_windows(SEARCH)
        runner = BlockRunner(checkpoint, device, params.runtime.batch_size)
        prefix = search_prefix(
            checkpoint,
            windows.token_ids,
            runner,
            search.site,
            search.outlier_threshold,
            search.start_token_counts,
            ranks,
        )
        header = make_header(
            "prefix_search", search.model_dump(), {"model": checkpoint.header, "windows": windows.header}
        )
        if ranks.first:
            with replacing_folder(PREFIX_SEARCH) as partial:
                tensors = {"token_ids": prefix.token_ids, "embeddings": prefix.embeddings}
                save_tensors(partial / "prefix.safetensors", tensors, header)
                write_json(partial / "report.json", prefix.report)
        metrics |= prefix.summary()


def plan(params: Params) -> Need:
    """What a run will take."""
    count, length = load_windows(SEARCH).token_ids.shape
    runtime = params.runtime
    tokens = own_tokens(count, length, runtime.processes)
    on_gpu = select_device(runtime).type == "cuda"
    return plan_walk(Checkpoint(MODEL, "model"), tokens, min(tokens, runtime.batch_size * length), on_gpu)


if __name__ == "__main__":
    run_main(main)
