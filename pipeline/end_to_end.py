"""Train what is left to train through the whole quantized model: scales, zero points, clip factors, and, where asked
for, norm weights and the prefix's keys and values.

The loss is KL(original without a prefix ‖ quantized), in nats, on calibration windows: what the next blocks make of an
error counts, not its size. Integers of the weights stand still. All blocks are in memory; between them only hidden
states are kept for the backward pass, blocks are run again when it reaches them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from pipeline.artifacts import load_tensors, load_unfinished, save_tensors, write_json
from pipeline.checkpoint import BLOCK, Checkpoint
from pipeline.divergence import mean_divergence
from pipeline.params import EndToEndParams
from pipeline.quantized_block import block_settings, fill_block
from pipeline.streams import Stream
from pipeline.trainable import freeze_, unfreeze_
from pipeline.training import Outcome, Place, Trainer
from pipeline.walk import BlockRunner, walk

_STATE = "end-to-end.safetensors"
_HISTORY = "end-to-end.json"


@dataclass
class ModelData:
    """This rank's windows: token ids [N, T], and the original's hidden states behind its final norm [N, T, D]."""

    inputs: torch.Tensor
    exact: Stream
    count: int


class EndToEndTrainer(Trainer):
    """Trains the finished blocks of `work` together."""

    def __init__(
        self,
        initial: Checkpoint,
        original: Checkpoint,
        prefix_kv: torch.Tensor | None,
        params: EndToEndParams,
        place: Place,
    ) -> None:
        """Args:
        initial: the quantized checkpoint the blocks are of: embeddings, final norm, settings.
        original: the model whose logits are the target.
        prefix_kv: [L, 2, kv_heads, P, d] or None.
        place: its `work` holds the finished blocks (names in full), and the state between epochs.
        """
        self.initial, self.runner, self.work, self.header = initial, place.runner, place.work, place.header
        architecture, device = initial.architecture, self.runner.device
        self.blocks, quantizers, norms = [], [], []
        for index in range(initial.block_count):
            tensors, _ = load_tensors(self.work / BLOCK.format(index=index), self.header.stage)
            prefix = architecture.tensor_prefix(index)
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            block = fill_block(initial, index, own, block_settings(initial, index), device)
            found = unfreeze_(block, architecture, norms=params.norm_lr > 0)
            quantizers += found.quantizers
            norms += found.norms
            self.blocks.append(block)
        self.prefix_kv = None if prefix_kv is None else nn.Parameter(prefix_kv.to(device, torch.float32).clone())
        self.norm = initial.load_final_norm().to(device).requires_grad_(False)
        self.lm_head, self.exact_lm_head = (c.load_lm_head().to(device) for c in (initial, original))
        groups = [
            (quantizers, params.quant_lr),
            (norms, params.norm_lr),
            ([] if self.prefix_kv is None else [self.prefix_kv], params.prefix_lr),
        ]
        super().__init__(groups, params, 0.0, device, place.ranks)
        self._resume()

    def losses(self, data: ModelData, rows: Any) -> torch.Tensor:
        """The divergence of each of this rank's windows `rows`, [B]."""
        hidden = self.initial.embed(data.inputs[rows]).to(self.device)
        for index in range(len(self.blocks)):
            own_prefix = None if self.prefix_kv is None else self.prefix_kv[index]
            hidden = recompute(self.runner.run, self.blocks[index], hidden, own_prefix, use_reentrant=False)
        normed, exact = self.norm(hidden), data.exact[rows].to(self.device)
        return torch.stack(
            [
                mean_divergence(ours, target, self.lm_head, self.exact_lm_head)
                for ours, target in zip(normed, exact, strict=True)
            ]
        )

    def end_epoch(self) -> None:
        """Keep parameters, optimizer, best state and history on disk."""
        if not self.ranks.first or self.optimizer is None:
            return
        tensors = {"epochs": torch.tensor(len(self.outcome.history))}
        tensors["best_epoch"] = torch.tensor(self.outcome.best_epoch)
        tensors["highest"] = torch.tensor(
            [group["highest"] for group in self.optimizer.param_groups], dtype=torch.float64
        )
        for number, parameter in enumerate(self.parameters):
            tensors[f"now.{number}"], tensors[f"best.{number}"] = parameter.detach(), self.best[number]
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{number}.{name}"] = value
        write_json(self.work / _HISTORY, self.outcome.history)
        save_tensors(self.work / _STATE, tensors, self.header)

    @torch.no_grad()
    def _resume(self) -> None:
        saved = load_unfinished(self.work / _STATE, self.header)
        if saved is None or self.optimizer is None:
            return
        history = json.loads((self.work / _HISTORY).read_text(encoding="utf-8"))
        self.outcome = Outcome(history[: int(saved["epochs"])], int(saved["best_epoch"]))
        for group, highest in zip(self.optimizer.param_groups, saved["highest"].tolist(), strict=True):
            group["highest"] = highest
        for number, parameter in enumerate(self.parameters):
            parameter.copy_(saved[f"now.{number}"])
            self.best.append(saved[f"best.{number}"].to(self.device))
            adam = f"adam.{number}."
            values = {name.removeprefix(adam): value for name, value in saved.items() if name.startswith(adam)}
            if values:
                self.optimizer.state[parameter] = {
                    name: value if name == "step" else value.to(self.device) for name, value in values.items()
                }

    def write_(self, blocks: Path) -> torch.Tensor | None:
        """Freeze everything and replace the blocks in `blocks`; the prefix's KV on the CPU in the model's dtype."""
        for index, block in enumerate(self.blocks):
            freeze_(block)
            prefix = self.initial.architecture.tensor_prefix(index)
            tensors = {prefix + name: tensor for name, tensor in block.state_dict().items()}
            save_tensors(blocks / BLOCK.format(index=index), tensors, self.header)
        return None if self.prefix_kv is None else self.prefix_kv.detach().to(self.initial.dtype).cpu()


@torch.no_grad()
def run_original(original: Checkpoint, token_ids: torch.Tensor, runner: BlockRunner) -> torch.Tensor:
    """Hidden states [N, T, D] behind the original's final norm, without a prefix."""
    hidden = walk(original, original.embed(token_ids), runner, "original")
    norm = original.load_final_norm()
    for window in hidden:
        window.copy_(norm(window))
    return hidden
