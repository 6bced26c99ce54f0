"""Bytes of the checkpoints that stages write.

Quantized and packed blocks are built on the meta device, as for loading a checkpoint, and their tensors are counted. So
a plan follows the settings of every block: bits, group sizes, formats, overrides.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.blocks.prefix_kv import PREFIX
from pipeline.blocks.quantized import BlockSettings, QuantizedLinear, add_quantizers_
from pipeline.inference.packed_block import pack_block_
from pipeline.models.checkpoint import EMBEDDINGS, Checkpoint, list_companions
from pipeline.planning.sizes import Sizes
from pipeline.quantization.params import QuantizerInitParams
from pipeline.quantization.quantizer_init import resolve_settings
from pipeline.runtime.artifacts import open_tensors

_COMPARED_ROWS = 64  # enough to tell a tied lm_head from one that was rotated


@dataclass(frozen=True)
class BlockFiles:
    """Bytes of all blocks of a checkpoint.

    Attributes:
        total: size of all tensors.
        quantizers: size of scales, zero points and clip factors (float32), which fine-tuning can train.
    """

    total: int
    quantizers: int


def count_blocks(
    checkpoint: Checkpoint, find_settings: Callable[[int], BlockSettings | None], packed: bool = False
) -> BlockFiles:
    """Return the bytes of all blocks, quantized.

    Args:
        find_settings: block index -> its settings.
        packed: count weights as an export packs them, instead of one byte each.
    """
    counted: dict[str, BlockFiles] = {}
    blocks = []
    for index in range(checkpoint.block_count):
        settings = find_settings(index)
        key = repr(settings)
        if key not in counted:
            counted[key] = _count_block(checkpoint, index, settings, packed)
        blocks.append(counted[key])
    return BlockFiles(sum(block.total for block in blocks), sum(block.quantizers for block in blocks))


def _count_block(checkpoint: Checkpoint, index: int, settings: BlockSettings | None, packed: bool) -> BlockFiles:
    block = copy.deepcopy(checkpoint.build_block(index)).to(checkpoint.dtype)
    with torch.device("meta"):
        if settings is not None:
            add_quantizers_(block, checkpoint.architecture, settings, checkpoint.config.num_key_value_heads)
        for module in list(block.modules()):
            if isinstance(module, QuantizedLinear):
                module.declare_quantized_()
        if packed:
            pack_block_(block, checkpoint.architecture)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in block.state_dict().items()}
    trained = (size for name, size in sizes.items() if "quantizer." in name or name.endswith(("_scale", "_zero_point")))
    return BlockFiles(sum(sizes.values()), sum(trained))


def count_quantized_blocks(rotated: Checkpoint, params: QuantizerInitParams) -> BlockFiles:
    """Return the bytes of the blocks that `quantizer_init` makes of a rotated checkpoint."""
    return count_blocks(rotated, lambda index: resolve_settings(params, rotated, index)[0])


def count_export(rotated: Checkpoint, params: QuantizerInitParams, prefix_tokens: int) -> int:
    """Return the bytes of the tensors that an export has, from the rotated checkpoint that it is made of."""
    blocks = count_blocks(rotated, lambda index: resolve_settings(params, rotated, index)[0], packed=True).total
    sizes, config = Sizes.of(rotated), rotated.config
    names = rotated.architecture.embedding, rotated.architecture.lm_head
    with open_tensors(rotated.folder / EMBEDDINGS, rotated.stage) as (file, _):
        embedding, lm_head = (file.get_slice(name)[:_COMPARED_ROWS] for name in names)
    itemsize, tables = getattr(torch, params.embedding_dtype).itemsize, count_rounded_tables(sizes, params)
    if params.lm_head_bits == 16 and torch.equal(embedding, lm_head):
        tables -= sizes.table_entries * itemsize
    head_dim = rotated.build_block(0).self_attn.head_dim
    prefix = sizes.blocks * 2 * config.num_key_value_heads * head_dim * prefix_tokens
    return blocks + tables + 4 * prefix  # exported in float32


def count_tables(sizes: Sizes, dtype: torch.dtype) -> int:
    """Return the bytes of embedding and lm_head, stored apart."""
    return 2 * sizes.table_entries * dtype.itemsize


def count_rounded_tables(sizes: Sizes, params: QuantizerInitParams) -> int:
    """Return the bytes of embedding and lm_head, stored apart, in a quantized checkpoint."""
    dtype = getattr(torch, params.embedding_dtype)
    if params.lm_head_bits == 16:
        return count_tables(sizes, dtype)
    return sizes.table_entries * (dtype.itemsize + 1) + 4 * sizes.vocabulary  # integers, and a scale for each row


def measure_companions(checkpoint: Checkpoint) -> int:
    """Return the bytes of a checkpoint's tokenizer and other files that stages copy."""
    return sum(path.stat().st_size for path in list_companions(checkpoint.folder))


@dataclass(frozen=True)
class OtherFiles:
    """Bytes of a quantized checkpoint besides its blocks.

    Attributes:
        tables: embedding and lm_head, stored apart.
        distinct_tables: the same as an export stores them: once where both are equal.
        prefix: keys and values of the prefix.
        companions: tokenizer and other files that are copied.
    """

    tables: int
    distinct_tables: int
    prefix: int
    companions: int

    @classmethod
    def measure(cls, checkpoint: Checkpoint) -> "OtherFiles":
        """Return the bytes of the files in a checkpoint's folder."""
        tables = (checkpoint.folder / EMBEDDINGS).stat().st_size
        names = checkpoint.architecture.embedding, checkpoint.architecture.lm_head
        with open_tensors(checkpoint.folder / EMBEDDINGS, checkpoint.stage) as (file, _):
            embedding, lm_head = (file.get_slice(name)[:_COMPARED_ROWS] for name in names)
        repeated = Sizes.of(checkpoint).table_entries * embedding.element_size()
        are_equal = embedding.dtype == lm_head.dtype and torch.equal(embedding, lm_head)
        distinct_tables = tables - repeated if are_equal else tables
        prefix = (checkpoint.folder / PREFIX).stat().st_size
        return cls(tables, distinct_tables, prefix, measure_companions(checkpoint))
