"""Block-wise fine-tuning (PrefixQuant, arXiv:2410.05265, §5; EfficientQAT, arXiv:2407.11062, §3.2).

Blocks are trained in order. Each is trained on the hidden states that the quantized blocks before it give. Its target
comes from the reference, the rotated model in full precision. `finetuning.blocks.target` chooses the target:

    fp_input      reference block(hidden states in the reference); also compensates for the errors of earlier blocks
    quant_input   reference block(hidden states in the quantized model); only the block's own error counts
    both          the mean of the two losses

Prefix positions are keys and values in the cache. They are never outputs, so no loss contains them. AdamW trains
weights and quantizer parameters along a cosine. The epoch with the lowest loss on validation windows is kept. Epoch 0,
the start, is one of them, so no block gets worse on validation windows.

Each finished block, and the hidden states after it, are on disk before the next block starts.
"""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.blocks.prefix_kv import PREFIX, load_prefix_kv
from pipeline.blocks.quantized import (
    fill_block,
    find_quantized_linear,
    find_site_quantizers,
    load_block,
    require_settings,
)
from pipeline.blocks.walk import BlockRunner, load_blocks
from pipeline.inspection.saturation import PROBED_WINDOWS, advance_probed_
from pipeline.models.checkpoint import Checkpoint, save_block_file
from pipeline.models.layers import DecoderLayer
from pipeline.numerics.quantizer import dequantize_weight, quantize_weight
from pipeline.quantization.equalization import EQUALIZATION, Equalizer, scale_prefix, select_block
from pipeline.rotation.matrices import load_rotation
from pipeline.runtime.artifacts import load_tensors, write_json
from pipeline.runtime.progress import show_progress
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.streams import Offload, Stream, as_tensor
from pipeline.runtime.unfinished import load_generation, save_generation
from pipeline.text.windows import load_start_token, prepend_start_token
from pipeline.training.losses import LOSSES
from pipeline.training.params import FinetuningParams
from pipeline.training.place import Place
from pipeline.training.trainables import Trainables, freeze_, unfreeze_
from pipeline.training.trainer import Rows, Trainer, decay_along_cosine

logger = logging.getLogger(__name__)

_REPORT = "block-{index:05d}.json"
TARGETS = {"fp_input": ("fp_input",), "quant_input": ("quant_input",), "both": ("fp_input", "quant_input")}


@dataclass
class BlockData:
    """Windows that a block is trained or validated on.

    Attributes:
        inputs: [N, T, D], this rank's windows after the quantized blocks before the block.
        targets: one or two times [N, T, D], outputs of the reference block. Empty where no loss is computed.
        count: the windows of all ranks.
    """

    inputs: Stream
    targets: list[Stream]
    count: int


class BlockTrainer(Trainer[BlockData]):
    """Trains one block."""

    def __init__(
        self,
        block: DecoderLayer,
        trainables: Trainables,
        *,
        prefix_kv: torch.Tensor | None,
        runner: BlockRunner,
        params: FinetuningParams,
        ranks: Ranks,
    ) -> None:
        """Set up the optimizer.

        Args:
            block: the block that `unfreeze_` has returned `trainables` of.
            prefix_kv: [2, heads, P, d], the prefix in this block, or None.
        """
        blocks = params.blocks
        super().__init__(
            [(trainables.quantizers, blocks.quant_lr), (trainables.weights, blocks.weight_lr)],
            schedule=blocks,
            weight_decay=blocks.weight_decay,
            device=runner.device,
            autocast=params.autocast,
            ranks=ranks,
        )
        self.block, self.prefix_kv, self.runner = block, prefix_kv, runner
        self.loss, self.min_lr_factor = LOSSES[blocks.loss_type], blocks.min_lr_factor

    def learning_rate(self, highest: float, step_index: int, step_count: int) -> float:
        return decay_along_cosine(highest, step_index / step_count, self.min_lr_factor)

    def losses(self, data: BlockData, rows: Rows) -> torch.Tensor:
        """Return the loss of each of this rank's windows `rows`, the mean over the targets, [B]."""
        output = self.runner.run(self.block, data.inputs[rows].to(self.device), self.prefix_kv)
        return torch.stack([self.loss(output, target[rows].to(self.device)) for target in data.targets]).mean(0)


@dataclass(frozen=True)
class Models:
    """The original model, the rotated one in full precision, and the quantized one to start from."""

    original: Checkpoint
    rotated: Checkpoint
    initial: Checkpoint


