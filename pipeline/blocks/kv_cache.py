"""A KV cache that begins with the prefix, in full precision, and quantizes the keys and values appended to it.

The prefix is never quantized. The full-precision model computes its keys and values once, and every sequence starts
with them. To the layers the prefix is ordinary text at positions 0 to P - 1: lengths, masks and positions count it, and
a layer with a sliding window forgets it like any other token. `PrefixCache` hides it from callers, whose lengths count
the text alone. `generate` needs that: it cuts the tokens that were read already off its input by this length.

R3, the online rotation of queries and keys, cancels in q·k. It only changes the values that the key quantizer rounds,
so it is applied inside the key quantizer: rotate, quantize, rotate back. Queries and prefix keys stay as the model made
them, and no attention function needs to know about R3. A kernel that keeps the rotated integers rotates its queries
instead: (q R3) · Q(k R3) = q · (Q(k R3) R3^T), the same number.

Biases of k_proj can be hundreds of times larger than the part of the keys that varies (Qwen2). Before RoPE such a
constant m is one vector per head. After RoPE it turns with the position and fills the whole range. A centered key
quantizer therefore subtracts it before RoPE. RoPE is linear: RoPE(k) = RoPE(k - m) + RoPE(m). The first part is
quantized, the second is computed from the position.

No module holds the state of a call, and no cache holds a module. Each call of an attention module gets a
`QuantizingCache` in place of its cache. It lives as long as the call, knows the positions of the call's tokens, and
quantizes on the way to the cache.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # of most families: blocks/rope.py checks

from pipeline.blocks.sliding import find_first_visible
from pipeline.kernels.packed_states import fits_kernels, pack_states, takes_matrix, unpack_states_
from pipeline.models.architectures import find_architecture
from pipeline.models.layers import Attention
from pipeline.numerics.hadamard import find_single_matrix, hadamard_transform
from pipeline.numerics.kept_dtype import KeepsDtype
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec

# The name of the argument that transformers passes a cache as, and of the output it returns it as; `cache` since 5.24.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

_LEAST_ROWS = 16  # per thread
_TABLE_STEP = 256  # rows by which tables of cosines and sines grow

Positions = tuple[torch.Tensor, torch.Tensor]  # cos and sin, [B or 1, T, d] each


class KeyQuantizer(KeepsDtype):
    """Quantizes keys [B, heads, T, d]: after RoPE, in the basis of R3 if `rotate`, or before RoPE.

    A hook on `quantizer` receives the keys as they are quantized: rotated, and without their mean if they are centered.
    The cache cannot quantize keys before RoPE. `hook_before_rope_` adds a hook to the module whose output RoPE turns.

    Attributes:
        mean: float32 [heads, d], of the keys before RoPE; only of a centered quantizer that acts after RoPE.
        transform: R3 and, called with True, its inverse.
        turns: whether the layer has RoPE.
        neighbours: whether RoPE turns neighbouring channels together.
    """

    mean: torch.Tensor

    def __init__(
        self,
        spec: QuantizerSpec,
        heads: int,
        head_dim: int,
        rotate: bool,
        before_rope: bool,
        *,
        turns: bool = True,
        neighbours: bool = False,
    ) -> None:
        super().__init__()
        self.turns, self.neighbours = turns, neighbours
        self.heads, self.head_dim = heads, head_dim
        self.rotate = rotate
        self.before_rope = before_rope
        self.transform: Callable[..., torch.Tensor] = hadamard_transform
        self.mean_taken_out = spec.enabled and spec.centered and not before_rope
        self.quantizer = ActivationQuantizer(replace(spec, centered=spec.centered and before_rope), head_dim, heads)
        if self.mean_taken_out:
            # The default dtype is the model's while transformers loads it: a mean without a dtype would get that one.
            self.register_buffer("mean", torch.full((heads, head_dim), torch.nan, dtype=torch.float32))

    def forward(self, keys: torch.Tensor, positions: Positions | None = None) -> torch.Tensor:
        """Quantize keys. `positions` belong to the keys; only a quantizer with a `mean` needs them."""
        if not self.quantizer.spec.enabled:
            return keys
        varying, constant = self.split(keys, positions)
        quantized = self.quantizer(varying)
        if not self.quantizer.calibrated:  # the call above was for hooks on the quantizer
            return keys
        return self.join(quantized, constant, keys.dtype)

    def split(self, keys: torch.Tensor, positions: Positions | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the part of keys that is quantized, in its basis, and RoPE(mean), or None if no mean is taken out."""
        if not self.mean_taken_out:
            return self.to_basis(keys), None
        assert positions is not None, "a centered key quantizer needs the positions of the keys"
        constant = self.turn_mean(*positions)
        return self.to_basis(keys.float() - constant), constant

    def join(self, quantized: torch.Tensor, constant: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Undo `split`, for keys of this dtype."""
        quantized = self.from_basis(quantized)
        return quantized if constant is None else (quantized + constant).to(dtype)

    @property
    def stores_codes(self) -> bool:
        """Whether a cache can store its keys as codes. Before RoPE it acts before the cache."""
        return self.quantizer.stores_codes and not self.before_rope

    def to_basis(self, x: torch.Tensor) -> torch.Tensor:
        """Return queries or keys [..., d] in the basis in which keys are quantized."""
        return self.transform(x) if self.rotate else x

    def from_basis(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `to_basis`.

        Libraries of a CPU add the terms of a product with few rows in another order. With zeros as further rows, a key
        is the same in a long call, in a short one, and when a cache decodes it with all others.
        """
        if not self.rotate:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # exported graphs have no fixed number of rows
            return self.transform(x, True)
        rows, least = x.shape[:-1].numel(), _LEAST_ROWS * torch.get_num_threads()
        if rows >= least:
            return self.transform(x, True)
        padded = torch.nn.functional.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, least - rows))
        return self.transform(padded, True)[:rows].reshape(x.shape)

    def turn_mean(self, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return RoPE(mean), float32 [B or 1, heads, T, d], at positions cos and sin [B or 1, T, d].

        Without RoPE it is the mean, [1, heads, 1, d].
        """
        mean = self.mean[None, :, None]
        return turn_keys(mean, cos.float(), sin.float(), self.neighbours) if self.turns else mean

    def hook_before_rope_(self, attention: Attention, heads_first: bool) -> None:
        """Apply it to the output of the key norm where the family has one, of k_proj otherwise.

        Args:
            heads_first: the key norm gives [B, heads, T, d], not [B, T, heads * d] or [B, T, heads, d].
        """
        hook_keys_(attention, heads_first, self)

    def split_heads(self, output: torch.Tensor, heads_first: bool) -> torch.Tensor:
        """Return keys [B, heads, T, d] from the output of `find_key_source`'s module."""
        return _split_heads(output, self.head_dim, heads_first)


class QuantizedAttention(Attention):
    """The type of an attention module after `quantized.add_quantizers_`. No object is an instance of it."""

    key_quantizer: KeyQuantizer
    value_quantizer: ActivationQuantizer


def as_quantized_attention(attention: Attention) -> QuantizedAttention:
    """Return an attention module as one with quantizers.

    Raises:
        TypeError: it has none.
    """
    if not hasattr(attention, "key_quantizer"):
        raise TypeError(f"{type(attention).__name__} has no quantizers")
    return cast(QuantizedAttention, attention)


class CachingAttention(Attention):
    """The type of an attention module that `quantize_cache_` is used on. No object is an instance of it."""

    value_quantizer: ActivationQuantizer


@dataclass(frozen=True)
class NewStates:
    """The keys or values of the tokens of one call, on their way to a cache of codes.

    Attributes:
        states: [B, heads, T, d], as attention reads them.
        codes: uint8 [B, heads, T, bytes], as they are stored; `states` if this layer stores no codes.
        decode_: (out [B, heads, N, d], first, codes, places): writes the states of stored codes to `out`, from position
            `first` on. `places` are those that the cache stored with them.
    """

    states: torch.Tensor
    codes: torch.Tensor
    decode_: Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor | None], None]


