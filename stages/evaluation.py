"""Evaluate one variant on the held-out windows: `python -m stages.evaluation VARIANT`.

    original          the imported model as it is
    original_prefix   the imported model in full precision, with the prefix in use: the honest baseline
    quantizer_init    the rotated, quantized model with the prefix in use
    finetuning        the same, fine-tuned
    export            the packed folder, loaded as a user loads it

Reads   the variant's checkpoint and prefix, artifacts/calibration/evaluation/; for all but `original` also
        artifacts/model/ and artifacts/evaluation/original.safetensors, to compare with
Writes  artifacts/evaluation/VARIANT.safetensors (final hidden states, loss per window), VARIANT_saturation.json beside
        it (how well static ranges fit this text, for dvc plots), metrics/evaluation/VARIANT.json
Perplexity walks block by block; tasks, where there are any, take the whole model in memory, in the first process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artifacts import Header, check_input, make_header, read_header, save_tensors
from pipeline.checkpoint import Checkpoint
from pipeline.memory import Need, own_tokens, plan_evaluation
from pipeline.params import Params, load_params
from pipeline.perplexity import Original, evaluate_model, evaluate_windows
from pipeline.prefix import load_prefix, load_prefix_kv
from pipeline.prefixed_model import assemble_model
from pipeline.progress import run_main, run_stage, select_device
from pipeline.quantized_model import load
from pipeline.saturation import write_saturation
from pipeline.walk import BlockRunner, compute_prefix_kv
from pipeline.windows import load_windows
from stages.arguments import parse_arguments
from stages.launcher import join_ranks, start_ranks

PARAMS = Path("params.yaml")
MODEL = Path("artifacts/model")
PREFIX = Path("artifacts/prefix_training/prefix.safetensors")
QUANTIZED = {"quantizer_init": Path("artifacts/quantizer_init"), "finetuning": Path("artifacts/finetuning")}
WINDOWS = Path("artifacts/calibration/evaluation")
EVALUATION = Path("artifacts/evaluation")
METRICS = Path("metrics/evaluation")
EXPORT = Path("artifacts/export")
VARIANTS = ("original", "original_prefix", *QUANTIZED, "export")


def main() -> None:
    arguments = parse_arguments(__doc__, VARIANTS)
    variant = arguments.variant
    params = load_params(PARAMS)
    if arguments.plan:
        print(plan(variant, params).describe())
        return
    if start_ranks(params.runtime.processes):
        return
    with (
        join_ranks(params.runtime) as (ranks, device),
        run_stage(f"evaluation@{variant}", METRICS / f"{variant}.json", params.runtime) as metrics,
    ):
        tasks = prepare_tasks(params) if ranks.first and params.evaluation.tasks else None
        opened = open_variant(variant, params, device)
        corpora = params.calibration.evaluation.corpora
        windows = {corpus: load_windows(WINDOWS / f"{corpus}.safetensors") for corpus in corpora}
        inputs = opened.inputs | {f"windows.{corpus}": cut.header for corpus, cut in windows.items()}
        compared = variant != "original" and params.evaluation.compare_with_original
        original = Original(Checkpoint(MODEL, "model"), EVALUATION / "original.safetensors") if compared else None
        token_ids = {corpus: cut.token_ids for corpus, cut in windows.items()}
        measured, tensors, saturation = opened.evaluate(token_ids, original=original, ranks=ranks)
        metrics |= measured
        if ranks.first:
            save_tensors(
                EVALUATION / f"{variant}.safetensors", tensors, make_header("evaluation", {"variant": variant}, inputs)
            )
            write_saturation(EVALUATION / f"{variant}_saturation.json", saturation)
        if tasks is not None:
            metrics |= tasks(*opened.load_model())


def plan(variant: str, params: Params) -> Need:
    """What a run will take."""
    cuts = [
        load_windows(WINDOWS / f"{corpus}.safetensors").token_ids for corpus in params.calibration.evaluation.corpora
    ]
    length, runtime = cuts[0].shape[1], params.runtime
    tokens = sum(own_tokens(len(cut), length, runtime.processes) for cut in cuts)
    compared = variant != "original" and params.evaluation.compare_with_original
    items = runtime.task_batch_size if params.evaluation.tasks else 0
    # The exported model is the fine-tuned one.
    quantized = QUANTIZED | {"export": QUANTIZED["finetuning"]}
    stage = {"export": "finetuning"}.get(variant, variant)
    checkpoint = Checkpoint(quantized[variant], stage) if variant in quantized else Checkpoint(MODEL, "model")
    on_gpu = select_device(runtime).type == "cuda"
    batch = min(tokens, runtime.batch_size * length)
    return plan_evaluation(checkpoint, tokens, batch, compared, variant == "export", items, on_gpu)


@dataclass(frozen=True)
class Variant:
    """What is evaluated.

    Attributes:
        evaluate: of corpus -> token ids, what `evaluate_windows` returns.
        load_model: the whole model, for tasks, and its tokenizer.
        inputs: headers of what it was made from.
    """

    evaluate: Callable[..., tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]]
    load_model: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    inputs: dict[str, Header]


def open_variant(variant: str, params: Params, device: torch.device) -> Variant:
    """The variant, ready to be evaluated. Raises ArtifactError and ExportError."""
    batch_size = params.runtime.batch_size
    if variant == "export":
        model, tokenizer = load(EXPORT, device)
        inputs = {"checkpoint": read_header(EXPORT, "export")}
        return Variant(partial(evaluate_model, model, batch_size=batch_size), lambda: (model, tokenizer), inputs)
    checkpoint = Checkpoint(QUANTIZED[variant], variant) if variant in QUANTIZED else Checkpoint(MODEL, "model")
    runner = BlockRunner(checkpoint, device, batch_size)
    prefix_kv, inputs = open_prefix(variant, params, checkpoint, runner)
    return Variant(
        partial(evaluate_windows, checkpoint, runner=runner, prefix_kv=prefix_kv),
        lambda: (assemble_model(checkpoint, prefix_kv, device), checkpoint.tokenizer),
        inputs | {"checkpoint": checkpoint.header},
    )


def prepare_tasks(params: Params) -> Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, Any]]:
    """Load the tasks and their data; what then asks a model and returns metrics."""
    # lm-eval takes seconds to import, and is of no use without tasks.
    from pipeline.lm_eval_tasks import run_tasks
    from pipeline.task_data import open_tasks

    own = params.evaluation
    tasks = open_tasks(own.tasks, own.task_folder, own.skip_unavailable)
    return lambda model, tokenizer: run_tasks(model, tokenizer, tasks, params.runtime.task_batch_size)


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
