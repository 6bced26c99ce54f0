"""Attention over packed codes equals attention over the states that they stand for."""

from dataclasses import replace

import pytest
import torch

from pipeline.kernels.code_attention import CodeAttention, describe_codes, fits_attention, make_table, make_turn
from pipeline.kernels.compiler import find_kernels
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.numerics.packing import unpack_codes
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec

pytestmark = pytest.mark.skipif(not find_kernels(), reason="no C++ compiler")

PAGE = 48
# Positions and queries of five texts: a whole text, a chunk, single queries of which one is read in two parts, and more
# queries than a task computes together.
LENGTHS, COUNTS = (5, 70, 1, 600, 90), (5, 9, 1, 1, 90)
HEADS, KV_HEADS = 6, 2


def make_quantizer(bits, width, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    quantizer = ActivationQuantizer(QuantizerSpec(bits, **options), width, KV_HEADS)
    values = {
        "scale": (torch.rand(quantizer.scale.shape, generator=generator) + 0.5) * 4 / 2**bits,
        "zero_point": torch.randint(0, 1 << bits, quantizer.scale.shape, generator=generator).float(),
        "shift": torch.randn(KV_HEADS, 1, width, generator=generator),
    }
    quantizer.calibrate_(**{name: values[name] for name, _ in quantizer.named_buffers()})
    return quantizer


def find_attention(keys, values, width, *, rotate=True, mean=False, prefix=0, sinks=False, window=0):
    """Return a `CodeAttention` of quantizers, and the cosines and sines of its positions."""
    draw = torch.Generator().manual_seed(1)
    angles = torch.arange(max(LENGTHS))[:, None] * 100.0 ** (-torch.arange(0, width, 2) / width)
    turns = torch.cat((angles.cos(), angles.sin()), dim=-1)
    attention = CodeAttention(
        describe_codes(keys, KV_HEADS, width),
        describe_codes(values, KV_HEADS, width),
        scale=width**-0.5,
        turn=make_turn(width) if rotate else None,
        mean=torch.randn(KV_HEADS, width, generator=draw) if mean else None,
        table=make_table(turns) if mean else None,
        prefix=torch.randn(2, KV_HEADS, prefix, width, generator=draw) if prefix else None,
        sinks=torch.randn(HEADS, generator=draw) if sinks else None,
        window=window,
    )
    return attention, turns


def attend_slowly(attention, turns, queries, keys, values):
    """Return the attention of one text's last queries [T, heads, d] over states [kv_heads, N, d], float64."""
    length = keys.shape[1]
    keys, values = keys.double(), values.double()
    if attention.turn is not None:
        keys = hadamard_transform(keys, True)
    if attention.mean is not None:
        cos, sin = (half.repeat(1, 2).double() for half in turns[:length].chunk(2, dim=-1))
        low, high = attention.mean.double().chunk(2, dim=-1)
        keys = keys + attention.mean.double()[:, None] * cos + torch.cat((-high, low), dim=-1)[:, None] * sin
    if attention.prefix is not None:
        tokens = min(attention.prefix.shape[2], length)
        keys[:, :tokens], values[:, :tokens] = attention.prefix.double()[:, :, :tokens]
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=0) for x in (keys, values))
    scores = attention.scale * queries.double().transpose(0, 1) @ keys.mT
    distance = torch.arange(length - len(queries), length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (attention.window or length))
    scores = scores.masked_fill(hidden, -torch.inf)
    if attention.sinks is not None:
        sinks = attention.sinks.double()[:, None, None].expand(-1, len(queries), 1)
        scores = torch.cat((scores, sinks), dim=-1)
    return (scores.softmax(-1)[..., :length] @ values).transpose(0, 1)


def compare(keys, values, width, *, dtype=torch.float32, **options):
    """Return the largest difference of `CodeAttention` from `attend_slowly`, and the largest value."""
    attention, turns = find_attention(keys, values, width, **options)
    draw = torch.Generator().manual_seed(2)
    most = -(-max(LENGTHS) // PAGE)
    order = torch.randperm(len(LENGTHS) * most, generator=draw).view(len(LENGTHS), most).int()
    row = attention.keys.bytes + attention.values.bytes
    cache = torch.randint(0, 256, (order.numel(), KV_HEADS, PAGE, row), dtype=torch.uint8, generator=draw)
    states = []
    for length, pages in zip(LENGTHS, order, strict=True):
        codes = [q.encode(torch.randn(KV_HEADS, length, width, generator=draw)) for q in (keys, values)]
        states.append([q.decode(x, width, torch.float32) for q, x in zip((keys, values), codes, strict=True)])
        places = pages.long().repeat_interleave(PAGE)[:length] * PAGE + torch.arange(length) % PAGE
        split = attention.keys.bytes
        for part, packed in zip((cache[..., :split], cache[..., split:]), codes, strict=True):
            torch.ops.prefixquant.store_codes(part, packed.transpose(0, 1).flatten(1), places)
    queries = (2 * torch.randn(sum(COUNTS), HEADS, width, generator=draw)).to(dtype)
    out = torch.full_like(queries, torch.nan)
    starts = torch.tensor((0, *COUNTS)).cumsum(0).int()
    attention.attend_(
        out,
        queries,
        key_codes=cache[..., : attention.keys.bytes],
        value_codes=cache[..., attention.keys.bytes :],
        pages=order,
        starts=starts,
        lengths=torch.tensor(LENGTHS).int(),
    )
    texts = queries.split(COUNTS)
    expected = torch.cat(
        [attend_slowly(attention, turns, text, *both) for text, both in zip(texts, states, strict=True)]
    )
    return (out - expected).abs().max().item(), expected.abs().max().item()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [16, 32, 64, 80])
