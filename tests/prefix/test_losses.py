"""Terms of the loss of a trainable prefix, each against a hand-computed case."""

import math

import pytest
import torch

from pipeline.prefix.losses import AttentionMeasure, OutlierMeasure, QuantizationMeasure, diversity, magnitude
from pipeline.prefix.sites import ATTENTION_RESULT
from tests.conftest import open_model
from tests.prefix.setup import training


def test_outlier_terms_equal_a_hand_computed_case():
    measure = OutlierMeasure(None, training(outlier_threshold=5.0))
    ratios = torch.tensor([[1.0, 1.0, 9.0, 1.0]])
    outlier, smoothness = expected = measure.terms(ratios)
    excess = 4 / 4
    smooth_maximum = math.log(3 * math.e + math.e**9)
    assert outlier.item() == pytest.approx(excess + smooth_maximum + 9.0, rel=1e-6)
    assert smoothness.item() == pytest.approx((0 + 8 + 8) / 3, rel=1e-6)
    # From activations: token maxima 2, 2, 18, 2 have median 2.
    x = torch.tensor([[[2.0, 1.0], [-2.0, 0.0], [3.0, -18.0], [2.0, 2.0]]])
    replaced, terms = measure.measure(0, "mlp_hidden", x)
    assert torch.allclose(terms, expected)
    assert replaced is x


def test_attention_terms_equal_a_hand_computed_case():
    x = torch.tensor([[[1.0, 3.0], [3.0, -1.0]]])  # [1, 2, 2]: over tokens means 2, 1, deviations 1, 2
    for loss_type, expected in (("l2", 20 / 4), ("var", (1 + 4) / 2)):
        replaced, terms = AttentionMeasure(None, training(loss_type=loss_type)).measure(0, ATTENTION_RESULT, x)
        assert terms.item() == pytest.approx(expected)
        assert replaced is x


def test_diversity_and_magnitude_equal_hand_computed_cases():
    assert diversity(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item() == 0
    assert diversity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])).item() == pytest.approx(1)
    assert diversity(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])).item() == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert diversity(torch.ones(1, 4)).item() == 0
    assert magnitude(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 4.0).item() == pytest.approx((5 / 4 - 1) / 2)


def test_scale_is_constant_within_a_batch(imported):
    """A block that runs again in the backward pass must compute the same."""
    checkpoint, _ = open_model(imported["llama_tied"])
    measure = QuantizationMeasure(checkpoint, training())
    x = torch.randn(2, 6, 96, generator=torch.Generator().manual_seed(5))
    first, _ = measure.measure(0, "mlp_hidden", x)
    scale = measure.quantizers._fixed[0, "mlp_hidden"][1].clone()
    measure.measure(1, "mlp_hidden", x * 2)
    measure.measure(0, "mlp_hidden", x * 5)
    assert torch.equal(measure.quantizers._fixed[0, "mlp_hidden"][1], scale)
    assert torch.equal(measure.measure(0, "mlp_hidden", x)[0], first)
    measure.begin_batch()
    measure.measure(0, "mlp_hidden", x * 5)
    assert torch.allclose(measure.quantizers._fixed[0, "mlp_hidden"][1], scale * 5)
