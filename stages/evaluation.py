"""Evaluate one variant on the held-out windows: `python -m stages.evaluation VARIANT`.

    original          the imported model as it is
    original_prefix   the imported model in full precision, with the prefix in use: the honest baseline
    quantizer_init    the rotated, quantized model with the prefix in use
    finetuning        the same, fine-tuned
    export            the packed folder, loaded as a user loads it

Reads   the variant's checkpoint and prefix, artifacts/calibration/evaluation/; for all but `original` also
        artifacts/model/ and artifacts/evaluation/original.safetensors, to compare with; for `export` also
        artifacts/evaluation/finetuning.safetensors. The stage fails where the export's hidden states differ from these.
Writes  artifacts/evaluation/VARIANT.safetensors (final hidden states, loss per window), VARIANT_saturation.json
        (how well static ranges fit this text, for dvc plots), VARIANT_samples.json (continuations of `report.prompts`
        by `original`, `quantizer_init` and `finetuning`), metrics/evaluation/VARIANT.json
Perplexity walks block by block. Tasks and samples take the whole model in memory, in the first process.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.blocks.prefix_kv import PREFIX, compute_prefix_kv, load_prefix_kv
from pipeline.blocks.walk import BlockRunner
from pipeline.evaluation.export_check import check_export
from pipeline.evaluation.perplexity import Original, evaluate_model, evaluate_windows
from pipeline.evaluation.samples import choose_prompts, generate_samples
from pipeline.inference.loading import load
from pipeline.inference.prefixed_model import assemble_model
from pipeline.inspection.saturation import write_saturation
from pipeline.models.architectures import find_max_positions
from pipeline.models.checkpoint import Checkpoint
from pipeline.params import Params
from pipeline.planning.evaluation import plan_evaluation
from pipeline.planning.need import Need
from pipeline.prefix.candidates import load_prefix
from pipeline.runtime.artifacts import Header, check_input, make_header, read_header, save_tensors, write_json
from pipeline.runtime.memory import GIB, gpu_limit, memory_limit
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
SAMPLED = ("original", *QUANTIZED)  # `export` computes the same as `finetuning`

logger = logging.getLogger(__name__)


def main(run: Run) -> None:
    params, variant, ranks = run.params, run.variant, run.ranks
    tasks = prepare_tasks(params) if ranks.first and params.evaluation.tasks else None
    corpora = params.calibration.evaluation.corpora
    windows = {corpus: load_windows(WINDOWS / f"{corpus}.safetensors") for corpus in corpora}
    prompts = prepare_prompts(run) if ranks.first else []
    opened = open_variant(run, windows[corpora[0]].text_start_token_id)
    inputs = opened.inputs | {f"windows.{corpus}": cut.header for corpus, cut in windows.items()}
    compared = variant != "original" and params.evaluation.compare_with_original
    original = Original(Checkpoint(MODEL, "model"), EVALUATION / "original.safetensors") if compared else None
    token_ids = {corpus: cut.token_ids for corpus, cut in windows.items()}
    if original is not None:
        for corpus, cut in windows.items():
            check_input(original.header, f"windows.{corpus}", cut.header, EVALUATION / "original.safetensors")
    measured, tensors, saturation = opened.evaluate(token_ids, original=original, ranks=ranks)
    run.metrics.update(measured)
    if variant == "export":
        path, export = EVALUATION / "finetuning.safetensors", opened.inputs["checkpoint"]
        run.metrics["largest_difference_to_finetuning"] = check_export(tensors, path, export, run.device)
    if ranks.first:
        header = make_header("evaluation", {"variant": variant}, inputs)
        save_tensors(EVALUATION / f"{variant}.safetensors", tensors, header)
        write_saturation(EVALUATION / f"{variant}_saturation.json", saturation)
    if ranks.first:
        new_tokens = params.report.new_tokens
        samples = generate_samples(*opened.load_model(), prompts, new_tokens) if prompts else []
        write_json(EVALUATION / f"{variant}_samples.json", samples)
    if tasks is not None:
        run.metrics.update(tasks(*opened.load_model()))


def plan(run: Run) -> Need:
    """Plan the stage. Samples are left out where their model does not fit, so then they are not counted."""
    needs_model = run.variant in SAMPLED and run.params.report.prompts != []
    if needs_model and (need := plan_stage(run, least_items=1)) and fits(need, run):
        return need
    return plan_stage(run, least_items=0)


def plan_stage(run: Run, least_items: int) -> Need:
    """Plan the stage with the whole model in memory for `least_items` texts, or for more if tasks ask for more."""
    params, variant = run.params, run.variant
    corpora = params.calibration.evaluation.corpora
    workload = run.workload(*(load_windows(WINDOWS / f"{corpus}.safetensors").token_ids for corpus in corpora))
    compared = variant != "original" and params.evaluation.compare_with_original
    items = max(params.runtime.task_batch_size if params.evaluation.tasks else 0, least_items)
    # The exported model is the fine-tuned one.
    checkpoint = open_checkpoint("finetuning" if variant == "export" else variant)
    in_memory = variant == "export"
    return plan_evaluation(checkpoint, workload, compared=compared, in_memory=in_memory, task_items=items)


def fits(need: Need, run: Run) -> bool:
    """Return whether the planned memory is there."""
    fits_gpu = run.device.type != "cuda" or need.gpu <= gpu_limit(run.params.runtime)
    return fits_gpu and need.memory <= memory_limit(run.params.runtime)


def prepare_prompts(run: Run) -> list[str]:
    """Return the prompts that this variant continues; none where the whole model does not fit into memory.

    Raises:
        SamplesError: a prompt of params.yaml is too long for the model.
    """
    report = run.params.report
    if run.variant not in SAMPLED or report.prompts == []:
        return []
    checkpoint = open_checkpoint(run.variant)
    room = find_max_positions(checkpoint.config) - report.new_tokens
    prompts = choose_prompts(report.prompts, checkpoint.tokenizer, room)
    need = plan_stage(run, least_items=1)
    if prompts and not fits(need, run):
        logger.warning(
            "report.prompts: the samples are left out. They need the whole model in memory, and %.1f GiB are not free. "
            "Set report.prompts: [] to leave them out, or runtime.max_memory.",
            (need.gpu if run.device.type == "cuda" else need.memory) / GIB,
        )
        return []
    return prompts


def open_checkpoint(variant: str) -> Checkpoint:
    """Return the checkpoint of a variant that is not the export."""
    return Checkpoint(QUANTIZED[variant], variant) if variant in QUANTIZED else Checkpoint(MODEL, "model")


@dataclass(frozen=True)
class Variant:
    """A variant, ready to be evaluated.

    Attributes:
        evaluate: takes corpus -> token ids, and returns a result like `evaluate_windows`.
        load_model: returns the whole model and its tokenizer, the same ones at every call.
        inputs: headers of the artifacts it was made from.
    """

    evaluate: Callable[..., tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]]
    load_model: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    inputs: dict[str, Header]


def open_variant(run: Run, start_token: int | None) -> Variant:
    """Return a variant.

    Args:
        start_token: the start token before every text, or None. It is left out after a prefix that ends in it.

    Raises:
        ArtifactError: an artifact is missing or does not fit the others.
        ExportError: the export is damaged.
    """
    variant, device = run.variant, run.device
    if variant == "export":
        limited = run.params.runtime.max_memory is not None
        model, tokenizer = load(EXPORT, device, unpacked=False if limited else None)
        inputs = {"checkpoint": read_header(EXPORT, "export")}
        return Variant(
            partial(evaluate_model, model, batch_size=run.params.runtime.batch_size), lambda: (model, tokenizer), inputs
        )
    checkpoint = open_checkpoint(variant)
    runner = run.runner(checkpoint)
    prefix_kv, text_start_token_id, inputs = open_prefix(run, checkpoint, runner, start_token)

    @cache
    def load_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        set_start_token_(checkpoint.tokenizer, text_start_token_id)
        return assemble_model(checkpoint, prefix_kv, device, text_start_token_id), checkpoint.tokenizer

    evaluate = partial(
        evaluate_windows,
        checkpoint,
        runner=runner,
        prefix_kv=prefix_kv,
        text_start_token_id=text_start_token_id,
    )
    return Variant(evaluate, load_model, inputs | {"checkpoint": checkpoint.header})


def prepare_tasks(params: Params) -> Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, Any]]:
    """Load the tasks and their data, and return a function that runs them on a model and returns metrics."""
    # lm-eval takes seconds to import, so it is imported only where there are tasks.
    from pipeline.evaluation.harness import run_tasks
    from pipeline.evaluation.task_data import open_tasks

    settings = params.evaluation
    tasks = open_tasks(settings.tasks, settings.task_folder, settings.skip_unavailable)
    return lambda model, tokenizer: run_tasks(model, tokenizer, tasks, params.runtime.task_batch_size)


def open_prefix(
    run: Run, checkpoint: Checkpoint, runner: BlockRunner, start_token: int | None
) -> tuple[torch.Tensor | None, int | None, dict[str, Header]]:
    """Return the variant's prefix KV [L, 2, kv_heads, P, d] or None, the start token after it or None, and headers."""
    if run.variant in QUANTIZED:
        text_start_token_id = load_start_token(checkpoint.folder / PREFIX, checkpoint.stage)
        return load_prefix_kv(checkpoint.folder, checkpoint.stage), text_start_token_id, {}
    if run.variant == "original":
        return None, start_token, {}
    prefix = load_prefix(PREFIXES, run.params.prefix.use, run.params.prefix.length)
    check_input(prefix.header, "model", checkpoint.header, PREFIXES)
    prefix_kv = compute_prefix_kv(checkpoint, prefix.embeddings, runner)
    return prefix_kv, find_text_start_token(start_token, prefix.initial_token_ids), {"prefix_training": prefix.header}


if __name__ == "__main__":
    open_stage("evaluation", main, __doc__, plan, VARIANTS, shared=True)
