"""Train what is left to train through the whole quantized model: scales, zero points, clip factors, and, where asked
for, norm weights and the prefix's keys and values.

The loss is KL(reference ‖ quantized), in nats, on calibration windows. The reference of this phase is the original
model, neither rotated nor quantized, without a prefix. What the next blocks make of an error counts, not its size.
Integers of the weights stand still. All blocks are in memory where there is room. Where
what they keep for the backward pass does not fit beside them, only hidden states between them are kept, and they are
run again; where the blocks do not fit, they are streamed, forwards and backwards (`streamed.py`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.blocks.quantized import block_settings, fill_block
from pipeline.blocks.walk import BlockRunner, walk
from pipeline.models.checkpoint import Checkpoint, load_block_file, save_block_file
from pipeline.runtime.streams import Stream
from pipeline.text.windows import prepend_start_token
from pipeline.training.divergence import mean_divergence
from pipeline.training.params import EndToEndParams
from pipeline.training.place import Place
from pipeline.training.streamed import TrainedBlocks
from pipeline.training.trainables import freeze_, unfreeze_
from pipeline.training.trainer import Rows, Trainer, decay_along_cosine

_STATE = "end-to-end.safetensors"


@dataclass
class ModelData:
    """This rank's windows.

    Attributes:
        inputs: embedded, as the quantized model reads them: [N, T, D], or [N, T + 1, D] with a start token in front.
        reference: [N, T, D], hidden states of the original model after its final norm, of content alone.
        count: how many windows all ranks have together.
    """

    inputs: Stream
    reference: Stream
    count: int


class EndToEndTrainer(Trainer[ModelData]):
    """Trains the finished blocks of `work` together."""

    bar = "end to end"

    def __init__(
        self,
        initial: Checkpoint,
        original: Checkpoint,
        prefix_kv: torch.Tensor | None,
        params: EndToEndParams,
        autocast: str,
        place: Place,
    ) -> None:
        """The blocks in `place.work`, and how far an unfinished run with the same header has trained them.

        Args:
            initial: the quantized checkpoint the blocks are of: final norm, lm_head, settings.
            original: the model whose logits are the target.
            prefix_kv: [L, 2, kv_heads, P, d] or None.
            autocast: the kind of it, as in params.yaml.
        """
        self.initial, self.runner, self.place = initial, place.runner, place
        architecture, device = initial.architecture, self.runner.device
        self.blocks = TrainedBlocks(architecture, self._load_tensors, device, place.keeping, place.offload)
        quantizers, norms = [], []
        for index in range(initial.block_count):
            block = fill_block(initial, index, self._load_tensors(index), block_settings(initial, index), device)
            found = unfreeze_(block, architecture, norms=params.norm_lr > 0)
            quantizers += found.quantizers
            norms += found.norms
            self.blocks.append(block, (*found.quantizers, *found.norms))
        self.prefix_kv = None if prefix_kv is None else nn.Parameter(prefix_kv.to(device, torch.float32).clone())
        self.norm = initial.load_final_norm().to(device).requires_grad_(False)
        self.lm_head, self.reference_lm_head = (c.load_lm_head().to(device) for c in (initial, original))
        groups = [
            (quantizers, params.quant_lr),
            (norms, params.norm_lr),
            ([] if self.prefix_kv is None else [self.prefix_kv], params.prefix_lr),
        ]
        super().__init__(groups, schedule=params, weight_decay=0.0, device=device, autocast=autocast, ranks=place.ranks)
        self.min_lr_factor = params.min_lr_factor
        self.resume_(place.work / _STATE, place.header)

    def learning_rate(self, highest: float, step_index: int, step_count: int) -> float:
        return decay_along_cosine(highest, step_index / step_count, self.min_lr_factor)

    def losses(self, data: ModelData, rows: Rows) -> torch.Tensor:
        """The divergence of each of this rank's windows `rows`, [B]."""
        hidden = data.inputs[rows].to(self.device)
        for index in range(len(self.blocks)):
            own_prefix = None if self.prefix_kv is None else self.prefix_kv[index]
            hidden = self.blocks.run(self._run_block, index, hidden, own_prefix)
        reference = data.reference[rows].to(self.device)
        normed = self.norm(hidden[:, -reference.shape[1] :])
        return torch.stack(
            [
                mean_divergence(ours, target, self.lm_head, self.reference_lm_head)
                for ours, target in zip(normed, reference, strict=True)
            ]
        )

    def _run_block(self, index: int, hidden: torch.Tensor, prefix_kv: torch.Tensor | None) -> torch.Tensor:
        return self.runner.run(self.blocks[index], hidden, prefix_kv)

    def _load_tensors(self, index: int) -> dict[str, torch.Tensor]:
        return load_block_file(self.place.work, self.initial.architecture, index, self.place.header.stage)

    def write_(self, blocks: Path) -> torch.Tensor | None:
        """Freeze everything and replace the blocks in `blocks`; the prefix's KV on the CPU in the model's dtype."""
        for index in range(len(self.blocks)):
            block = self.blocks.bring(index)
            freeze_(block)
            save_block_file(blocks, self.initial.architecture, index, block.state_dict(), self.place.header)
        return None if self.prefix_kv is None else self.prefix_kv.detach().to(self.initial.dtype).cpu()


@torch.no_grad()
def run_original(
    original: Checkpoint, token_ids: torch.Tensor, runner: BlockRunner, start_token: int | None = None
) -> torch.Tensor:
    """Hidden states [N, T, D] of windows [N, T] behind the original's final norm, without a prefix.

    `start_token` stands in front of each window, where there is one; its own states are left out.
    """
    hidden = walk(original, original.embed(prepend_start_token(token_ids, start_token)), runner, "original")
    hidden = hidden[:, -token_ids.shape[1] :]
    original.apply_final_norm_(hidden)
    return hidden
