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

from pipeline.blocks.prefix_kv import PREFIX, compute_prefix_kv, load_prefix_kv
from pipeline.blocks.walk import BlockRunner
from pipeline.evaluation.perplexity import Original, evaluate_model, evaluate_windows
from pipeline.inference.loading import load
from pipeline.inference.prefixed_model import assemble_model
from pipeline.inspection.saturation import write_saturation
from pipeline.models.checkpoint import Checkpoint
from pipeline.params import Params
from pipeline.planning.evaluation import plan_evaluation
from pipeline.planning.need import Need
from pipeline.prefix.candidates import load_prefix
from pipeline.runtime.artifacts import Header, check_input, make_header, read_header, save_tensors
from pipeline.text.start_token import set_start_token_
from pipeline.text.windows import find_text_start_token, load_start_token, load_windows
from stages.opening import Run, open_stage

MODEL = Path("artifacts/model")
PREFIXES = Path("artifacts/prefix_training/prefix.safetensors")
QUANTIZED = {"quantizer_init": Path("artifacts/quantizer_init"), "finetuning": Path("artifacts/finetuning")}
WINDOWS = Path("artifacts/calibration/evaluation")
EVALUATION = Path("artifacts/evaluation")
EXPORT = Path("artifacts/export")
VARIANTS = ("original", "original_prefix", *QUANTIZED, "export")


def main(run: Run) -> None:
    params, variant, ranks = run.params, run.variant, run.ranks
    tasks = prepare_tasks(params) if ranks.first and params.evaluation.tasks else None
    corpora = params.calibration.evaluation.corpora
    windows = {corpus: load_windows(WINDOWS / f"{corpus}.safetensors") for corpus in corpora}
    opened = open_variant(run, windows[corpora[0]].text_start_token_id)
    inputs = opened.inputs | {f"windows.{corpus}": cut.header for corpus, cut in windows.items()}
    compared = variant != "original" and params.evaluation.compare_with_original
    original = Original(Checkpoint(MODEL, "model"), EVALUATION / "original.safetensors") if compared else None
    token_ids = {corpus: cut.token_ids for corpus, cut in windows.items()}
    for corpus, cut in windows.items() if original else ():
        check_input(original.header, f"windows.{corpus}", cut.header, EVALUATION / "original.safetensors")
    measured, tensors, saturation = opened.evaluate(token_ids, original=original, ranks=ranks)
    run.metrics.update(measured)
    if ranks.first:
        header = make_header("evaluation", {"variant": variant}, inputs)
        save_tensors(EVALUATION / f"{variant}.safetensors", tensors, header)
        write_saturation(EVALUATION / f"{variant}_saturation.json", saturation)
    if tasks is not None:
        run.metrics.update(tasks(*opened.load_model()))


def plan(run: Run) -> Need:
    params, variant = run.params, run.variant
    corpora = params.calibration.evaluation.corpora
    workload = run.workload(*(load_windows(WINDOWS / f"{corpus}.safetensors").token_ids for corpus in corpora))
    compared = variant != "original" and params.evaluation.compare_with_original
    items = params.runtime.task_batch_size if params.evaluation.tasks else 0
    # The exported model is the fine-tuned one.
    stage = "finetuning" if variant == "export" else variant
    checkpoint = Checkpoint(QUANTIZED[stage], stage) if stage in QUANTIZED else Checkpoint(MODEL, "model")
    in_memory = variant == "export"
    return plan_evaluation(checkpoint, workload, compared=compared, in_memory=in_memory, task_items=items)


@dataclass(frozen=True)
class Variant:
    """A variant of the model, ready to be evaluated.

    Attributes:
        evaluate: {corpus: token ids} -> the results of `evaluate_windows`.
        load_model: the whole model, for tasks, and its tokenizer.
        inputs: headers of the artifacts it was made from.
    """

    evaluate: Callable[..., tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]]
    load_model: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    inputs: dict[str, Header]


def open_variant(run: Run, start_token: int | None) -> Variant:
    """The variant, ready to be evaluated. Raises ArtifactError and ExportError.

    `start_token` belongs before every window unless the prefix ends in it.
    """
    variant, device = run.variant, run.device
    if variant == "export":
        limited = run.params.runtime.max_memory is not None
        model, tokenizer = load(EXPORT, device, unpacked=False if limited else None)
        inputs = {"checkpoint": read_header(EXPORT, "export")}
        return Variant(
            partial(evaluate_model, model, batch_size=run.params.runtime.batch_size), lambda: (model, tokenizer), inputs
        )
    checkpoint = Checkpoint(QUANTIZED[variant], variant) if variant in QUANTIZED else Checkpoint(MODEL, "model")
    runner = run.runner(checkpoint)
    prefix_kv, own_start, inputs = open_prefix(run, checkpoint, runner, start_token)

    def load_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        set_start_token_(checkpoint.tokenizer, own_start)
        return assemble_model(checkpoint, prefix_kv, device, own_start), checkpoint.tokenizer

    evaluate = partial(evaluate_windows, checkpoint, runner=runner, prefix_kv=prefix_kv, text_start_token_id=own_start)
    return Variant(evaluate, load_model, inputs | {"checkpoint": checkpoint.header})


def prepare_tasks(params: Params) -> Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, Any]]:
    """Load the tasks and their data; what then asks a model and returns metrics."""
    # lm-eval takes seconds to import, and is of no use without tasks.
    from pipeline.evaluation.harness import run_tasks
    from pipeline.evaluation.task_data import open_tasks

    own = params.evaluation
    tasks = open_tasks(own.tasks, own.task_folder, own.skip_unavailable)
    return lambda model, tokenizer: run_tasks(model, tokenizer, tasks, params.runtime.task_batch_size)


def open_prefix(
    run: Run, checkpoint: Checkpoint, runner: BlockRunner, start_token: int | None
) -> tuple[torch.Tensor | None, int | None, dict[str, Header]]:
    """The variant's prefix KV [L, 2, kv_heads, P, d] or None, the start token after it or None, inputs' headers."""
    if run.variant in QUANTIZED:
        own_start = load_start_token(checkpoint.folder / PREFIX, checkpoint.stage)
        return load_prefix_kv(checkpoint.folder, checkpoint.stage), own_start, {}
    if run.variant == "original":
        return None, start_token, {}
    own = run.params.prefix
    prefix = load_prefix(PREFIXES, own.use, own.length)
    check_input(prefix.header, "model", checkpoint.header, PREFIXES)
    prefix_kv = compute_prefix_kv(checkpoint, prefix.embeddings, runner)
    return prefix_kv, find_text_start_token(start_token, prefix.initial_token_ids), {"prefix_training": prefix.header}


if __name__ == "__main__":
    open_stage("evaluation", main, __doc__, plan, VARIANTS, shared=True)
