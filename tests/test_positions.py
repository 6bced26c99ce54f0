"""The benchmark of positions agrees with the evaluation."""

import math

import pytest
import torch

from benchmarks.quality.positions import format_table, measure_losses, split_positions
from pipeline.evaluation.perplexity import evaluate_windows
from tests.conftest import open_model


def test_losses_equal_the_evaluation(imported, token_ids):
    checkpoint, runner = open_model(imported["llama_tied"])
    metrics, _, _ = evaluate_windows(checkpoint, {"a": token_ids}, runner, prefix_kv=None)
    losses = measure_losses(checkpoint, {"a": token_ids}, None, None)["a"]
    assert losses.shape == (len(token_ids), token_ids.shape[1] - 1)
    assert math.exp(losses.mean()) == pytest.approx(metrics["perplexity"]["a"], rel=1e-4)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (100, [(0, 100)]),
        (1023, [(0, 256), (256, 512), (512, 1023)]),
        (2047, [(0, 256), (256, 512), (512, 1024), (1024, 1536), (1536, 2047)]),
    ],
)
def test_positions_cover_all_targets(length, expected):
    assert [(place.start, place.stop) for place in split_positions(length)] == expected


def test_ratios_are_of_perplexities_by_position():
    exact = {"a": torch.full((2, 300), 1.0)}
    early, late = torch.full((2, 300), 1.0), torch.full((2, 300), 1.0)
    early[:, :256] += math.log(2)
    late[:, 256:] += math.log(3)
    first, second = format_table(exact, {"one": {"a": early}, "two": {"a": late}}).splitlines()[3:]
    assert first.split(" | ")[4:6] == ["2.00", "1.00"]
    assert second.split(" | ")[4:6] == ["1.00", "3.00"]
    difference = (44 * math.log(3) - 256 * math.log(2)) / 300
    assert f"{difference:+.3f} ± 0.000" in second
