"""Blocks are loaded in order, one at a time, on a GPU one ahead, and give the same results there as on a CPU."""

import gc
import shutil
import weakref

import pytest
import torch
from torch import nn

from pipeline.blocks.prefetch import prefetch_blocks
from pipeline.blocks.quantized import load_block
from pipeline.blocks.walk import BlockRunner, load_blocks
from pipeline.models.checkpoint import Checkpoint
from tests.blocks.test_walk import walked_logits
from tests.conftest import PROSE_FILE, open_model, read_json, tiny_params, write_params
from tests.test_stages import ALL, run

CPU = torch.device("cpu")


def test_a_block_is_loaded_when_it_is_asked_for_and_gone_when_it_is_dropped():
    loaded, living = [], []

    def load(index):
        loaded.append(index)
        block = nn.Linear(2, 2)
        living.append(weakref.ref(block))
        return block

    blocks = prefetch_blocks(load, range(3, 6), CPU)
    for index in range(3, 6):
        block = next(blocks)
        assert loaded[-1] == index
        del block
        gc.collect()
        assert living[-1]() is None
    assert next(blocks, None) is None


def test_walking_from_a_later_block_on(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    names = [set(block.state_dict()) for block in load_blocks(checkpoint, CPU, start=1)]
    assert names == [set(load_block(checkpoint, index).state_dict()) for index in (1, 2)]


@pytest.mark.gpu
def test_prefetched_blocks_are_the_loaded_ones(imported):
    checkpoint, _ = open_model(imported["qwen3"])
    for index, block in enumerate(load_blocks(checkpoint, torch.device("cuda"))):
        expected = load_block(checkpoint, index).state_dict()
        for name, tensor in block.state_dict().items():
            assert tensor.device.type == "cuda"
            assert torch.equal(tensor.cpu(), expected[name]), name


@pytest.mark.gpu
@torch.no_grad()
def test_a_failed_load_is_raised_where_the_block_is_asked_for():
    def load(index):
        if index == 1:
            raise RuntimeError("block 1 is damaged")
        return nn.Linear(2, 2)

    blocks = prefetch_blocks(load, range(3), torch.device("cuda"))
    next(blocks)
    with pytest.raises(RuntimeError, match="block 1 is damaged"):
        next(blocks)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "gemma3_text", "olmo2"])
def test_walking_on_a_gpu_is_walking_on_a_cpu(family, imported, token_ids):
    checkpoint, runner = open_model(imported[family])
    expected = walked_logits(checkpoint, runner, token_ids)
    on_gpu = BlockRunner(checkpoint, torch.device("cuda"), 2)
    hidden = checkpoint.embed(token_ids)
    for block in load_blocks(checkpoint, torch.device("cuda")):
        on_gpu.advance_(block, hidden)
    found = checkpoint.load_lm_head().logits(checkpoint.load_final_norm()(hidden))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_pipeline_gives_the_same_on_a_gpu_as_on_a_cpu(dtype, model_folders, tmp_path, monkeypatch):
    found = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        folder.mkdir()
        shutil.copyfile(PROSE_FILE, folder / "prose.txt")
        params = tiny_params(model_folders["llama_untied_biases"], folder / "prose.txt")
        params["model"]["dtype"] = params["rotation"]["dtype"] = dtype
        params["prefix_search"]["outlier_threshold"] = 1.2
        params["prefix_training"] |= {"enabled": True, "epochs": 1, "length": 2}
        # Trained in bfloat16 a random model, or a prefix of it, ends elsewhere.
        params["prefix"]["use"] = {"float32": "trained", "bfloat16": "found"}[dtype]
        if dtype == "float32":
            params["finetuning"]["autocast"] = "none"
        params["runtime"]["device"] = device
        write_params(folder, params)
        monkeypatch.chdir(folder)
        run(*ALL, monkeypatch=monkeypatch)
        found[device] = {
            variant: read_json(folder / f"metrics/evaluation/{variant}.json")["perplexity"]["prose"]
            for variant in ("original", "original_prefix", "quantizer_init", "finetuning", "export")
        }
    close = {"float32": 1e-3, "bfloat16": 2e-2}[dtype]
    # What is quantized differs where a value near the middle of two integers falls to the other one.
    for variant, perplexity in found["cpu"].items():
        exact = variant.startswith("original")
        assert found["cuda"][variant] == pytest.approx(perplexity, rel=close if exact else 0.1), variant
    assert found["cuda"]["export"] == pytest.approx(found["cuda"]["finetuning"], rel=close)
    assert Checkpoint(tmp_path / "cuda/artifacts/finetuning", "finetuning").dtype == getattr(torch, dtype)
