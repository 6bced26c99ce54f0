"""The prefix that simulated static quantizers ask for: candidates, what they cost, which is taken."""

import math

import pytest
import torch
from torch import nn

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.walk import BlockRunner
from pipeline.prefix import benefit
from pipeline.prefix.benefit import (
    PrefixSearchError,
    choose_by_benefit,
    choose_candidate,
    list_candidates,
    simulate_costs,
)
from pipeline.prefix.frozen_model import FrozenModel
from pipeline.prefix.outliers import describe_outliers, rank_peaks
from pipeline.prefix.search import search_prefix
from pipeline.runtime.ranks import Ranks
from tests.conftest import open_model
from tests.prefix.test_training import training

WINDOWS = torch.randint(2, 320, (10, 24), generator=torch.Generator().manual_seed(3))


def test_candidates_are_none_the_start_token_and_up_to_four_others_in_front_of_it():
    assert list_candidates([7, 0, 8, 9, 10, 11], 0) == [
        [],
        [0],
        [7, 0],
        [7, 8, 0],
        [7, 8, 9, 0],
        [7, 8, 9, 10, 0],
    ]
    assert list_candidates([7], None) == [[], [7]]
    assert list_candidates([], 0) == [[], [0]]


def test_peaks_are_ranked_whatever_the_threshold():
    """Of each window the largest token behind position 0 counts, by its squared ratio to the median."""
    maxima = torch.ones(2, 5)
    maxima[0, 0], maxima[0, 2], maxima[1, 4] = 100.0, 3.0, 5.0
    token_ids = torch.tensor([[9, 9, 7, 9, 9], [9, 9, 9, 9, 8]])
    layer = describe_outliers(0, maxima, token_ids, threshold=64)
    assert layer.peaks == {7: 9.0, 8: 25.0}
    assert rank_peaks([layer, layer]) == [8, 7]


def test_the_shortest_within_the_error_of_the_best_is_taken():
    candidates = [[], [0], [5, 0]]
    noise = torch.tensor([0.1, -0.1, 0.1, -0.1], dtype=torch.float64)
    costs = torch.stack((2.0 + noise, 1.0 + 0.03 + noise.roll(1), 1.0 + noise))
    choice = choose_candidate(candidates, costs)
    assert choice.token_ids == [0]  # 0.03 above the best, give or take 0.12
    assert [row["kl"] for row in choice.table] == pytest.approx([2.0, 1.03, 1.0])
    assert choice.table[1]["standard_error"] == pytest.approx((costs[1] - costs[2]).std().item() / 2)
    assert choose_candidate(candidates, costs[[1, 2, 0]]).token_ids == []  # ties go to the shortest
    costs[1] += 0.5
    assert choose_candidate(candidates, costs).token_ids == [5, 0]


def test_what_diverges_is_never_taken():
    costs = torch.full((2, 3), torch.inf, dtype=torch.float64)
    costs[1] = 4.0
    choice = choose_candidate([[], [0]], costs)
    assert (choice.token_ids, choice.table[0]["kl"]) == ([0], None)
    with pytest.raises(
        PrefixSearchError, match=r"diverges behind every candidate; set prefix_search\.choose: threshold"
    ):
        choose_candidate([[], [0]], torch.full((2, 3), torch.inf))


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "gemma2"])
@torch.no_grad()
def test_the_walk_costs_what_the_whole_model_with_simulated_quantizers_does(family, imported, monkeypatch):
    """Against prefix training's own forward, through all blocks at once; scales of the judged windows themselves."""
    monkeypatch.setattr(benefit, "_EVERY", 1)
    checkpoint, runner = open_model(imported[family], batch_size=4)
    judged, candidate = WINDOWS[:4], [5, 9, 0]
    found = simulate_costs(checkpoint, [candidate], judged, judged, runner)[0]
    model = FrozenModel(checkpoint, runner, training(simulate=True, weights={"kl": 1.0}))
    prefix = checkpoint.embed(torch.tensor(candidate))
    expected = model.losses(prefix, judged, model.run_original(judged))["kl"]
    assert found.mean().item() == pytest.approx(expected.item(), rel=1e-3)
    assert found.min() > 0


@torch.no_grad()
def test_ranks_share_candidates_and_find_what_one_process_finds(imported):
    checkpoint, runner = open_model(imported["llama_tied"])
    windows = WINDOWS
    alone = choose_by_benefit(checkpoint, [6], 0, windows, runner)
    assert len(alone.table) == 3
    for rank in range(2):
        shared = OneOfTwo(rank)
        own = simulate_costs(checkpoint, [[], [0], [6, 0]], windows[:4], windows[4:8], runner, shared)
        mine = [row["kl"] for row in alone.table][rank::2]
        assert own.mean(1)[rank::2].tolist() == pytest.approx(mine)
        assert own.mean(1)[1 - rank :: 2].eq(0).all()


