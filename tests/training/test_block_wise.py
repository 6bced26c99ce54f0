"""Block-wise fine-tuning: targets, starts, streams of hidden states, and blocks that get better and never worse."""

import math

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv, load_prefix_kv
from pipeline.blocks.quantized import block_settings, fill_block, load_block
from pipeline.blocks.walk import BlockRunner
from pipeline.inspection.saturation import PROBED_WINDOWS
from pipeline.models.checkpoint import BLOCK
from pipeline.models.sites import Site
from pipeline.numerics.quantizer import dequantize_weight, quantize_weight
from pipeline.quantization.equalization import Equalizer, select_block
from pipeline.rotation.matrices import compute_rotated_prefix_kv, load_rotation
from pipeline.runtime.artifacts import load_tensors, make_header
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.unfinished import load_generation
from pipeline.training.block_wise import BlockTrainer, finetune_blocks, use_full_precision_
from pipeline.training.finetuning import summarise_blocks
from tests.training.setup import (
    HEADER,
    MEASURED,
    PREFIX,
    make_block_trainer,
    make_place,
    read_bytes,
    run_blocks,
    settings,
)


def test_every_block_gets_better(quantized, tmp_path):
    models, train, _ = quantized
    same = models, train, train  # so few tokens of a random model say nothing about others
    blocks = run_blocks(same, tmp_path, start="full_precision", blocks={"epochs": 8, "weight_lr": 0.003})
    assert [block["block"] for block in blocks] == [0, 1, 2]
    for block in blocks:
        losses = [row["validation"] for row in block["history"]]
        assert block["validation_before"] == losses[0]
        assert block["validation_after"] == min(losses) < losses[0]
        assert block["best_epoch"] == losses.index(min(losses))
    assert summarise_blocks(blocks)["validation_ratio"] < 0.99


@pytest.mark.parametrize("target", ["fp_input", "quant_input", "both"])
@torch.no_grad()
def test_targets_are_outputs_of_the_reference_block(target, quantized, tmp_path):
    """Losses before training of two blocks, written out with transformers' own layers."""
    models, _train, validation = quantized
    report = run_blocks(quantized, tmp_path, blocks=MEASURED | {"target": target})
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    kv = load_prefix_kv(models.initial.folder, "quantizer_init")
    reference, hidden = models.rotated.embed(validation), models.initial.embed(validation)
    original_kv = compute_rotated_prefix_kv(models.rotated, models.original.embed(PREFIX), runner)
    assert not torch.allclose(kv, original_kv, rtol=0.01)  # the prefix is equalized like the quantized blocks
    for index in range(2):
        teacher, student = load_block(models.rotated, index), load_block(models.initial, index)
        targets = {
            "fp_input": runner.run(teacher, reference, original_kv[index]),
            "quant_input": runner.run(teacher, hidden, original_kv[index]),
        }
        output = runner.run(student, hidden, kv[index])
        names = ["fp_input", "quant_input"] if target == "both" else [target]
        expected = sum((output - targets[name]).square().mean().item() for name in names) / len(names)
        assert report[index]["validation_before"] == pytest.approx(expected, rel=1e-5)
        reference, hidden = targets["fp_input"], output


def test_full_precision_start_uses_the_rotated_equalized_weights(quantized, tmp_path):
    models, _, _ = quantized
    quantized_block = load_block(models.initial, 1)
    weights = use_full_precision_(quantized_block, models.rotated, models.initial, 1)
    shift = quantized_block.input_layernorm.quantizer.shift  # the mean input of q_proj, which causes no error
    linear = quantized_block.self_attn.q_proj
    rounded = dequantize_weight(
        quantize_weight(weights["self_attn.q_proj"], linear.weight_scale, 4), linear.weight_scale
    )
    assert torch.allclose(rounded @ shift + linear.bias, weights["self_attn.q_proj"] @ shift, atol=1e-6)
    assert not torch.allclose(rounded @ shift, weights["self_attn.q_proj"] @ shift, atol=1e-3)
    block = fill_block(models.rotated, 1, models.rotated.load_block_tensors(1), block_settings(models.rotated, 1))
    scales, _ = load_tensors(models.initial.folder / "equalization.safetensors", "quantizer_init")
    r2 = load_rotation(models.rotated.folder, "r2")
    Equalizer(block, models.rotated.architecture, block_settings(models.rotated, 1), r2).scale_(select_block(scales, 1))
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"):
        assert torch.equal(weights[name], block.get_submodule(name).weight), name
    assert torch.equal(weights["mlp.up_proj"], block.mlp.up_proj.weight)
    assert not torch.equal(weights["mlp.up_proj"], models.rotated.load_block_tensors(1)["mlp.up_proj.weight"])
    for name, weight in weights.items():  # the quantized weights are these, rounded
        rounded = quantized_block.get_submodule(name).dense_weight(torch.float32)
        assert ((rounded - weight).norm() / weight.norm()).item() < 0.2
    started = run_blocks(quantized, tmp_path / "a", start="full_precision", blocks=MEASURED)
    assert all(block["changed_integers"] > 0 for block in started)  # rounding to nearest differs from GPTQ
    assert all(block["changed_integers"] == 0 for block in run_blocks(quantized, tmp_path / "b", blocks=MEASURED))


