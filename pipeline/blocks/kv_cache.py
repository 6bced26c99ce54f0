"""A KV cache that begins with the prefix, in full precision, and quantizes what is appended to it.

Its lengths count the prefix while the model runs, so that masks and positions do; to everybody else (`generate`, which
cuts what it has read off its input by them) a whole model's cache counts the text alone.

The prefix is never quantized: its keys and values are computed once by the full-precision model and put in front of
every sequence. R3, the online rotation of queries and keys, cancels in q·k; all it does is change what the key
quantizer sees. So it lives here, wholly inside the key's quantizer: rotate, quantize, rotate back. Queries and prefix
keys stay as the model made them, and no attention function needs to know about R3. (A kernel that keeps the rotated
integers rotates its queries instead: (q R3) · Q(k R3) = q · (Q(k R3) R3^T), the same number.)

Biases of k_proj can be hundreds of times what varies (Qwen2). In front of RoPE such a constant m is one vector a head;
behind it, it turns with the position and fills the whole range. So a centered key quantizer takes it out in front:
RoPE is linear, RoPE(k) = RoPE(k - m) + RoPE(m), the first part is quantized, the second is known by position.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # the same in every supported family

from pipeline.numerics.hadamard import hadamard_transform
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec


class KeyQuantizer(nn.Module):
    """Quantizes keys [B, heads, T, d]: after RoPE, in the basis of R3 when `rotate`, or before RoPE.

    A hook on `quantizer` sees the keys as they are quantized, that is, rotated, and without what is constant before
    RoPE where they are centered. Before RoPE the cache cannot apply it: `hook_before_rope_` hangs it on the module
    whose output RoPE turns.

    Attributes:
        mean: float32 [heads, d], of the keys before RoPE; only of a centered quantizer that acts behind RoPE.
        positions: (cos, sin), each [B or 1, T, d], of the keys that come next; `watch_positions_` keeps them.
    """

    def __init__(self, spec: QuantizerSpec, heads: int, head_dim: int, rotate: bool, before_rope: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.rotate = rotate
        self.before_rope = before_rope
        self.mean_taken_out = spec.enabled and spec.centered and not before_rope
        self.quantizer = ActivationQuantizer(replace(spec, centered=spec.centered and before_rope), head_dim, heads)
        self.positions: tuple[torch.Tensor, torch.Tensor] | None = None
        if self.mean_taken_out:
            self.register_buffer("mean", torch.full((heads, head_dim), torch.nan))

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        if not self.quantizer.spec.enabled:
            return keys
        varying, constant = keys, None
        if self.mean_taken_out:
            constant = self.turn_mean(*self.positions)
            varying = keys.float() - constant
        quantized = self.quantizer(self.to_basis(varying))
        if not self.quantizer.calibrated:  # that was for the hooks
            return keys
        if self.rotate:
            quantized = hadamard_transform(quantized, inverse=True)
        return quantized if constant is None else (quantized + constant).to(keys.dtype)

    def to_basis(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys [..., d] in the basis in which keys are quantized."""
        return hadamard_transform(x) if self.rotate else x

    def turn_mean(self, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """RoPE(mean), float32 [B or 1, heads, T, d], at positions cos and sin [B or 1, T, d]."""
        mean = self.mean[None, :, None]
        return apply_rotary_pos_emb(mean, mean, cos.float(), sin.float())[1]

    def watch_positions_(self, attention: nn.Module) -> None:
        """Learn from each call of the attention at which positions its keys stand: caches are not told."""

        def keep_positions(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            module.key_quantizer.positions = kwargs["position_embeddings"]

        attention.register_forward_pre_hook(keep_positions, with_kwargs=True)

    def hook_before_rope_(self, attention: nn.Module, heads_first: bool) -> None:
        """Apply it to the output of k_norm where the family has one, of k_proj otherwise.

        Args:
            heads_first: k_norm gives [B, heads, T, d], not [B, T, heads * d] or [B, T, heads, d].
        """

        def quantize_output(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            keys = self(self.split_heads(output, heads_first))
            return keys if heads_first else keys.transpose(1, 2).reshape(output.shape)

        find_key_source(attention).register_forward_hook(quantize_output)

    def split_heads(self, output: torch.Tensor, heads_first: bool) -> torch.Tensor:
        """Keys [B, heads, T, d] from what `find_key_source`'s module gives."""
        if heads_first:
            return output
        return output.view(*output.shape[:2], self.heads, self.head_dim).transpose(1, 2)


def find_key_source(attention: nn.Module) -> nn.Module:
    """The module whose output RoPE turns into keys."""
    return attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj


class PrefixLayer(DynamicLayer):
    """One layer's cache: `get_seq_length()` starts at P, so that masks and positions count the prefix.

    Args:
        prefix_kv: [2, heads, P, d] keys (after RoPE) and values, or None for no prefix.
        key_quantizer, value_quantizer: applied to every appended key and value, never to the prefix.
    """

    def __init__(
        self,
        prefix_kv: torch.Tensor | None = None,
        key_quantizer: nn.Module | None = None,
        value_quantizer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.prefix_kv = prefix_kv
        self.key_quantizer = key_quantizer
        self.value_quantizer = value_quantizer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.prefix_kv is not None:
            prefix = self.prefix_kv.to(dtype=self.dtype, device=self.device)
            self.keys, self.values = prefix.unsqueeze(1).expand(2, key_states.shape[0], *prefix.shape[1:])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.key_quantizer is not None:
            key_states = self.key_quantizer(key_states)
        if self.value_quantizer is not None:
            value_states = self.value_quantizer(value_states)
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        if not self.is_initialized and self.prefix_kv is not None:
            return self.prefix_kv.shape[-2]
        return super().get_seq_length()


class PrefixCache(Cache):
    """The cache of a whole model: a `PrefixLayer` per block."""

    def __init__(self, layers: list[PrefixLayer]) -> None:
        super().__init__(layers=layers)
        prefix_kv = layers[0].prefix_kv
        self.prefix_tokens = 0 if prefix_kv is None else prefix_kv.shape[-2]
        self._hidden_tokens = self.prefix_tokens

    @contextmanager
    def counting_prefix(self) -> Iterator[None]:
        """Inside, lengths count the prefix."""
        self._hidden_tokens = 0
        try:
            yield
        finally:
            self._hidden_tokens = self.prefix_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) - self._hidden_tokens


def make_layer(block: nn.Module, prefix_kv: torch.Tensor | None) -> PrefixLayer:
    """The cache of one block, with its share of the prefix [2, heads, P, d] and the quantizers the block carries."""
    attention = block.self_attn
    keys = getattr(attention, "key_quantizer", None)
    keys = None if keys is None or keys.before_rope else keys
    return PrefixLayer(prefix_kv, keys, getattr(attention, "value_quantizer", None))


def make_block_cache(block: nn.Module, prefix_kv: torch.Tensor | None) -> Cache:
    """A one-layer cache for a single decoder layer (its `layer_idx` is 0)."""
    return Cache(layers=[make_layer(block, prefix_kv)])