class _Streams:
    """Hidden states of this rank's windows before a block, by split: "train" and "validation".

    Attributes:
        quantized: split -> [N, T, D] after the quantized blocks.
        reference: split -> [N, T, D] after the reference blocks; only with the target fp_input or both.
        outputs: split -> [N, T, D], room for the outputs of a reference block for `quantized`; only with the target
            quant_input or both.
    """

    def __init__(
        self,
        models: Models,
        windows: dict[str, torch.Tensor],
        *,
        targets: Collection[str],
        measured_splits: Collection[str],
        offload: Offload,
        saved: dict[str, torch.Tensor],
    ) -> None:
        """Embed the windows, or continue with the saved hidden states of an unfinished run.

        Args:
            windows: split -> token ids [N, T].
            targets: names of `TARGETS`.
            measured_splits: the splits whose loss is computed. Only they need targets.
            saved: from `saved_tensors`; empty at the first block.
        """
        self.quantized: dict[str, Stream] = {}
        self.reference: dict[str, Stream] = {}
        self.outputs: dict[str, Stream] = {}

        def begin(kind: str, split: str, checkpoint: Checkpoint) -> Stream:
            hidden = saved[f"{kind}.{split}"] if saved else checkpoint.embed(windows[split])
            return offload.keep(f"{kind}-{split}", hidden)

        for split in windows:
            self.quantized[split] = begin("quantized", split, models.initial)
        for split in measured_splits:
            if "fp_input" in targets:
                self.reference[split] = begin("reference", split, models.rotated)
            if "quant_input" in targets:
                room = torch.empty_like(as_tensor(self.quantized[split]))
                self.outputs[split] = offload.keep(f"outputs-{split}", room)

    def advance_reference_(
        self, runner: BlockRunner, block: DecoderLayer, prefix_kv: torch.Tensor | None
    ) -> dict[str, list[Stream]]:
        """Run a reference block on all windows; return split -> the targets of the quantized block."""
        targets: dict[str, list[Stream]] = {split: [] for split in self.quantized}
        for split, inputs in self.quantized.items():
            if split in self.reference:
                runner.advance_(block, self.reference[split], prefix_kv)
                targets[split].append(self.reference[split])
            if split in self.outputs:
                runner.advance_(block, inputs, prefix_kv, into=self.outputs[split])
                targets[split].append(self.outputs[split])
        return targets

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """Return the state from which an unfinished run continues at this block."""
        streams = {"quantized": self.quantized, "reference": self.reference}
        return {
            f"{kind}.{split}": as_tensor(stream)
            for kind, of_splits in streams.items()
            for split, stream in of_splits.items()
        }