class CountingCache(Cache):
    """The cache that the model itself reads during one call. Its lengths count the prefix.

    Attributes:
        positions: int32 [B or 1, T], of the tokens of the call, the prefix counted.
        turns: kind of RoPE -> float32 [positions, d], cosines and then sines of all positions read so far, d / 2 each.
            They belong to the `PrefixCache`.
    """

    def __init__(self, layers: list[Any], positions: torch.Tensor, turns: dict[str | None, torch.Tensor]) -> None:
        super().__init__(layers=layers)
        self.positions, self.turns = positions.to(torch.int32), turns
        self._noted: set[str | None] = set()

    def note_turns_(self, kind: str | None, tables: Positions) -> torch.Tensor:
        """Add the cosines and sines of this call's positions to `turns`, once, and return all of this kind.

        Raises:
            ValueError: a position is negative.
        """
        if kind not in self._noted:
            half = tables[0].shape[-1] // 2
            rows = torch.cat([table.detach()[..., :half].float() for table in tables], dim=-1)
            batch = max(len(rows), len(self.positions))
            positions = self.positions.to(rows.device).long().expand(batch, -1)
            lowest, highest = (int(bound) for bound in positions.aminmax())
            if lowest < 0:
                raise ValueError(
                    f"position_ids={lowest}: a packed cache has a table of positions, which begins at 0. Pass "
                    "positions from 0 on, or packed_cache=False to load()."
                )
            table, needed = self.turns.get(kind), highest + 1
            if table is None or len(table) < needed:
                longer = rows.new_zeros(-(-needed // _TABLE_STEP) * _TABLE_STEP, 2 * half)
                if table is not None:
                    longer[: len(table)] = table
                table = longer
            elif table.is_inference() and not torch.is_inference_mode_enabled():
                table = table.clone()  # one that was made in inference mode cannot be changed outside of it
            table[positions] = rows.expand(batch, -1, -1)
            self.turns[kind] = table
            self._noted.add(kind)
        return self.turns[kind]


class QuantizingCache:
    """The cache that one call of an attention module writes to: quantizes, then appends to the cache it was given."""

    def __init__(self, cache: Cache, attention: CachingAttention, positions: Positions) -> None:
        self.cache, self.attention, self.positions = cache, attention, positions

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys (after RoPE) and values [B, heads, T, d] to a layer, and return all that it then holds."""
        layer = self.cache.layers[layer_idx] if layer_idx < len(self.cache.layers) else None
        quantizer = getattr(self.attention, "key_quantizer", None)
        if isinstance(layer, PrefixLayer) and layer.packed:
            assert isinstance(self.cache, CountingCache)
            assert quantizer is not None
            return self._store(self.cache, layer, quantizer, key_states, value_states)
        if quantizer is not None and not quantizer.before_rope:
            key_states = quantizer(key_states, self.positions)
        value_states = self.attention.value_quantizer(value_states)
        return self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)

    def _store(
        self,
        cache: CountingCache,
        layer: "PrefixLayer",
        quantizer: KeyQuantizer,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to a layer of codes. Codes and states come from the same numbers."""
        table = places = None
        if not quantizer.stores_codes:
            keys = key_states if quantizer.before_rope else quantizer(key_states, self.positions)
            new_keys = NewStates(keys, keys.detach(), _copy_)
        else:
            varying, constant = quantizer.split(key_states, self.positions)
            keys = quantizer.join(quantizer.quantizer(varying), constant, key_states.dtype)
            if quantizer.mean_taken_out and quantizer.turns:
                kind = getattr(self.attention, "layer_type", None) or getattr(self.attention, "attention_type", None)
                table, places = cache.note_turns_(kind, self.positions), cache.positions
            decode_ = functools.partial(decode_keys_, quantizer, table)
            new_keys = NewStates(keys, pack_states(quantizer.quantizer, varying), decode_)
        values = self.attention.value_quantizer(value_states)
        if self.attention.value_quantizer.stores_codes:
            codes = pack_states(self.attention.value_quantizer, value_states)
            new_values = NewStates(values, codes, functools.partial(decode_values_, self.attention.value_quantizer))
        else:
            new_values = NewStates(values, values.detach(), _copy_)
        return layer.append_(new_keys, new_values, places)


def _copy_(out: torch.Tensor, first: int, states: torch.Tensor, places: torch.Tensor | None) -> None:
    out[:, :, first : first + states.shape[2]] = states


def decode_values_(
    quantizer: ActivationQuantizer, out: torch.Tensor, first: int, codes: torch.Tensor, places: torch.Tensor | None
) -> None:
    """Write the values of stored codes to `out`, as `NewStates.decode_` does."""
    if fits_kernels(quantizer, out):
        unpack_states_(out, codes, first, quantizer)
    else:
        out[:, :, first : first + codes.shape[2]] = quantizer.decode(codes, out.shape[-1], out.dtype)


def decode_keys_(
    quantizer: KeyQuantizer,
    table: torch.Tensor | None,
    out: torch.Tensor,
    first: int,
    codes: torch.Tensor,
    places: torch.Tensor | None,
) -> None:
    """Write the keys of stored codes to `out`, as `NewStates.decode_` does.

    Args:
        table: float32 [positions, d], cosines and sines, where RoPE turns a mean.
    """
    inner, width = quantizer.quantizer, out.shape[-1]
    turned = None if table is None else table.to(out.device)
    wide = quantizer.mean_taken_out or out.dtype == torch.float32
    matrix = find_single_matrix(width, True) if quantizer.rotate and takes_matrix(width) else None
    turns_halves = table is None or not quantizer.neighbours  # the kernel turns a mean as Llama does
    if fits_kernels(inner, out) and turns_halves and (not quantizer.rotate or (matrix is not None and wide)):
        mean = quantizer.mean if quantizer.mean_taken_out else None
        unpack_states_(out, codes, first, inner, matrix=matrix, mean=mean, places=places, table=turned)
        return
    constant = None
    if quantizer.mean_taken_out:
        nothing = torch.empty(0)
        tables = (nothing, nothing)
        if turned is not None and places is not None:
            cos, sin = turned[places.long()].chunk(2, dim=-1)
            tables = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        constant = quantizer.turn_mean(*tables)
    values = inner.decode(codes, width, torch.float32 if quantizer.mean_taken_out else out.dtype)
    out[:, :, first : first + codes.shape[2]] = quantizer.join(values, constant, out.dtype)


def quantize_cache_(attention: Attention) -> None:
    """Have each call of an attention module quantize the keys and values that it caches.

    Args:
        attention: it has a `value_quantizer`, and a `key_quantizer` unless keys are left as they are.
    """
    attention.register_forward_pre_hook(_wrap_cache, with_kwargs=True)


def _wrap_cache(
    module: CachingAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cache = kwargs.get(CACHE)
    if cache is None:  # a caller that wants neither cache nor quantizers
        return args, kwargs
    tables = complete_tables(kwargs["position_embeddings"], module.head_dim)
    return args, kwargs | {CACHE: QuantizingCache(cache, module, tables)}


def find_key_source(attention: Attention) -> nn.Module:
    """Return the module whose output RoPE turns into keys, or whose output is the keys where `uses_rope` says no."""
    name = find_architecture(attention.config).key_norm
    return attention.get_submodule(name if hasattr(attention, name) else "k_proj")


def complete_tables(tables: Positions, width: int) -> Positions:
    """Return cos and sin [B or 1, T, d] with a column for each channel, where a family has one for each pair."""
    cos, sin = tables
    if 2 * cos.shape[-1] != width:
        return tables
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def turn_keys(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, neighbours: bool) -> torch.Tensor:
    """Apply RoPE to keys [B, heads, T, d]; cos and sin are [B or 1, T, d], with the frequencies twice, side by side.

    Args:
        neighbours: whether channels (2i, 2i + 1) are turned by frequency i, and not (i, i + d/2).
    """
    if not neighbours:
        return apply_rotary_pos_emb(keys, keys, cos, sin)[1]
    halves = torch.cat((keys[..., ::2], keys[..., 1::2]), dim=-1)
    turned = apply_rotary_pos_emb(halves, halves, cos, sin)[1]
    return torch.stack(turned.chunk(2, dim=-1), dim=-1).flatten(-2)


def hook_keys_(
    attention: Attention, heads_first: bool, hook: Callable[[torch.Tensor], torch.Tensor]
) -> RemovableHandle:
    """Replace the keys before RoPE, [B, heads, T, d], by hook(keys) whenever an attention module runs.

    Args:
        heads_first: the key norm gives [B, heads, T, d], not [B, T, heads * d] or [B, T, heads, d].

    Returns:
        A handle that removes the hook.
    """
    replace = functools.partial(_replace_keys, hook, attention.head_dim, heads_first)
    return find_key_source(attention).register_forward_hook(replace)


def _replace_keys(
    hook: Callable[[torch.Tensor], torch.Tensor],
    head_dim: int,
    heads_first: bool,
    module: nn.Module,
    args: tuple[Any, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    keys = hook(_split_heads(output, head_dim, heads_first))
    return keys if heads_first else keys.transpose(1, 2).reshape(output.shape)


def _split_heads(output: torch.Tensor, head_dim: int, heads_first: bool) -> torch.Tensor:
    return output if heads_first else output.view(*output.shape[:2], -1, head_dim).transpose(1, 2)


class PrefixLayer(DynamicLayer):
    """One layer's cache, which begins with the prefix: `get_seq_length()` is P before any text.

    Args:
        prefix_kv: [2, heads, P, d] keys (after RoPE) and values, or None for no prefix.

    Attributes:
        packed: whether it stores codes, which only `append_` can add.
    """

    packed = False

    def __init__(self, prefix_kv: torch.Tensor | None = None) -> None:
        super().__init__()
        self.prefix_kv = prefix_kv

    def append_(
        self, keys: NewStates, values: NewStates, places: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to a layer of codes (`packed_layers.py`)."""
        raise NotImplementedError("this layer stores states, not codes: call update")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.prefix_kv is not None:
            prefix = self.prefix_kv.to(key_states)
            self.keys, self.values = prefix.unsqueeze(1).expand(2, key_states.shape[0], *prefix.shape[1:])

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all positions, [B, heads, T, d] each.

        Raises:
            RuntimeError: nothing was read yet.
        """
        if self.keys is None or self.values is None:
            raise RuntimeError("a cache is empty: no token was read yet")
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all text. Older versions of transformers fill it with zeros and keep its length."""
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:  # before that, the length counts a prefix that has no rows yet
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.is_initialized:
            super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]  (transformers types it as long)

    def get_seq_length(self) -> int:
        """Return how many positions were read, the prefix among them."""
        return self.count_kept()

    def count_kept(self) -> int:
        """Return how many positions the layer holds, the prefix among them."""
        if not self.is_initialized and self.prefix_kv is not None:
            return self.prefix_kv.shape[-2]
        return super().get_seq_length()

    def forget_(self, count: int) -> None:
        """Forget the first `count` positions that the layer holds."""
        keys, values = self.read()
        self.keys, self.values = keys[..., count:, :].clone(), values[..., count:, :].clone()


class SlidingLayer(PrefixLayer):
    """The cache of a layer with a sliding window. `drop_` forgets positions; lengths still count them.

    Attributes:
        window: positions that a position attends to, itself included.
        dropped: how many positions, from the first one on, are gone.
        complete_from: lengths from here on can be cropped to. Every position that the next token attends to is
            still there.
        record_past: whether the cache keeps all positions, so that `generate` can take tokens back.
    """

    is_sliding = True

    def __init__(self, window: int, prefix_kv: torch.Tensor | None = None) -> None:
        super().__init__(prefix_kv)
        self.window = window
        self.dropped = self.complete_from = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def drop_(self, first: int) -> None:
        """Forget all positions before `first`."""
        if self.is_initialized and first > self.dropped:
            self.complete_from = self.get_seq_length()
            self.forget_(first - self.dropped)
            self.dropped = first

    def get_seq_length(self) -> int:
        return self.count_kept() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys `query_length` new tokens will meet, and the position of the first one."""
        return super().get_mask_sizes(query_length)[0] - self.dropped, self.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` positions.

        Raises:
            ValueError: the next token would attend to positions that are gone.
        """
        if self.get_seq_length() + tokens_to_remove < self.complete_from:
            raise ValueError(
                f"{-tokens_to_remove} tokens cannot be taken back: layers with sliding_window={self.window} keep only "
                "the positions that the next token sees. Call activate_past_recording() on the cache first."
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.dropped = self.complete_from = 0


class PrefixCache(Cache):
    """The cache of a whole model: a `PrefixLayer` per block. Its lengths count the text alone.

    Attributes:
        turns: cosines and sines of the positions that were read, see `CountingCache`.
    """

    def __init__(self, layers: list[PrefixLayer]) -> None:
        super().__init__(layers=[*layers])
        prefix_kv = layers[0].prefix_kv
        self.prefix_tokens = 0 if prefix_kv is None else prefix_kv.shape[-2]
        self._was_cropped = False
        self.turns: dict[str | None, torch.Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) - self.prefix_tokens

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise ValueError: a model without the prefix would take positions for the text from these lengths."""
        raise ValueError(
            f"{CACHE} is a PrefixCache, which only the model that made it can read. Pass this model None, or a cache "
            "of its own."
        )

    def count_prefix(self, positions: torch.Tensor | None = None) -> CountingCache:
        """Return a cache of the same layers, whose lengths count the prefix, for one call of the model.

        Args:
            positions: [B or 1, T], of the tokens of the call, the prefix counted. A cache of codes needs them.
        """
        return CountingCache(self.layers, torch.empty(0) if positions is None else positions, self.turns)

    def begin_call_(self, mask: torch.Tensor | None) -> None:
        """Make room before a call: forget the positions that tokens which were taken back had kept in memory.

        Args:
            mask: [B, P + past], 0 for padding; None if there is no padding.
        """
        if self._was_cropped:
            self._was_cropped = False
            self._drop_unseen_(mask)

    def end_call_(self, mask: torch.Tensor | None) -> None:
        """After a call, forget all positions that no later token attends to, unless the past is recorded.

        Args:
            mask: [B, P + past + T], 0 for padding; None if there is no padding.
        """
        if not any(getattr(layer, "record_past", False) for layer in self.layers):
            self._drop_unseen_(mask)

    def _drop_unseen_(self, mask: torch.Tensor | None) -> None:
        firsts: dict[int, int] = {}
        for layer in self.layers:
            if isinstance(layer, SlidingLayer):
                if layer.window not in firsts:
                    firsts[layer.window] = find_first_visible(layer.window, layer.get_seq_length(), mask)
                layer.drop_(firsts[layer.window])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of text.

        Raises:
            ValueError: in a layer with a sliding window, the next token would attend to positions that are gone.
        """
        super().crop(max(tokens_to_remove, -self.get_seq_length()))
        self._was_cropped = True


def make_layer(prefix_kv: torch.Tensor | None, window: int | None = None) -> PrefixLayer:
    """Return the empty cache of one block.

    Args:
        prefix_kv: the block's share of the prefix, [2, heads, P, d].
        window: the block's sliding window; None if it attends to everything.
    """
    return PrefixLayer(prefix_kv) if window is None else SlidingLayer(window, prefix_kv)


def make_block_cache(prefix_kv: torch.Tensor | None) -> Cache:
    """Return a one-layer cache for one call of a single decoder layer, whose `layer_idx` is 0."""
    return Cache(layers=[make_layer(prefix_kv)])
