"""Compute the prefix's KV in the rotated model, then choose every scale and round the weights, block by block.

Reads   artifacts/rotation/, artifacts/prefix_training/prefix.safetensors, artifacts/calibration/train.safetensors
Writes  artifacts/quantizer_init/ (a checkpoint of integers and scales, with the prefix in use, report.json
        and plots/saturation.json for dvc plots),
        metrics/quantizer_init.json
With quantizer_init.budget, all blocks are quantized once before for each number of bits to choose from.
Finished blocks are kept in .work/quantizer_init/ until the end: a killed run continues where it was.
arXiv:2410.05265, §5. Packaged model: about 1.5 minutes for 16 windows of 512 tokens, 1 GiB.
"""

from pathlib import Path

from pipeline.models.architectures import find_max_positions
from pipeline.models.checkpoint import Checkpoint
from pipeline.params import check_against_model
from pipeline.planning.disk import count_export
from pipeline.planning.need import Need
from pipeline.planning.quantizer_init import plan_quantizer_init
from pipeline.prefix.candidates import load_prefix
from pipeline.quantization.bit_budget import choose_bits, count_integers
from pipeline.quantization.params import QuantizerInitParams
from pipeline.quantization.quantizer_init import init_quantizers
from pipeline.runtime.artifacts import check_same_origin, make_header
from pipeline.text.windows import find_text_start_token, load_windows
from stages.opening import Run, open_stage

ROTATION = Path("artifacts/rotation")
PREFIX = Path("artifacts/prefix_training/prefix.safetensors")
TRAIN = Path("artifacts/calibration/train.safetensors")
WORK = Path(".work/quantizer_init")
QUANTIZER_INIT = Path("artifacts/quantizer_init")


def main(run: Run) -> None:
    quantizer_init, prefix = run.params.quantizer_init, run.params.prefix
    checkpoint, windows = Checkpoint(ROTATION, "rotation"), load_windows(TRAIN)
    widths = checkpoint.architecture.setting_widths(map(checkpoint.build_block, range(checkpoint.block_count)))
    check_against_model(run.params, widths, checkpoint.block_count, find_max_positions(checkpoint.config))
    candidate = load_prefix(PREFIX, prefix.use, prefix.length)
    check_same_origin(checkpoint.header, candidate.header, "model")
    header = make_header(
        "quantizer_init",
        quantizer_init.describe() | {"prefix": prefix.model_dump()},
        {"rotation": checkpoint.header, "prefix_training": candidate.header, "windows": windows.header},
    )
    runner = run.runner(checkpoint)
    text_start_token_id = find_text_start_token(windows.text_start_token_id, candidate.initial_token_ids)
    choice = choose_bits(
        checkpoint,
        params=quantizer_init,
        prefix_embeddings=candidate.embeddings,
        token_ids=windows.token_ids,
        runner=runner,
        work_folder=WORK,
        header=header,
        ranks=run.ranks,
        text_start_token_id=text_start_token_id,
        other_bytes=count_other_bytes(checkpoint, quantizer_init, len(candidate.embeddings)),
    )
    run.metrics.update(choice.metrics)
    run.metrics.update(
        init_quantizers(
            checkpoint,
            QUANTIZER_INIT,
            params=choice.params,
            bits=choice.report,
            prefix_token_ids=candidate.token_ids,
            prefix_embeddings=candidate.embeddings,
            token_ids=windows.token_ids,
            runner=runner,
            work_folder=WORK,
            header=header,
            ranks=run.ranks,
            text_start_token_id=text_start_token_id,
        )
    )


def count_other_bytes(checkpoint: Checkpoint, settings: QuantizerInitParams, prefix_tokens: int) -> int:
    """Return the bytes of the export without the integers of its linears, if a bound needs them, otherwise 0."""
    if settings.budget.size_mib is None:
        return 0
    return count_export(checkpoint, settings, prefix_tokens) - count_integers(checkpoint, settings)


def plan(run: Run) -> Need:
    workload = run.workload(load_windows(TRAIN).token_ids)
    return plan_quantizer_init(Checkpoint(ROTATION, "rotation"), workload, run.params.quantizer_init)


if __name__ == "__main__":
    open_stage("quantizer_init", main, __doc__, plan, shared=True, work=WORK)
