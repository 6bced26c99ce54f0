"""Every stage runs on a CPU with its tensors on a double of a GPU (`gpu_double.py`)."""

import contextlib
import shutil

import pytest
import torch
from torch import nn

from pipeline.blocks.prefetch import TensorFetcher, prefetch_blocks
from tests.conftest import PROSE_FILE, tiny_params, write_params
from tests.gpu_double import CUDA, GpuDouble, MixedDevicesError, UnorderedError
from tests.test_stages import ALL, contents, run

# --- The double ------------------------------------------------------------------------------------------------------


def test_the_double_refuses_the_same_as_a_gpu_and_counts_waits():
    with GpuDouble() as gpu:
        x = torch.arange(3.0, device="cuda")
        assert (x.device, x.is_cuda) == (CUDA, True)
        with pytest.raises(MixedDevicesError):
            x + torch.ones(3)
        assert (x + torch.tensor(1.0)).sum().item() == 6  # a number of the host is none of its tensors
        assert gpu.waits.total() == 1
        weight = nn.Parameter(torch.ones(3).to("cuda"))
        (weight * x).softmax(0).square().sum().backward()
        assert weight.grad.device == CUDA
        expected = torch.ones(3, requires_grad=True)
        (expected * torch.arange(3.0)).softmax(0).square().sum().backward()
        assert torch.equal(weight.grad.cpu(), expected.grad)
    assert not torch.cuda.is_available()


def test_the_double_refuses_to_read_tensors_that_have_not_arrived():
    with GpuDouble() as gpu:
        stream, values = torch.cuda.Stream(CUDA), torch.ones(3)
        with torch.cuda.stream(stream):
            with pytest.raises(UnorderedError, match="not pinned"):
                values.to("cuda", non_blocking=True)
            sent = values.pin_memory().to("cuda", non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        with pytest.raises(UnorderedError, match="before its copy has arrived"):
            sent + 1
        torch.cuda.current_stream(CUDA).wait_event(event)
        with pytest.raises(UnorderedError, match="not recorded"):
            sent + 1
        sent.record_stream(torch.cuda.current_stream(CUDA))
        assert (sent + 1).cpu().tolist() == [2, 2, 2]
        assert gpu.waits.total() == 1


# --- Prefetching -----------------------------------------------------------------------------------------------------


def test_blocks_come_one_ahead_from_pinned_memory_and_are_waited_for():
    loaded = []

    def load(index):
        loaded.append(index)
        return nn.Linear(2, 2).requires_grad_(False)

    with GpuDouble() as gpu:
        blocks = prefetch_blocks(load, range(3), CUDA)
        for index in range(3):
            block = next(blocks)
            assert block(torch.ones(1, 2, device=CUDA)).device == CUDA
            assert loaded[: index + 1] == list(range(index + 1))
        assert next(blocks, None) is None
    assert loaded == [0, 1, 2]
    assert set(gpu.uploads) == {"meanwhile pipeline/blocks/prefetch.py:fetch"}
    assert not gpu.waits


def test_tensors_are_fetched_in_any_order_and_unwanted_ones_are_dropped():
    loaded = []

    def load(index):
        loaded.append(index)
        return {"x": torch.full((2,), float(index))}

    for device, double in (("cpu", contextlib.nullcontext()), ("cuda", GpuDouble())):
        loaded.clear()
        with double:
            fetcher = TensorFetcher(load, torch.device(device))
            found = [fetcher.get(*step)["x"] for step in ((0, 1), (1, 2), (2, None), (1, 0), (0, 5), (3, None))]
            assert [x.sum().item() / 2 for x in found] == [0, 1, 2, 1, 0, 3]
        assert loaded == [0, 1, 2, 1, 0, *([5] if device == "cuda" else []), 3]


# --- Stages ----------------------------------------------------------------------------------------------------------


def run_on(device, folder, source, stages, monkeypatch):
    """Artifacts of a tiny model's stages, in float32 throughout, and the double they ran on."""
    folder.mkdir()
    shutil.copyfile(PROSE_FILE, folder / "prose.txt")
    params = tiny_params(source, folder / "prose.txt")
    params["prefix_search"]["outlier_threshold"] = 1.2
    params["prefix_training"] |= {"enabled": True, "epochs": 1, "length": 2}
    params["prefix"]["use"] = "trained"
    params["finetuning"]["autocast"] = "none"
    params["runtime"] |= {"device": device, "offload": "never"}
    write_params(folder, params)
    monkeypatch.chdir(folder)
    double = GpuDouble() if device == "cuda" else contextlib.nullcontext()
    with double as gpu, monkeypatch.context() as patch:
        run(*stages, monkeypatch=patch)
    return contents(folder / "artifacts"), gpu


def test_every_stage_comes_to_the_same_bytes_on_the_double(model_folders, tmp_path, monkeypatch):
    source, stages = model_folders["llama_untied_biases"], ALL[:-1]  # the report computes nothing
    expected, _ = run_on("cpu", tmp_path / "cpu", source, stages, monkeypatch)
    found, gpu = run_on("cuda", tmp_path / "cuda", source, stages, monkeypatch)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    # The prefix, and what a simulated quantizer knows, are not sent with every batch.
    for place in ("pipeline/blocks/kv_cache.py:lazy_initialization", "pipeline/prefix/simulation.py:rotate"):
        assert f"waiting {place}" not in gpu.uploads
