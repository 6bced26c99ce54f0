"""Masks that transformers' own do not cover: padding after the prefix, and packed texts.

In a layer with a sliding window of W (`sliding_window` of the config), a position attends to itself and the W - 1
positions before it. The prefix is text like any other: it slides out of the window, so that a model with a prefix
equals the original reading prefix + text, at every length. One running text needs no mask from here: transformers
builds its own from the lengths of the cache.

Two cases are different, because keys are not where the original would have them:

    padding   p p · · a b c      The prefix comes before the padding. `a` is 1 position after it, not 3.
    packing   p p a b | d e      Each text has the prefix before it. `d` is 1 position after it, and a, b are masked.

So distances are counted in positions that the text really has.
"""

import torch
from transformers import AttentionMaskInterface, PreTrainedConfig


def count_places(mask: torch.Tensor) -> torch.Tensor:
    """Return the place of each position in its text, [B, length], without the padding (0 in `mask` [B, length])."""
    return mask.long().cumsum(-1)


def make_mask(
    config: PreTrainedConfig,
    hidden: torch.Tensor,
    *,
    past: int,
    dropped: int = 0,
    window: int | None = None,
    places: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    texts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mask of a layer as its attention takes it: [B, 1, T, keys], bool (sdpa) or added (eager).

    Window 3, P = 2, one text of 3 tokens after 2 positions of padding (rows of padding are left out):

        p p · · a b c
        1 1 0 0 1 0 0
        0 1 0 0 1 1 0
        0 0 0 0 1 1 1

    Args:
        config: the model's; names its attention implementation.
        hidden: [B, T, …], the input of attention; only its shape, dtype and device count.
        past: how many positions were read before `hidden`, the prefix's and the dropped ones included.
        dropped: the number of these, from the first on, that are no longer in the cache.
        window: W; None if the layer attends to everything.
        places: [B, past + T], the place of each position in its text; needed with a window.
        mask: [B, past + T], 0 for padding; None if there is none.
        texts: [B, past + T], the number of the text that a position belongs to, -1 for the prefix, which all texts
            see; None if each row is one text.
    """
    real = None if mask is None else mask.to(hidden.device).bool()

    def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        visible = key <= query
        if window is not None:
            assert places is not None, "a sliding window needs the places of positions"
            visible = visible & (places[row, query] - places[row, key] < window)
        if real is not None:
            visible = visible & real[row, key]
        if texts is not None:
            visible = visible & ((texts[row, key] == texts[row, query]) | (texts[row, key] < 0))
        return visible

    batch, length = hidden.shape[:2]
    return AttentionMaskInterface()[config._attn_implementation](
        batch_size=batch,
        q_length=length,
        kv_length=past + length - dropped,
        q_offset=past,
        kv_offset=dropped,
        mask_function=sees,
        allow_is_causal_skip=False,
        dtype=hidden.dtype,
        config=config,
        device=hidden.device,
    )


def find_first_visible(window: int, length: int, mask: torch.Tensor | None = None) -> int:
    """Return the first of `length` positions that the next token attends to; for several texts, the lowest.

    Window 3: length 5 -> 3; mask 0 0 1 1 1 -> 3; 1 1 1 0 0 -> 1.

    Args:
        mask: [B, length], 0 for padding.
    """
    if mask is None or length == 0:
        return max(0, length - window + 1)
    real = mask.bool()
    places = count_places(real)
    visible = real & (places[:, -1:] - places < window - 1)
    first = torch.where(visible.any(-1), visible.int().argmax(-1), length)
    return int(first.min())
