"""The walk and its masks in layers that slide: the prefix leaves the window like any other token."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import load_block
from pipeline.blocks.sliding import count_places, find_first_visible, make_mask
from pipeline.importing.import_model import import_model
from pipeline.models.architectures import find_narrowest_window, find_sliding_window
from tests.blocks.test_walk import assert_close, walked_logits
from tests.conftest import FAMILIES, SIZES, SLIDING, WINDOW, make_model, make_tokenizer, open_model, randomize_

LENGTHS = [WINDOW, WINDOW + 1, WINDOW * 3 // 2, WINDOW * 3]
PREFIX = [5, 9, 0]
FULL, SLIDES = "full_attention", "sliding_attention"
PATTERNS = {  # name -> config; windows of 2 and 3 are shorter than the prefix and as long
    "qwen3, one layer in three": Qwen3Config(
        **SIZES, head_dim=16, use_sliding_window=True, sliding_window=WINDOW, layer_types=[SLIDES, FULL, FULL]
    ),
    "qwen3, as in Ministral": Qwen3Config(
        **SIZES, head_dim=16, use_sliding_window=True, sliding_window=3, layer_types=[FULL, SLIDES, SLIDES]
    ),
    "qwen2, every layer": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=10, layer_types=[SLIDES, SLIDES, SLIDES]
    ),
    "mistral, a narrow window": MistralConfig(**SIZES, head_dim=20, sliding_window=2),
}


def random_ids(rows, length):
    return torch.randint(0, 320, (rows, length), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    """Return name -> transformers' own model, and the folder it was imported to."""
    root, models = tmp_path_factory.mktemp("patterns"), {}
    for number, (name, config) in enumerate(PATTERNS.items()):
        torch.manual_seed(0)
        model = randomize_(AutoModelForCausalLM.from_config(copy.deepcopy(config)))
        model.save_pretrained(root / f"source{number}")
        make_tokenizer().save_pretrained(root / f"source{number}")
        import_model(str(root / f"source{number}"), None, torch.float32, root / f"model{number}")
        models[name] = model, root / f"model{number}"
    return models


@pytest.fixture(params=[*SLIDING, *PATTERNS])
def sliding_model(request, imported, patterns):
    """Return transformers' own model and the folder it was imported to, for every family and pattern that slides."""
    if request.param in PATTERNS:
        return patterns[request.param]
    return make_model(request.param), imported[request.param]


def find_sliding_blocks(folder):
    checkpoint, _ = open_model(folder)
    return [find_sliding_window(checkpoint.config, load_block(checkpoint, index)) is not None for index in range(3)]


def test_every_family_slides_where_its_config_says(imported):
    slides = {family: find_sliding_blocks(imported[family]) for family in FAMILIES}
    assert {family for family, blocks in slides.items() if any(blocks)} == set(SLIDING)
    assert slides["mistral"] == slides["phi3"] == [True, True, True]
    assert slides["qwen2"] == [False, True, True]
    assert slides["gemma2"] == slides["gemma3_text"] == [True, False, True]


def test_layer_types_decide_which_blocks_slide(patterns):
    slides = [find_sliding_blocks(folder) for _, folder in patterns.values()]
    assert slides == [[True, False, False], [False, True, True], [True, True, True], [True, True, True]]


def test_a_stray_key_of_the_config_makes_no_family_slide(imported):
    checkpoint, runner = open_model(imported["llama_tied"])
    checkpoint.config.sliding_window = 4  # of a family that never slides: transformers ignores it
    blocks = [load_block(checkpoint, index) for index in range(3)]
    assert find_narrowest_window(checkpoint.config, blocks) is None
    ids = random_ids(2, 24)
    with torch.no_grad():
        assert_close(walked_logits(checkpoint, runner, ids), make_model("llama_tied")(ids).logits)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_walk_without_a_prefix_equals_the_original(sliding_model, length):
    original, folder = sliding_model
    ids = random_ids(3, length)
    with torch.no_grad():
        expected = original(ids).logits
    assert_close(walked_logits(*open_model(folder), ids), expected)  # measured: at most 4e-6


