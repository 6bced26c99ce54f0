"""Fine-tuning as a whole: the checkpoint computes the trained model, and killed runs continue."""

import json
import math

import pytest
import torch
import yaml

from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.blocks.quantized import load_block
from pipeline.blocks.walk import BlockRunner
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.params import QuantizerInitParams
from pipeline.quantization.quantizer_init import init_quantizers
from pipeline.rotation.matrices import compute_rotated_prefix_kv
from pipeline.runtime import artifacts
from pipeline.runtime.artifacts import make_header
from pipeline.training import block_wise
from pipeline.training.block_wise import BlockTrainer, Models
from pipeline.training.end_to_end import EndToEndTrainer
from tests.conftest import ROOT, open_model
from tests.rotation.test_merging import rotate
from tests.training.setup import PREFIX, read_bytes, run_whole


def test_the_checkpoint_computes_the_trained_model(quantized, tmp_path):
    """The report's validation losses equal the losses of the blocks loaded from the artifact."""
    models, _, validation = quantized
    metrics, checkpoint = run_whole(quantized, tmp_path, blocks={"target": "fp_input"})
    assert metrics["blocks_failed"] == []
    report = (tmp_path / "out" / "report.json").read_text()
    blocks = yaml.safe_load(report)["blocks"]
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    kv = load_prefix_kv(checkpoint.folder, "finetuning")
    assert torch.equal(kv, load_prefix_kv(models.initial.folder, "quantizer_init"))
    reference, hidden = models.rotated.embed(validation), checkpoint.embed(validation)
    reference_kv = compute_rotated_prefix_kv(models.rotated, models.original.embed(PREFIX), runner)
    for index in range(3):
        block = load_block(checkpoint, index)
        assert block.mlp.down_proj.weight.dtype == torch.int8
        runner.advance_(load_block(models.rotated, index), reference, reference_kv[index])
        runner.advance_(block, hidden, kv[index])
        error = (hidden - reference).square().mean().item()
        assert error == pytest.approx(blocks[index]["validation_after"], rel=1e-5)
    epochs = json.loads((tmp_path / "out" / "plots/losses.json").read_text())
    assert [row["train"] is not None for row in epochs] == [row["epoch"] > 0 for row in epochs]
    assert all(row["validation"] == 1 for row in epochs if row["epoch"] == 0)
    assert [row["block"] for row in json.loads((tmp_path / "out" / "plots/blocks.json").read_text())] == [0, 1, 2]
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {"symmetric": False, "group_size": 16}, "activations": {"symmetric": False}},
        {"activations": {"mode": "dynamic"}, "keys": {"mode": "dynamic"}, "values": {"bits": 16}},
        {"weights": {"bits": 16}, "activations": {"group_size": 16, "bits": 3}},
    ],
)
def test_every_kind_of_quantizer_can_be_trained_and_frozen(changes, imported, tmp_path):
    rotated, runner, _ = rotate(imported["llama_untied_biases"], tmp_path / "rotated")
    original, _ = open_model(imported["llama_untied_biases"])
    token_ids = torch.randint(0, 320, (6, 16), generator=torch.Generator().manual_seed(1))
    init = yaml.safe_load((ROOT / "params.yaml").read_text())["quantizer_init"]
    init = init | {group: init[group] | values for group, values in changes.items()} | {"mse_samples": 2}
    nothing = torch.zeros(0, dtype=torch.int64)
    init_quantizers(
        rotated,
        tmp_path / "q",
        params=QuantizerInitParams.model_validate(init),
        prefix_token_ids=nothing,
        prefix_embeddings=original.embed(nothing),
        token_ids=token_ids[:4],
        runner=runner,
        work_folder=tmp_path / "w",
        header=make_header("quantizer_init", {"test": 2}),
    )
    models = Models(original, rotated, Checkpoint(tmp_path / "q", "quantizer_init"))
    metrics, checkpoint = run_whole((models, token_ids[:4], token_ids[4:]), tmp_path, end_to_end={"enabled": True})
    assert metrics["validation_ratio"] < 1
    names = {index: set(models.initial.load_block_tensors(index)) for index in range(3)}
    for index in range(3):
        tensors = checkpoint.load_block_tensors(index)
        assert set(tensors) == names[index]
        for name, tensor in tensors.items():
            start = models.initial.load_block_tensors(index)[name]
            assert (tensor.dtype, tensor.shape) == (start.dtype, start.shape), name
            if name.endswith("zero_point"):
                assert torch.equal(tensor, tensor.round())
                assert tensor.min() >= 0


@pytest.mark.parametrize("end_to_end", [False, True])
def test_ruinous_rates_keep_the_state_before_training(quantized, tmp_path, end_to_end):
    """With such rates, losses are NaN, which JSON cannot express."""
    alone = {"enabled": not end_to_end, "quant_lr": 1e3, "weight_lr": 0.0 if end_to_end else 1e3}
    together = {"enabled": end_to_end, "quant_lr": 1e3, "prefix_lr": 1e30, "norm_lr": 1e30}
    metrics, checkpoint = run_whole(quantized, tmp_path, blocks=alone, end_to_end=together)
    report = json.loads((checkpoint.folder / "report.json").read_text())
    histories = [report["end_to_end"]["history"]] if end_to_end else [b["history"] for b in report["blocks"]]
    losses = [row["validation"] for history in histories for row in history]
    assert None in losses or len(losses) == len(histories)  # not finite, or training failed in the first epoch
    assert all(history[0]["validation"] > 0 for history in histories)
    best = [report["end_to_end"]["best_epoch"]] if end_to_end else [b["best_epoch"] for b in report["blocks"]]
    assert all(math.isfinite(history[epoch]["validation"]) for history, epoch in zip(histories, best, strict=True))
    assert metrics["validation_ratio"] <= 1.0
    block = load_block(checkpoint, 0)
    assert all(torch.isfinite(tensor.float()).all() for tensor in block.state_dict().values())


@pytest.mark.parametrize("where", ["in a block", "between blocks", "in a write", "end to end"])
def test_killed_run_continues_and_ends_with_the_same_bytes(where, quantized, tmp_path, monkeypatch):
    end = {"end_to_end": {"enabled": True}}
    run_whole(quantized, tmp_path / "a", **end)
    with monkeypatch.context() as patch:
        kill_at(where, patch)
        with pytest.raises(KeyboardInterrupt):
            run_whole(quantized, tmp_path / "b", **end)
    run_whole(quantized, tmp_path / "b", **end)
    assert read_bytes(tmp_path / "b" / "out") == read_bytes(tmp_path / "a" / "out")


def kill_at(where, patch):
    calls = []

    def dying(function, at, before=True):
        def wrapped(*args, **kwargs):
            calls.append(1)
            if len(calls) == at and before:
                raise KeyboardInterrupt
            result = function(*args, **kwargs)
            if len(calls) == at:
                raise KeyboardInterrupt
            return result

        return wrapped

    if where == "in a block":
        patch.setattr(BlockTrainer, "losses", dying(BlockTrainer.losses, 25))
    elif where == "between blocks":  # the block is written, the hidden states after it are not
        patch.setattr(block_wise, "save_generation", dying(block_wise.save_generation, 2))
    elif where == "in a write":
        patch.setattr(artifacts, "save_file", dying(artifacts.save_file, 4, before=False))
    else:
        patch.setattr(EndToEndTrainer, "losses", dying(EndToEndTrainer.losses, 6))
