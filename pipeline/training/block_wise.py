"""Block-wise fine-tuning (PrefixQuant, arXiv:2410.05265, §5; EfficientQAT, arXiv:2407.11062, §3.2).

Blocks in order. Two streams of hidden states stand before a block: what the quantized blocks before it made of the
windows, which it is trained on, and the reference's, from which its target comes. The reference of this phase is the
rotated model in full precision:

    fp_input      block(full-precision input): also makes up for what the blocks before it lost
    quant_input   block(quantized input): only the block's own error
    both          the mean of the two losses

Prefix positions are keys and values in the cache, never outputs, and so in no loss. Weights and quantizer parameters
are trained by AdamW along a cosine; after each epoch the loss of validation windows is taken, and in the end the best
epoch stands. Epoch 0, the start, counts: no block gets worse on validation windows.

Each finished block is on disk before the next one starts, with the streams behind it.
"""

import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.blocks.prefix_kv import PREFIX, load_prefix_kv
from pipeline.blocks.quantized import block_settings, fill_block, find_site_quantizers, load_block
from pipeline.blocks.walk import BlockRunner, load_blocks
from pipeline.inspection.saturation import PROBED_WINDOWS, advance_probed_
from pipeline.models.checkpoint import (
    Checkpoint,
    save_block_file,
)
from pipeline.numerics.quantizer import dequantize_weight, quantize_weight
from pipeline.quantization.equalization import EQUALIZATION, Equalizer, scale_prefix, select_block
from pipeline.rotation.matrices import load_rotation
from pipeline.runtime.artifacts import load_tensors, write_json
from pipeline.runtime.progress import show_progress
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.streams import Stream, as_tensor
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
    """What a block is trained on.

    Attributes:
        inputs: [N, T, D], this rank's windows as the quantized blocks before it made them.
        targets: one or two times [N, T, D], what the block should make of them.
        count: how many windows all ranks have together.
    """

    inputs: Stream
    targets: list[Stream]
    count: int


class BlockTrainer(Trainer[BlockData]):
    """Trains one block on windows before it."""

    def __init__(
        self,
        block: nn.Module,
        trainables: Trainables,
        prefix_kv: torch.Tensor | None,
        runner: BlockRunner,
        params: FinetuningParams,
        ranks: Ranks,
    ) -> None:
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
        self.loss_of, self.min_lr_factor = LOSSES[blocks.loss_type], blocks.min_lr_factor

    def learning_rate(self, highest: float, step_index: int, step_count: int) -> float:
        return decay_along_cosine(highest, step_index / step_count, self.min_lr_factor)

    def losses(self, data: BlockData, rows: Rows) -> torch.Tensor:
        """Of each of this rank's windows `rows`, [B]: the mean over the targets."""
        output = self.runner.run(self.block, data.inputs[rows].to(self.device), self.prefix_kv)
        return torch.stack([self.loss_of(output, target[rows].to(self.device)) for target in data.targets]).mean(0)


@dataclass(frozen=True)
class Models:
    """The original, the rotated one in full precision, and the quantized one to start from."""

    original: Checkpoint
    rotated: Checkpoint
    initial: Checkpoint


