"""The state of a training run: it must start finite, and a killed run continues from it."""

import functools
import math

import pytest

from pipeline.training import trainer as trainer_module
from pipeline.training.end_to_end import EndToEndTrainer
from pipeline.training.state import TrainingError
from tests.training.setup import ALL_MOVE, MEASURED, make_block_trainer, read_bytes, run_whole


def test_training_does_not_start_from_a_loss_that_is_not_finite(quantized, monkeypatch):
    trainer, _, data = make_block_trainer(quantized)
    monkeypatch.setattr(trainer, "evaluate", lambda data: {"validation": math.nan})
    with pytest.raises(TrainingError, match="the loss before training is not finite: the model to train from"):
        trainer.train_(data, data, 0)


@pytest.mark.parametrize("failing", [[1], [1, 2, 3]])
def test_killed_epoch_continues_after_the_last_saved_step(failing, quantized, tmp_path, monkeypatch):
    """A continued run remembers failed steps, the rates halved for them, and how many failed in a row."""
    monkeypatch.setattr(trainer_module, "_KEEP_EVERY", 2)
    end = {"blocks": MEASURED, "end_to_end": ALL_MOVE | {"batch_size": 1}}
    differentiate, batches, order = EndToEndTrainer.differentiate, [], []

    def watched(self, data, windows, at=None):
        batches.append(windows.tolist())
        if len(batches) == at:
            raise KeyboardInterrupt
        loss = differentiate(self, data, windows)
        return math.nan if windows.tolist() in [order[step] for step in failing if order] else loss

    def run_watched(name, at=None):
        batches.clear()
        with monkeypatch.context() as patch:
            patch.setattr(EndToEndTrainer, "differentiate", functools.partialmethod(watched, at=at))
            return run_whole(quantized, tmp_path / name, **end)[0]

    run_watched("order")
    order += batches
    whole_metrics = run_watched("a")
    whole = batches[:]
    assert len(whole) == (8 if failing == [1] else 4)
    with pytest.raises(KeyboardInterrupt):
        run_watched("b", at=4)
    assert run_watched("b") == whole_metrics
    assert whole_metrics["end_to_end"]["failed"] == (len(failing) == 3)
    assert batches == whole[2:]  # killed in the fourth step; the second was saved
    assert read_bytes(tmp_path / "b/out") == read_bytes(tmp_path / "a/out")
