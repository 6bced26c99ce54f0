"""Choosing a prefix by the cost of simulated static quantizers: candidates, their costs, the choice."""

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
from pipeline.prefix.harm import Harm, Reader, choose_harm_windows, measure_harm
from pipeline.prefix.search import search_prefix
from pipeline.runtime.ranks import Ranks
from tests.conftest import open_model
from tests.prefix.setup import searching, training

HARMLESS = [Harm(0.0, None)] * 3
WINDOWS = torch.randint(2, 320, (10, 24), generator=torch.Generator().manual_seed(3))


def test_candidates_are_none_the_start_token_and_up_to_four_tokens_before_it():
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


def test_shortest_candidate_within_the_error_of_the_best_is_chosen():
    candidates = [[], [0], [5, 0]]
    noise = torch.tensor([0.1, -0.1, 0.1, -0.1], dtype=torch.float64)
    costs = torch.stack((2.0 + noise, 1.0 + 0.03 + noise.roll(1), 1.0 + noise))
    choice = choose_candidate(candidates, costs, HARMLESS)
    assert choice.token_ids == [0]  # 0.03 above the best, with a standard error of 0.12
    assert [row["kl"] for row in choice.table] == pytest.approx([2.0, 1.03, 1.0])
    assert choice.table[1]["standard_error"] == pytest.approx((costs[1] - costs[2]).std().item() / 2)
    assert choose_candidate(candidates, costs[[1, 2, 0]], HARMLESS).token_ids == []  # ties go to the shortest
    costs[1] += 0.5
    assert choose_candidate(candidates, costs, HARMLESS).token_ids == [5, 0]


def test_diverging_candidates_are_never_chosen():
    costs = torch.full((2, 3), torch.inf, dtype=torch.float64)
    costs[1] = 4.0
    choice = choose_candidate([[], [0]], costs, HARMLESS[:2])
    assert (choice.token_ids, choice.table[0]["kl"]) == ([0], None)
    with pytest.raises(
        PrefixSearchError, match=r"diverges after every candidate\. Set prefix_search\.choose: threshold"
    ):
        choose_candidate([[], [0]], torch.full((2, 3), torch.inf), HARMLESS[:2])


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "gemma2"])
@torch.no_grad()
def test_costs_equal_the_divergence_of_the_whole_model_with_simulated_quantizers(family, imported, monkeypatch):
    """The same windows calibrate and are scored, so prefix training's forward through all blocks gives the same."""
    monkeypatch.setattr(benefit, "_SCORED_STRIDE", 1)
    checkpoint, runner = open_model(imported[family], batch_size=4)
    windows, candidate = WINDOWS[:4], [5, 9, 0]
    costs = simulate_costs(checkpoint, [candidate], calibration=windows, scored=windows, runner=runner)[0]
    model = FrozenModel(checkpoint, runner, training(simulate=True, weights={"kl": 1.0}))
    prefix = checkpoint.embed(torch.tensor(candidate))
    expected = model.losses(prefix, windows, model.run_original(windows))["kl"]
    assert costs.mean().item() == pytest.approx(expected.item(), rel=1e-3)
    assert costs.min() > 0


@torch.no_grad()
def test_ranks_share_candidates_and_compute_the_same_costs_as_one_process(imported):
    checkpoint, runner = open_model(imported["llama_tied"])
    alone = choose_by_benefit(checkpoint, [6], start_token_id=0, token_ids=WINDOWS, runner=runner)
    assert len(alone.table) == 3
    for rank in range(2):
        costs = simulate_costs(
            checkpoint,
            [[], [0], [6, 0]],
            calibration=WINDOWS[:4],
            scored=WINDOWS[4:8],
            runner=runner,
            ranks=OneOfTwo(rank),
        ).mean(1)
        expected = [row["kl"] for row in alone.table][rank::2]
        assert costs[rank::2].tolist() == pytest.approx(expected)
        assert costs[1 - rank :: 2].eq(0).all()


