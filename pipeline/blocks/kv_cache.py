"""A KV cache that begins with the prefix, in full precision, and quantizes what is appended to it.

Its lengths count the prefix while the model runs, so that masks and positions do; to everybody else (`generate`, which
cuts what it has read off its input by them) a whole model's cache counts the text alone.

In blocks that slide the prefix stays, and of the text only what the next token can see (`SlidingLayer`).

The prefix is never quantized: its keys and values are computed once by the full-precision model and put in front of
every sequence. R3, the online rotation of queries and keys, cancels in q·k; all it does is change what the key
quantizer sees. So it lives here, wholly inside the key's quantizer: rotate, quantize, rotate back. Queries and prefix
keys stay as the model made them, and no attention function needs to know about R3. (A kernel that keeps the rotated
integers rotates its queries instead: (q R3) · Q(k R3) = q · (Q(k R3) R3^T), the same number.)

Biases of k_proj can be hundreds of times what varies (Qwen2). In front of RoPE such a constant m is one vector a head;
behind it, it turns with the position and fills the whole range. So a centered key quantizer takes it out in front:
RoPE is linear, RoPE(k) = RoPE(k - m) + RoPE(m), the first part is quantized, the second is known by position.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # the same in every supported family

from pipeline.blocks.sliding import find_first_visible
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec

# What transformers calls the argument that a cache is passed as, and what it is returned as; `cache` since 5.24.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


class KeyQuantizer(nn.Module):
    """Quantizes keys [B, heads, T, d]: after RoPE, in the basis of R3 when `rotate`, or before RoPE.

    A hook on `quantizer` sees the keys as they are quantized, that is, rotated, and without what is constant before
    RoPE where they are centered. Before RoPE the cache cannot apply it: `hook_before_rope_` hangs it on the module
    whose output RoPE turns.

    Attributes:
        mean: float32 [heads, d], of the keys before RoPE; only of a centered quantizer that acts behind RoPE.
        positions: (cos, sin), each [B or 1, T, d], of the keys that come next; `watch_positions_` keeps them.
        transform: R3 and, called with True, its inverse.
    """

    def __init__(self, spec: QuantizerSpec, heads: int, head_dim: int, rotate: bool, before_rope: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.rotate = rotate
        self.before_rope = before_rope
        self.transform: Callable[..., torch.Tensor] = hadamard_transform
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
            quantized = self.transform(quantized, True)
        return quantized if constant is None else (quantized + constant).to(keys.dtype)

    def to_basis(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys [..., d] in the basis in which keys are quantized."""
        return self.transform(x) if self.rotate else x

    def turn_mean(self, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """RoPE(mean), float32 [B or 1, heads, T, d], at positions cos and sin [B or 1, T, d]."""
        mean = self.mean[None, :, None]
        return apply_rotary_pos_emb(mean, mean, cos.float(), sin.float())[1]

    def watch_positions_(self, attention: nn.Module) -> None:
        """Learn from each call of the attention at which positions its keys stand: caches are not told."""
        attention.register_forward_pre_hook(_keep_positions, with_kwargs=True)

    def hook_before_rope_(self, attention: nn.Module, heads_first: bool) -> None:
        """Apply it to the output of k_norm where the family has one, of k_proj otherwise.

        Args:
            heads_first: k_norm gives [B, heads, T, d], not [B, T, heads * d] or [B, T, heads, d].
        """
        find_key_source(attention).register_forward_hook(functools.partial(self._quantize_output, heads_first))

    def _quantize_output(self, heads_first: bool, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        keys = self(self.split_heads(output, heads_first))
        return keys if heads_first else keys.transpose(1, 2).reshape(output.shape)

    def split_heads(self, output: torch.Tensor, heads_first: bool) -> torch.Tensor:
        """Keys [B, heads, T, d] from what `find_key_source`'s module gives."""
        if heads_first:
            return output
        return output.view(*output.shape[:2], self.heads, self.head_dim).transpose(1, 2)


def _keep_positions(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    module.key_quantizer.positions = kwargs["position_embeddings"]


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
            prefix = self.prefix_kv.to(key_states)
            self.keys, self.values = prefix.unsqueeze(1).expand(2, key_states.shape[0], *prefix.shape[1:])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.key_quantizer is not None:
            key_states = self.key_quantizer(key_states)
        if self.value_quantizer is not None:
            value_states = self.value_quantizer(value_states)
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        """Forget all text. Older versions of transformers fill it with zeros and keep its length."""
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def get_seq_length(self) -> int:
        if not self.is_initialized and self.prefix_kv is not None:
            return self.prefix_kv.shape[-2]
        return super().get_seq_length()


class SlidingLayer(PrefixLayer):
    """The cache of a block that slides: the prefix, and of the text what the next token can see; lengths count all.

    Attributes:
        window: positions of text a position sees, its own included.
        dropped: how many positions of text, from its beginning on, are gone.
        first_visible: of the text, the first position to be kept at the next `update`.
        record_past: nothing is dropped until the next `PrefixCache.crop`, so that `generate` can take tokens back.
    """

    is_sliding = True

    def __init__(
        self,
        window: int,
        prefix_kv: torch.Tensor | None = None,
        key_quantizer: nn.Module | None = None,
        value_quantizer: nn.Module | None = None,
    ) -> None:
        super().__init__(prefix_kv, key_quantizer, value_quantizer)
        self.window = window
        self.dropped = self.first_visible = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All that the new tokens can see; what is kept is what the next one can."""
        seen = super().update(key_states, value_states, *args, **kwargs)
        if not self.record_past:
            self.drop_(self.first_visible)
        return seen

    def drop_(self, first: int) -> None:
        """Forget the text in front of position `first`."""
        prefix = 0 if self.prefix_kv is None else self.prefix_kv.shape[-2]
        start = prefix + first - self.dropped
        if start > prefix:
            self.keys, self.values = (
                torch.cat((states[..., :prefix, :], states[..., start:, :]), dim=-2)
                for states in (self.keys, self.values)
            )
            self.dropped = first

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length)[0] - self.dropped, self.dropped

    def reset(self) -> None:
        super().reset()
        self.dropped = self.first_visible = 0


class PrefixCache(Cache):
    """The cache of a whole model: a `PrefixLayer` per block."""

    def __init__(self, layers: list[PrefixLayer]) -> None:
        super().__init__(layers=layers)
        prefix_kv = layers[0].prefix_kv
        self.prefix_tokens = 0 if prefix_kv is None else prefix_kv.shape[-2]
        self._hidden_tokens = self.prefix_tokens
        self._sliding = [layer for layer in layers if isinstance(layer, SlidingLayer)]
        self._text_mask: torch.Tensor | None = None

    @property
    def dropped(self) -> int:
        """How many positions of text the blocks that slide have forgotten."""
        return self._sliding[0].dropped if self._sliding else 0

    def expect_(self, length: int, text_mask: torch.Tensor | None) -> None:
        """Before a call behind which the text has `length` tokens, those of padding 0 in text_mask [B, length]."""
        if self._sliding:
            self._text_mask = text_mask
            first = find_first_visible(self._sliding[0].window, length, text_mask)
            for layer in self._sliding:
                layer.first_visible = first

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens. Raises ValueError where what the next one sees is gone."""
        if not self._sliding or not self._sliding[0].is_initialized:
            super().crop(tokens_to_remove)
            return
        window, length = self._sliding[0].window, self.get_seq_length() + tokens_to_remove
        mask = None if self._text_mask is None else self._text_mask[:, :length]
        first = find_first_visible(window, length, mask)
        if first < self.dropped:
            raise ValueError(
                f"{-tokens_to_remove} tokens cannot be taken back: blocks with sliding_window={window} keep only what "
                "the next token sees; call activate_past_recording() on the cache first"
            )
        super().crop(tokens_to_remove)
        self._text_mask = mask
        for layer in self._sliding:
            layer.drop_(first)

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


def make_layer(block: nn.Module, prefix_kv: torch.Tensor | None, window: int | None = None) -> PrefixLayer:
    """The cache of one block, with its share of the prefix [2, heads, P, d] and the quantizers the block carries.

    `window` is that of a block that slides; None keeps everything.
    """
    attention = block.self_attn
    keys = getattr(attention, "key_quantizer", None)
    keys = None if keys is None or keys.before_rope else keys
    quantizers = keys, getattr(attention, "value_quantizer", None)
    return PrefixLayer(prefix_kv, *quantizers) if window is None else SlidingLayer(window, prefix_kv, *quantizers)


def make_block_cache(block: nn.Module, prefix_kv: torch.Tensor | None) -> Cache:
    """A one-layer cache for one call of a single decoder layer (its `layer_idx` is 0)."""
    return Cache(layers=[make_layer(block, prefix_kv)])
