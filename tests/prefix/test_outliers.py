from collections import Counter

import pytest
import torch
from torch import nn

from pipeline.prefix import search
from pipeline.prefix.outliers import LayerOutliers, describe_outliers, outlier_ratios, token_maxima
from pipeline.prefix.search import choose_prefix, measure_outliers, search_prefix
from pipeline.text.start_token import choose_start_token
from pipeline.text.windows import prepend_start_token
from tests.conftest import open_model


def test_token_maxima_take_magnitudes():
    x = torch.tensor([[[1.0, -5.0], [2.0, 3.0]]])
    assert token_maxima(x).tolist() == [[5.0, 3.0]]


def test_ratios_are_relative_to_the_windows_own_median():
    maxima = torch.tensor([[2.0, 200.0, 2.0, 1.0, 4.0], [10.0, 10.0, 10.0, 5.0, 20.0]])
    assert outlier_ratios(maxima).tolist() == [[1.0, 100.0, 1.0, 0.5, 2.0], [1.0, 1.0, 1.0, 0.5, 2.0]]
    assert outlier_ratios(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_statistics_of_a_layer_by_hand():
    maxima = torch.ones(2, 5)
    maxima[0, 0], maxima[0, 3], maxima[1, 2] = 100, 70, 65
    ids = torch.tensor([[9, 1, 2, 3, 4], [9, 8, 3, 7, 6]])
    layer = describe_outliers(4, maxima, ids, threshold=64)
    assert layer.mean_count == 1.5
    assert layer.content == Counter({3: 2})  # position 0 is no content
    assert layer.positions == Counter({0: 1, 3: 1, 2: 1})
    assert (layer.mean_top1_ratio, layer.max_top1_ratio) == (82.5, 100.0)


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


def plant_outlier(monkeypatch, checkpoint, token_ids, token):
    """Make block 1's down_proj see 1000 times the values wherever `token` stands; all windows in one batch."""
    build = checkpoint.build_block

    def build_with_outlier(index):
        block = build(index)
        if index == 1:
            block.mlp.act_fn = Planted(block.mlp.act_fn, token_ids == token)
        return block

    monkeypatch.setattr(checkpoint, "build_block", build_with_outlier)


class Planted(nn.Module):
    def __init__(self, act_fn, where):
        super().__init__()
        self.act_fn = act_fn
        self.where = where

    def forward(self, x):
        y = self.act_fn(x)
        return torch.where(self.where[..., None], y * 1000, y)


@pytest.mark.parametrize("site", ["down_proj_input", "block_output"])
def test_a_planted_outlier_token_is_found_and_prefixed(site, imported, token_ids, monkeypatch):
    checkpoint, runner = open_model(imported["llama_tied"], batch_size=3)
    token_ids[:, 1:] = token_ids[:, 1:].clamp_min(50)
    token_ids[:, 10] = 42
    plant_outlier(monkeypatch, checkpoint, token_ids, 42)
    layers = measure_outliers(checkpoint, token_ids, runner, site, 64.0)
    assert layers[0].mean_count == 0
    assert layers[1].content == Counter({42: 3})
    assert layers[1].positions == Counter({10: 3})
    assert choose_prefix(layers, 0, False) == [42, 0]


def test_windows_are_searched_with_the_start_token_and_judged_behind_a_prefix_without(imported, token_ids, monkeypatch):
    checkpoint, runner = open_model(imported["llama_tied"], batch_size=3)
    read = []
    measure = search.measure_outliers
    monkeypatch.setattr(search, "measure_outliers", lambda *a, **o: (read.append(a[1]), measure(*a, **o))[1])
    token_ids = token_ids.clamp_min(1)
    found = search_prefix(checkpoint, token_ids, runner, "block_output", 1.05, False, window_start=0)
    assert found.token_ids[-1] == 0
    assert 0 not in found.token_ids[:-1]
    before, after = read
    assert torch.equal(before, prepend_start_token(token_ids, 0))
    assert torch.equal(after, token_ids)
    assert checkpoint.tokenizer.decode([0]) not in [row["text"] for row in found.report["layers"][0]["tokens"]]


def test_no_outliers_give_an_empty_prefix_that_says_so(imported, token_ids):
    checkpoint, runner = open_model(imported["qwen3"])
    found = search_prefix(checkpoint, token_ids, runner, "down_proj_input", 1e6, False)
    assert found.token_ids.tolist() == []
    assert found.embeddings.shape == (0, 48)
    assert "the prefix is empty" in found.report["why"]
    assert found.summary()["prefix_token_ids"] == []


def test_report_lists_layers_before_and_after(imported, token_ids):
    checkpoint, runner = open_model(imported["llama_tied"])
    found = search_prefix(checkpoint, token_ids, runner, "block_output", 1.05, False)
    assert found.token_ids[-1] == 0
    assert torch.equal(found.embeddings, checkpoint.embed(found.token_ids))
    assert found.report["prefix_texts"][-1] == "<s>"
    first = found.report["layers"][0]
    assert first["top1_median_ratio"] > 1
    assert first["top1_median_ratio_with_prefix"] != first["top1_median_ratio"]
    assert first["tokens"][0].keys() == {"id", "text", "count"}
