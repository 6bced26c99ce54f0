"""Several processes do what one does."""

import os
import socket

import pytest
import torch
import torch.multiprocessing
import yaml

from pipeline.runtime.params import RuntimeParams
from pipeline.runtime.ranks import Ranks, shuffle
from stages.launcher import join_ranks
from tests.conftest import ROOT
from tests.training.test_finetuning import BlockData, quantized, trainer_of  # noqa: F401 (a fixture)

RUNTIME = RuntimeParams.model_validate(
    yaml.safe_load((ROOT / "params.yaml").read_text())["runtime"] | {"device": "cpu"}
)


@pytest.mark.parametrize("count", [1, 3, 16, 64, 100])
def test_shuffled_windows_are_all_windows_spread_evenly(count):
    orders = [shuffle(count, torch.Generator().manual_seed(seed)) for seed in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(count))
    if count >= 16:
        assert len({tuple(order.tolist()) for order in orders}) == 3
        for order in orders:
            for start in range(0, count - 3, 4):
                assert sorted((order[start : start + 4] % 4).tolist()) == [0, 1, 2, 3]


def test_windows_are_owned_by_one_rank_and_found_there():
    windows = torch.arange(7)
    ranks = [Ranks(rank, 3) for rank in range(3)]
    assert [windows[rank.own(7)].tolist() for rank in ranks] == [[0, 3, 6], [1, 4], [2, 5]]
    batch = torch.tensor([6, 2, 4, 0])
    for rank in ranks:
        own = windows[rank.own(7)][rank.locate(batch)]
        assert own.tolist() == [index for index in batch.tolist() if index % 3 == rank.rank]


def measure(trainer, data):
    """Losses of some batches, the gradients of a whole one, and the course of a training run."""
    losses = {
        "batch": trainer.differentiate(data, torch.tensor([3, 0])),
        "one rank has none": trainer.differentiate(data, torch.tensor([0, 2])),
        "evaluation": trainer.evaluate(data),
    }
    trainer.differentiate(data, torch.arange(4))
    gradients = [parameter.grad for parameter in trainer.parameters]
    trainer.train_(data, data, 5)
    return losses, gradients, [row["validation"] for row in trainer.state.history]


def _differentiate(rank, world, port, quantized, folder):  # noqa: F811
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    with join_ranks(RUNTIME) as (ranks, _):
        trainer, _, data = trainer_of(quantized)
        own = ranks.own(data.count)
        trainer.ranks = ranks
        shard = BlockData(data.inputs[own], [target[own] for target in data.targets], data.count)
        torch.save(measure(trainer, shard), folder / f"{rank}.pt")


def test_two_ranks_have_the_losses_and_gradients_of_one(quantized, tmp_path):  # noqa: F811
    trainer, _, data = trainer_of(quantized)
    losses, gradients, history = measure(trainer, data)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_differentiate, (2, port, quantized, tmp_path), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found_losses, found_gradients, found_history in both:
        for name, loss in losses.items():
            assert found_losses[name] == pytest.approx(loss, rel=1e-5), name
        for found, expected in zip(found_gradients, gradients, strict=True):
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert found_history == pytest.approx(history, rel=1e-2)
    assert both[0][2] == both[1][2]  # ranks agree to the last bit: they choose the same epoch
