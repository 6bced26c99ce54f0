"""The search: the paper's rule, planted outliers, the start token, and the report."""

from collections import Counter

import pytest
import torch
from torch import nn

from pipeline.prefix import search
from pipeline.prefix.outliers import LayerOutliers
from pipeline.prefix.search import choose_prefix, measure_outliers, search_prefix
from pipeline.text.start_token import choose_start_token
from pipeline.text.windows import prepend_start_token
from tests.conftest import open_model
from tests.prefix.setup import searching


def layer(mean_count, content):
    return LayerOutliers(0, mean_count, Counter(content), Counter(), 0.0, 0.0)


@pytest.mark.parametrize(
    ("start_token_counts", "expected"),
    [(False, [5, 7, 0]), (True, [5, 0])],
)
def test_prefix_is_the_most_frequent_outliers_and_the_start_token(start_token_counts, expected):
    layers = [layer(1.2, {5: 4, 7: 1, 9: 1}), layer(0.3, {7: 2}), layer(0.0, {})]
    assert choose_prefix(layers, 0, start_token_counts) == expected


def test_prefix_rules_at_the_edges():
    assert choose_prefix([layer(0.0, {})], 0, False) == []
    assert choose_prefix([layer(0.1, {})], 0, False) == [0]  # only position 0: the start token alone
    assert choose_prefix([layer(2.0, {0: 9, 4: 1, 3: 1})], 0, False) == [3, 4, 0]  # never twice; ties by id
    assert choose_prefix([layer(1.0, {4: 1})], None, False) == [4]


def test_start_token_is_bos_or_else_eos(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    assert choose_start_token(checkpoint) == (0, "BOS '<s>'")
    checkpoint.tokenizer.bos_token = None
    assert choose_start_token(checkpoint) == (1, "EOS '</s>', for lack of a BOS")
    checkpoint.tokenizer.eos_token = None
    assert choose_start_token(checkpoint)[0] is None


def plant_outlier_(monkeypatch, checkpoint, token_ids, token):
    """Multiply the input of block 1's down_proj by 1000 wherever `token` is; all windows must be one batch."""
    build = checkpoint.build_block

    def build_with_outlier(index):
        block = build(index)
        if index == 1:
            block.mlp.act_fn = Planted(block.mlp.act_fn, token_ids == token)
        return block

    monkeypatch.setattr(checkpoint, "build_block", build_with_outlier)


class Planted(nn.Module):
    """An activation function that gives 1000 times its values at some positions."""

    def __init__(self, act_fn, where):
        super().__init__()
        self.act_fn = act_fn
        self.where = where

    def forward(self, x):
        y = self.act_fn(x)
        return torch.where(self.where[..., None], y * 1000, y)


@pytest.mark.parametrize("site", ["down_proj_input", "block_output"])
def test_planted_outlier_token_is_found_and_prefixed(site, imported, token_ids, monkeypatch):
    checkpoint, runner = open_model(imported["llama_tied"], batch_size=3)
    token_ids[:, 1:] = token_ids[:, 1:].clamp_min(50)
    token_ids[:, 10] = 42
    plant_outlier_(monkeypatch, checkpoint, token_ids, 42)
    layers = measure_outliers(checkpoint, token_ids, runner=runner, site=site, threshold=64.0)
    assert layers[0].mean_count == 0
    assert layers[1].content == Counter({42: 3})
    assert layers[1].positions == Counter({10: 3})
    assert choose_prefix(layers, 0, False) == [42, 0]


def test_windows_begin_with_the_start_token_unless_the_prefix_ends_in_it(imported, token_ids, monkeypatch):
    checkpoint, runner = open_model(imported["llama_tied"], batch_size=3)
    measured_windows = []

    def measure_watched(checkpoint, token_ids, **options):
        measured_windows.append(token_ids)
        return measure_outliers(checkpoint, token_ids, **options)

    monkeypatch.setattr(search, "measure_outliers", measure_watched)
    token_ids = token_ids.clamp_min(1)
    params = searching(site="block_output", outlier_threshold=1.05)
    prefix = search_prefix(checkpoint, token_ids, params=params, runner=runner, text_start_token_id=0)
    assert prefix.token_ids[-1] == 0
    assert 0 not in prefix.token_ids[:-1]
    before, after = measured_windows
    assert torch.equal(before, prepend_start_token(token_ids, 0))
    assert torch.equal(after, token_ids)
    assert checkpoint.tokenizer.decode([0]) not in [row["text"] for row in prefix.report["layers"][0]["tokens"]]


def test_no_outliers_give_an_empty_prefix(imported, token_ids):
    checkpoint, runner = open_model(imported["qwen3"])
    prefix = search_prefix(checkpoint, token_ids, params=searching(outlier_threshold=1e6), runner=runner)
    assert prefix.token_ids.tolist() == []
    assert prefix.embeddings.shape == (0, 48)
    assert "the prefix is empty" in prefix.report["why"]
    assert prefix.summary()["prefix_token_ids"] == []


def test_report_lists_layers_without_and_with_the_prefix(imported, token_ids):
    checkpoint, runner = open_model(imported["llama_tied"])
    params = searching(site="block_output", outlier_threshold=1.05)
    prefix = search_prefix(checkpoint, token_ids, params=params, runner=runner)
    assert prefix.token_ids[-1] == 0
    assert torch.equal(prefix.embeddings, checkpoint.embed(prefix.token_ids))
    assert prefix.report["prefix_texts"][-1] == "<s>"
    first = prefix.report["layers"][0]
    assert first["top1_median_ratio"] > 1
    assert first["top1_median_ratio_with_prefix"] != first["top1_median_ratio"]
    assert first["tokens"][0].keys() == {"id", "text", "count"}