def test_zero_rates_leave_every_block_unchanged(quantized, tmp_path):
    blocks = run_blocks(quantized, tmp_path, blocks={"quant_lr": 0.0, "weight_lr": 0.0})
    assert [block["best_epoch"] for block in blocks] == [0, 0, 0]
    models = quantized[0]
    for index in range(3):
        tensors, _ = load_tensors(tmp_path / BLOCK.format(index=index), "finetuning")
        for name, tensor in models.initial.load_block_tensors(index).items():
            assert torch.equal(tensors[f"model.layers.{index}.{name}"], tensor), name


def test_measured_blocks_run_only_the_windows_that_saturation_is_counted_on(quantized, tmp_path):
    models, train, validation = quantized
    more = models, torch.cat((train, train.flip(0))), validation
    blocks = run_blocks(more, tmp_path / "a", blocks=MEASURED)
    _, saved = load_generation(tmp_path / "a", HEADER, Ranks())
    assert saved["quantized.train"].shape[0] == PROBED_WINDOWS < len(more[1])
    alone = models, more[1][:PROBED_WINDOWS], validation
    assert run_blocks(alone, tmp_path / "b", blocks=MEASURED) == blocks
    assert {site for block in blocks for site in block["saturation"]} == set(Site)


def test_prefix_positions_are_in_no_loss(quantized):
    """They are keys and values in the cache, so the block's output has no rows for them."""
    models, train, _ = quantized
    trainer, _, data = make_block_trainer(quantized)
    assert trainer.prefix_kv.shape[-2] == 2
    assert trainer.runner.run(trainer.block, data.inputs, trainer.prefix_kv).shape == data.inputs.shape
    assert compute_prefix_kv(models.rotated, models.rotated.embed(train[0, :2]), trainer.runner).shape[-2] == 2


def test_three_failed_steps_end_a_block_in_its_best_state(quantized, tmp_path, monkeypatch, caplog):
    losses, trainers = BlockTrainer.losses, []

    def broken(self, data, rows):
        """Break the losses of the second block from its second epoch on."""
        if not any(trainer is self for trainer in trainers):
            trainers.append(self)
        block = len(trainers) - 1
        bad = block == 1 and torch.is_grad_enabled() and len(self.state.history) == 2
        return losses(self, data, rows) * (math.inf if bad else 1.0)

    monkeypatch.setattr(BlockTrainer, "losses", broken)
    blocks = run_blocks(quantized, tmp_path, blocks={"batch_size": 1})
    assert [block["failure"] is None for block in blocks] == [True, False, True]
    assert blocks[1]["best_epoch"] <= 1
    assert len(blocks[1]["history"]) == 2
    metrics = summarise_blocks(blocks)
    assert metrics["blocks_failed"] == [1]
    assert "block 1: 3 steps in a row without a finite loss and gradient, epoch 2" in caplog.text
    assert "training failed in blocks 1; they keep their best state" in caplog.text


def test_unfinished_run_of_other_settings_is_not_continued(quantized, tmp_path, caplog):
    run_blocks(quantized, tmp_path)
    models, train, validation = quantized
    place = make_place(models, tmp_path, header=make_header("finetuning", {"test": 2}))
    finetune_blocks(models, train, validation, settings(MEASURED), place)
    assert "had other settings or inputs" in caplog.text


@pytest.mark.parametrize("target", ["fp_input", "both"])
def test_offloaded_streams_give_the_same_bytes_and_leave_no_files(target, quantized, tmp_path):
    run_blocks(quantized, tmp_path / "a", blocks={"target": target})
    run_blocks(quantized, tmp_path / "b", offload=tmp_path / "streams", blocks={"target": target})
    assert read_bytes(tmp_path / "a") == read_bytes(tmp_path / "b")
    assert list((tmp_path / "streams").iterdir()) == []


def test_offloaded_streams_are_removed_after_a_failure(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(BlockTrainer, "losses", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_blocks(quantized, tmp_path / "b", offload=tmp_path / "streams")
    assert list((tmp_path / "streams").iterdir()) == []
