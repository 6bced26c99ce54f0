"""Writes to vLLM's cache the keys and values that were evaluated, and the prefix at the first P positions.

A decoder layer of vLLM turns queries and keys and hands them, with the values, to its attention, which writes them
into the cache and reads it:

    q, k = rotary_emb(positions, q, k)      -> TurnedKeys: keys are quantized after RoPE (or before)
    attention(q, k, v)                      -> CachedValues: values are quantized; at positions 0 … P-1 keys and
                                               values give way to the prefix's

Placeholders take those positions (placeholders.py), in every text, at any place of a batch, and however a text is cut
into chunks: only the position counts. The outputs of the model at these positions have no reader, because later tokens
read only the cache. In a layer with a sliding window they leave the window like any other token.

A cache of codes (`packed_cache`, code_backend.py) gets codes from PackedKeys and PackedValues. Its attention reads the
prefix from a tensor of its own, and nothing reads the codes at positions 0 … P-1.

vLLM does not tell its attention the positions. They travel with the keys, in two more columns, so that no module holds
the state of a call.
"""

from typing import cast

import torch
from torch import nn

from pipeline.blocks.kv_cache import KeyQuantizer, Positions
from pipeline.kernels.code_attention import CodeAttention, describe_codes, make_turn
from pipeline.kernels.compiler import find_kernels
from pipeline.kernels.packed_states import encode_states, fits_kernels
from pipeline.numerics.formats import INT
from pipeline.numerics.hadamard import CPU, HadamardTransform, factor_hadamard
from pipeline.numerics.quantizer import ActivationQuantizer, integer_range

_BASE = 256


class Rope(nn.Module):
    """The type of vLLM's RoPE. No object is an instance of it.

    Attributes:
        cos_sin_cache: [positions, d], cosines and then sines.
    """

    cos_sin_cache: torch.Tensor


