"""Hooks on sites read the values of the original block, and the block continues with the values that they return."""

import pytest
import torch

from pipeline.blocks.quantized import load_block
from pipeline.models.sites import Site
from pipeline.prefix.sites import ATTENTION_RESULT, hook_sites_
from tests.conftest import open_model

SITES = (*Site, ATTENTION_RESULT)
FAMILIES = ["llama_tied", "qwen3", "gemma2", "olmo2"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hooks_that_return_the_values_change_nothing(family, imported, token_ids):
    checkpoint, runner = open_model(imported[family])
    hidden = checkpoint.embed(token_ids)
    expected = runner.run(load_block(checkpoint, 0), hidden)
    block, shapes = load_block(checkpoint, 0), {}
    hook_sites_(block, checkpoint.architecture, SITES, lambda site, x: (shapes.setdefault(site, x.shape), x)[1])
    assert torch.equal(runner.run(block, hidden), expected)
    batch, length, width = hidden.shape
    heads, head_dim = checkpoint.config.num_key_value_heads, block.self_attn.head_dim
    assert shapes == {
        Site.ATTENTION_INPUT: (batch, length, width),
        Site.KEY: (batch, heads, length, head_dim),
        Site.VALUE: (batch, heads, length, head_dim),
        Site.ATTENTION_OUTPUT: (batch, length, checkpoint.config.num_attention_heads * head_dim),
        ATTENTION_RESULT: (batch, length, width),
        Site.MLP_INPUT: (batch, length, width),
        Site.MLP_HIDDEN: (batch, length, checkpoint.config.intermediate_size),
    }


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_block_continues_with_the_values_that_a_hook_returns(family, site, imported, token_ids):
    checkpoint, runner = open_model(imported[family])
    hidden = checkpoint.embed(token_ids)
    block = load_block(checkpoint, 0)
    expected = runner.run(block, hidden)
    hook_sites_(block, checkpoint.architecture, [site], lambda site, x: x.flip(-1))
    assert (runner.run(block, hidden) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_unknown_sites_are_refused(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    with pytest.raises(ValueError, match="attention is not a site"):
        hook_sites_(load_block(checkpoint, 0), checkpoint.architecture, ["attention"], lambda site, x: x)
