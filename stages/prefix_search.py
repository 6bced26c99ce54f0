"""Find the outlier tokens of the original model and choose the prefix (arXiv:2410.05265, §5.1 and Eq. 3).

Reads   artifacts/model/, artifacts/calibration/search.safetensors
Writes  artifacts/prefix_search/prefix.safetensors and report.json, metrics/prefix_search.json
Packaged model: about 20 seconds for 16 windows of 512 tokens, 0.7 GiB.
"""

from pathlib import Path

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.need import Need
from pipeline.planning.prefix_search import plan_prefix_search
from pipeline.prefix.search import search_prefix
from pipeline.runtime.artifacts import make_header, replacing_folder, save_tensors, write_json
from pipeline.text.windows import load_windows
from stages.opening import Run, open_stage

MODEL = Path("artifacts/model")
SEARCH = Path("artifacts/calibration/search.safetensors")
PREFIX_SEARCH = Path("artifacts/prefix_search")


def main(run: Run) -> None:
    prefix_search = run.params.prefix_search
    checkpoint, windows = Checkpoint(MODEL, "model"), load_windows(SEARCH)
    prefix = search_prefix(
        checkpoint,
        windows.token_ids,
        params=prefix_search,
        runner=run.runner(checkpoint),
        ranks=run.ranks,
        text_start_token_id=windows.text_start_token_id,
    )
    inputs = {"model": checkpoint.header, "windows": windows.header}
    header = make_header("prefix_search", prefix_search.model_dump(), inputs)
    if run.ranks.first:
        with replacing_folder(PREFIX_SEARCH) as partial:
            tensors = {"token_ids": prefix.token_ids, "embeddings": prefix.embeddings}
            save_tensors(partial / "prefix.safetensors", tensors, header)
            write_json(partial / "report.json", prefix.report)
    run.metrics.update(prefix.summary())


def plan(run: Run) -> Need:
    workload = run.workload(load_windows(SEARCH).token_ids)
    return plan_prefix_search(Checkpoint(MODEL, "model"), workload, run.params.prefix_search)


if __name__ == "__main__":
    open_stage("prefix_search", main, __doc__, plan, shared=True)