@pytest.mark.parametrize("prefix_length", [1, 3, WINDOW + 6])
@pytest.mark.parametrize("length", [1, WINDOW - 3, *LENGTHS])
def test_a_walk_with_a_prefix_equals_the_original_reading_it_first(sliding_model, length, prefix_length):
    original, folder = sliding_model
    checkpoint, runner = open_model(folder)
    prefix, ids = random_ids(1, prefix_length)[0], random_ids(3, length)
    whole = torch.cat((prefix.expand(len(ids), -1), ids), dim=1)
    with torch.no_grad():
        expected = original(whole).logits[:, prefix_length:]
    prefix_kv = compute_prefix_kv(checkpoint, checkpoint.embed(prefix), runner)
    assert_close(walked_logits(checkpoint, runner, ids, prefix_kv), expected)  # measured: at most 4e-6


@torch.no_grad()
def test_a_prefix_among_the_hidden_states_equals_one_in_the_cache(sliding_model):
    checkpoint, runner = open_model(sliding_model[1])
    prefix, ids = checkpoint.embed(torch.tensor(PREFIX)), random_ids(2, 50)
    prefix_kv = compute_prefix_kv(checkpoint, prefix, runner)
    text = checkpoint.embed(ids)
    whole = torch.cat((prefix.expand(2, -1, -1), text), dim=1)
    for index in range(3):
        block = load_block(checkpoint, index)
        text, whole = runner.run(block, text, prefix_kv[index]), runner.run(block, whole)
        assert torch.allclose(whole[:, 3:], text, rtol=1e-4, atol=1e-4)


def write_rows(mask):
    return ["".join(str(int(seen)) for seen in row) for row in mask[0, 0]]


class Kernel:
    """The part of a config that masks depend on."""

    _attn_implementation = "sdpa"


class Eager:
    _attn_implementation = "eager"


PADDED = torch.tensor([[1, 1, 0, 0, 1, 1, 1]])  # two tokens of prefix, two of padding, three of text


def test_masks_of_padded_texts_by_hand():
    expected = ["1000000", "1100000", "1100000", "1100000", "1100100", "0100110", "0000111"]
    hidden, places = torch.zeros(1, 7, 0), count_places(PADDED)
    options = {"window": 3, "places": places, "mask": PADDED}
    assert write_rows(make_mask(Kernel, hidden, past=0, **options)) == expected
    assert write_rows(make_mask(Kernel, hidden[:, :5], past=2, **options)) == expected[2:]
    assert write_rows(make_mask(Kernel, hidden[:, :1], past=6, **options)) == ["0000111"]
    assert write_rows(make_mask(Kernel, hidden[:, :1], past=6, dropped=4, **options)) == ["111"]
    added = make_mask(Eager, hidden, past=0, **options)
    assert write_rows(added == 0) == expected
    assert added.dtype == torch.float32


def test_masks_of_packed_texts_by_hand():
    texts = torch.tensor([[-1, -1, 0, 0, 1, 1, 1]])
    hidden = torch.zeros(1, 5, 0)
    everything = ["1110000", "1111000", "1100100", "1100110", "1100111"]
    assert write_rows(make_mask(Kernel, hidden, past=2, texts=texts)) == everything
    places = torch.tensor([[-2, -1, 0, 1, 0, 1, 2]])
    sliding = ["1110000", "0111000", "1100100", "0100110", "0000111"]
    assert write_rows(make_mask(Kernel, hidden, past=2, texts=texts, window=3, places=places)) == sliding


def test_the_first_visible_position_by_hand():
    assert [find_first_visible(3, length) for length in range(6)] == [0, 0, 0, 1, 2, 3]
    masks = {"00111": 3, "11111": 3, "11100": 1, "11000": 0, "10101": 2, "00000": 5, "00001": 4}
    for mask, first in masks.items():
        assert find_first_visible(3, 5, torch.tensor([[int(digit) for digit in mask]])) == first
    both = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert find_first_visible(3, 5, both) == 1
    assert find_first_visible(1, 5, both) == 5
