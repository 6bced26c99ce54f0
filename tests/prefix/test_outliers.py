"""Outlier statistics against hand-computed cases."""

from collections import Counter

import torch

from pipeline.prefix.outliers import describe_outliers, outlier_ratios, rank_peaks, token_maxima


def test_token_maxima_take_magnitudes():
    x = torch.tensor([[[1.0, -5.0], [2.0, 3.0]]])
    assert token_maxima(x).tolist() == [[5.0, 3.0]]


def test_ratios_are_relative_to_the_median_of_the_window():
    maxima = torch.tensor([[2.0, 200.0, 2.0, 1.0, 4.0], [10.0, 10.0, 10.0, 5.0, 20.0]])
    assert outlier_ratios(maxima).tolist() == [[1.0, 100.0, 1.0, 0.5, 2.0], [1.0, 1.0, 1.0, 0.5, 2.0]]
    assert outlier_ratios(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_layer_statistics_equal_a_hand_computed_case():
    maxima = torch.ones(2, 5)
    maxima[0, 0], maxima[0, 3], maxima[1, 2] = 100, 70, 65
    ids = torch.tensor([[9, 1, 2, 3, 4], [9, 8, 3, 7, 6]])
    layer = describe_outliers(4, maxima, ids, threshold=64)
    assert layer.mean_count == 1.5
    assert layer.content == Counter({3: 2})  # position 0 is no content
    assert layer.positions == Counter({0: 1, 3: 1, 2: 1})
    assert (layer.mean_top1_ratio, layer.max_top1_ratio) == (82.5, 100.0)


def test_peaks_are_ranked_whatever_the_threshold():
    """Each window counts for its largest token after position 0, with the squared ratio to the median."""
    maxima = torch.ones(2, 5)
    maxima[0, 0], maxima[0, 2], maxima[1, 4] = 100.0, 3.0, 5.0
    token_ids = torch.tensor([[9, 9, 7, 9, 9], [9, 9, 9, 9, 8]])
    layer = describe_outliers(0, maxima, token_ids, threshold=64)
    assert layer.peaks == {7: 9.0, 8: 25.0}
    assert rank_peaks([layer, layer]) == [8, 7]
