"""Walking block by block equals the model's own forward, with and without a prefix."""

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.walk import batches, walk
from pipeline.models.architectures import UnsupportedModelError
from tests.conftest import FAMILIES, make_model, open_model

TOLERANCE = 1e-5  # relative to max |logit|; measured: at most 8e-7 (prefix), 0 (none)


@torch.no_grad()
def walked_logits(checkpoint, runner, token_ids, prefix_kv=None):
    hidden = walk(checkpoint, checkpoint.embed(token_ids), runner, "", prefix_kv)
    return checkpoint.load_lm_head().logits(checkpoint.load_final_norm()(hidden))


def assert_close(logits, expected, tolerance=TOLERANCE):
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_walk_equals_the_models_forward(family, imported, token_ids):
    with torch.no_grad():
        expected = make_model(family)(token_ids).logits
    assert_close(walked_logits(*open_model(imported[family]), token_ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 3])
def test_prefix_in_the_cache_equals_prepending_its_tokens(family, length, imported, token_ids):
    prefix = torch.tensor([5, 9, 0])[-length:]
    with torch.no_grad():
        whole = torch.cat((prefix.expand(len(token_ids), -1), token_ids), dim=1)
        expected = make_model(family)(whole).logits[:, length:]
    checkpoint, runner = open_model(imported[family])
    prefix_kv = compute_prefix_kv(checkpoint, checkpoint.embed(prefix), runner)
    assert prefix_kv.shape == (3, 2, 2, length, make_model(family).model.layers[0].self_attn.head_dim)
    assert_close(walked_logits(checkpoint, runner, token_ids, prefix_kv), expected)


def test_attention_is_causal_with_a_prefix(imported, token_ids):
    checkpoint, runner = open_model(imported["llama_tied"])
    prefix_kv = compute_prefix_kv(checkpoint, checkpoint.embed(torch.tensor([5, 0])), runner)
    changed = token_ids.clone()
    changed[:, 12:] = 3
    first = walked_logits(checkpoint, runner, token_ids, prefix_kv)
    second = walked_logits(checkpoint, runner, changed, prefix_kv)
    assert torch.equal(first[:, :12], second[:, :12])
    assert not torch.allclose(first[:, 12:], second[:, 12:])


def test_an_empty_prefix_has_no_kv(imported):
    checkpoint, runner = open_model(imported["llama_tied"])
    assert compute_prefix_kv(checkpoint, checkpoint.embed(torch.tensor([], dtype=torch.int64)), runner) is None


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_batch_size_changes_nothing_but_summation_order(batch_size, imported, token_ids):
    expected = walked_logits(*open_model(imported["qwen3"], 3), token_ids)
    assert_close(walked_logits(*open_model(imported["qwen3"], batch_size), token_ids), expected, 1e-6)
    assert [(part.start, part.stop) for part in batches(5, 2)] == [(0, 2), (2, 4), (4, 5)]


def test_windows_beyond_the_position_range_are_refused(imported):
    checkpoint, runner = open_model(imported["llama_tied"])
    with pytest.raises(UnsupportedModelError, match=r"300 positions .* exceed max_position_embeddings=256"):
        walked_logits(checkpoint, runner, torch.zeros(1, 300, dtype=torch.int64))
