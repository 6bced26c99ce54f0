"""Channels that RoPE turns together are found, and scaled tables of RoPE do not trip the check."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.tiny_models import SIZES, make_tokenizer, randomize_
from pipeline.blocks.quantized import fill_block
from pipeline.blocks.rope import check_rope, find_rope_groups
from pipeline.importing.import_model import import_model
from pipeline.models.architectures import UnsupportedModelError
from tests.conftest import open_model

HALVES = [*range(6), *range(6)]
GROUPS = {
    "llama_tied": (0, HALVES),
    "helium": (0, HALVES),
    "smollm3": (1, list(range(12))),  # a layer without RoPE
    "glm": (0, [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8]),  # half of each head
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
    monkeypatch.setattr("pipeline.blocks.rope.turn_keys", lambda keys, cos, sin: keys * 1.1)
    with pytest.raises(UnsupportedModelError, match="block 0: keys in the cache are not those before RoPE"):
        check_rope(block, 0, runner)