class OneOfTwo(Ranks):
    """One of two ranks; what the other one has is added elsewhere."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2)

    def sum_(self, *tensors: torch.Tensor) -> None:
        pass


@torch.no_grad()
def test_search_by_benefit_reports_its_table_and_the_prefix_it_takes(imported):
    checkpoint, runner = open_model(imported["llama_tied"])
    found = search_prefix(checkpoint, WINDOWS, runner, "down_proj_input", 64.0, False, choose="benefit")
    table = found.report["candidates"]
    assert table[0]["token_ids"] == []
    assert table[1]["token_ids"] == [0]
    assert 2 <= len(table) <= 6
    best = min(table, key=lambda row: row["kl"])
    (taken,) = [row for row in table if row["token_ids"] == found.token_ids.tolist()]
    assert taken["kl_above_best"] <= taken["standard_error"]
    assert len(taken["token_ids"]) <= len(best["token_ids"])
    kv = compute_prefix_kv(checkpoint, found.embeddings, runner)
    assert (kv is None) == (found.token_ids.numel() == 0)


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_one_window_that_diverges_is_enough_to_be_left_out(broken, imported, monkeypatch):
    checkpoint, runner = open_model(imported["llama_tied"])
    divergences, calls = benefit.mean_divergences, []

    def diverge(*args):
        calls.append(1)
        costs = divergences(*args)
        costs[0] *= broken if len(calls) == 1 else 1  # no prefix, first window
        return costs

    monkeypatch.setattr(benefit, "mean_divergences", diverge)
    choice = choose_by_benefit(checkpoint, [], 0, WINDOWS, runner)
    assert choice.token_ids == [0]
    assert choice.table[0] == {"token_ids": [], "kl": None, "chosen": False}
    monkeypatch.setattr(
        benefit, "mean_divergences", lambda ours, *args: torch.full((len(ours),), broken, dtype=torch.float64)
    )
    with pytest.raises(PrefixSearchError, match="behind every candidate"):
        choose_by_benefit(checkpoint, [], 0, WINDOWS, runner)


def test_ranges_are_those_of_the_windows_that_calibrate(imported):
    checkpoint, runner = open_model(imported["llama_tied"], batch_size=1)
    costs = simulate_costs(checkpoint, [[0]], WINDOWS[:2], WINDOWS[2:6], runner)
    alone = simulate_costs(checkpoint, [[0]], WINDOWS[:2], WINDOWS[3:4], runner)
    assert alone[0, 0].item() == pytest.approx(costs[0, 1].item(), rel=1e-2)
    flattered = simulate_costs(checkpoint, [[0]], WINDOWS[3:4], WINDOWS[3:4], runner)
    assert flattered[0, 0] < 0.98 * alone[0, 0]


PLACE, TOKEN = 10, 42  # where every window has the token that draws an outlier


class Outlier(nn.Module):
    """An activation function that gives 300 times its values at one place, unless a prefix has drawn them."""

    def __init__(self, act_fn):
        super().__init__()
        self.act_fn, self.drawn = act_fn, False

    def forward(self, x):
        y = self.act_fn(x)
        if self.drawn or x.shape[1] <= PLACE:  # a prefix itself is shorter
            return y
        return torch.cat((y[:, :PLACE], 300 * y[:, PLACE : PLACE + 1], y[:, PLACE + 1 :]), dim=1)


class RiggedRunner(BlockRunner):
    """Sees whether TOKEN begins the prefix, by the values it has in block 1."""

    values: torch.Tensor

    def run(self, block, hidden, prefix_kv=None):
        if isinstance(block.mlp.act_fn, Outlier):
            block.mlp.act_fn.drawn = prefix_kv is not None and torch.allclose(prefix_kv[1, :, 0], self.values)
        return super().run(block, hidden, prefix_kv)


@pytest.mark.parametrize("threshold", [2.0, 1e6])
def test_a_token_that_ruins_quantization_is_prefixed_whatever_the_threshold(threshold, imported, monkeypatch):
    checkpoint, plain = open_model(imported["llama_tied"])
    runner = RiggedRunner(checkpoint, torch.device("cpu"), 3)
    runner.values = compute_prefix_kv(checkpoint, checkpoint.embed(torch.tensor([TOKEN])), plain)[1, 1, :, 0]
    build = checkpoint.build_block

    def build_rigged(index):
        block = build(index)
        if index == 1:
            block.mlp.act_fn = Outlier(block.mlp.act_fn)
        return block

    monkeypatch.setattr(checkpoint, "build_block", build_rigged)
    windows = WINDOWS.clamp_min(50)
    windows[:, PLACE] = TOKEN
    search = checkpoint, windows, runner, "down_proj_input", threshold, False
    found = search_prefix(*search, choose="benefit")
    assert found.token_ids.tolist() == [TOKEN, 0]
    table = found.report["candidates"]
    assert [row["token_ids"][:1] for row in table] == [[], [0]] + 4 * [[TOKEN]]
    assert [row["chosen"] for row in table] == [False, False, True, False, False, False]
    assert table[2]["texts"] == [checkpoint.tokenizer.decode([TOKEN]), "<s>"]
    assert min(row["kl"] for row in table[:2]) > 1.2 * max(row["kl"] for row in table[2:])
    assert found.summary()["simulated_kl"] == {"none": table[0]["kl"], "chosen": table[2]["kl"]}
    if threshold == 1e6:
        by_ratio = search_prefix(*search)
        assert by_ratio.token_ids.tolist() == []
        assert by_ratio.report["candidates"] is None
        assert "simulated_kl" not in by_ratio.summary()


@pytest.mark.parametrize("count", [1, 10])
def test_a_model_without_outliers_gets_no_prefix(count, imported):
    checkpoint, runner = open_model(imported["llama_tied"])
    found = search_prefix(checkpoint, WINDOWS[:count], runner, "down_proj_input", 64.0, False, choose="benefit")
    assert found.token_ids.tolist() == []
    assert found.embeddings.shape == (0, 48)
    assert found.report["candidates"][0]["chosen"]
