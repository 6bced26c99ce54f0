"""Hidden states of all windows through the model, one block in memory at a time.

    runner = BlockRunner(checkpoint, device, batch_size)
    hidden = checkpoint.embed(token_ids)                     # [N, T, D], before block 0
    for index, block in enumerate(load_blocks(checkpoint, device)):
        runner.advance_(block, hidden, prefix_kv[index])     # now before block index + 1

Walking equals the model's own forward. The block is the model's own layer. Mask and rotary embedding are built by the
model's own code from the length of the cache, so both count a prefix that is in the cache. In a layer with a sliding
window the prefix leaves the window like any other token.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from pipeline.blocks.kv_cache import CACHE, complete_tables, make_block_cache, make_layer
from pipeline.blocks.prefetch import prefetch_blocks
from pipeline.blocks.quantized import load_block
from pipeline.models.architectures import check_window, find_sliding_window
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.layers import DecoderLayer
from pipeline.runtime.progress import show_progress
from pipeline.runtime.streams import Stream


class BlockRunner:
    """Runs any block of one model over batches of equally long windows."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, batch_size: int) -> None:
        self.config = checkpoint.config
        self.device = device
        self.batch_size = batch_size
        self._rotary = checkpoint.build_rotary_embedding().to(device)
        self._prepared: dict[tuple, dict[str, Any]] = {}

    def run(self, block: DecoderLayer, hidden: torch.Tensor, prefix_kv: torch.Tensor | None = None) -> torch.Tensor:
        """Run one batch through one block.

        Args:
            block: a decoder layer from `load_block`, on the runner's device.
            hidden: [B, T, D] before the block, on the runner's device.
            prefix_kv: [2, heads, P, d], the prefix's keys and values in this block, or None.

        Returns:
            [B, T, D] after the block.
        """
        return self._run(block, hidden, make_block_cache(prefix_kv))

    def take_prefix(self, prefix_kv: torch.Tensor | None, index: int) -> torch.Tensor | None:
        """Return the share of [L, 2, heads, P, d] that belongs to block `index`, sent to the device once."""
        return None if prefix_kv is None else prefix_kv[index].to(self.device)

    def run_prefix(self, block: DecoderLayer, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the prefix itself, [1, P, D], through one block.

        Returns:
            Its outputs, and its keys and values [2, heads, P, d].
        """
        hidden, keys, values = self.run_with_kv(block, hidden)
        return hidden, torch.stack((keys[0], values[0]))

    def run_with_kv(self, block: DecoderLayer, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run without a prefix in the cache; also return keys (after RoPE) and values, [B, heads, T, d] each."""
        layer = make_layer(None)
        hidden = self._run(block, hidden, Cache(layers=[layer]))
        return hidden, *layer.read()

    def _run(self, block: DecoderLayer, hidden: torch.Tensor, cache: Cache) -> torch.Tensor:
        return block(hidden, use_cache=True, **self.prepare(block, hidden, cache), **{CACHE: cache})

    @torch.no_grad()
    def advance_(
        self,
        block: DecoderLayer,
        hidden: Stream,
        prefix_kv: torch.Tensor | None = None,
        into: Stream | None = None,
        windows: range | None = None,
    ) -> None:
        """Replace `hidden` [N, T, D] (on any device) by the block's outputs, batch by batch.

        Args:
            into: written to in place of `hidden`.
            windows: consecutive windows to advance; None for all.
        """
        target = hidden if into is None else into
        windows = range(len(hidden)) if windows is None else windows
        for part in batches(len(windows), self.batch_size):
            rows = slice(windows.start + part.start, windows.start + part.stop)
            target[rows] = self.run(block, hidden[rows].to(self.device), prefix_kv).to(target.device)

    def rotary_tables(
        self, block: DecoderLayer, hidden: torch.Tensor, prefix_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin) of the positions of hidden [B, T, D] after a prefix, each [1, T, d]."""
        positions = torch.arange(prefix_tokens, prefix_tokens + hidden.shape[1], device=self.device).unsqueeze(0)
        return complete_tables(self.tables_at(block, hidden, positions), block.self_attn.head_dim)

    def tables_at(
        self, block: DecoderLayer, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin at positions [1, T], each [1, T, d] or [1, T, d / 2], in the dtype of `hidden`."""
        kind = self._rope_kind(block)
        return self._rotary(hidden, positions) if kind is None else self._rotary(hidden, positions, kind)

    def _rope_kind(self, block: DecoderLayer) -> str | None:
        """Return the kind of layer, where RoPE depends on it."""
        attention = block.self_attn  # the attribute has another name in Olmo 3
        kind = getattr(attention, "layer_type", None) or getattr(attention, "attention_type", None)
        return kind if kind in self.config.rope_parameters else None

    def prepare(self, block: DecoderLayer, hidden: torch.Tensor, cache: Cache) -> dict[str, Any]:
        """Return the arguments of a decoder layer that depend on the shape of a batch and on the kind of the layer.

        They are `attention_mask`, `position_ids` [1, T] and `position_embeddings`, (cos, sin), and are kept.
        """
        batch, length, _ = hidden.shape
        prefix = cache.get_seq_length()
        window = find_sliding_window(self.config, block)
        if window is not None and prefix + length <= window:
            window = None  # nothing is out of sight
        key = (batch, length, prefix, self._rope_kind(block), window)
        if key not in self._prepared:
            check_window(self.config, prefix + length)
            position_ids = torch.arange(prefix, prefix + length, device=self.device).unsqueeze(0)
            create_mask = create_causal_mask if window is None else create_sliding_window_causal_mask
            mask = create_mask(self.config, hidden, None, cache, position_ids)
            self._prepared[key] = {
                "attention_mask": mask,
                "position_ids": position_ids,
                "position_embeddings": self.tables_at(block, hidden, position_ids),
            }
        return self._prepared[key]


def batches(count: int, batch_size: int) -> Iterator[slice]:
    """Yield slices that cover range(count) in order."""
    return (slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size))


def load_blocks(checkpoint: Checkpoint, device: torch.device, start: int = 0) -> Iterator[DecoderLayer]:
    """Yield the blocks from `start` on, as `load_block` returns them; see `prefetch_blocks`."""
    indices = range(start, checkpoint.block_count)
    return prefetch_blocks(lambda index: load_block(checkpoint, index), indices, device)


def walk(
    checkpoint: Checkpoint,
    hidden: torch.Tensor,
    runner: BlockRunner,
    description: str,
    prefix_kv: torch.Tensor | None = None,
    watch: Callable[[int, DecoderLayer], None] | None = None,
    after: Callable[[int, DecoderLayer], None] | None = None,
) -> torch.Tensor:
    """Advance `hidden` [N, T, D] in place through all blocks and return it.

    Args:
        prefix_kv: [L, 2, heads, P, d] or None.
        watch: called with (index, block) before a block runs, to add hooks to it; the block is dropped afterwards.
        after: called with (index, block) once `hidden` is after the block.
    """
    blocks = load_blocks(checkpoint, runner.device)
    for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, description):
        block = next(blocks)
        if watch is not None:
            watch(index, block)
        runner.advance_(block, hidden, runner.take_prefix(prefix_kv, index))
        if after is not None:
            after(index, block)
        del block
    return hidden
