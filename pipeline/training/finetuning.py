"""Fine-tuning as a whole: first block by block (`block_wise.py`), then end to end (`end_to_end.py`), each if enabled.

Finished work stays in the work folder until the end, so that a killed run continues. Next to the checkpoint, the
artifact holds losses for `dvc plots` and a report by block and epoch.
"""

import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.prefix_kv import PREFIX
from pipeline.blocks.quantized import require_settings
from pipeline.models.checkpoint import LM_HEAD, Checkpoint, load_block_file
from pipeline.quantization.assembly import assemble_checkpoint
from pipeline.runtime.artifacts import load_tensors, write_rows
from pipeline.text.windows import TokenRows, unpack_start_token
from pipeline.training.block_wise import Models, count_changes, finetune_blocks
from pipeline.training.end_to_end import EmbeddedWindows, EndToEndTrainer, ModelData
from pipeline.training.params import FinetuningParams
from pipeline.training.place import Place
from pipeline.training.reference import AlongsideReference, CachedReference, Reference
from pipeline.training.trainer import Outcome

logger = logging.getLogger(__name__)

EPOCH_LOSSES = "plots/losses.json"
BLOCK_LOSSES = "plots/blocks.json"
END_TO_END_LOSSES = "plots/end_to_end.json"
STEP_LOSSES = "plots/steps.json"


@dataclass(frozen=True)
class FinetuningWindows:
    """Token ids of content alone.

    Attributes:
        train: [N, T], to train single blocks on and to count saturation on.
        end_to_end: [K, T'], to train all blocks on together; may be in their file.
        validation: [M, T"], to choose the epoch in both phases.
        text_start_token_id: the start token that the original reads before each text, or None. For the quantized
            model, the one in its checkpoint counts.
    """

    train: torch.Tensor
    end_to_end: TokenRows
    validation: torch.Tensor
    text_start_token_id: int | None = None


def finetune(
    models: Models, windows: FinetuningWindows, params: FinetuningParams, place: Place, folder: Path
) -> dict[str, Any]:
    """Fine-tune a quantized checkpoint.

    Args:
        folder: replaced by the new checkpoint.

    Returns:
        The stage's metrics.
    """
    initial = models.initial
    blocks = finetune_blocks(models, windows.train, windows.validation, params, place)
    report: dict[str, Any] = {"blocks": blocks}
    metrics = summarise_blocks(blocks)
    prefix, _ = load_tensors(initial.folder / PREFIX, initial.stage)
    block_folder = place.work_folder
    if params.end_to_end.enabled:
        block_folder = place.work_folder / "end_to_end"
        outcome, prefix_kv = _finetune_end_to_end(
            models, windows, prefix=prefix, params=params, place=place, block_folder=block_folder
        )
        if prefix_kv is not None:
            prefix["kv"] = prefix_kv
        report["end_to_end"] = vars(outcome)
        metrics |= summarise_end_to_end(outcome)
    if place.ranks.first:
        if params.end_to_end.enabled and params.end_to_end.weights != "fixed":
            metrics["changed_integers"] = round(_measure_changes(initial, block_folder, place), 5)
        assemble_checkpoint(
            initial,
            folder,
            work_folder=block_folder,
            settings=[require_settings(initial, index) for index in range(initial.block_count)],
            embeddings=initial.load_embeddings(),
            lm_head=initial.settings.get(LM_HEAD),
            prefix=prefix,
            report=report,
            header=place.header,
            write_extras=lambda unfinished: write_losses(unfinished, report),
        )
        shutil.rmtree(place.work_folder)
    place.ranks.wait()
    return metrics


