"""Evaluate one variant on the held-out windows: `python -m stages.evaluation VARIANT`.

    original          the imported model as it is
    original_prefix   the imported model in full precision, with the prefix in use: the honest baseline
    quantizer_init    the rotated, quantized model with the prefix in use
    finetuning        the same, fine-tuned

Reads   the variant's checkpoint and prefix, artifacts/calibration/evaluation/; for all but `original` also
        artifacts/model/ and artifacts/evaluation/original.safetensors, to compare with
Writes  artifacts/evaluation/VARIANT.safetensors (final hidden states, loss per window), VARIANT_saturation.csv beside
        it (how well static ranges fit this text, for dvc plots), metrics/evaluation/VARIANT.json
Packaged model: about 20 seconds (original) and 30 (quantized) for 8 windows of 1,024 tokens, 1.1 GiB.
"""

import argparse
from pathlib import Path

import torch

from pipeline.artifacts import Header, check_input, make_header, save_tensors
from pipeline.checkpoint import Checkpoint
from pipeline.params import Params, load_params
from pipeline.perplexity import Original, evaluate_windows
from pipeline.prefix import load_prefix, load_prefix_kv
from pipeline.progress import run_main, run_stage
from pipeline.saturation import write_saturation
from pipeline.walk import BlockRunner, compute_prefix_kv
from pipeline.windows import load_windows
from stages.launcher import join_ranks, start_ranks

PARAMS = Path("params.yaml")
MODEL = Path("artifacts/model")
PREFIX = Path("artifacts/prefix_training/prefix.safetensors")
QUANTIZED = {"quantizer_init": Path("artifacts/quantizer_init"), "finetuning": Path("artifacts/finetuning")}
WINDOWS = Path("artifacts/calibration/evaluation")
EVALUATION = Path("artifacts/evaluation")
METRICS = Path("metrics/evaluation")
VARIANTS = ("original", "original_prefix", *QUANTIZED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    variant = parser.parse_args().variant
    params = load_params(PARAMS)
    if start_ranks(params.runtime.processes):
        return
    with (
        join_ranks(params.runtime) as (ranks, device),
        run_stage(f"evaluation@{variant}", METRICS / f"{variant}.json", params.runtime) as metrics,
    ):
        checkpoint = Checkpoint(QUANTIZED[variant], variant) if variant in QUANTIZED else Checkpoint(MODEL, "model")
        runner = BlockRunner(checkpoint, device, params.runtime.batch_size)
        prefix_kv, inputs = open_prefix(variant, params, checkpoint, runner)
        corpora = params.calibration.evaluation.corpora
        windows = {corpus: load_windows(WINDOWS / f"{corpus}.safetensors") for corpus in corpora}
        inputs |= {f"windows.{corpus}": cut.header for corpus, cut in windows.items()}
        compared = variant != "original" and params.evaluation.compare_with_original
        original = Original(Checkpoint(MODEL, "model"), EVALUATION / "original.safetensors") if compared else None
        token_ids = {corpus: cut.token_ids for corpus, cut in windows.items()}
        measured, tensors, saturation = evaluate_windows(checkpoint, token_ids, runner, prefix_kv, original, ranks)
        metrics |= measured
        header = make_header("evaluation", {"variant": variant}, inputs | {"checkpoint": checkpoint.header})
        if ranks.first:
            save_tensors(EVALUATION / f"{variant}.safetensors", tensors, header)
            write_saturation(EVALUATION / f"{variant}_saturation.csv", saturation)


def open_prefix(
    variant: str, params: Params, checkpoint: Checkpoint, runner: BlockRunner
) -> tuple[torch.Tensor | None, dict[str, Header]]:
    """The variant's prefix KV [L, 2, kv_heads, P, d] or None, and the headers of what it was made from."""
    if variant in QUANTIZED:
        return load_prefix_kv(checkpoint.folder, checkpoint.stage), {}
    if variant == "original":
        return None, {}
    _, embeddings, header = load_prefix(PREFIX, params.prefix.use, params.prefix.length)
    check_input(header, "model", checkpoint.header, PREFIX)
    return compute_prefix_kv(checkpoint, embeddings, runner), {"prefix_training": header}


if __name__ == "__main__":
    run_main(main)