class TableRope(nn.Module):
    """Llama's RoPE by tables of transformers, for the types of RoPE that vLLM computes in another way or not at all."""

    cos_sin_cache: torch.Tensor

    def __init__(self, cos_sin_cache: torch.Tensor) -> None:
        """Take tables [positions, d], cosines and then sines of half of the channels each."""
        super().__init__()
        self.register_buffer("cos_sin_cache", cos_sin_cache, persistent=False)

    def forward(
        self, positions: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.cos_sin_cache.to(keys.dtype)[positions].unsqueeze(1)
        cos, sin = (half.repeat(1, 1, 2) for half in table.chunk(2, dim=-1))
        return _turn_heads(queries, cos, sin), _turn_heads(keys, cos, sin)


def _turn_heads(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn rows [T, heads * d]; cos and sin are [T, 1, d]."""
    x = rows.unflatten(-1, (-1, cos.shape[-1]))
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).flatten(-2)


class NoRope(nn.Module):
    """Takes the place of RoPE in layers without it."""

    def forward(
        self, positions: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return queries, keys


class TurnedKeys(nn.Module):
    """Takes the place of a layer's RoPE: (positions [T], queries [T, H d], keys [T, K d]) -> queries and keys.

    With a prefix, keys are [T, K d + 2]: see `append_places`.
    """

    def __init__(
        self,
        rope: Rope | TableRope | NoRope,
        quantizer: KeyQuantizer,
        dtype: torch.dtype,
        device: torch.device = CPU,
        prefix_tokens: int = 0,
    ) -> None:
        """Wrap a layer's RoPE.

        Args:
            dtype, device: the dtype and device of the model's computations.
            prefix_tokens: P.
        """
        super().__init__()
        self.rope, self.quantizer, self.prefix_tokens = rope, quantizer.to(device), prefix_tokens
        if quantizer.rotate:
            transform_dtype = torch.float32 if quantizer.mean_taken_out else dtype
            quantizer.transform = HadamardTransform(quantizer.head_dim, transform_dtype, device=device)
        one_pass = device.type == "cpu" and fits_one_pass(quantizer) and quantizer.turns
        self.in_one_pass = one_pass and find_kernels()

    def forward(
        self, positions: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        queries, keys = self.turn(positions, queries, keys)
        return queries, append_places(keys, positions, self.prefix_tokens) if self.prefix_tokens else keys

    def turn(
        self, positions: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries and keys after RoPE, the keys quantized."""
        if self.quantizer.before_rope:
            return self.rope(positions, queries, self.quantize(keys))
        queries, keys = self.rope(positions, queries, keys)
        if self.in_one_pass:
            return queries, self.quantize_in_one_pass(keys, positions)
        return queries, self.quantize(keys, self.find_tables(positions, keys))

    def find_tables(self, positions: torch.Tensor, keys: torch.Tensor) -> Positions | None:
        """Return the cos and sin of positions, [1, T, d] each; None if no mean is taken out."""
        if not self.quantizer.mean_taken_out:
            return None
        if not self.quantizer.turns:
            return keys, keys  # nothing reads them: without RoPE the mean is the same at all positions
        table = cast(Rope, self.rope).cos_sin_cache.to(keys.dtype)[positions].unsqueeze(0)
        cos, sin = (half.repeat(1, 1, 2) for half in table.chunk(2, dim=-1))
        return cos, sin

    def quantize(self, keys: torch.Tensor, tables: Positions | None = None) -> torch.Tensor:
        """Quantize keys [T, K d]. `tables` are the cos and sin of their positions, which a mean needs."""
        return as_rows(self.quantizer(as_heads(keys, self.quantizer.heads), tables))

    def quantize_in_one_pass(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Quantize keys as `KeyQuantizer` does after RoPE, in float32, with R3 and its inverse."""
        outer, inner = self.quantizer, self.quantizer.quantizer
        lowest, highest = integer_range(inner.spec.bits, inner.spec.symmetric)
        mean = outer.mean if outer.mean_taken_out else None
        zero_point = None if inner.spec.symmetric else inner.zero_point
        table = cast(Rope, self.rope).cos_sin_cache.to(keys.dtype) if outer.mean_taken_out else None
        order = outer.head_dim if outer.rotate else 1
        return torch.ops.prefixquant.cached_keys(
            keys, positions, table, mean, inner.scale, zero_point, order, lowest, highest
        )


class PackedKeys(TurnedKeys):
    """Takes the place of a layer's RoPE, for a cache of codes: (positions, queries, keys) -> queries and key codes.

    The codes are uint8 [T, K bytes], of the keys that `TurnedKeys` returns. Those of the prefix have no reader.
    """

    def forward(
        self, positions: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        queries, keys = self.rope(positions, queries, keys)
        outer, inner = self.quantizer, self.quantizer.quantizer
        if not self.in_one_pass:
            tables = self.find_tables(positions, keys)
            varying, _ = outer.split(as_heads(keys, outer.heads), tables)
            return queries, as_rows(inner.encode(varying))
        lowest, _ = integer_range(inner.spec.bits, inner.spec.symmetric)
        mean = outer.mean if outer.mean_taken_out else None
        zero_point = None if inner.spec.symmetric else inner.zero_point
        table = cast(Rope, self.rope).cos_sin_cache.to(keys.dtype) if outer.mean_taken_out else None
        order = outer.head_dim if outer.rotate else 1
        codes = torch.ops.prefixquant.key_codes(
            keys, positions, table, mean, inner.scale, zero_point, order, lowest, inner.spec.bits
        )
        return queries, codes


class PackedValues(nn.Module):
    """Values [T, K d] -> their packed codes, uint8 [T, K bytes]."""

    def __init__(self, quantizer: ActivationQuantizer, heads: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.quantizer, self.heads = quantizer.to(device), heads
        # Chosen once: compiled code cannot ask whether the operators can be compiled.
        self.in_one_pass = fits_kernels(quantizer, torch.empty(1, heads, 1, 1, dtype=dtype, device=device))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        states = as_heads(values, self.heads)
        codes = encode_states(self.quantizer, states) if self.in_one_pass else self.quantizer.encode(states)
        return as_rows(codes)


def find_code_attention(
    keys: KeyQuantizer,
    values: ActivationQuantizer,
    *,
    scale: float,
    window: int,
    prefix_kv: torch.Tensor | None,
    table: torch.Tensor | None,
) -> CodeAttention:
    """Return the attention over the codes of `PackedKeys` and `PackedValues`.

    Args:
        scale: the factor of the scores.
        window: positions that a position attends to; 0 for all before it.
        prefix_kv: [2, K, P, d] or None.
        table: from `code_attention.make_table`; only a mean needs it.
    """
    return CodeAttention(
        describe_codes(keys.quantizer, keys.heads, keys.head_dim),
        describe_codes(values, keys.heads, keys.head_dim),
        scale=scale,
        turn=make_turn(keys.head_dim) if keys.rotate else None,
        mean=keys.mean.float().contiguous() if keys.mean_taken_out else None,
        table=table if keys.mean_taken_out else None,
        prefix=None if prefix_kv is None else prefix_kv.float().contiguous(),
        window=window,
    )


def explain_no_codes(keys: KeyQuantizer, values: ActivationQuantizer) -> str | None:
    """Return why the cache of a layer cannot hold codes: the setting, the reason and a remedy. None if it can."""
    remedy = "Leave packed_cache out, or quantize with other settings"
    if keys.before_rope:
        return f"keys.before_rope=true: their codes would have to be turned at each reading. {remedy}"
    for name, quantizer in (("keys", keys.quantizer), ("values", values)):
        spec = quantizer.spec
        if not spec.enabled:
            return f"{name}.bits={spec.bits}: they are not quantized. {remedy}"
        if spec.dynamic:
            return f"{name}.mode=dynamic: every token would need scales of its own in the cache. {remedy}"
        if not quantizer.stores_codes:
            return f"{name}.format={spec.format}: its scales are found at run time and not stored. {remedy}"
    return None


def fits_one_pass(quantizer: KeyQuantizer) -> bool:
    """Return whether keys are static integers after RoPE, with one scale per head, and heads have a width of 2^n."""
    spec = quantizer.quantizer.spec
    static = spec.enabled and spec.format == INT and not spec.dynamic and spec.group_size == -1
    factors = factor_hadamard(quantizer.head_dim)
    return static and not quantizer.before_rope and (not quantizer.rotate or factors.power_of_two == quantizer.head_dim)


class CachedValues(nn.Module):
    """Takes the place of a layer's attention: (queries [T, H d], keys, values [T, K d]) -> [T, H d].

    With a prefix, keys come from `append_places`.
    """

    prefix: torch.Tensor | None

    def __init__(
        self,
        attention: nn.Module,
        quantizer: ActivationQuantizer,
        heads: int,
        prefix_kv: torch.Tensor | None,
        device: torch.device = CPU,
    ) -> None:
        """Wrap a layer's attention.

        Args:
            quantizer: the quantizer of values.
            heads: K.
            prefix_kv: [2, K, P, d], keys after RoPE and values of this layer, or None. It is moved to `device`.
        """
        super().__init__()
        self.attention, self.quantizer, self.heads = attention, quantizer.to(device), heads
        rows = None if prefix_kv is None else prefix_kv.transpose(1, 2).flatten(2).contiguous().to(device)
        self.register_buffer("prefix", rows, persistent=False)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        values = as_rows(self.quantizer(as_heads(values, self.heads)))
        if self.prefix is not None:
            keys, places = split_places(keys)
            length = self.prefix.shape[1]
            stored = self.prefix.to(keys.dtype)[:, places.clamp(max=length - 1)]
            inside = (places < length).unsqueeze(-1)
            keys, values = torch.where(inside, stored[0], keys), torch.where(inside, stored[1], values)
        return self.attention(queries, keys, values)


def append_places(keys: torch.Tensor, positions: torch.Tensor, prefix_tokens: int) -> torch.Tensor:
    """Return keys [T, C] with two more columns: the place in the prefix, P for every position after it.

    The columns are the two digits of the place to base 256: integers that bfloat16 holds exactly. P = 300, positions
    2, 299, 5000 -> (0, 2), (1, 43), (1, 44).
    """
    places = positions.clamp(max=prefix_tokens)
    digits = torch.stack((places // _BASE, places % _BASE), dim=-1)
    return torch.cat((keys, digits.to(keys.dtype)), dim=-1)


def split_places(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `append_places`: return keys [T, C] and places [T]."""
    digits = keys[:, -2:].long()
    return keys[:, :-2], digits[:, 0] * _BASE + digits[:, 1]


def as_heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows [T, heads * d] as [1, heads, T, d], as quantizers of keys and values take them."""
    return rows.unflatten(-1, (heads, -1)).transpose(0, 1).unsqueeze(0)


def as_rows(states: torch.Tensor) -> torch.Tensor:
    """Undo `as_heads`."""
    return states.squeeze(0).transpose(0, 1).flatten(1)