@pytest.mark.parametrize("bits", range(2, 9))
def test_attention_equals_that_over_states(bits, width, symmetric):
    options = {"symmetric": symmetric, "centered": not symmetric}
    keys, values = make_quantizer(bits, width, **options), make_quantizer(10 - bits, width, 1, **options)
    difference, largest = compare(keys, values, width, rotate=bits % 2 == 0, mean=symmetric, prefix=3)
    assert difference <= 2e-5 * largest  # measured: 3e-6


@pytest.mark.parametrize("window", [0, 1, 20, 64])
@pytest.mark.parametrize("parts", [{}, {"prefix": 40}, {"sinks": True}, {"prefix": 3, "mean": True, "sinks": True}])
def test_prefix_mean_sinks_and_windows(parts, window):
    keys, values = make_quantizer(4, 32), make_quantizer(4, 32, 1)
    difference, largest = compare(keys, values, 32, window=window, **parts)
    assert difference <= 2e-5 * largest


def test_groups_and_other_formats():
    for options in ({"group_size": 8}, {"group_size": 8, "symmetric": False}, {"bits": 8, "format": "fp8_e4m3"}):
        options = {"bits": 4, **options}
        difference, largest = compare(make_quantizer(width=32, **options), make_quantizer(4, 32, 1), 32)
        assert difference <= 2e-5 * largest
        difference, largest = compare(make_quantizer(4, 32, 1), make_quantizer(width=32, **options), 32)
        assert difference <= 2e-5 * largest


def test_bfloat16_is_rounded_once():
    difference, largest = compare(make_quantizer(4, 64), make_quantizer(4, 64, 1), 64, dtype=torch.bfloat16)
    assert difference <= 2**-8 * largest


def test_threads_change_nothing(two_threads):
    attention, _ = find_attention(make_quantizer(4, 32), make_quantizer(4, 32, 1), 32, prefix=3)
    codes = torch.randint(0, 256, (40, KV_HEADS, 64, 16), dtype=torch.uint8)
    queries, outs = torch.randn(2, HEADS, 32), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outs.append(torch.empty_like(queries))
        attention.attend_(outs[-1], queries, **make_operands(codes))
    assert torch.equal(*outs)


def make_operands(codes):
    """Return two texts of one query each, with 20 of 40 pages."""
    return {
        "key_codes": codes,
        "value_codes": codes,
        "pages": torch.arange(40, dtype=torch.int32).view(2, 20),
        "starts": torch.tensor([0, 1, 2], dtype=torch.int32),
        "lengths": torch.tensor([1280, 900], dtype=torch.int32),
    }


def test_formats_describe_the_codes_of_quantizers():
    x = torch.randn(1, KV_HEADS, 7, 32)
    for options in ({}, {"symmetric": False, "centered": True}, {"group_size": 8}, {"bits": 8, "format": "fp8_e4m3"}):
        quantizer = make_quantizer(width=32, **({"bits": 4} | options))
        described = describe_codes(quantizer, KV_HEADS, 32)
        codes = unpack_codes(quantizer.encode(x), described.bits, 32)
        states = described.decode(codes.transpose(1, 2)).transpose(1, 2)
        assert torch.allclose(states, quantizer(x), atol=1e-6)
        assert (described.levels is None) == ("format" not in options)


def test_operands_that_do_not_fit_are_refused():
    attention, _ = find_attention(make_quantizer(4, 32), make_quantizer(4, 32, 1), 32, mean=True)
    codes, queries = torch.zeros(40, KV_HEADS, 64, 16, dtype=torch.uint8), torch.zeros(2, HEADS, 32)
    good, out = make_operands(codes) | {"lengths": torch.tensor([600, 2], dtype=torch.int32)}, torch.empty(2, HEADS, 32)
    attention.attend_(out, queries, **good)
    for name, changed, message in [
        ("lengths", good["lengths"] + 10, "length 610 is outside a table"),
        ("pages", good["pages"] + 30, "page 50 is outside a cache of 40"),
        ("pages", good["pages"][:, :3].contiguous(), "text 0 of 600 tokens has too few pages"),
        ("starts", good["starts"] + 1, "text 1: queries 2 to 3 of 2"),
        ("starts", good["starts"].long(), "starts needs 3 values, int32"),
        ("value_codes", codes[..., :8], "codes .* are not"),
        ("key_codes", codes[:5], "as many pages of values as of keys"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            attention.attend_(out, queries, **good | {name: changed})
    with pytest.raises(RuntimeError, match="a mean needs a table"):
        replace(attention, table=None).attend_(out, queries, **good)
    assert fits_attention(32, torch.float32, torch.device("cpu"))
    assert not fits_attention(24, torch.float32, torch.device("cpu"))
    assert not fits_attention(32, torch.float64, torch.device("cpu"))
    cache = torch.zeros(4, KV_HEADS, 8, 16, dtype=torch.uint8)
    rows = torch.ones(3, KV_HEADS * 16, dtype=torch.uint8)
    torch.ops.prefixquant.store_codes(cache, rows, torch.tensor([5, -1, 31]))
    assert cache.sum() == 2 * KV_HEADS * 16
    assert (cache[0, :, 5] == 1).all()
    assert (cache[3, :, 7] == 1).all()
    with pytest.raises(RuntimeError, match="place 32 is outside the cache"):
        torch.ops.prefixquant.store_codes(cache, rows, torch.tensor([5, -1, 32]))
