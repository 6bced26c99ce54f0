"""Channels that RoPE turns together are found, and scaled tables of RoPE do not trip the check."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe

from benchmarks.tiny_models import SIZES, make_tokenizer, randomize_
from pipeline.blocks.kv_cache import turn_keys
from pipeline.blocks.quantized import fill_block
from pipeline.blocks.rope import check_rope, find_rope_groups
from pipeline.importing.import_model import import_model
from pipeline.models.architectures import ARCHITECTURES, UnsupportedModelError
from tests.conftest import open_model

HALVES = [*range(6), *range(6)]
GROUPS = {
    "llama_tied": (0, HALVES),
    "helium": (0, HALVES),
    "smollm3": (1, list(range(12))),  # a layer without RoPE
    "glm": (0, [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8]),  # half of each head
    "ernie4_5_moe": (1, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),  # neighbours
}
ROPE = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
}


def load_plain(folder, index, dtype=torch.float32):
    checkpoint, runner = open_model(folder)
    return fill_block(checkpoint, index, checkpoint.load_block_tensors(index), None, dtype=dtype), runner


@pytest.mark.parametrize("family", GROUPS)
def test_channels_that_turn_together_are_of_one_group(family, imported):
    index, groups = GROUPS[family]
    assert find_rope_groups(*load_plain(imported[family], index)).tolist() == groups


def test_neighbours_are_turned_as_transformers_turns_them():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 5, 12, generator=generator)
    angles = torch.rand(1, 5, 6, generator=generator).repeat(1, 1, 2)
    tables = angles.cos(), angles.sin()
    expected = modeling_ernie4_5_moe.apply_rotary_pos_emb(keys, keys, *tables)[1]
    assert torch.equal(turn_keys(keys, *tables, neighbours=True), expected)
    assert (turn_keys(keys, *tables, neighbours=False) - expected).abs().max() > 1
    exact = turn_keys(keys.double(), *(table.double() for table in tables), neighbours=True)
    turned = torch.view_as_complex(keys.double().unflatten(-1, (6, 2))) * torch.polar(
        torch.ones(5, 6, dtype=torch.float64), angles[0, :, :6].double()
    )
    assert torch.allclose(exact, torch.view_as_real(turned).flatten(-2), rtol=0, atol=1e-6)  # cos and sin of float32


@pytest.mark.parametrize("family", ["llama_tied", "ernie4_5_moe"])
def test_wrong_pairs_of_channels_are_refused(family, imported, monkeypatch):
    block, runner = load_plain(imported[family], 0)
    check_rope(block, 0, runner)
    entry = ARCHITECTURES[runner.config.model_type]
    wrong = replace(entry, rope_neighbours=not entry.rope_neighbours)
    monkeypatch.setitem(ARCHITECTURES, runner.config.model_type, wrong)
    partner, expected = (1, 6) if entry.rope_neighbours else (6, 1)
    message = rf"turns channels \[0, {partner}\] of a head together, .* expected are channels \[0, {expected}\]"
    with pytest.raises(UnsupportedModelError, match=message):
        check_rope(block, 0, runner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ROPE)
def test_scaled_rope_passes_the_check(kind, dtype, tmp_path):
    """YaRN's factor on cosine and sine (1.14 here) is in the tables, so keys in the cache have it as expected."""
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4} | ROPE[kind])
    randomize_(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "out")
    block, runner = load_plain(tmp_path / "out", 0, dtype)
    check_rope(block, 0, runner)


def test_a_step_after_rope_is_named(imported, monkeypatch):
    block, runner = load_plain(imported["llama_tied"], 0)
    monkeypatch.setattr("pipeline.blocks.rope.turn_keys", lambda keys, cos, sin, neighbours: keys * 1.1)
    with pytest.raises(UnsupportedModelError, match="block 0: keys in the cache are not those before RoPE"):
        check_rope(block, 0, runner)
