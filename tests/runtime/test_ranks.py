"""Several processes compute the same as one."""

import os
import socket

import pytest
import torch
import torch.multiprocessing
import yaml

from pipeline.runtime.params import RuntimeParams
from pipeline.runtime.ranks import ALONE, RankError, Ranks, shuffle
from pipeline.training.block_wise import BlockData
from stages.launcher import join_ranks
from tests.conftest import ROOT
from tests.training.setup import make_block_trainer, quantized  # noqa: F401 (a fixture)

RUNTIME = RuntimeParams.model_validate(
    yaml.safe_load((ROOT / "params.yaml").read_text())["runtime"] | {"device": "cpu"}
)


@pytest.mark.parametrize("count", [1, 3, 16, 64, 100])
def test_every_batch_of_a_shuffled_order_spreads_evenly_over_ranks(count):
    orders = [shuffle(count, torch.Generator().manual_seed(seed)) for seed in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(count))
    if count >= 16:
        assert len({tuple(order.tolist()) for order in orders}) == 3
        for order in orders:
            for start in range(0, count - 3, 4):
                assert sorted((order[start : start + 4] % 4).tolist()) == [0, 1, 2, 3]


def test_every_window_belongs_to_one_rank_and_is_located_there():
    windows = torch.arange(7)
    ranks = [Ranks(rank, 3) for rank in range(3)]
    assert [windows[rank.slice_windows(7)].tolist() for rank in ranks] == [[0, 3, 6], [1, 4], [2, 5]]
    batch = torch.tensor([6, 2, 4, 0])
    for rank in ranks:
        rank_windows = windows[rank.slice_windows(7)][rank.locate(batch)]
        assert rank_windows.tolist() == [index for index in batch.tolist() if index % 3 == rank.rank]


def test_fewer_windows_than_ranks_are_refused():
    message = r"^runtime\.processes=3: there are only 2 windows\. Use at most 2\.$"
    with pytest.raises(RankError, match=message):
        Ranks(0, 3).slice_windows(2)


def test_one_process_keeps_its_tensors():
    values = torch.arange(6.0).view(3, 2)
    ALONE.sum_(values)
    ALONE.broadcast_(values)
    assert ALONE.count(3) == 3
    assert ALONE.collect(values, 3) is values
    assert ALONE.join(values) is values
    assert values.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def measure(trainer, data):
    """Return the losses of some batches, the gradients of a whole one, and the validation losses of a training run."""
    losses = {
        "batch": trainer.differentiate(data, torch.tensor([3, 0])),
        "one rank has none": trainer.differentiate(data, torch.tensor([0, 2])),
        "evaluation": trainer.evaluate(data),
    }
    trainer.differentiate(data, torch.arange(4))
    gradients = [parameter.grad for parameter in trainer.parameters]
    trainer.train_(data, data, 5)
    return losses, gradients, [row["validation"] for row in trainer.state.history]


def check_collectives(ranks):
    """Check each collective on two ranks that hold [1, 2] and [3, 0]."""
    values = {operation: torch.tensor([[1, 2], [3, 0]][ranks.rank]) for operation in ("sum_", "min_", "max_")}
    for operation, tensor in values.items():
        getattr(ranks, operation)(tensor)
    assert {operation: tensor.tolist() for operation, tensor in values.items()} == {
        "sum_": [4, 2],
        "min_": [1, 0],
        "max_": [3, 2],
    }
    windows = torch.arange(10).view(5, 2)
    assert torch.equal(ranks.collect(windows[ranks.slice_windows(5)], 5), windows)
    assert ranks.join(torch.full((ranks.rank + 1,), ranks.rank)).tolist() == [0, 1, 1]
    assert ranks.count(ranks.rank + 1) == 3
    first = torch.tensor(float(ranks.rank))
    ranks.broadcast_(first)
    assert first == 0
    ranks.wait()


def _differentiate(rank, world, port, quantized, folder):  # noqa: F811
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    with join_ranks(RUNTIME) as (ranks, _):
        trainer, _, data = make_block_trainer(quantized)
        windows = ranks.slice_windows(data.count)
        trainer.ranks = ranks
        shard = BlockData(data.inputs[windows], [target[windows] for target in data.targets], data.count)
        check_collectives(ranks)
        torch.save(measure(trainer, shard), folder / f"{rank}.pt")


def test_two_ranks_have_the_losses_and_gradients_of_one(quantized, tmp_path):  # noqa: F811
    trainer, _, data = make_block_trainer(quantized)
    losses, gradients, history = measure(trainer, data)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_differentiate, (2, port, quantized, tmp_path), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank_losses, rank_gradients, rank_history in both:
        for name, loss in losses.items():
            assert rank_losses[name] == pytest.approx(loss, rel=1e-5), name
        for gradient, expected in zip(rank_gradients, gradients, strict=True):
            assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert rank_history == pytest.approx(history, rel=1e-2)
    assert both[0][2] == both[1][2]  # ranks agree to the last bit: they choose the same epoch