class OneOfTwo(Ranks):
    """One of two ranks, whose sums leave the other rank out."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2)

    def sum_(self, *tensors: torch.Tensor) -> None:
        pass


@torch.no_grad()
def test_search_by_benefit_reports_its_table_and_the_chosen_prefix(imported):
    checkpoint, runner = open_model(imported["llama_tied"])
    prefix = search_prefix(checkpoint, WINDOWS, params=searching(choose="benefit"), runner=runner)
    table = prefix.report["candidates"]
    assert table[0]["token_ids"] == []
    assert table[1]["token_ids"] == [0]
    assert 2 <= len(table) <= 6
    best = min(table, key=lambda row: row["kl"])
    (chosen,) = [row for row in table if row["token_ids"] == prefix.token_ids.tolist()]
    assert chosen["kl_above_best"] <= chosen["standard_error"]
    assert len(chosen["token_ids"]) <= len(best["token_ids"])
    kv = compute_prefix_kv(checkpoint, prefix.embeddings, runner)
    assert (kv is None) == (prefix.token_ids.numel() == 0)


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_one_diverging_window_excludes_a_candidate(broken, imported, monkeypatch):
    checkpoint, runner = open_model(imported["llama_tied"])
    divergences, calls = benefit.mean_divergences, []

    def diverge(*args):
        calls.append(1)
        costs = divergences(*args)
        costs[0] *= broken if len(calls) == 1 else 1  # no prefix, first window
        return costs

    monkeypatch.setattr(benefit, "mean_divergences", diverge)
    monkeypatch.setattr(benefit, "MAX_KL", math.inf)  # a prefix changes a random model by a nat
    choice = choose_by_benefit(checkpoint, [], start_token_id=0, token_ids=WINDOWS, runner=runner)
    assert choice.token_ids == [0]
    assert choice.table[0].items() >= {"token_ids": [], "kl": None, "chosen": False}.items()
    monkeypatch.setattr(
        benefit, "mean_divergences", lambda hidden, *args: torch.full((len(hidden),), broken, dtype=torch.float64)
    )
    with pytest.raises(PrefixSearchError, match="after every candidate"):
        choose_by_benefit(checkpoint, [], start_token_id=0, token_ids=WINDOWS, runner=runner)


def test_candidates_that_harm_the_unquantized_model_are_refused():
    candidates, costs = [[], [0], [5, 0]], torch.tensor([[3.0, 3.1], [2.0, 2.1], [1.0, 1.1]], dtype=torch.float64)
    harmless, pinned = Harm(0.001, 0.002), Harm(0.2, 1.5)
    choice = choose_candidate(candidates, costs, [harmless, harmless, pinned])
    assert choice.token_ids == [0]
    assert [row["refused"] for row in choice.table] == [False, False, True]
    assert [row["full_precision_kl_after_leaving"] for row in choice.table] == [0.002, 0.002, 1.5]
    assert choice.table[2]["kl_above_best"] == pytest.approx(-1)  # better than the best that is not refused
    assert choose_candidate(candidates, costs, [harmless, Harm(math.nan, None), pinned]).token_ids == []
    costs[0] = torch.inf
    with pytest.raises(PrefixSearchError, match="after every candidate that does not harm the unquantized model"):
        choose_candidate(candidates, costs, [harmless, pinned, pinned])


@torch.no_grad()
def test_search_measures_each_candidate_in_full_precision(imported):
    checkpoint, runner = open_model(imported["gemma3_text"])
    prefix = search_prefix(checkpoint, WINDOWS, params=searching(choose="benefit"), runner=runner)
    table = prefix.report["candidates"]
    readers = [Reader(checkpoint.embed(ids), ids) for ids in (torch.tensor(row["token_ids"]).long() for row in table)]
    windows = choose_harm_windows(checkpoint, (WINDOWS[4:8], WINDOWS), 5)
    assert windows.shape[1] > checkpoint.widest_window
    harms = measure_harm(checkpoint, readers, windows, runner=runner)
    assert [row["full_precision_kl"] for row in table] == pytest.approx([harm.mean for harm in harms])
    assert [row["refused"] for row in table] == [harm.worst > benefit.MAX_KL for harm in harms]
    assert table[0]["full_precision_kl"] == table[0]["full_precision_kl_after_leaving"] == 0
    assert not next(row for row in table if row["chosen"])["refused"]


def test_ranges_come_from_the_calibration_windows(imported):
    checkpoint, runner = open_model(imported["llama_tied"], batch_size=1)

    def measure_costs(calibration, scored):
        return simulate_costs(checkpoint, [[0]], calibration=calibration, scored=scored, runner=runner)[0]

    costs = measure_costs(WINDOWS[:2], WINDOWS[2:6])
    alone = measure_costs(WINDOWS[:2], WINDOWS[3:4])
    assert alone[0].item() == pytest.approx(costs[1].item(), rel=1e-2)
    fitted = measure_costs(WINDOWS[3:4], WINDOWS[3:4])
    assert fitted[0] < 0.98 * alone[0]


PLACE, TOKEN = 10, 42  # every window has this token at this position, and it draws an outlier


class Outlier(nn.Module):
    """An activation function that gives 300 times its values at PLACE, unless a prefix begins with TOKEN."""

    def __init__(self, act_fn):
        super().__init__()
        self.act_fn, self.drawn = act_fn, False

    def forward(self, x):
        y = self.act_fn(x)
        if self.drawn or x.shape[1] <= PLACE:  # a prefix itself is shorter
            return y
        return torch.cat((y[:, :PLACE], 300 * y[:, PLACE : PLACE + 1], y[:, PLACE + 1 :]), dim=1)


class RiggedRunner(BlockRunner):
    """Recognizes a prefix that begins with TOKEN by its values in block 1."""

    values: torch.Tensor

    def run(self, block, hidden, prefix_kv=None):
        if isinstance(block.mlp.act_fn, Outlier):
            block.mlp.act_fn.drawn = prefix_kv is not None and torch.allclose(prefix_kv[1, :, 0], self.values)
        return super().run(block, hidden, prefix_kv)


@pytest.mark.parametrize("threshold", [2.0, 1e6])
def test_token_that_ruins_quantization_is_prefixed_whatever_the_threshold(threshold, imported, monkeypatch):
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
    monkeypatch.setattr(benefit, "MAX_KL", math.inf)  # a prefix changes a random model by a nat
    windows = WINDOWS.clamp_min(50)
    windows[:, PLACE] = TOKEN
    params = searching(choose="benefit", outlier_threshold=threshold)
    prefix = search_prefix(checkpoint, windows, params=params, runner=runner)
    assert prefix.token_ids.tolist() == [TOKEN, 0]
    table = prefix.report["candidates"]
    assert [row["token_ids"][:1] for row in table] == [[], [0]] + 4 * [[TOKEN]]
    assert [row["chosen"] for row in table] == [False, False, True, False, False, False]
    assert table[2]["texts"] == [checkpoint.tokenizer.decode([TOKEN]), "<s>"]
    assert min(row["kl"] for row in table[:2]) > 1.2 * max(row["kl"] for row in table[2:])
    assert prefix.summary()["simulated_kl"] == {"none": table[0]["kl"], "chosen": table[2]["kl"]}
    if threshold == 1e6:
        by_ratio = search_prefix(checkpoint, windows, params=searching(outlier_threshold=threshold), runner=runner)
        assert by_ratio.token_ids.tolist() == []
        assert by_ratio.report["candidates"] is None
        assert "simulated_kl" not in by_ratio.summary()


@pytest.mark.parametrize("count", [1, 10])
def test_model_without_outliers_gets_no_prefix(count, imported):
    checkpoint, runner = open_model(imported["llama_tied"])
    prefix = search_prefix(checkpoint, WINDOWS[:count], params=searching(choose="benefit"), runner=runner)
    assert prefix.token_ids.tolist() == []
    assert prefix.embeddings.shape == (0, 48)
    assert prefix.report["candidates"][0]["chosen"]
