"""A walk frees each block when it drops it, without the garbage collector, because blocks are large."""

import gc

import pytest
import torch

from tests.test_stages import ALL, change, run


@pytest.fixture
def left_over():
    """Return a function that collects objects which only the garbage collector can free."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)

    def collect():
        gc.collect()
        found = [kept for kept in gc.garbage if isinstance(kept, torch.Tensor)]
        gc.garbage.clear()
        return found

    yield collect
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


def test_left_over_objects_are_found(left_over):
    block = torch.nn.Linear(2, 2)
    block.held = [block]
    del block
    assert len(left_over()) == 2


@pytest.mark.parametrize("stage", ["prefix_search", "quantizer_init", "finetuning"])
def test_no_tensor_waits_for_the_garbage_collector(stage, project, monkeypatch, left_over):
    change(project, "prefix_search.choose", "benefit")
    change(project, "finetuning.end_to_end.enabled", False)
    run(*ALL[: ALL.index(stage)], monkeypatch=monkeypatch)
    left_over()
    run(stage, monkeypatch=monkeypatch)
    assert left_over() == []