def _finetune_end_to_end(
    models: Models,
    windows: FinetuningWindows,
    *,
    prefix: dict[str, torch.Tensor],
    params: FinetuningParams,
    place: Place,
    block_folder: Path,
) -> tuple[Outcome, torch.Tensor | None]:
    """Train the finished blocks together and write them to `block_folder`; return the outcome and the prefix's KV."""

    def prepare(split: str, token_ids: TokenRows, kind: str) -> ModelData:
        mine = place.ranks.slice_windows(len(token_ids))
        rank_windows = token_ids[mine] if isinstance(token_ids, torch.Tensor) else token_ids.select(mine)
        reference: Reference
        if kind == "cached":
            reference = CachedReference.compute(
                models.original,
                rank_windows,
                place.runner,
                text_start_token_id=windows.text_start_token_id,
                path=place.work_folder / f"reference-{split}-{place.ranks.rank:05d}-of-{place.ranks.world}",
                header=place.header,
            )
        else:
            reference = AlongsideReference(models.original, rank_windows, place.runner, windows.text_start_token_id)
        return ModelData(
            EmbeddedWindows(models.initial, rank_windows, unpack_start_token(prefix)), reference, len(token_ids)
        )

    train = prepare("train", windows.end_to_end, params.end_to_end.reference)
    validation = prepare("validation", windows.validation, "cached")
    trainer = EndToEndTrainer(
        models.initial,
        models.original,
        prefix_kv=prefix.get("kv"),
        params=params.end_to_end,
        autocast=params.autocast,
        place=place,
    )
    place.ranks.wait()  # the first rank may finish and clear up before another one has read its blocks
    outcome = trainer.train_(train, validation, params.seed)
    if outcome.failure:
        logger.warning("end to end: %s. Everything keeps its state of epoch %d.", outcome.failure, outcome.best_epoch)
    if not place.ranks.first:
        return outcome, None
    block_folder.mkdir(exist_ok=True)
    return outcome, trainer.write_(block_folder)


def _measure_changes(initial: Checkpoint, block_folder: Path, place: Place) -> float:
    """Return the share of the integers of all weights that differ between `initial` and the blocks in a folder."""
    counts = [
        count_changes(
            initial.load_block_tensors(index),
            load_block_file(block_folder, initial.architecture, index, place.header.stage),
        )
        for index in range(initial.block_count)
    ]
    changed, count = (sum(values) for values in zip(*counts, strict=True))
    return changed / max(count, 1)


def write_losses(folder: Path, report: dict[str, Any]) -> None:
    """Write the losses of a report for dvc plots.

    losses.json has a row per block and epoch, relative to the block's start; blocks.json a row per block;
    end_to_end.json a row per epoch of the second phase; steps.json a row per step of it, numbered from 1.
    """
    epochs, before_after = [], []
    for block in report["blocks"]:
        first = block["validation_before"] or 1.0
        for row in block["history"]:
            position = {"place": block["block"] + row["epoch"] / len(block["history"]), "block": block["block"]}
            ratios = {name: None if row[name] is None else row[name] / first for name in ("train", "validation")}
            epochs.append(position | {"epoch": row["epoch"]} | ratios)
        after = block["validation_after"]
        values = {"before": block["validation_before"], "after": after, "ratio": after / first}
        before_after.append({"block": block["block"]} | values)
    write_rows(folder / EPOCH_LOSSES, epochs)
    write_rows(folder / BLOCK_LOSSES, before_after)
    history = report.get("end_to_end", {"history": []})["history"]
    columns = [{name: value for name, value in row.items() if name != "step_losses"} for row in history]
    write_rows(folder / END_TO_END_LOSSES, columns)
    losses = [loss for row in history for loss in row.get("step_losses", ())]
    write_rows(folder / STEP_LOSSES, [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)])


def summarise_blocks(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the metrics of the block-wise phase; warn about blocks whose training failed."""
    ratios = [block["validation_after"] / block["validation_before"] for block in blocks if block["validation_before"]]
    failed = [block["block"] for block in blocks if block["failure"]]
    if failed:
        logger.warning("training failed in blocks %s; they keep their best state", ", ".join(map(str, failed)))
    mean = sum(math.log(max(ratio, 1e-6)) for ratio in ratios) / max(len(ratios), 1)
    return {
        "validation_ratio": round(math.exp(mean), 4),
        "changed_integers": round(sum(block["changed_integers"] for block in blocks) / len(blocks), 5),
        "blocks_unchanged": sum(block["best_epoch"] == 0 for block in blocks),
        "blocks_failed": failed,
    }


def summarise_end_to_end(outcome: Outcome) -> dict[str, Any]:
    """Return the metrics of the second phase: KL from the original on validation windows, in nats."""
    losses = [row["validation"] for row in outcome.history]
    return {
        "end_to_end": {
            "kl_before": round(losses[0], 5),
            "kl_after": round(losses[outcome.best_epoch], 5),
            "best_epoch": outcome.history[outcome.best_epoch]["epoch"],
            "failed": outcome.failure is not None,
        }
    }
