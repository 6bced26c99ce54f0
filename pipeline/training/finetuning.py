"""Fine-tuning as a whole: where asked for, blocks one by one (`block_wise.py`); all together (`end_to_end.py`).

What is finished is kept in the place's work folder until the end, so that a killed run continues there; what the
artifact holds beside the checkpoint are losses for `dvc plots` and a report by block and epoch.
"""

import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.prefix_kv import PREFIX
from pipeline.blocks.quantized import block_settings
from pipeline.quantization.assembly import assemble_checkpoint
from pipeline.runtime.artifacts import load_tensors, write_rows
from pipeline.text.windows import prepend_start_token, unpack_start_token
from pipeline.training.block_wise import Models, finetune_blocks
from pipeline.training.end_to_end import EndToEndTrainer, ModelData, run_original
from pipeline.training.params import FinetuningParams
from pipeline.training.place import Place
from pipeline.training.trainer import Outcome

logger = logging.getLogger(__name__)

EPOCH_LOSSES = "plots/losses.json"
BLOCK_LOSSES = "plots/blocks.json"
END_TO_END_LOSSES = "plots/end_to_end.json"


@dataclass(frozen=True)
class FinetuningWindows:
    """Token ids of content alone.

    Attributes:
        train: [N, T], which blocks are trained on one by one, and saturation is counted on.
        end_to_end: [K, T'], which all are trained on together.
        validation: [M, T"], which choose the epoch, in both phases.
        text_start_token_id: what the original reads in front of each, or None; the quantized checkpoint knows its own.
    """

    train: torch.Tensor
    end_to_end: torch.Tensor
    validation: torch.Tensor
    text_start_token_id: int | None = None


def finetune(
    models: Models, windows: FinetuningWindows, params: FinetuningParams, place: Place, folder: Path
) -> dict[str, Any]:
    """From a quantized checkpoint to a better one.

    Args:
        folder: replaced by the checkpoint at the end.

    Returns:
        The stage's metrics.
    """
    blocks = finetune_blocks(models, windows.train, windows.validation, params, place)
    report: dict[str, Any] = {"blocks": blocks}
    metrics = summarise_blocks(blocks)
    prefix, _ = load_tensors(models.initial.folder / PREFIX, models.initial.stage)
    finished = place.work
    if params.end_to_end.enabled:
        finished = place.work / "end_to_end"
        outcome, kv = _finetune_end_to_end(models, prefix, windows, params, place, finished)
        prefix |= {} if kv is None else {"kv": kv}
        report["end_to_end"] = vars(outcome)
        metrics |= summarise_end_to_end(outcome)
    if place.ranks.first:
        initial, architecture = models.initial, models.initial.architecture
        names = (architecture.embedding, architecture.lm_head, architecture.final_norm)
        assemble_checkpoint(
            initial,
            folder,
            work_folder=finished,
            settings=[block_settings(initial, index) for index in range(initial.block_count)],
            embeddings={name: initial.load_tensor(name) for name in names},
            prefix=prefix,
            report=report,
            header=place.header,
            write_extras=lambda unfinished: write_losses(unfinished, report),
        )
        shutil.rmtree(place.work)
    place.ranks.wait()
    return metrics


def _finetune_end_to_end(
    models: Models,
    prefix: dict[str, torch.Tensor],
    windows: FinetuningWindows,
    params: FinetuningParams,
    place: Place,
    finished: Path,
) -> tuple[Outcome, torch.Tensor | None]:
    """Train the finished blocks together into `finished`. Return the outcome and the prefix's KV."""
    data = []
    for name, ids in (("train", windows.end_to_end), ("validation", windows.validation)):
        own = ids[place.ranks.slice_windows(len(ids))]
        reference = run_original(models.original, own, place.runner, windows.text_start_token_id)
        reference = place.offload.keep(f"original-{name}", reference)
        read = prepend_start_token(own, unpack_start_token(prefix))
        embedded = place.offload.keep(f"embedded-{name}", models.initial.embed(read))
        data.append(ModelData(embedded, reference, len(ids)))
    trainer = EndToEndTrainer(
        models.initial, models.original, prefix.get("kv"), params.end_to_end, params.autocast, place
    )
    place.ranks.wait()  # the first one may be through, and clear up, before another has read its blocks
    outcome = trainer.train_(*data, params.seed)
    if outcome.failure:
        logger.warning("end to end: %s; everything keeps its state of epoch %d", outcome.failure, outcome.best_epoch)
    if place.ranks.first:
        finished.mkdir(exist_ok=True)
        return outcome, trainer.write_(finished)
    return outcome, None


def write_losses(folder: Path, report: dict[str, Any]) -> None:
    """Write the losses of a report for dvc plots.

    losses.json has a row per block and epoch, relative to the block's start; blocks.json a row per block;
    end_to_end.json a row per epoch of the second phase.
    """
    epochs, before_after = [], []
    for block in report["blocks"]:
        first = block["validation_before"] or 1.0
        for row in block["history"]:
            own = {"place": block["block"] + row["epoch"] / len(block["history"]), "block": block["block"]}
            shares = {name: None if row[name] is None else row[name] / first for name in ("train", "validation")}
            epochs.append(own | {"epoch": row["epoch"]} | shares)
        after = block["validation_after"]
        values = {"before": block["validation_before"], "after": after, "ratio": after / first}
        before_after.append({"block": block["block"]} | values)
    write_rows(folder / EPOCH_LOSSES, epochs)
    write_rows(folder / BLOCK_LOSSES, before_after)
    write_rows(folder / END_TO_END_LOSSES, report.get("end_to_end", {"history": []})["history"])


def summarise_blocks(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """The stage's metrics of the block-wise phase; a warning names the blocks whose training was given up."""
    ratios = [block["validation_after"] / block["validation_before"] for block in blocks if block["validation_before"]]
    failed = [block["block"] for block in blocks if block["failure"]]
    if failed:
        logger.warning("training was given up in blocks %s; they keep their best state", ", ".join(map(str, failed)))
    mean = sum(math.log(max(ratio, 1e-6)) for ratio in ratios) / max(len(ratios), 1)
    return {
        "validation_ratio": round(math.exp(mean), 4),
        "changed_integers": round(sum(block["changed_integers"] for block in blocks) / len(blocks), 5),
        "blocks_unchanged": sum(block["best_epoch"] == 0 for block in blocks),
        "blocks_failed": failed,
    }


def summarise_end_to_end(outcome: Outcome) -> dict[str, Any]:
    """The stage's metrics of the second phase: KL from the original on validation windows, in nats."""
    losses = [row["validation"] for row in outcome.history]
    return {
        "end_to_end": {
            "kl_before": round(losses[0], 5),
            "kl_after": round(losses[outcome.best_epoch], 5),
            "best_epoch": outcome.best_epoch,
            "failed": outcome.failure is not None,
        }
    }
