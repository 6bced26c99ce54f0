"""The cache: the prefix first and unquantized, lengths, dropping, taking back; calls that share modules do not mix."""

import copy
import pickle
import threading

import pytest
import torch

from pipeline.blocks.kv_cache import (
    CACHE,
    KeyQuantizer,
    PrefixCache,
    PrefixLayer,
    QuantizingCache,
    SlidingLayer,
    make_block_cache,
)
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec, fake_quantize
from tests.blocks.test_quantized import quantized_block, settings_of
from tests.conftest import open_model


class Attention(torch.nn.Module):
    """Quantizes keys and values of 2 heads with one scale each."""

    def __init__(self):
        super().__init__()
        self.key_quantizer = KeyQuantizer(QuantizerSpec(4), 2, 8, rotate=False, before_rope=False)
        self.key_quantizer.quantizer.calibrate_(scale=torch.tensor([0.5, 0.5]))
        self.value_quantizer = ActivationQuantizer(QuantizerSpec(4), 8, 2)
        self.value_quantizer.calibrate_(scale=torch.tensor([0.25, 0.25]))


def test_new_keys_and_values_are_quantized_and_the_prefix_never():
    prefix = torch.randn(2, 2, 3, 8)
    cache = make_block_cache(prefix)
    assert cache.get_seq_length() == 3
    keys, values = torch.randn(2, 4, 2, 5, 8).unbind(0)
    found = QuantizingCache(cache, Attention(), ()).update(keys, values, 0)
    assert cache.get_seq_length() == 8
    for whole, own, appended, scale in zip(found, prefix, (keys, values), (0.5, 0.25), strict=True):
        assert torch.equal(whole[:, :, :3], own.expand(4, -1, -1, -1))
        assert torch.equal(whole[:, :, 3:], fake_quantize(appended, torch.tensor(scale), 4))
    cache.layers[0].reset()
    assert cache.get_seq_length() == 3


def test_a_sliding_layer_keeps_only_the_positions_that_the_next_token_reads():
    prefix = torch.randn(2, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    layers = [SlidingLayer(5, prefix), PrefixLayer(prefix)]
    cache = PrefixCache(layers)
    text = torch.randn(2, 1, 30, 4, generator=torch.Generator().manual_seed(1))
    everything, length = torch.cat((prefix[0].expand(2, 1, 2, 4), text), dim=2), 0
    for step in (1, 6, 1, 1, 4, 1, 6, 1):
        new = text[:, :, length : length + step]
        before = layers[0].get_seq_length()
        assert layers[0].get_mask_sizes(step) == (min(before, 4) + step, max(0, before - 4))
        cache.begin_call_(None)
        keys, values = cache.count_prefix().update(new, -new, 0)
        complete, _ = cache.count_prefix().update(new, -new, 1)
        cache.end_call_(None)
        length += step
        assert torch.equal(complete, everything[:, :, : 2 + length])
        visible = everything[:, :, max(0, before - 4) : 2 + length]  # 4 before the first new one, prefix or text
        assert torch.equal(keys, visible)
        assert torch.equal(values[:, :, -step:], -new)
        assert torch.equal(layers[0].keys, everything[:, :, : 2 + length][:, :, -4:])
        assert layers[0].keys.untyped_storage().nbytes() == layers[0].keys.numel() * 4
        assert (cache.get_seq_length(), cache.get_seq_length(1)) == (length, length)
        assert layers[0].get_seq_length() == cache.count_prefix().get_seq_length() == 2 + length
    cache.reset()
    assert cache.get_seq_length() == 0
    assert (layers[0].get_seq_length(), layers[0].dropped) == (2, 0)


def test_padding_is_not_counted_when_positions_are_dropped():
    layer = SlidingLayer(3)
    cache = PrefixCache([layer])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    keys = torch.arange(10.0).view(2, 1, 5, 1)
    cache.count_prefix().update(keys, keys, 0)
    cache.end_call_(mask)
    assert layer.keys.flatten(1).tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]  # the second text ended at position 2
    assert layer.dropped == 1


def test_tokens_are_removed_only_where_the_next_one_can_read_all_of_its_window():
    layer = SlidingLayer(5)
    cache = PrefixCache([layer])
    text = torch.arange(24.0).view(1, 1, 24, 1)

    def read(start, stop):
        cache.begin_call_(None)
        cache.count_prefix().update(text[:, :, start:stop], text[:, :, start:stop], 0)
        cache.end_call_(None)

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
    assert layer.keys.flatten().tolist() == list(range(5, 15))
    cache.crop(-4)
    assert cache.get_seq_length() == 11
    read(11, 12)
    assert layer.keys.flatten().tolist() == [7, 8, 9, 10, 11]
    cache.crop(0)
    assert cache.get_seq_length() == 12
    with pytest.raises(ValueError, match="2 tokens cannot be taken back"):
        cache.crop(-2)


