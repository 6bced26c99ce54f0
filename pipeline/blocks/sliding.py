"""Sliding windows with the prefix pinned: which positions a position sees in blocks that slide.

In such a block a position was trained to see W positions, its own included (`sliding_window` of the config). The prefix
is no part of what slides: position t of the text sees

    the whole prefix, however far it is      and the text's positions s with t - W < s <= t

that is, W positions of text, with a prefix or without one, where it is what the model's makers meant. RoPE stays what
it is: the prefix is at 0 to P - 1, text begins at P. Padding is not counted: a text sees the same however it is padded.
"""

from typing import Any

import torch
from transformers import AttentionMaskInterface


def make_sliding_mask(
    config: Any,
    window: int,
    hidden: torch.Tensor,
    prefix: int,
    past: int,
    dropped: int = 0,
    text_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mask of a block that slides, as its attention takes it: [B, 1, T, keys], bool (sdpa) or added (eager).

    P = 2, T = 4 behind it, window 2:

        1 1 | 1 0 0 0
        1 1 | 1 1 0 0
        1 1 | 0 1 1 0
        1 1 | 0 0 1 1

    Args:
        config: the model's; names its attention implementation.
        window: W.
        hidden: [B, T, …] what attention is about to read; its shape, dtype and device count.
        prefix: how many positions in front of the text are pinned, be they in the cache or the first of `hidden`.
        past: positions in front of `hidden`, the prefix's and the dropped ones included.
        dropped: how many positions, the text's first ones, are no longer among the keys.
        text_mask: [B, past + T - prefix], 0 for padding; None: there is none.

    Raises:
        ValueError: the attention implementation takes no mask of its own.
    """
    if "flash" in config._attn_implementation:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} cannot keep the prefix in sight of layers that slide "
            f"(sliding_window={window}); use sdpa or eager"
        )
    batch, length = hidden.shape[:2]
    device, total = hidden.device, past + length
    everything = torch.arange(total, device=device)
    places = torch.cat((everything[:prefix], everything[prefix + dropped :]))  # of the keys
    real = counted = None
    if text_mask is not None:
        real = torch.nn.functional.pad(text_mask.to(device).bool(), (prefix, 0), value=True)
        counted = real.cumsum(-1)

    def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        place = places[key]
        distance = query - place if counted is None else counted[row, query] - counted[row, place]
        seen = (place <= query) & ((distance < window) | (place < prefix))
        return seen if real is None else seen & real[row, place]

    return AttentionMaskInterface()[config._attn_implementation](
        batch_size=batch,
        q_length=length,
        kv_length=len(places),
        q_offset=past,
        mask_function=sees,
        allow_is_causal_skip=False,
        dtype=hidden.dtype,
        config=config,
        device=device,
    )


def find_first_visible(window: int, length: int, text_mask: torch.Tensor | None = None) -> int:
    """The first position of a text [length] that a token behind it can see; of several texts the least.

    Window 3: length 5 -> 3; text_mask 0 0 1 1 1 -> 3; 1 1 1 0 0 -> 1.

    Args:
        text_mask: [B, length], 0 for padding.
    """
    if text_mask is None or length == 0:
        return max(0, length - window + 1)
    real = text_mask.bool()
    counted = real.cumsum(-1)
    visible = real & (counted[:, -1:] - counted < window - 1)
    first = torch.where(visible.any(-1), visible.int().argmax(-1), length)
    return int(first.min())
