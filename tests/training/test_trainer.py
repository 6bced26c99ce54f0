"""The training loop: rates, clipping, order of windows, best epoch, early stop and numerical failures."""

import math

import pytest
import torch

from pipeline.training.trainer import Trainer
from tests.training.setup import make_block_trainer


def test_zero_rate_freezes_its_group(quantized):
    for frozen, moving in (("weight_lr", "quantizers"), ("quant_lr", "weights")):
        trainer, trainables, data = make_block_trainer(quantized, {frozen: 0.0})
        before = {kind: [p.detach().clone() for p in getattr(trainables, kind)] for kind in ("quantizers", "weights")}
        trainer.train_(data, data, 0)
        for kind, values in before.items():
            after = getattr(trainables, kind)
            moved = any(not torch.equal(a, b) for a, b in zip(after, values, strict=True))
            assert moved == (kind == moving), (frozen, kind)


def test_gradients_are_clipped_to_the_maximum_norm(quantized, monkeypatch):
    trainer, _, data = make_block_trainer(quantized, {"clip_grad": 1e-3})

    def measure_norm():
        return math.sqrt(sum(p.grad.square().sum().item() for p in trainer.parameters))

    norms = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: norms.append(measure_norm()))
    trainer.differentiate(data, torch.arange(4))
    assert measure_norm() > 1e-2
    trainer.step(data, torch.arange(4), 0, 1)
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_learning_rates_follow_the_cosine_to_their_floor(quantized, monkeypatch):
    trainer, _, data = make_block_trainer(
        quantized, {"quant_lr": 0.01, "weight_lr": 0.002, "epochs": 2, "min_lr_factor": 10}
    )
    rates = []
    monkeypatch.setattr(
        trainer.optimizer, "step", lambda: rates.append([group["lr"] for group in trainer.optimizer.param_groups])
    )
    trainer.train_(data, data, 0)
    shape = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == [[pytest.approx(0.01 * s), pytest.approx(0.002 * s)] for s in shape]


def test_each_epoch_visits_all_windows_in_a_new_order(quantized, monkeypatch):
    trainer, _, data = make_block_trainer(quantized, {"epochs": 3, "batch_size": 1})
    order = []
    monkeypatch.setattr(trainer, "step", lambda data, windows, *position: order.append(int(windows)))
    trainer.train_(data, data, 3)
    epochs = [order[:4], order[4:8], order[8:]]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_best_epoch_is_restored_after_a_late_divergence(quantized, monkeypatch):
    good, _, data = make_block_trainer(quantized, {"epochs": 1, "quant_lr": 0.001, "weight_lr": 0.0})
    good.train_(data, data, 0)
    trainer, _, data = make_block_trainer(quantized, {"epochs": 4, "quant_lr": 0.001, "weight_lr": 0.0})
    step = Trainer.step

    def diverges(self, data, windows, step_index, step_count):
        assert step_count == 8
        if step_index >= 2:  # from the second epoch on
            for group in self.optimizer.param_groups:
                group["highest"] = 3.0
        return step(self, data, windows, 0 if step_index >= 2 else step_index, 2)

    monkeypatch.setattr(trainer, "step", lambda *args: diverges(trainer, *args))
    outcome = trainer.train_(data, data, 0)
    assert outcome.history[-1]["validation"] > 2 * outcome.history[1]["validation"]
    assert outcome.best_epoch == 1
    for restored, expected in zip(trainer.parameters, good.parameters, strict=True):
        assert torch.equal(restored, expected)


def test_early_stop_counts_from_the_best_epoch(quantized, monkeypatch):
    trainer, _, data = make_block_trainer(quantized, {"epochs": 9, "early_stop": 2})
    measured = iter([5.0, 4.0, 4.5, 3.0, 3.5, 3.6, 1.0])
    monkeypatch.setattr(trainer, "evaluate", lambda data: {"validation": next(measured)})
    outcome = trainer.train_(data, data, 0)
    assert [row["validation"] for row in outcome.history] == [5.0, 4.0, 4.5, 3.0, 3.5, 3.6]
    assert outcome.best_epoch == 3


def test_nan_step_is_skipped_and_halves_the_rates(quantized, monkeypatch):
    trainer, _, data = make_block_trainer(quantized)
    before = [p.detach().clone() for p in trainer.parameters]
    losses = trainer.losses
    monkeypatch.setattr(trainer, "losses", lambda *args: losses(*args) * math.nan)
    assert trainer.step(data, torch.arange(2), 0, 1) is None
    assert all(torch.equal(p, b) for p, b in zip(trainer.parameters, before, strict=True))
    monkeypatch.undo()
    assert trainer.step(data, torch.arange(2), 0, 1) is not None
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.0025, 0.0005])


def test_rounds_validate_within_an_epoch_and_change_no_step(quantized):
    """Seven steps an epoch, a validation every three: after steps 3, 6, 7, 10, …"""
    trainer, _, data = make_block_trainer(quantized, {"epochs": 2, "batch_size": 1})
    assert trainer._split_epochs(7, 2) == [(1, range(7)), (2, range(7))]
    trainer.validate_every = 3
    assert [(e, s.start, s.stop) for e, s in trainer._split_epochs(7, 1)] == [(1, 0, 3), (1, 3, 6), (1, 6, 7)]
    outcome = trainer.train_(data, data, 0)
    assert [row.get("step") for row in outcome.history] == [None, 3, 4, 7, 8]
    assert [row["epoch"] for row in outcome.history] == [0, 0.75, 1.0, 1.75, 2.0]
    whole, _, data = make_block_trainer(quantized, {"epochs": 2, "batch_size": 1})
    assert whole.train_(data, data, 0).history[-1]["validation"] == outcome.history[-1]["validation"]
