"""The import gate: an imported model must compute the same as transformers from the source, or nothing is written.

Windows of random tokens go through transformers' own `from_pretrained(source)` and, by the walk, through the imported
checkpoint. All logits are compared, in float32, from tensors in the dtype of the import.

Before that, `layer_arguments.py` compares the calls of all layers in texts that are longer than the sliding window, and
`blocks/rope.py` how each layer turns its keys.

If the whole model does not fit into memory, it goes block by block. transformers loads a model with that layer alone,
which reads the output of the block before it and is dropped again. The walk advances in step with it. Embedding and
lm_head then hold only the rows of the tokens in the windows. GGUF files always go block by block, even if they fit:
transformers dequantizes all of a file, and of a file with one block only that block.

Where the import multiplied weights (importing/rewriting.py), a dtype of 16 bits rounds the products, and no tolerance
tells rounding from a mistake. Then the products are compared before rounding, with the source in float32, and the
written tensors must be these products, rounded once.
"""

import copy
import logging
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pipeline.blocks.quantized import fill_block
from pipeline.blocks.rope import check_rope
from pipeline.blocks.walk import BlockRunner
from pipeline.importing.rewriting import rewrite_checkpoint
from pipeline.importing.source import Read, Source
from pipeline.inspection.layer_arguments import check_layer_arguments, record_model_calls
from pipeline.models.architectures import find_max_positions
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.experts import split_experts, stack_experts
from pipeline.models.layers import CausalModel, Movable
from pipeline.models.lm_head import LmHead
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.memory import GIB
from pipeline.runtime.progress import current_rss_gib, show_progress

logger = logging.getLogger(__name__)

IMPORT_TOLERANCE = 1e-4
_WINDOWS, _LENGTH = 2, 64
_SLACK = 1.1  # memory relative to the weights: activations and the temporary copies of loading


class ImportGateError(PipelineError):
    """The imported model does not compute the same as transformers from the source."""


@torch.no_grad()
def check_import(source: Source, folder: Path, limit: float) -> dict[str, Any]:
    """Compare the logits of an imported model with its source's.

    Args:
        source: the source of the import.
        folder: the imported model.
        limit: bytes that this process may use.

    Returns:
        Metrics: `import_gate`, whole or by block, and `max_logit_deviation`, relative to max |logit|.

    Raises:
        ImportGateError: the logits differ by more than 1e-4, or are not finite.
        UnsupportedModelError: layers are called in another way than by transformers, or turn keys in another way than
            Llama.
    """
    checkpoint = Checkpoint(folder, "model")
    check_layer_arguments(checkpoint, source.config)
    generator = torch.Generator().manual_seed(0)
    shape = _WINDOWS, min(_LENGTH, find_max_positions(checkpoint.config))
    token_ids = torch.randint(0, checkpoint.config.vocab_size, shape, generator=generator)
    whole = source.load_whole is not None and _whole_size(checkpoint) <= limit
    compare = _compare_whole if whole else _compare_blocks
    plain = rewrite_checkpoint(source.config, source.names, source.read)
    if plain.rounds and checkpoint.dtype != torch.float32:
        checkpoint = _Unrounded(checkpoint, plain.read)
    deviation = compare(source, checkpoint, token_ids, torch.float32)
    if math.isinf(deviation):
        raise ImportGateError(
            "the model's logits are not finite in float32; its weights are damaged. Get the model again. Nothing was "
            "written."
        )
    if not deviation <= IMPORT_TOLERANCE:
        # In families whose linears were fused in the source, massive activations may enlarge rounding errors.
        logger.warning("logits differ by %.2e of the largest in float32; comparing again in float64", deviation)
        deviation = compare(source, checkpoint, token_ids, torch.float64)
    if not deviation <= IMPORT_TOLERANCE:
        raise ImportGateError(
            f"the imported model is not what transformers reads from the source: logits differ by {deviation:.2e} of "
            f"max |logit|, allowed are {IMPORT_TOLERANCE:.0e}. Nothing was written. Report this with the model's name."
        )
    return {"import_gate": "whole" if whole else "by block", "max_logit_deviation": deviation}


class _Unrounded(Checkpoint):
    """An imported model in float32, with its tensors as the rewritten source has them, not rounded to its dtype."""

    def __init__(self, checkpoint: Checkpoint, read: Read) -> None:
        self.__dict__ |= checkpoint.__dict__
        self.config = copy.deepcopy(checkpoint.config)
        self.config.dtype = torch.float32
        self._written = checkpoint
        self._read = read

    def load_block_tensors(self, index: int) -> dict[str, torch.Tensor]:
        prefix = self.architecture.tensor_prefix(index)
        interleaved = self.architecture.interleaved_experts  # the source has the experts of a block joined
        written = stack_experts(self._written.load_block_tensors(index), interleaved)
        exact = {name: self._read_exactly(prefix + name, tensor) for name, tensor in written.items()}
        return split_experts(exact, interleaved)

    def load_tensor(self, name: str) -> torch.Tensor:
        written = self._written.load_tensor(name)
        if name == self.architecture.lm_head and self.config.tie_word_embeddings:
            name = self.architecture.embedding
        return self._read_exactly(name, written)

    def _read_exactly(self, name: str, written: torch.Tensor) -> torch.Tensor:
        tensor = self._read(name)
        if not torch.equal(tensor.to(written), written):
            raise ImportGateError(f"{name} was not written as it was read. Nothing was written. Report this.")
        return tensor


