"""End-to-end fine-tuning: train scales, zero points and clip factors through the whole quantized model.

Norm weights and the prefix's keys and values are trained too where their rate is above 0, and the integers of the
weights where `weights` is not `fixed` (`trainables.py`). The loss is KL(reference ‖ quantized) in nats, on calibration
windows. The reference of this phase is the original model, neither rotated nor quantized, without a prefix. So an error
counts by its effect on the predictions, not by its size.

Windows are read from disk as they are trained on, so memory does not grow with their number. `reference.py` says where
the original's hidden states come from.

All blocks are in memory where there is room. Where the activations that autograd keeps do not fit next to them, only
the hidden states between blocks are kept, and blocks run again in the backward pass. Where the blocks do not fit
either, they are streamed, forwards and backwards (`streamed.py`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.blocks.quantized import block_settings, fill_block
from pipeline.models.checkpoint import Checkpoint, load_block_file, save_block_file
from pipeline.quantization.assembly import UNROUNDED
from pipeline.runtime.artifacts import load_tensors
from pipeline.runtime.streams import Stream
from pipeline.text.windows import TokenRows, prepend_start_token
from pipeline.training.divergence import mean_divergence
from pipeline.training.params import EndToEndParams
from pipeline.training.place import Place
from pipeline.training.reference import Reference
from pipeline.training.state import TrainingError
from pipeline.training.streamed import TrainedBlocks
from pipeline.training.trainables import LearnedIntegers, freeze_, lower_temperature_, unfreeze_
from pipeline.training.trainer import Rows, Trainer, decay_along_cosine

_STATE = "end-to-end.safetensors"


@dataclass
class ModelData:
    """Windows of this rank that the whole model is trained or validated on.

    Attributes:
        inputs: embeddings of the tokens that the quantized model reads after the prefix: [N, T, D], or [N, T + 1, D]
            if it reads a start token before each text. Indexing it reads the tokens of those windows.
        reference: [N, T, D], hidden states of the content in the original model, after its final norm. Indexing it
            reads or computes those windows.
        count: the windows of all ranks.
    """

    inputs: "Stream | EmbeddedWindows"
    reference: "Stream | Reference"
    count: int


class EmbeddedWindows:
    """Embeddings [N, T, D] or [N, T + 1, D] of windows, computed where they are read."""

    def __init__(self, checkpoint: Checkpoint, token_ids: TokenRows, start_token_id: int | None) -> None:
        """Read the embedding table.

        Args:
            token_ids: [N, T], content alone.
            start_token_id: the start token that is put before each window, or None.
        """
        self.checkpoint, self.token_ids, self.start_token_id = checkpoint, token_ids, start_token_id
        self._table = checkpoint.load_tensor(checkpoint.architecture.embedding)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, rows: Rows) -> torch.Tensor:
        token_ids = prepend_start_token(self.token_ids[rows], self.start_token_id)
        return self.checkpoint.scale_embeddings(nn.functional.embedding(token_ids, self._table))


class EndToEndTrainer(Trainer[ModelData]):
    """Trains the finished blocks in a work folder together."""

    bar = "end to end"
    keeps_step_losses = True

    def __init__(
        self,
        initial: Checkpoint,
        original: Checkpoint,
        *,
        prefix_kv: torch.Tensor | None,
        params: EndToEndParams,
        autocast: str,
        place: Place,
    ) -> None:
        """Load the blocks in `place.work_folder`, and the state of an unfinished run with the same header.

        Args:
            initial: the quantized checkpoint; final norm, lm_head and settings are taken from it.
            original: the original model.
            prefix_kv: [L, 2, kv_heads, P, d] or None.
            autocast: auto | none | bfloat16, as in params.yaml.
        """
        self.initial, self.runner, self.place = initial, place.runner, place
        architecture, device = initial.architecture, self.runner.device
        self.blocks = TrainedBlocks(architecture, self._load_tensors, device, place.keeping, place.offload)
        self._check_weights(params)
        quantizers: list[nn.Parameter] = []
        norms: list[nn.Parameter] = []
        integers: list[nn.Parameter] = []
        for index in range(initial.block_count):
            block = fill_block(initial, index, self._load_tensors(index), block_settings(initial, index), device=device)
            learned = self._load_learned(index, params)
            trainables = unfreeze_(block, architecture, norms=params.norm_lr > 0, integers=learned)
            quantizers += trainables.quantizers
            norms += trainables.norms
            integers += trainables.integers
            self.blocks.append(block, (*trainables.quantizers, *trainables.norms, *trainables.integers))
        self.prefix_kv = None if prefix_kv is None else nn.Parameter(prefix_kv.to(device, torch.float32).clone())
        self.norm = initial.load_final_norm().to(device).requires_grad_(False)
        self.lm_head = initial.load_lm_head().to(device)
        self.reference_lm_head = original.load_lm_head().to(device)
        super().__init__(
            [
                (quantizers, params.quant_lr),
                (norms, params.norm_lr),
                ([] if self.prefix_kv is None else [self.prefix_kv], params.prefix_lr),
                (integers, params.weight_lr),
            ],
            schedule=params,
            weight_decay=0.0,
            device=device,
            autocast=autocast,
            ranks=place.ranks,
        )
        self.min_lr_factor, self.validate_every = params.min_lr_factor, params.validate_every
        self.resume_(place.work_folder / _STATE, place.header)

    def _check_weights(self, params: EndToEndParams) -> None:
        """Raise TrainingError where weights are to be trained and cannot be."""
        if params.weights == "fixed":
            return
        if self.place.keeping.stream:
            raise TrainingError(
                f"finetuning.end_to_end.weights={params.weights}: the weights under training do not fit into "
                "runtime.max_memory. Raise it, or set weights: fixed."
            )
        if not (self.initial.folder / UNROUNDED.format(index=0)).is_file():
            raise TrainingError(
                f"finetuning.end_to_end.weights={params.weights}: {self.initial.folder} lacks the weights before "
                "rounding. Set quantizer_init.keep_unrounded: true, and rerun quantizer_init."
            )

    def _load_learned(self, index: int, params: EndToEndParams) -> LearnedIntegers | None:
        if params.weights == "fixed":
            return None
        offsets, _ = load_tensors(self.initial.folder / UNROUNDED.format(index=index), self.initial.stage)
        return LearnedIntegers(params.weights, offsets)

    def step(self, data: ModelData, windows: torch.Tensor, step_index: int, step_count: int) -> float | None:
        for index in range(len(self.blocks)):
            lower_temperature_(self.blocks[index], step_index / step_count)
        return super().step(data, windows, step_index, step_count)

    def learning_rate(self, highest: float, step_index: int, step_count: int) -> float:
        return decay_along_cosine(highest, step_index / step_count, self.min_lr_factor)

    def losses(self, data: ModelData, rows: Rows) -> torch.Tensor:
        """Return the mean divergence of each of this rank's windows `rows`, [B]."""
        hidden = data.inputs[rows].to(self.device)
        for index in range(len(self.blocks)):
            block_kv = None if self.prefix_kv is None else self.prefix_kv[index]
            hidden = self.blocks.run(self._run_block, index, hidden, block_kv)
        references = data.reference[rows].to(self.device)
        normed = self.norm(hidden[:, -references.shape[1] :])  # without the start token
        return torch.stack(
            [
                mean_divergence(states, reference, self.lm_head, self.reference_lm_head)
                for states, reference in zip(normed, references, strict=True)
            ]
        )

    def _run_block(self, index: int, hidden: torch.Tensor, prefix_kv: torch.Tensor | None) -> torch.Tensor:
        return self.runner.run(self.blocks[index], hidden, prefix_kv)

    def _load_tensors(self, index: int) -> dict[str, torch.Tensor]:
        return load_block_file(self.place.work_folder, self.initial.architecture, index, self.place.header.stage)

    def write_(self, folder: Path) -> torch.Tensor | None:
        """Freeze the blocks and write them to `folder`; return the prefix's KV on the CPU, in the model's dtype."""
        for index in range(len(self.blocks)):
            block = self.blocks.bring(index)
            freeze_(block)
            save_block_file(folder, self.initial.architecture, index, block.state_dict(), self.place.header)
        return None if self.prefix_kv is None else self.prefix_kv.detach().to(self.initial.dtype).cpu()
