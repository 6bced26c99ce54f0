"""Which channels RoPE turns together, and whether a family's keys are turned as this project assumes.

Equalization, centered key quantizers and the choice of key ranges work with keys before RoPE. They assume that keys in
the cache are RoPE of the output of `find_key_source`, or that output itself in layers without RoPE. They also assume
that RoPE turns channels (i, i + d/2) of a head together, or (2i, 2i + 1) where `Architecture.rope_neighbours` says so.
Families differ: RoPE may turn a part of each head, and a norm may follow it. So the attention module itself is run, its
keys before RoPE are replaced by chosen vectors, and those in the cache are read.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache

from pipeline.blocks.kv_cache import CACHE, complete_tables, find_key_source, hook_keys_, make_layer, turn_keys
from pipeline.blocks.walk import BlockRunner
from pipeline.models.architectures import UnsupportedModelError, find_architecture, find_max_positions, uses_rope
from pipeline.models.layers import DecoderLayer

_POSITIONS = (1, 7, 1009)  # far enough for slow channels to turn in half precision
_TOLERANCE = 1e-2  # measured: 0 in float32, 2e-3 in bfloat16; 0.3 and more where the assumption is wrong


@torch.no_grad()
def find_rope_groups(block: DecoderLayer, runner: BlockRunner) -> torch.Tensor:
    """Return the group of each channel of a head, [d] int64: channels that RoPE mixes have the same number.

    Llama's RoPE, d = 6: [0, 1, 2, 0, 1, 2]. Without RoPE: [0, 1, 2, 3, 4, 5].

    Args:
        block: a decoder layer, plain or with quantizers that are not calibrated.
    """
    width = block.self_attn.head_dim
    unit = torch.eye(width)
    keys, _, _ = _turn(block, runner, lambda keys: unit.to(keys)[:, None, None].expand_as(keys), width)
    mixed = (keys != 0).flatten(1, 2).any(1).cpu()
    together = (mixed | mixed.T | torch.eye(width, dtype=torch.bool)).float()
    for _ in range(width.bit_length()):  # channels that are mixed with the same channel are of one group
        together = (together @ together > 0).float()
    return together.argmax(1).unique(return_inverse=True)[1]


@torch.no_grad()
def check_rope(block: DecoderLayer, index: int, runner: BlockRunner) -> None:
    """Check that the keys in the cache are the family's RoPE of those before it, or these keys in a layer without RoPE.

    Args:
        block: decoder layer `index`.

    Raises:
        UnsupportedModelError: they are not. The message says how they differ.
    """
    config, attention = runner.config, block.self_attn
    width = attention.head_dim
    source = find_key_source(attention)
    vectors = torch.randn(width, generator=torch.Generator().manual_seed(0))
    problem = f"model_type={config.model_type!r}: block {index}: "
    misshapen = (
        f"{problem}{type(source).__name__}, whose output RoPE turns into keys, gives other shapes than "
        f"heads_first={find_architecture(config).heads_first} says ({{reason}}). Correct its entry in ARCHITECTURES "
        "(docs/new_family.md)"
    )
    try:
        keys, before, tables = _turn(block, runner, lambda keys: vectors.to(keys).expand_as(keys), 1)
    except RuntimeError as error:
        raise UnsupportedModelError(misshapen.format(reason=str(error).splitlines()[0])) from error
    if keys.shape != before.shape:
        reason = f"{list(before.shape)}, in the cache {list(keys.shape)}"
        raise UnsupportedModelError(misshapen.format(reason=reason))
    turns, neighbours = uses_rope(config, block), find_architecture(config).rope_neighbours
    expected = turn_keys(before, *tables, neighbours) if turns and tables[0].shape[-1] == width else before
    if not (keys - expected).abs().max() <= _TOLERANCE * expected.abs().max():
        groups = find_rope_groups(block, runner).tolist()
        partners = [channel for channel, group in enumerate(groups) if group == groups[0]]
        alone = sum(groups.count(group) == 1 for group in groups)
        assumed = [number // 2 for number in range(width)] if neighbours else list(range(width // 2)) * 2
        pairing = (
            f"RoPE turns channels {partners} of a head together, and {alone} of {width} channels not at all; expected "
            f"are channels {[0, 1 if neighbours else width // 2] if turns else [0]}"
            if (groups != assumed and turns) or (alone != width and not turns)
            else "something acts on the keys after RoPE, such as a norm"
        )
        raise UnsupportedModelError(
            f"{problem}keys in the cache are not those before RoPE, turned as rope_neighbours={neighbours} says: "
            f"{pairing}. Centered key quantizers and equalization would be wrong. Correct its entry in ARCHITECTURES, "
            "or permute the rows of q_proj and k_proj at import (docs/new_family.md)."
        )


def _turn(
    block: DecoderLayer, runner: BlockRunner, replace: Callable[[torch.Tensor], torch.Tensor], batch: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Run attention with its keys before RoPE replaced; return keys in the cache, keys before, both [B, heads, T, d].

    The third value are the tables of RoPE. Values, queries and the input are of no interest: the input is zero.
    """
    attention, config, width = block.self_attn, runner.config, block.self_attn.head_dim
    weight = attention.o_proj.weight
    last = find_max_positions(config) - 1
    positions = torch.tensor([[min(position, last) for position in _POSITIONS]], device=weight.device)
    hidden = torch.zeros(batch, len(_POSITIONS), config.hidden_size, dtype=weight.dtype, device=weight.device)
    tables, layer = runner.tables_at(block, hidden, positions), make_layer(None)
    replaced: list[torch.Tensor] = []

    def keep(keys: torch.Tensor) -> torch.Tensor:
        replaced.append(replace(keys).contiguous())
        return replaced[0]

    handle = hook_keys_(attention, find_architecture(config).heads_first, keep)
    try:
        attention(
            hidden_states=hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=tables,
            **{CACHE: Cache(layers=[layer])},
        )
    finally:
        handle.remove()
    return layer.read()[0], replaced[0], complete_tables(tables, width)