@pytest.mark.parametrize("make", [PrefixLayer, lambda prefix: SlidingLayer(5, prefix)])
def test_the_prefix_is_not_taken_back(make):
    cache = PrefixCache([make(torch.ones(2, 1, 2, 4))])
    cache.count_prefix().update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0)
    cache.crop(-7)
    assert cache.get_seq_length() == 0
    assert torch.equal(cache.layers[0].keys, torch.ones(1, 1, 2, 4))


def test_a_cache_holds_no_module():
    """Copies and pickles of a cache are tensors and numbers, whatever model it was made for."""
    prefix = torch.randn(4, 2, 1, 2, 4)
    layers = [SlidingLayer(5, prefix[0]), PrefixLayer(prefix[1])]
    cache = PrefixCache(layers)
    for index in range(2):
        cache.count_prefix().update(torch.ones(1, 1, 7, 4), torch.ones(1, 1, 7, 4), index)
    cache.end_call_(None)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert other.get_seq_length() == 7
        for layer, theirs in zip(layers, other.layers, strict=True):
            assert torch.equal(layer.keys, theirs.keys)
            assert not any(isinstance(value, torch.nn.Module) for value in vars(theirs).values())
        other.count_prefix().update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4), 0)
        assert other.get_seq_length() == 8
        assert cache.get_seq_length() == 7


@pytest.mark.parametrize("width", [12, 16, 20, 64, 96, 128])
def test_a_key_is_the_same_alone_and_with_others(width):
    """Some products with R3 add in another order where there are few rows."""
    quantizer = KeyQuantizer(QuantizerSpec(4), 1, width, rotate=True, before_rope=False)
    keys = torch.randn(1, 1, 300, width, generator=torch.Generator().manual_seed(width))
    whole = quantizer.from_basis(keys)
    for count in (1, 2, 3, 5, 7, 9, 15, 16, 17, 100):
        for start in range(0, 300 - count, 60):
            part = slice(start, start + count)
            assert torch.equal(quantizer.from_basis(keys[:, :, part]), whole[:, :, part])
    assert torch.allclose(quantizer.to_basis(whole), keys, atol=1e-5)


# --- calls that share a block, whose key quantizer takes out a mean that turns with the position


@pytest.fixture
def shared_block(imported):
    """Return a block of Qwen2 with a centered key quantizer, its runner, and two batches of hidden states [2, T, D]."""
    checkpoint, runner = open_model(imported["qwen2"])
    block = quantized_block(checkpoint, settings_of(key=4, value=4, online=True, centered=True))
    generator = torch.Generator().manual_seed(5)
    mean = block.self_attn.key_quantizer.mean
    block.self_attn.key_quantizer.mean = 8 * torch.randn(mean.shape, generator=generator)
    width = checkpoint.config.hidden_size
    return block, runner, [torch.randn(2, length, width, generator=generator) for length in (9, 17)]


def run_in_steps(block, runner, hidden, cache):
    """Yield outputs of a block, token by token, so that two callers can take turns."""
    for step in range(hidden.shape[1]):
        past = cache.get_seq_length()
        tables = runner.rotary_tables(block, hidden[:, step : step + 1], past)
        yield block(hidden[:, step : step + 1], position_embeddings=tables, attention_mask=None, **{CACHE: cache})


@torch.no_grad()
def test_interleaved_calls_equal_single_ones(shared_block):
    block, runner, (first, second) = shared_block
    expected = [torch.cat([*run_in_steps(block, runner, x, make_block_cache(None))], 1) for x in (first, second)]
    turns = [run_in_steps(block, runner, x, make_block_cache(None)) for x in (first, second)]
    found = [[], []]
    for step in range(17):
        for outputs, turn in zip(found, turns, strict=True):
            if step < 9 or turn is turns[1]:
                outputs.append(next(turn))
    for outputs, whole in zip(found, expected, strict=True):
        assert torch.equal(torch.cat(outputs, 1), whole)


def test_threads_on_one_block_do_not_mix(shared_block):
    block, runner, batches = shared_block
    prefix = torch.randn(2, 2, 3, block.self_attn.head_dim, generator=torch.Generator().manual_seed(1))
    calls = [(hidden, kv) for hidden in batches for kv in (None, prefix)]
    with torch.no_grad():
        expected = [runner.run(block, *call) for call in calls]
    wrong = []

    def repeat(call, result):
        with torch.no_grad():
            for _ in range(40):
                if not torch.equal(runner.run(block, *call), result):
                    wrong.append(call)

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(calls, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_checkpointed_recomputation_after_another_call(shared_block):
    """Autograd runs the block again in the backward pass, when another call has long passed through it."""
    block, runner, (first, second) = shared_block

    def gradient(run):
        hidden = first.clone().requires_grad_()
        output = run(hidden)
        runner.run(block, second)
        output.square().sum().backward()
        return hidden.grad

    expected = gradient(lambda hidden: runner.run(block, hidden))
    found = gradient(lambda hidden: torch.utils.checkpoint.checkpoint(runner.run, block, hidden, use_reentrant=False))
    assert torch.equal(found, expected)