def finetune_blocks(
    models: Models,
    train: torch.Tensor,
    validation: torch.Tensor,
    params: FinetuningParams,
    place: Place,
) -> list[dict[str, Any]]:
    """Train all blocks into `place.work`, continuing there if an earlier run with the same header was cut short.

    Windows [N, T] and [M, T] are content alone; the start token that the quantized model reads in front of them, where
    it reads one, stands there in every stream and counts like any other token.

    Returns:
        Per block: {"block", "validation_before", "validation_after", "best_epoch", "failure", "history",
        "changed_integers": share of the weights' integers that differ from the start's, "saturation"}.
    """
    rotated, initial, runner, ranks = models.rotated, models.initial, place.runner, place.ranks
    place.work.mkdir(parents=True, exist_ok=True)
    prefix_kv = load_prefix_kv(initial.folder, initial.stage)
    wanted = TARGETS[params.blocks.target]
    start_token = load_start_token(initial.folder / PREFIX, initial.stage)
    windows = {
        split: prepend_start_token(ids[ranks.slice_windows(len(ids))], start_token)
        for split, ids in {"train": train, "validation": validation}.items()
    }
    if not params.blocks.enabled:  # the rest of them nobody would look at
        windows["train"] = windows["train"][:PROBED_WINDOWS]
    counts = {"train": len(train), "validation": len(validation)}
    start, saved = load_generation(place.work, place.header, ranks)
    if start:
        logger.info("continuing at block %d of %d", start, initial.block_count)
    judged = [*windows] if params.blocks.enabled else ["validation"]  # what needs a target
    streams: dict[str, dict[str, Stream]] = {}
    for kind, checkpoint in ({"quantized": initial} | ({"reference": rotated} if "fp_input" in wanted else {})).items():
        streams[kind] = {
            split: place.offload.keep(f"{kind}-{split}", saved[f"{kind}.{split}"] if start else checkpoint.embed(ids))
            for split, ids in windows.items()
            if kind == "quantized" or split in judged
        }
    del saved
    own_target = {
        split: place.offload.keep(f"target-{split}", torch.empty_like(as_tensor(streams["quantized"][split])))
        for split in judged
        if "quant_input" in wanted
    }
    reference_blocks = load_blocks(rotated, runner.device, start)
    scales, r2 = load_scales(initial), load_rotation(rotated.folder, "r2")
    for index in show_progress(range(start, initial.block_count), initial.block_count - start, "fine-tuning"):
        reference_block = next(reference_blocks)
        own_prefix = reference_prefix_kv = runner.take_prefix(prefix_kv, index)
        if own_prefix is not None:
            reference_prefix_kv = scale_prefix(own_prefix, select_block(scales, index), r2, inverse=True)
        data = {}
        for split, inputs in streams["quantized"].items():
            targets = []
            if split in judged and "fp_input" in wanted:
                runner.advance_(reference_block, streams["reference"][split], reference_prefix_kv)
                targets.append(streams["reference"][split])
            if split in judged and "quant_input" in wanted:
                runner.advance_(reference_block, inputs, reference_prefix_kv, into=own_target[split])
                targets.append(own_target[split])
            data[split] = BlockData(inputs, targets, counts[split])
        del reference_block
        report, tensors = _finetune_block(models, index, data, own_prefix, params, place)
        if ranks.first:
            write_json(place.work / _REPORT.format(index=index), {"block": index} | report)
            save_block_file(place.work, initial.architecture, index, tensors, place.header)
        finished = {
            f"{kind}.{split}": as_tensor(stream) for kind, own in streams.items() for split, stream in own.items()
        }
        save_generation(place.work, finished, index + 1, place.header, ranks)
    paths = [place.work / _REPORT.format(index=index) for index in range(initial.block_count)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _finetune_block(
    models: Models,
    index: int,
    data: dict[str, BlockData],
    prefix_kv: torch.Tensor | None,
    params: FinetuningParams,
    place: Place,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train one block and move its inputs, the quantized streams, behind it; its report and its tensors."""
    architecture, runner = models.initial.architecture, place.runner
    block = load_block(models.initial, index, runner.device)
    weights = None
    if params.start == "full_precision":
        weights = use_full_precision_(block, models.rotated, models.initial, index)
    elif params.blocks.weight_lr > 0:
        weights = {name: block.get_submodule(name).dense_weight(torch.float32) for name in architecture.linears}
    trainables = unfreeze_(block, architecture, weights=weights)
    del weights  # trained is a copy
    trainer = BlockTrainer(block, trainables, prefix_kv, runner, params, place.ranks)
    outcome = trainer.train_(data["train"], data["validation"], params.seed * 10_000 + index)
    freeze_(block)
    saturation = advance_probed_(runner, block, architecture, data["train"].inputs, prefix_kv)
    runner.advance_(block, data["validation"].inputs, prefix_kv)
    if outcome.failure:
        logger.warning("block %d: %s; it keeps its state of epoch %d", index, outcome.failure, outcome.best_epoch)
    before = models.initial.load_block_tensors(index)  # read again rather than kept while training
    pairs = [(block.get_submodule(name).weight, before[f"{name}.weight"]) for name in architecture.linears]
    changed = sum((after.cpu() != weight).sum().item() for after, weight in pairs)
    losses = [row["validation"] for row in outcome.history]
    report = {
        "validation_before": losses[0],
        "validation_after": losses[outcome.best_epoch],
        "best_epoch": outcome.best_epoch,
        "failure": outcome.failure,
        "changed_integers": changed / sum(weight.numel() for _, weight in pairs),
        "history": outcome.history,
        "saturation": saturation,
    }
    return report, block.state_dict()


def load_scales(initial: Checkpoint) -> dict[str, torch.Tensor]:
    """What all blocks were equalized by, for `select_block`."""
    path = initial.folder / EQUALIZATION
    return load_tensors(path, initial.stage)[0] if path.is_file() else {}


def use_full_precision_(
    block: nn.Module, rotated: Checkpoint, initial: Checkpoint, index: int
) -> dict[str, torch.Tensor]:
    """Linear -> the rotated model's weight [out, in] of block `index`, equalized as the quantized one was.

    The biases of the quantized `block` become those that go with these weights rounded to nearest, in place: of a
    centered weight, with the correction of its own mean error instead of that of `initial`'s integers.
    """
    architecture = initial.architecture
    reference = fill_block(rotated, index, rotated.load_block_tensors(index), block_settings(initial, index))
    equalizer = Equalizer(reference, architecture, block_settings(initial, index), load_rotation(rotated.folder, "r2"))
    equalizer.scale_(select_block(load_scales(initial), index))
    quantizers, weights = find_site_quantizers(block, architecture), {}
    for site, readers in architecture.site_readers.items():
        for name in readers:
            linear, source = block.get_submodule(name), reference.get_submodule(name)
            weights[name] = source.weight.to(linear.weight.device)
            if linear.bias is None:
                continue
            linear.bias = torch.zeros_like(linear.bias) if source.bias is None else source.bias.to(linear.bias)
            if linear.spec.centered and quantizers[site].spec.centered:
                scale, zero_point = linear.weight_scale, linear.weight_zero_point
                grid = linear.spec.grid
                codes = quantize_weight(weights[name], scale, grid, zero_point)
                error = dequantize_weight(codes, scale, zero_point, grid) - weights[name].float()
                linear.correct_bias_(-(error @ quantizers[site].shift))
    return weights