def _whole_size(checkpoint: Checkpoint) -> float:
    """Return the bytes of this process with the whole model in float32 and the largest shard of the imported one."""
    sizes = [path.stat().st_size for path in checkpoint.folder.glob("*.safetensors")]
    widening = torch.float32.itemsize / checkpoint.dtype.itemsize
    return current_rss_gib() * GIB + _SLACK * widening * (sum(sizes) + max(sizes))


def _compare_whole(source: Source, checkpoint: Checkpoint, token_ids: torch.Tensor, dtype: torch.dtype) -> float:
    assert source.load_whole is not None, "this source cannot be loaded whole"
    model = source.load_whole(checkpoint.dtype).float()
    if dtype != torch.float32:
        _widen_(model, dtype)
    expected = model(token_ids).logits
    del model
    hidden = _embed(checkpoint, token_ids, dtype)
    runner = BlockRunner(checkpoint, torch.device("cpu"), _WINDOWS)
    for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "checking blocks"):
        _advance_(runner, checkpoint, index, hidden)
    return _relative_deviation(_logits(checkpoint, hidden, slice(None)), expected)


def _widen_(model: CausalModel, dtype: torch.dtype) -> None:
    """Have a model compute in another dtype, and hold only one block at a time in it."""
    for part in (model.get_input_embeddings(), model.model.norm, model.lm_head):
        part.to(dtype)

    def widen(block: nn.Module, args: tuple) -> None:
        block.to(dtype)

    def narrow(block: nn.Module, args: tuple, output: torch.Tensor) -> None:
        block.float()

    for block in model.model.layers:
        block.register_forward_pre_hook(widen)
        block.register_forward_hook(narrow)


def _compare_blocks(source: Source, checkpoint: Checkpoint, token_ids: torch.Tensor, dtype: torch.dtype) -> float:
    rows, positions = token_ids.unique(return_inverse=True)
    runner = BlockRunner(checkpoint, torch.device("cpu"), _WINDOWS)
    calls = record_model_calls(source.config, token_ids.shape[1])
    hidden = _embed(checkpoint, token_ids, dtype)
    expected: torch.Tensor | None = None
    for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "checking blocks"):
        model = source.load_block(index, rows, checkpoint.dtype)
        cast(Movable, model).to(dtype)
        layer = model.model.layers[0]
        before = _read_embedded(model, positions) if expected is None else expected
        after: torch.Tensor = layer(**calls[index] | {"hidden_states": before})
        expected = after
        if index == checkpoint.block_count - 1:
            model.model.layers = nn.ModuleList([_Constant(after)])
            expected = model(positions, use_cache=False).logits
        del model, layer
        _advance_(runner, checkpoint, index, hidden)
    assert expected is not None, "a model has blocks"
    return _relative_deviation(_logits(checkpoint, hidden, rows), expected)


class _Constant(nn.Module):
    """Takes the place of all decoder layers: returns the hidden states after them, whatever it reads."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.hidden


def _read_embedded(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the hidden states before layer 0, as transformers' own model computes them."""
    base, parts = model.model, (model.model.layers, model.model.norm)
    base.layers, base.norm = nn.ModuleList(), nn.Identity()
    hidden = base(token_ids, use_cache=False).last_hidden_state
    base.layers, base.norm = parts
    return hidden


def _embed(checkpoint: Checkpoint, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows, positions = token_ids.unique(return_inverse=True)
    table = checkpoint.load_tensor(checkpoint.architecture.embedding)[rows]
    embedding = checkpoint.build_embedding(table.to(dtype))
    embedding.padding_idx = None  # its row may be left out
    if hasattr(embedding, "embed_scale"):  # transformers has it in the model's dtype
        embedding.embed_scale = embedding.embed_scale.to(checkpoint.dtype)
    return embedding(positions)


def _advance_(runner: BlockRunner, checkpoint: Checkpoint, index: int, hidden: torch.Tensor) -> None:
    block = fill_block(checkpoint, index, checkpoint.load_block_tensors(index), None, dtype=hidden.dtype)
    check_rope(block, index, runner)
    runner.advance_(block, hidden)


def _logits(checkpoint: Checkpoint, hidden: torch.Tensor, rows: Any) -> torch.Tensor:
    head = checkpoint.load_lm_head()
    return LmHead(head.weight[rows].to(hidden), head.cap).logits(checkpoint.load_final_norm().to(hidden)(hidden))


def _relative_deviation(computed: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest deviation, relative to the largest expected value; infinite if anything is NaN."""
    deviation = ((computed - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    return deviation if math.isfinite(deviation) else math.inf
