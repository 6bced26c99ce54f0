"""A KV cache that begins with the prefix, in full precision, and quantizes what is appended to it.

The prefix is never quantized: its keys and values are computed once by the full-precision model and put in front of
every sequence. R3, the online rotation of queries and keys, cancels in q·k; all it does is change what the key
quantizer sees. So it lives here, wholly inside the key's quantizer: rotate, quantize, rotate back. Queries and prefix
keys stay as the model made them, and no attention function needs to know about R3. (A kernel that keeps the rotated
integers rotates its queries instead: (q R3) · Q(k R3) = q · (Q(k R3) R3^T), the same number.)
"""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from pipeline.hadamard import hadamard_transform
from pipeline.quantizer import StaticQuantizer


class KeyQuantizer(nn.Module):
    """Quantizes keys [B, heads, T, d] after RoPE, in the basis of R3 when `rotate`.

    A hook on `quantizer` sees the keys as they are quantized, that is, rotated.
    """

    def __init__(self, bits: int, heads: int, rotate: bool) -> None:
        super().__init__()
        self.rotate = rotate
        self.quantizer = StaticQuantizer(bits, (heads, 1, 1))

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        if self.quantizer.bits >= 16:
            return keys
        if not self.quantizer.calibrated:
            self.quantizer(hadamard_transform(keys) if self.rotate else keys)  # for the hooks
            return keys
        if not self.rotate:
            return self.quantizer(keys)
        return hadamard_transform(self.quantizer(hadamard_transform(keys)), inverse=True)


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


def make_block_cache(block: nn.Module, prefix_kv: torch.Tensor | None) -> Cache:
    """A one-layer cache for a single decoder layer (its `layer_idx` is 0), with the quantizers the layer carries."""
    attention = block.self_attn
    layer = PrefixLayer(
        prefix_kv, getattr(attention, "key_quantizer", None), getattr(attention, "value_quantizer", None)
    )
    return Cache(layers=[layer])
