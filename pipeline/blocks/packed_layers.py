"""A cache of codes: keys and values of the text as 2 to 8 bits, the prefix next to them in full precision.

    layer.keys     uint8 [B, heads, T, bytes], the codes of the text's keys; in full precision where keys have no codes
    layer.values   the same for values
    layer.places   int32 [B or 1, T], positions of the text; only where the mean of keys is taken out before RoPE
    prefix_kv      [2, heads, P, d], as in every layer

A call of attention appends codes and gets the states of all positions, which live as long as the call. So a model holds
the states of one layer at a time. They are the states that were evaluated, bit for bit where `kernels/packed_states.py`
says so. The scales are in the quantizers: a cache can be read only by the attention of its layer, which passes the
functions that decode (`kv_cache.NewStates`).

A static quantizer whose values can be stored has codes (`ActivationQuantizer.stores_codes`). Keys that are quantized
before RoPE have none, because the cache receives them after RoPE.
"""

import torch

from pipeline.blocks.kv_cache import NewStates, PrefixLayer, QuantizedAttention, SlidingLayer
from pipeline.models.layers import Attention


class PackedLayer(PrefixLayer):
    """A `PrefixLayer` that stores codes. Its `keys` and `values` hold the text alone."""

    packed = True
    places: torch.Tensor | None = None

    def append_(
        self, keys: NewStates, values: NewStates, places: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append codes, and return the states of all positions, [B, heads, prefix + past + T, d] each.

        Args:
            places: int32 [B or 1, T], positions of the new tokens; None if no layer of this kind needs them.
        """
        first = self.count_prefix_kept()
        whole = []
        for index, (new, stored) in enumerate(((keys, self.keys), (values, self.values))):
            past = 0 if stored is None else stored.shape[2]
            batch, heads, length, width = new.states.shape
            out = new.states.new_empty(batch, heads, first + past + length, width)
            if first and self.prefix_kv is not None:
                out[:, :, :first] = self.prefix_kv[index, :, -first:].to(out)
            if stored is not None and past:
                new.decode_(out, first, stored, self.places)
            out[:, :, first + past :] = new.states
            whole.append(out)
        if self.keys is None or self.values is None:
            self.dtype, self.device, self.is_initialized = keys.states.dtype, keys.states.device, True
            self.keys, self.values, self.places = keys.codes, values.codes, places
        else:
            self.keys = torch.cat((self.keys, keys.codes), dim=2)
            self.values = torch.cat((self.values, values.codes), dim=2)
            if self.places is not None and places is not None:
                rows = max(len(self.places), len(places))
                both = (self.places.expand(rows, -1), places.to(self.places.device).expand(rows, -1))
                self.places = torch.cat(both, dim=1)
        return whole[0], whole[1]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise RuntimeError: states have no codes without the quantizers of an attention module."""
        raise RuntimeError(
            "a packed cache stores codes, which only attention modules with quantizers can append. Pass it to the "
            "model, or use make_cache(packed=False)."
        )

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise RuntimeError: the scales are in the quantizers of the attention module."""
        raise RuntimeError("a packed cache holds codes without their scales. Use make_cache(packed=False) to read it.")

    def count_prefix_kept(self) -> int:
        """Return how many positions of the prefix the layer still holds."""
        length = 0 if self.prefix_kv is None else self.prefix_kv.shape[-2]
        return max(0, length - getattr(self, "dropped", 0))

    def count_kept(self) -> int:
        return self.count_prefix_kept() + (0 if self.keys is None else self.keys.shape[2])

    def forget_(self, count: int) -> None:
        start = max(0, count - self.count_prefix_kept())
        if start and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, start:].clone(), self.values[:, :, start:].clone()
            self.places = None if self.places is None else self.places[:, start:].clone()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.places is not None and self.keys is not None:
            self.places = self.places[:, : self.keys.shape[2]]

    def reset(self) -> None:
        super().reset()
        self.places = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.places is not None and len(self.places) > 1:
            self.places = self.places.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_places_(indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_places_(beam_idx)

    def _select_places_(self, rows: torch.Tensor) -> None:
        if self.places is not None and len(self.places) > 1:
            self.places = self.places[rows.to(self.places.device)]


class PackedSlidingLayer(PackedLayer, SlidingLayer):
    """A `SlidingLayer` that stores codes."""

    def __init__(self, window: int, prefix_kv: torch.Tensor | None = None) -> None:
        SlidingLayer.__init__(self, window, prefix_kv)


def has_codes(attention: Attention) -> bool:
    """Return whether a cache can store the keys or the values of an attention module as codes."""
    quantizers = [getattr(attention, name, None) for name in QuantizedAttention.__annotations__]
    return all(quantizers) and any(quantizer.stores_codes for quantizer in quantizers if quantizer is not None)


def make_packed_layer(prefix_kv: torch.Tensor | None, window: int | None = None) -> PackedLayer:
    """Return the empty cache of codes of one block, with the arguments of `kv_cache.make_layer`."""
    return PackedLayer(prefix_kv) if window is None else PackedSlidingLayer(window, prefix_kv)