def finetune_blocks(
    models: Models,
    train: torch.Tensor,
    validation: torch.Tensor,
    params: FinetuningParams,
    place: Place,
) -> list[dict[str, Any]]:
    """Train all blocks, one after another, and write them to `place.work_folder`.

    An unfinished run there with the same header is continued. Unless `finetuning.blocks.enabled`, blocks are measured
    and written untrained.

    Args:
        train: windows [N, T] of content. The start token that the quantized model reads between prefix and text, if
            any, is put before each; it counts in the losses like any other token.
        validation: windows [M, T], likewise.

    Returns:
        Per block: {"block", "validation_before", "validation_after", "best_epoch", "failure", "history",
        "changed_integers": share of the weights' integers that differ from the start's, "saturation"}.
    """
    rotated, initial, runner, ranks = models.rotated, models.initial, place.runner, place.ranks
    place.work_folder.mkdir(parents=True, exist_ok=True)
    text_start_token_id = load_start_token(initial.folder / PREFIX, initial.stage)
    windows = {
        split: prepend_start_token(token_ids[ranks.slice_windows(len(token_ids))], text_start_token_id)
        for split, token_ids in {"train": train, "validation": validation}.items()
    }
    counts = {"train": len(train), "validation": len(validation)}
    measured_splits = ["train", "validation"]
    if not params.blocks.enabled:  # saturation is counted on the first train windows, and nothing needs the others
        windows["train"] = windows["train"][:PROBED_WINDOWS]
        measured_splits = ["validation"]
    start, saved = load_generation(place.work_folder, place.header, ranks)
    if start:
        logger.info("continuing at block %d of %d", start, initial.block_count)
    streams = _Streams(
        models,
        windows,
        targets=TARGETS[params.blocks.target],
        measured_splits=measured_splits,
        offload=place.offload,
        saved=saved,
    )
    del saved
    prefix_kv = load_prefix_kv(initial.folder, initial.stage)
    scales, r2 = load_scales(initial), load_rotation(rotated.folder, "r2")
    reference_blocks = load_blocks(rotated, runner.device, start)
    for index in show_progress(range(start, initial.block_count), initial.block_count - start, "fine-tuning"):
        block_kv = reference_kv = runner.take_prefix(prefix_kv, index)
        if block_kv is not None:  # the quantized checkpoint's prefix is equalized, as its blocks are
            reference_kv = scale_prefix(block_kv, select_block(scales, index), r2, inverse=True)
        reference_block = next(reference_blocks)
        targets = streams.advance_reference_(runner, reference_block, reference_kv)
        del reference_block
        data = {split: BlockData(inputs, targets[split], counts[split]) for split, inputs in streams.quantized.items()}
        report, tensors = _finetune_block(models, index, data=data, prefix_kv=block_kv, params=params, place=place)
        if ranks.first:
            write_json(place.work_folder / _REPORT.format(index=index), {"block": index} | report)
            save_block_file(place.work_folder, initial.architecture, index, tensors, place.header)
        save_generation(place.work_folder, streams.saved_tensors(), index + 1, place.header, ranks)
    paths = [place.work_folder / _REPORT.format(index=index) for index in range(initial.block_count)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _finetune_block(
    models: Models,
    index: int,
    *,
    data: dict[str, BlockData],
    prefix_kv: torch.Tensor | None,
    params: FinetuningParams,
    place: Place,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train a block, then run it on its inputs in place; return its report and its tensors."""
    architecture, runner = models.initial.architecture, place.runner
    block = load_block(models.initial, index, runner.device)
    weights = None
    if params.start == "full_precision":
        weights = use_full_precision_(block, models.rotated, models.initial, index)
    elif params.blocks.weight_lr > 0:
        names = architecture.of_block(block).linears
        weights = {name: find_quantized_linear(block, name).dense_weight(torch.float32) for name in names}
    trainables = unfreeze_(block, architecture, weights=weights)
    del weights  # `trainables` has copies
    trainer = BlockTrainer(block, trainables, prefix_kv=prefix_kv, runner=runner, params=params, ranks=place.ranks)
    outcome = trainer.train_(data["train"], data["validation"], params.seed * 10_000 + index)
    freeze_(block)
    saturation = advance_probed_(runner, block, architecture, data["train"].inputs, prefix_kv)
    runner.advance_(block, data["validation"].inputs, prefix_kv)
    if outcome.failure:
        logger.warning("block %d: %s. It keeps its state of epoch %d.", index, outcome.failure, outcome.best_epoch)
    losses = [row["validation"] for row in outcome.history]
    report = {
        "validation_before": losses[0],
        "validation_after": losses[outcome.best_epoch],
        "best_epoch": outcome.best_epoch,
        "failure": outcome.failure,
        "changed_integers": _measure_changes(block, models.initial, index),
        "history": outcome.history,
        "saturation": saturation,
    }
    return report, block.state_dict()


def _measure_changes(block: DecoderLayer, initial: Checkpoint, index: int) -> float:
    """Return the share of the integers of a block's weights that differ from `initial`."""
    names = initial.architecture.of_block(block).linears
    after = {f"{name}.weight": find_quantized_linear(block, name).weight.cpu() for name in names}
    before = initial.load_block_tensors(index)  # read again, rather than kept in memory during training
    changed, count = count_changes(before, after)
    return changed / max(count, 1)  # weights of 16 bits have no integers


def count_changes(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Return how many elements of the weights of `after` differ from those of `before`, and how many there are.

    Args:
        before, after: name -> tensor, on the same device; `before` may have more names. Only those in `after` that end
            in `.weight` and hold integers count.
    """
    names = [name for name, codes in after.items() if name.endswith(".weight") and not codes.is_floating_point()]
    changed = sum(int(torch.ne(after[name], before[name]).sum()) for name in names)
    return changed, sum(after[name].numel() for name in names)


def load_scales(initial: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the scales by which the blocks of a quantized checkpoint were equalized, for `select_block`."""
    path = initial.folder / EQUALIZATION
    return load_tensors(path, initial.stage)[0] if path.is_file() else {}


def use_full_precision_(
    block: DecoderLayer, rotated: Checkpoint, initial: Checkpoint, index: int
) -> dict[str, torch.Tensor]:
    """Prepare a quantized block for a start from full-precision weights, and return these weights.

    In place, each bias becomes the one that belongs to these weights rounded to nearest: where weights are centered, it
    corrects the mean error of this rounding, instead of the error of the integers of `initial`.

    Args:
        block: block `index` of `initial`.

    Returns:
        Linear -> weight [out, in] of the rotated model, equalized like the block.
    """
    architecture, settings = initial.architecture.of_block(block), require_settings(initial, index)
    rotated_block = fill_block(rotated, index, rotated.load_block_tensors(index), settings)
    equalizer = Equalizer(rotated_block, architecture, settings, load_rotation(rotated.folder, "r2"))
    equalizer.scale_(select_block(load_scales(initial), index))
    quantizers, weights = find_site_quantizers(block, architecture), {}
    for site, readers in architecture.site_readers.items():
        for name in readers:
            linear, source = find_quantized_linear(block, name), find_quantized_linear(rotated_block, name)
            weights[name] = source.weight.to(linear.weight.device)
            if linear.bias is None:
                continue
            linear.bias = torch.zeros_like(linear.bias) if source.bias is None else source.bias.to(linear.bias)
            if linear.spec.centered and quantizers[site].spec.centered:
                scale, zero_point = linear.scales, linear.weight_zero_point
                grid = linear.spec.grid
                codes = quantize_weight(weights[name], scale, grid, zero_point)
                error = dequantize_weight(codes, scale, zero_point, grid) - weights[name].float()
                linear.correct_bias_(-(error @ quantizers[site].shift))
    return weights
