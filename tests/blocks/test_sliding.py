"""Blocks that slide see the prefix at any distance and as much text as their makers meant, in a walk and in a cache."""

import pytest
import torch

from pipeline.blocks.kv_cache import PrefixCache, PrefixLayer, SlidingLayer
from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import load_block
from pipeline.blocks.sliding import find_first_visible, make_sliding_mask
from pipeline.models.architectures import find_narrowest_window, find_sliding_window
from tests.blocks.test_walk import assert_close, walked_logits
from tests.conftest import FAMILIES, SLIDING, WINDOW, make_model, open_model, read_pinned

LENGTHS = [WINDOW, WINDOW + 1, WINDOW * 3 // 2, WINDOW * 3]
PREFIX = [5, 9, 0]


def random_ids(rows, length):
    return torch.randint(0, 320, (rows, length), generator=torch.Generator().manual_seed(7))


def slides(family):
    """Of each block."""
    checkpoint, _ = open_model(family)
    return [find_sliding_window(checkpoint.config, load_block(checkpoint, index)) is not None for index in range(3)]


def test_every_family_slides_where_its_makers_say(imported):
    patterns = {family: slides(imported[family]) for family in FAMILIES}
    assert {family for family, pattern in patterns.items() if any(pattern)} == set(SLIDING)
    assert patterns["mistral"] == patterns["phi3"] == [True, True, True]
    assert patterns["qwen2"] == [False, True, True]
    assert patterns["gemma2"] == patterns["gemma3_text"] == [True, False, True]


def test_a_stray_key_of_the_config_makes_no_family_slide(imported):
    checkpoint, runner = open_model(imported["llama_tied"])
    checkpoint.config.sliding_window = 4  # of a family that never slides: transformers ignores it
    blocks = [load_block(checkpoint, index) for index in range(3)]
    assert find_narrowest_window(checkpoint.config, blocks) is None
    ids = random_ids(2, 24)
    with torch.no_grad():
        assert_close(walked_logits(checkpoint, runner, ids), make_model("llama_tied")(ids).logits)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("family", SLIDING)
def test_a_walk_without_a_prefix_is_the_makers_own_forward(family, length, imported):
    ids = random_ids(3, length)
    with torch.no_grad():
        expected = make_model(family)(ids).logits
    assert_close(walked_logits(*open_model(imported[family]), ids), expected)  # measured: at most 4e-6


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("family", SLIDING)
def test_a_walk_behind_a_prefix_is_a_dense_forward_that_sees_it_everywhere(family, length, imported):
    checkpoint, runner = open_model(imported[family])
    prefix, ids = torch.tensor(PREFIX), random_ids(3, length)
    whole = torch.cat((prefix.expand(len(ids), -1), ids), dim=1)
    expected = read_pinned(make_model(family), checkpoint.embed(whole), prefix=3).logits[:, 3:]
    found = walked_logits(checkpoint, runner, ids, compute_prefix_kv(checkpoint, checkpoint.embed(prefix), runner))
    assert_close(found, expected)  # measured: at most 4e-6
    with torch.no_grad():
        lost = make_model(family)(whole).logits[:, 3:]  # where the prefix slides out of sight
    assert (found - lost).abs().max() > 0.01 * lost.abs().max()


@pytest.mark.parametrize("family", SLIDING)
@torch.no_grad()
def test_a_prefix_among_the_hidden_states_is_one_in_the_cache(family, imported):
    checkpoint, runner = open_model(imported[family])
    prefix, ids = checkpoint.embed(torch.tensor(PREFIX)), random_ids(2, 50)
    kv = compute_prefix_kv(checkpoint, prefix, runner)
    behind = checkpoint.embed(ids)
    whole = torch.cat((prefix.expand(2, -1, -1), behind), dim=1)
    for index in range(3):
        block = load_block(checkpoint, index)
        behind, whole = runner.run(block, behind, kv[index]), runner.run(block, whole, pinned=3)
        assert torch.allclose(whole[:, 3:], behind, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SLIDING)
@torch.no_grad()
def test_a_prefix_longer_than_the_window_sees_all_of_itself(family, imported):
    checkpoint, runner = open_model(imported[family])
    prefix, ids = random_ids(1, WINDOW + 6)[0], random_ids(2, 40)
    whole = torch.cat((prefix.expand(len(ids), -1), ids), dim=1)
    expected = read_pinned(make_model(family), checkpoint.embed(whole), len(prefix)).logits[:, len(prefix) :]
    kv = compute_prefix_kv(checkpoint, checkpoint.embed(prefix), runner)
    assert_close(walked_logits(checkpoint, runner, ids, kv), expected)


def rows(mask):
    return ["".join(str(int(seen)) for seen in row) for row in mask[0, 0]]


class Kernel:
    """Of a config, what counts for masks."""

    _attn_implementation = "sdpa"


def test_masks_by_hand():
    hidden = torch.zeros(1, 4, 0)
    expected = ["111000", "111100", "110110", "110011"]
    assert rows(make_sliding_mask(Kernel, 2, hidden, prefix=2, past=2)) == expected
    everything = torch.zeros(1, 6, 0)  # the prefix among what is read: causal in itself
    assert rows(make_sliding_mask(Kernel, 2, everything, 2, past=0)) == ["100000", "110000", *expected]
    # Two positions of text are read already, one of them is gone: keys are p p | 1 2 3 4 5.
    found = make_sliding_mask(Kernel, 3, hidden, prefix=2, past=4, dropped=1)
    assert rows(found) == ["1111000", "1111100", "1101110", "1100111"]
    # Padding on the left, in between and on the right is neither seen nor counted.
    padded = make_sliding_mask(Kernel, 2, everything, 0, past=0, text_mask=torch.tensor([[0, 1, 0, 1, 1, 0]]))
    assert rows(padded)[1:5] == ["010000", "010000", "010100", "000110"]
    Eager = type("Eager", (), {"_attn_implementation": "eager"})
    added = make_sliding_mask(Eager, 2, hidden, prefix=2, past=2)
    assert rows(added == 0) == expected
    assert added.dtype == torch.float32
    Flash = type("Flash", (), {"_attn_implementation": "flash_attention_2"})
    with pytest.raises(ValueError, match=r"'flash_attention_2' cannot keep the prefix.*sliding_window=2\); use sdpa"):
        make_sliding_mask(Flash, 2, hidden, prefix=2, past=2)


def test_what_the_next_token_sees_by_hand():
    assert [find_first_visible(3, length) for length in range(6)] == [0, 0, 0, 1, 2, 3]
    masks = {"00111": 3, "11111": 3, "11100": 1, "11000": 0, "10101": 2, "00000": 5, "00001": 4}
    for mask, first in masks.items():
        assert find_first_visible(3, 5, torch.tensor([[int(digit) for digit in mask]])) == first
    both = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert find_first_visible(3, 5, both) == 1
    assert find_first_visible(1, 5, both) == 5


def test_a_cache_keeps_the_prefix_and_what_the_next_token_sees():
    prefix = torch.randn(2, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    layers = [SlidingLayer(5, prefix), PrefixLayer(prefix)]
    cache = PrefixCache(layers)
    text = torch.randn(2, 1, 30, 4, generator=torch.Generator().manual_seed(1))
    length = 0
    for step in (7, 1, 1, 4, 1, 6, 1):
        cache.expect_(length + step, None)
        new = text[:, :, length : length + step]
        keys, values = cache.update(new, -new, 0)
        every, _ = cache.update(new, -new, 1)
        length += step
        assert every.shape[2] == 2 + length
        assert torch.equal(keys[0, :, :2], prefix[0])
        seen = min(length, step + 4)  # W - 1 in front of the first new one
        assert torch.equal(keys[:, :, 2:], text[:, :, length - seen : length])
        assert torch.equal(values[:, :, 2:], -keys[:, :, 2:])
        assert layers[0].keys.shape[2] == 2 + min(length, 4)
        assert layers[0].keys.untyped_storage().nbytes() == layers[0].keys.numel() * 4
        assert (cache.get_seq_length(), cache.get_seq_length(1)) == (length, length)
        assert layers[0].get_seq_length() == 2 + length
        assert layers[0].get_mask_sizes(3) == (2 + 4 + 3, length - 4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.dropped == 0


def test_tokens_are_taken_back_only_where_what_they_saw_is_kept():
    layer = SlidingLayer(5)
    cache = PrefixCache([layer])
    text = torch.arange(24.0).view(1, 1, 24, 1)

    def read(start, stop):
        cache.expect_(stop, None)
        cache.update(text[:, :, start:stop], text[:, :, start:stop], 0)

    read(0, 4)
    cache.crop(-2)
    assert layer.keys.flatten().tolist() == [0, 1]
    read(2, 9)
    with pytest.raises(ValueError, match=r"3 tokens cannot be taken back.*sliding_window=5.*activate_past_recording"):
        cache.crop(-3)
    assert layer.keys.flatten().tolist() == [5, 6, 7, 8]
    cache.activate_past_recording()
    read(9, 12)
    read(12, 15)
    cache.crop(-4)
    assert layer.keys.flatten().tolist() == [7, 8, 9, 10]
    assert cache.get_seq_length() == 11
    cache.crop(0)
    assert cache.get_seq_length() == 11
