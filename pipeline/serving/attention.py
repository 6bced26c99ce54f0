"""What stands in vLLM's cache: keys and values as they were evaluated, and in the first P places the prefix.

A decoder layer of vLLM turns queries and keys and hands them, with the values, to its attention, which writes them
into the cache and reads it:

    q, k = rotary_emb(positions, q, k)      -> TurnedKeys: keys are quantized behind RoPE (or before)
    attention(q, k, v)                      -> CachedValues: values are quantized; at positions 0 … P-1 keys and
                                               values give way to the prefix's

Placeholders stand at those positions (placeholders.py), in every text, at whatever place of a batch and however a text
is cut into chunks: all that counts is the position. What the model computes there is read by nobody: later tokens see
only the cache.
"""

import torch
from torch import nn

from pipeline.blocks.kv_cache import KeyQuantizer
from pipeline.kernels.compiler import find_kernels
from pipeline.numerics.formats import INT
from pipeline.numerics.hadamard import CPU, HadamardTransform, plan_hadamard
from pipeline.numerics.quantizer import ActivationQuantizer, integer_range


class TurnedKeys(nn.Module):
    """In the place of a layer's RoPE: (positions [T], queries [T, H d], keys [T, K d]) -> queries and keys.

    Attributes:
        positions: of the tokens that come next, for `CachedValues`.
    """

    def __init__(
        self, rope: nn.Module, quantizer: KeyQuantizer, dtype: torch.dtype, device: torch.device = CPU
    ) -> None:
        """`dtype`, `device`: in and on which the model computes."""
        super().__init__()
        self.rope, self.quantizer = rope, quantizer.to(device)
        if quantizer.rotate:
            own = torch.float32 if quantizer.mean_taken_out else dtype
            quantizer.transform = HadamardTransform(quantizer.head_dim, own, device=device)
        self.in_one_pass = device.type == "cpu" and fits_one_pass(quantizer) and find_kernels()
        self.positions: torch.Tensor | None = None

    def forward(
        self, positions: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.positions = positions
        if self.quantizer.before_rope:
            return self.rope(positions, queries, self.quantize(keys))
        if self.in_one_pass:
            queries, keys = self.rope(positions, queries, keys)
            return queries, self.quantize_in_one_pass(keys, positions)
        if self.quantizer.mean_taken_out:
            table = self.rope.cos_sin_cache.to(keys.dtype)[positions].unsqueeze(0)
            cos, sin = (half.repeat(1, 1, 2) for half in table.chunk(2, dim=-1))
            self.quantizer.positions = cos, sin
        queries, keys = self.rope(positions, queries, keys)
        keys = self.quantize(keys)
        self.quantizer.positions = None  # nobody reads them later: compiled code need not keep them
        return queries, keys

    def quantize(self, keys: torch.Tensor) -> torch.Tensor:
        return as_rows(self.quantizer(as_heads(keys, self.quantizer.heads)))

    def quantize_in_one_pass(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What `KeyQuantizer` does behind RoPE, in float32, with R3 and what undoes it."""
        own, inner = self.quantizer, self.quantizer.quantizer
        ends = integer_range(inner.spec.bits, inner.spec.symmetric)
        mean = own.mean if own.mean_taken_out else None
        zero_point = None if inner.spec.symmetric else inner.zero_point
        table = self.rope.cos_sin_cache.to(keys.dtype) if own.mean_taken_out else None
        order = own.head_dim if own.rotate else 1
        return torch.ops.prefixquant.cached_keys(keys, positions, table, mean, inner.scale, zero_point, order, *ends)


def fits_one_pass(quantizer: KeyQuantizer) -> bool:
    """Static integers behind RoPE, a scale a head, a head's width with a transform of Sylvester's alone."""
    spec = quantizer.quantizer.spec
    static = spec.enabled and spec.format == INT and not spec.dynamic and spec.group_size == -1
    plan = plan_hadamard(quantizer.head_dim)
    return static and not quantizer.before_rope and (not quantizer.rotate or plan.power_of_two == quantizer.head_dim)


class CachedValues(nn.Module):
    """In the place of a layer's attention: (queries [T, H d], keys, values [T, K d]) -> [T, H d]."""

    def __init__(
        self,
        attention: nn.Module,
        turned: TurnedKeys,
        quantizer: ActivationQuantizer,
        prefix_kv: torch.Tensor | None,
        device: torch.device = CPU,
    ) -> None:
        """`prefix_kv`: [2, K, P, d], keys behind RoPE and values of this layer, or None; it goes to `device`."""
        super().__init__()
        self.attention, self.quantizer = attention, quantizer.to(device)
        self._turned = (turned,)  # a tuple: it is a module of the layer already
        self.heads = turned.quantizer.heads
        own = None if prefix_kv is None else prefix_kv.transpose(1, 2).flatten(2).contiguous().to(device)
        self.register_buffer("prefix", own, persistent=False)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        values = as_rows(self.quantizer(as_heads(values, self.heads)))
        if self.prefix is not None:
            positions, length = self._turned[0].positions, self.prefix.shape[1]
            stored = self.prefix.to(keys.dtype)[:, positions.clamp(max=length - 1)]
            inside = (positions < length).unsqueeze(-1)
            keys, values = torch.where(inside, stored[0], keys), torch.where(inside, stored[1], values)
        return self.attention(queries, keys, values)


def as_heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[T, heads * d] -> [1, heads, T, d], as quantizers of keys and values take them."""
    return rows.unflatten(-1, (heads, -1)).transpose(0, 1).unsqueeze(0)


def as_rows(states: torch.Tensor) -> torch.Tensor:
    """Undo `as_heads`."""
    return states.squeeze(0).transpose(0, 1).flatten(1)
