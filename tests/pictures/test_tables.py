import math

import pytest
import torch

from pipeline.pictures.tables import format_markdown, format_results, mean_and_error

ROWS = {
    "original": {"perplexity": {"prose": 2.0}, "tasks": {"colours": {"acc": 0.5}, "stories": {"bleu": 1.0}}},
    "export": {"perplexity": {"prose": 3.0}, "tasks": {"colours": {"acc": 0.25}, "stories": {"bleu": 0.5}}},
}


def test_results_are_perplexities_ratios_and_accuracies():
    assert format_results(ROWS).splitlines() == [
        "| | prose | ratio | colours |",
        "| --- | ---: | ---: | ---: |",
        "| original | 2.00 | 1.00 | 0.500 |",
        "| export | 3.00 | 1.50 | 0.250 |",
    ]


def test_titles_are_aligned_to_the_left():
    assert format_markdown(["a", "b", "c"], [["x", "", "1"]], titles=2).splitlines() == [
        "| a | b | c |",
        "| --- | --- | ---: |",
        "| x | | 1 |",
    ]


def test_the_error_of_a_mean_of_a_hand_computed_case():
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert math.isnan(mean_and_error(torch.tensor([1.0]))[1])
