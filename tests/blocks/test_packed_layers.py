"""A cache of codes gives attention the states that a plain cache holds, after every operation."""

import copy
import pickle

import pytest
import torch

from pipeline.blocks.kv_cache import CountingCache, KeyQuantizer, PrefixCache, QuantizingCache, make_layer
from pipeline.blocks.packed_layers import has_codes, make_packed_layer
from pipeline.numerics.packing import packed_width
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec

HEADS, WIDTH, PREFIX = 2, 16, 3
GENERATOR = torch.Generator().manual_seed(3)
TABLE = torch.randn(2, 200, WIDTH // 2, generator=GENERATOR).repeat(1, 1, 2)  # cosines and sines by position


class Attention(torch.nn.Module):
    def __init__(self, keys, values, *, rotate=True, before_rope=False, **rope):
        super().__init__()
        self.key_quantizer = KeyQuantizer(keys, HEADS, WIDTH, rotate and not before_rope, before_rope, **rope)
        self.value_quantizer = ActivationQuantizer(values, WIDTH, HEADS)
        known = {"scale": 0.4, "zero_point": 2.0, "shift": 0.3, "clip_factor": 0.9}
        for quantizer in (self.key_quantizer.quantizer, self.value_quantizer):
            buffers = quantizer.named_buffers()
            quantizer.calibrate_(**{name: torch.full(buffer.shape, known[name]) for name, buffer in buffers})
        if self.key_quantizer.mean_taken_out:
            self.key_quantizer.mean = 5 * torch.randn(HEADS, WIDTH, generator=torch.Generator().manual_seed(8))


def call(cache, attention, states, positions):
    """Make one attention call: keys and values [2, B, heads, T, d] at positions [B or 1, T], the prefix counted."""
    tables = TABLE[:, positions].to(states.dtype)
    cache.begin_call_(None)
    whole = QuantizingCache(cache.count_prefix(positions), attention, (tables[0], tables[1])).update(*states, 0)
    cache.end_call_(None)
    return whole


def assert_same(attention, operations, *, window=None, dtype=torch.float32, prefix=PREFIX):
    """Feed and change both caches in the same way, and compare the states of every call."""
    prefix_kv = torch.randn(2, HEADS, prefix, WIDTH, generator=GENERATOR).to(dtype) if prefix else None
    plain, packed = (PrefixCache([make(prefix_kv, window)]) for make in (make_layer, make_packed_layer))
    for operation in operations:
        if callable(operation):
            plain, packed = operation(plain) or plain, operation(packed) or packed
        else:
            batch, length, offset = operation
            states = 2 * torch.randn(2, batch, HEADS, length, WIDTH, generator=GENERATOR).to(dtype)
            start = plain.get_seq_length() + prefix
            positions = torch.arange(start, start + length)[None]
            if offset:  # rows at positions of their own, as after padding
                positions = (positions - torch.arange(batch)[:, None]).clamp_min(prefix)
            for found, expected in zip(
                call(packed, attention, states, positions), call(plain, attention, states, positions), strict=True
            ):
                assert torch.equal(found, expected)
        for layer in (*plain.layers, *packed.layers):
            assert layer.get_seq_length() == plain.layers[0].get_seq_length()
            assert layer.get_mask_sizes(2) == plain.layers[0].get_mask_sizes(2)
        assert packed.get_seq_length() == plain.get_seq_length()
    return packed


SPECS = {
    "int": {},
    "asymmetric": {"symmetric": False},
    "groups": {"group_size": 8},
    "centered": {"centered": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_all_bits_and_dtypes(bits, options, dtype):
    attention = Attention(QuantizerSpec(bits, **options), QuantizerSpec(bits, **options))
    packed = assert_same(attention, [(2, 7, False), (2, 1, False), (2, 4, False), (2, 1, True)], dtype=dtype)
    layer = packed.layers[0]
    assert layer.keys.shape == layer.values.shape == (2, HEADS, 13, packed_width(WIDTH, bits))
    assert layer.keys.dtype == layer.values.dtype == torch.uint8


@pytest.mark.parametrize("form", ["fp8_e4m3", "mxfp4"])
def test_other_formats_have_codes(form):
    spec = QuantizerSpec(8 if form == "fp8_e4m3" else 4, group_size=-1 if form == "fp8_e4m3" else WIDTH, format=form)
    packed = assert_same(Attention(spec, spec), [(1, 5, False), (1, 1, False)])
    assert packed.layers[0].keys.dtype == torch.uint8


STATIC, TOKEN = QuantizerSpec(4, centered=True), QuantizerSpec(4, dynamic=True)


def test_states_without_codes_are_stored_as_they_are():
    for attention, dtypes in (
        (Attention(TOKEN, STATIC), (torch.float32, torch.uint8)),
        (Attention(STATIC, TOKEN), (torch.uint8, torch.float32)),
        (Attention(STATIC, STATIC, before_rope=True), (torch.float32, torch.uint8)),
        (Attention(QuantizerSpec(), STATIC), (torch.float32, torch.uint8)),
    ):
        assert has_codes(attention)
        layer = assert_same(attention, [(2, 5, False), (2, 1, False)]).layers[0]
        assert (layer.keys.dtype, layer.values.dtype) == dtypes
    assert not has_codes(Attention(TOKEN, QuantizerSpec()))
    assert not has_codes(torch.nn.Linear(1, 1))


def test_a_layer_without_rope_adds_the_mean_as_it_is():
    assert assert_same(Attention(STATIC, STATIC, turns=False), [(1, 5, False), (1, 2, False)]).layers[0].places is None


@pytest.mark.parametrize("rotate", [True, False])
def test_a_mean_is_turned_in_pairs_of_neighbours(rotate):
    """The compiled operators turn channels i and i + d/2 together."""
    layer = assert_same(Attention(STATIC, STATIC, rotate=rotate, neighbours=True), [(1, 5, False), (1, 2, False)])
    assert layer.layers[0].keys.dtype == torch.uint8


ROWS = torch.tensor([1, 0, 1])
OPERATIONS = {
    "crop": lambda cache: cache.crop(-2),
    "crop everything": lambda cache: cache.crop(-100),
    "repeat": lambda cache: cache.batch_repeat_interleave(1),
    "reset": lambda cache: cache.reset(),
    "swap": lambda cache: cache.reorder_cache(ROWS[:2]),
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@pytest.mark.parametrize("window", [None, 2, 6, 50])
@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("offset", [False, True])
def test_operations(name, window, prefix, offset):
    attention = Attention(STATIC, STATIC)

    def record(cache):
        cache.activate_past_recording()

    before = [record] if name.startswith("crop") else []
    feed = [(2, 5, offset), (2, 1, offset), OPERATIONS[name], (2, 4, offset), (2, 1, False), (2, 1, offset)]
    assert_same(attention, [*before, *feed], window=window, prefix=prefix)


@pytest.mark.parametrize("offset", [False, True])
def test_rows_are_selected_and_repeated(offset):
    operations = [
        (2, 5, offset),
        lambda cache: cache.batch_select_indices(ROWS),
        (3, 2, offset),
        lambda cache: cache.batch_repeat_interleave(2),
        (6, 1, False),
        lambda cache: cache.batch_select_indices(ROWS[:1]),
        (1, 3, False),
    ]
    assert_same(Attention(STATIC, STATIC), operations)


def test_a_packed_cache_holds_codes_and_no_states():
    packed = assert_same(Attention(STATIC, STATIC), [(2, 40, False), (2, 1, False)])
    layer = packed.layers[0]
    assert sum(tensor.nbytes for tensor in (layer.keys, layer.values)) == 2 * 2 * HEADS * 41 * WIDTH // 2
    assert layer.places.tolist() == [list(range(PREFIX, PREFIX + 41))]
    assert not any(isinstance(value, torch.nn.Module) for value in vars(layer).values())
    assert {name: table.shape for name, table in packed.turns.items()} == {None: (256, WIDTH)}
    with pytest.raises(RuntimeError, match="only attention modules with quantizers can append"):
        packed.count_prefix().update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)
    with pytest.raises(RuntimeError, match=r"make_cache\(packed=False\)"):
        layer.read()


def test_a_cache_from_inference_mode_continues_outside_of_it():
    attention, cache = Attention(STATIC, STATIC), PrefixCache([make_packed_layer(None)])
    states = torch.randn(2, 1, HEADS, 4, WIDTH, generator=GENERATOR)
    with torch.inference_mode():
        call(cache, attention, states, torch.arange(4)[None])
    keys, _ = call(cache, attention, states[..., :1, :], torch.tensor([[4]]))
    assert keys.shape[2] == 5


def test_gradients_reach_the_tokens_of_the_call():
    attention, states = Attention(STATIC, STATIC), torch.randn(2, 1, HEADS, 4, WIDTH, generator=GENERATOR)
    gradients = []
    for make in (make_layer, make_packed_layer):
        cache = PrefixCache([make(None)])
        with torch.no_grad():
            call(cache, attention, states, torch.arange(4)[None])
        attention.value_quantizer.scale.requires_grad_()
        new = states.clone().requires_grad_()
        keys, values = call(cache, attention, new, torch.arange(4, 8)[None])
        (keys.square().sum() + values.sum()).backward()
        gradients.append(new.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_negative_positions_are_refused():
    """They would count from the end of the table, and overwrite the cosines of other positions."""
    cache = CountingCache([], torch.tensor([[-1, 0]]), {})
    with pytest.raises(ValueError, match=r"position_ids=-1: a packed cache has a table"):
        cache.note_turns_(None, (torch.ones(1, 2, 4), torch.ones(1, 2, 4)))
