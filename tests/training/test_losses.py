"""Losses equal hand-computed cases."""

import pytest
import torch

from pipeline.training.losses import LOSSES

TARGET = torch.tensor([[[1.0, 2.0], [0.0, 4.0], [9.0, -9.0], [1.0, 1.0], [30.0, 40.0]]])
OUTPUT = TARGET + torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 0.0], [0.0, 10.0]]])


def test_losses_equal_a_hand_computed_case():
    squares = [1.0, 4.0, 9.0, 0.0, 100.0]  # per token, summed over two channels
    losses = {name: loss(OUTPUT, TARGET).tolist() for name, loss in LOSSES.items()}
    assert losses["mse"] == [pytest.approx(sum(squares) / 10)]
    # The tokens of largest mean magnitude are the last (35), the third (9) and the second (2).
    assert losses["skip_mse"] == [pytest.approx((1.0 + 0.0) / 4)]
    # One of ten magnitudes is beyond the range, which ends at 40: only the last error, 10, is beyond it.
    assert losses["clamp_mse"] == [pytest.approx((1.0 + 4.0 + 9.0) / 10)]
    energies = [5.0, 16.0, 162.0, 2.0, 2500.0]
    assert losses["normalized_mse"] == [pytest.approx(sum(s / e for s, e in zip(squares, energies, strict=True)) / 5)]
    similarity = torch.nn.functional.cosine_similarity(OUTPUT[0], TARGET[0]).mean().item()
    assert losses["cosine"] == [pytest.approx(1 - similarity)]
    assert torch.cosine_similarity(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 2.0]), dim=0).item() < 1


@pytest.mark.parametrize("name", LOSSES)
def test_each_window_has_its_own_loss(name):
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(3, 6, 8, generator=generator) for _ in range(2))
    together = LOSSES[name](output, target)
    assert together.shape == (3,)
    for index in range(3):
        alone = LOSSES[name](output[index : index + 1], target[index : index + 1])
        assert together[index].item() == pytest.approx(alone.item(), rel=1e-6)
    assert LOSSES[name](target, target).abs().max() < 1e-6
