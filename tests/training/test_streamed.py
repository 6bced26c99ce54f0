"""Streamed blocks: the same bytes as blocks that stay in memory, with the weights of one block at a time."""

import pytest
import torch

from pipeline.training.streamed import _RunStreamed
from tests.training.setup import (
    ALL_MOVE,
    KEEPINGS,
    MEASURED,
    make_end_to_end_trainer,
    read_bytes,
    run_blocks,
    run_whole,
    settings,
)


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_kept_recomputed_and_streamed_blocks_give_the_same_bytes(autocast, quantized, tmp_path):
    models, train, _ = quantized
    same = models, train, train  # so that the best epoch is not the start
    values = {"blocks": MEASURED, "end_to_end": ALL_MOVE, "autocast": autocast}
    for name, keeping in KEEPINGS.items():
        metrics, _ = run_whole(same, tmp_path / name, keeping, **values)
        assert metrics["end_to_end"]["best_epoch"] == 2
    run_whole(same, tmp_path / "files", KEEPINGS["streamed"], tmp_path / "offload", **values)
    assert list((tmp_path / "offload").iterdir()) == []
    expected = read_bytes(tmp_path / "graphs/out")
    for name in ("hidden states", "streamed", "files"):
        assert read_bytes(tmp_path / name / "out") == expected


def test_only_one_streamed_block_has_its_weights_in_memory(quantized, tmp_path, monkeypatch):
    """A batch reads every block forwards and backwards; at the turns the last and the first block are reused."""
    run_blocks(quantized, tmp_path, blocks=MEASURED)
    params = settings(end_to_end=ALL_MOVE).end_to_end
    trainer, data = make_end_to_end_trainer(quantized, tmp_path, params, keeping=KEEPINGS["streamed"])
    blocks, read, present = trainer.blocks, [], []
    load, run_block = blocks._load, trainer.runner.run
    monkeypatch.setattr(blocks, "_load", lambda index: (read.append(index), load(index))[1])

    def watched(block, *args):
        complete = [n for n, other in enumerate(blocks) if other.mlp.up_proj.weight.device.type != "meta"]
        present.append((list(blocks).index(block), complete))
        return run_block(block, *args)

    monkeypatch.setattr(trainer.runner, "run", watched)
    for _ in range(2):
        trainer.differentiate(data, torch.arange(2))
    assert present == [(index, [index]) for index in (0, 1, 2, 2, 1, 0) * 2]
    assert read == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    with torch.no_grad():
        trainer.losses(data, slice(0, 2))
    assert read[9:] == [1, 2]


def test_run_killed_in_a_streamed_backward_pass_ends_with_the_same_bytes(quantized, tmp_path, monkeypatch):
    run_whole(quantized, tmp_path / "a", end_to_end=ALL_MOVE, blocks=MEASURED)
    backward, calls = _RunStreamed.backward, []

    def dying(ctx, *upstream):
        calls.append(ctx.index)
        if len(calls) == 8:  # the second block of the first batch of the second epoch
            raise KeyboardInterrupt
        return backward(ctx, *upstream)

    with monkeypatch.context() as patch:
        patch.setattr(_RunStreamed, "backward", staticmethod(dying))
        with pytest.raises(KeyboardInterrupt):
            run_whole(quantized, tmp_path / "b", KEEPINGS["streamed"], blocks=MEASURED, end_to_end=ALL_MOVE)
    assert calls == [2, 1, 0, 2, 1, 0, 2, 1]
    run_whole(quantized, tmp_path / "b", KEEPINGS["streamed"], blocks=MEASURED, end_to_end=ALL_MOVE)
    assert read_bytes(tmp_path / "b/out") == read_bytes(tmp_path / "a/out")
