"""Fine-tuning: blocks get better and never worse, what is trained is what is frozen, killed runs continue."""

import functools
import json
import math

import pytest
import torch
import yaml

from pipeline.blocks.prefix_kv import compute_prefix_kv, load_prefix_kv
from pipeline.blocks.quantized import block_settings, fill_block, find_site_quantizers, load_block
from pipeline.blocks.walk import BlockRunner
from pipeline.evaluation.perplexity import compute_final_hidden
from pipeline.inspection.saturation import PROBED_WINDOWS
from pipeline.models.checkpoint import BLOCK, Checkpoint
from pipeline.models.sites import Site
from pipeline.numerics.quantizer import dequantize_weight, quantize_weight
from pipeline.quantization.equalization import Equalizer, select_block
from pipeline.quantization.params import QuantizerInitParams
from pipeline.quantization.quantizer_init import init_quantizers
from pipeline.rotation.matrices import compute_rotated_prefix_kv, load_rotation
from pipeline.runtime.artifacts import load_tensors, make_header
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.streams import Offload
from pipeline.runtime.unfinished import load_generation
from pipeline.training import block_wise as finetuning
from pipeline.training import trainer as trainer_module
from pipeline.training.block_wise import BlockData, BlockTrainer, Models, finetune_blocks
from pipeline.training.end_to_end import EndToEndTrainer, ModelData, run_original
from pipeline.training.finetuning import FinetuningWindows, finetune, summarise_blocks
from pipeline.training.params import EndToEndParams, FinetuningParams
from pipeline.training.place import HIDDEN_STATES, Keeping, Place
from pipeline.training.state import TrainingError
from pipeline.training.streamed import _RunStreamed
from pipeline.training.trainables import unfreeze_
from pipeline.training.trainer import Trainer
from tests.conftest import ROOT, open_model
from tests.rotation.test_merging import rotate

HEADER = make_header("finetuning", {"test": 1})
MEASURED = {"enabled": False}  # blocks that are measured and not trained
PREFIX = torch.tensor([7, 0])


def settings(blocks=None, end_to_end=None, **changes):
    """Return the params of three epochs for each block, with changes in either phase or in what both share."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["finetuning"] | changes
    values["blocks"] |= {"enabled": True, "epochs": 3, "batch_size": 2, "early_stop": 9}
    values["blocks"] |= {"quant_lr": 0.005, "weight_lr": 0.001} | (blocks or {})
    values["end_to_end"] |= {"enabled": False, "epochs": 2, "batch_size": 2, "early_stop": 9} | (end_to_end or {})
    return FinetuningParams.model_validate(values)


@pytest.fixture(scope="module")
def quantized(imported, tmp_path_factory):
    """A tiny model, rotated, and quantized with a prefix of two tokens; windows to train on and to validate on."""
    root = tmp_path_factory.mktemp("finetuning")
    rotated, runner, _ = rotate(imported["llama_tied"], root / "rotated", r1="online", online_signs=True)
    ids = torch.randint(0, 320, (6, 16), generator=torch.Generator().manual_seed(1))
    init = yaml.safe_load((ROOT / "params.yaml").read_text())["quantizer_init"]
    init = QuantizerInitParams.model_validate(init | {"mse_samples": 2})
    original, _ = open_model(imported["llama_tied"])
    init_quantizers(
        rotated,
        root / "quantized",
        params=init,
        prefix_token_ids=PREFIX,
        prefix_embeddings=original.embed(PREFIX),
        token_ids=ids[:4],
        runner=runner,
        work_folder=root / "work",
        header=make_header("quantizer_init", {"test": 1}),
    )
    return Models(original, rotated, Checkpoint(root / "quantized", "quantizer_init")), ids[:4], ids[4:]


def run(quantized, work, ranks=None, offload=None, **changes):
    models, train, validation = quantized
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    with Offload(offload) as streams:
        place = Place(runner, streams, work, HEADER, ranks or Ranks())
        return finetune_blocks(models, train, validation, settings(**changes), place)


def run_whole(quantized, folder, keeping=HIDDEN_STATES, offload=None, together=None, **changes):
    """`together`: windows to train all blocks on; None: those that each is trained on."""
    models, train, validation = quantized
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    with Offload(offload) as streams:
        place = Place(runner, streams, folder / "work", HEADER, keeping=keeping)
        windows = FinetuningWindows(train, train if together is None else together, validation)
        metrics = finetune(models, windows, settings(**changes), place, folder / "out")
    return metrics, Checkpoint(folder / "out", "finetuning")


def trainer_of(quantized, blocks=None, index=1):
    """A block, its trainer, and its data: what `finetune_blocks` would train, with random inputs."""
    models, _, _ = quantized
    params = settings(blocks)
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    prefix_kv = load_prefix_kv(models.initial.folder, "quantizer_init")[index]
    reference = load_block(models.rotated, index)
    with torch.no_grad():
        original_kv = compute_rotated_prefix_kv(models.rotated, models.original.embed(PREFIX), runner)
        inputs = models.rotated.embed(torch.randint(0, 320, (4, 16), generator=torch.Generator().manual_seed(4)))
        for before in range(index):
            runner.advance_(load_block(models.rotated, before), inputs, original_kv[before])
        target = runner.run(reference, inputs, original_kv[index])
    block = load_block(models.initial, index)
    for quantizer in find_site_quantizers(block, models.initial.architecture).values():
        quantizer.scale *= 1.3  # something to mend
    weights = {n: block.get_submodule(n).dense_weight(torch.float32) for n in models.initial.architecture.linears}
    trainables = unfreeze_(block, models.initial.architecture, weights=weights)
    trainer = BlockTrainer(block, trainables, prefix_kv, runner, params, Ranks())
    return trainer, trainables, BlockData(inputs, [target], 4)


# --- What a block is trained on --------------------------------------------------------------------------------------


def test_every_block_gets_better(quantized, tmp_path):
    models, train, _ = quantized
    same = models, train, train  # so few tokens of a random model say nothing about others
    blocks = run(same, tmp_path, start="full_precision", blocks={"epochs": 8, "weight_lr": 0.003})
    assert [block["block"] for block in blocks] == [0, 1, 2]
    for block in blocks:
        losses = [row["validation"] for row in block["history"]]
        assert block["validation_before"] == losses[0]
        assert block["validation_after"] == min(losses) < losses[0]
        assert block["best_epoch"] == losses.index(min(losses))
    assert summarise_blocks(blocks)["validation_ratio"] < 0.99


@pytest.mark.parametrize("target", ["fp_input", "quant_input", "both"])
@torch.no_grad()
def test_targets_are_the_full_precision_blocks_outputs(target, quantized, tmp_path):
    """Losses at epoch 0 of the second block, from transformers' layers and nothing of the stage."""
    models, _train, validation = quantized
    found = run(quantized, tmp_path, blocks=MEASURED | {"target": target})
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    kv = load_prefix_kv(models.initial.folder, "quantizer_init")
    reference, ours = models.rotated.embed(validation), models.initial.embed(validation)
    original_kv = compute_rotated_prefix_kv(models.rotated, models.original.embed(PREFIX), runner)
    assert not torch.allclose(kv, original_kv, rtol=0.01)  # scaled as the quantized blocks' own keys and values are
    for index in range(2):
        teacher, student = load_block(models.rotated, index), load_block(models.initial, index)
        targets = {
            "fp_input": runner.run(teacher, reference, original_kv[index]),
            "quant_input": runner.run(teacher, ours, original_kv[index]),
        }
        output = runner.run(student, ours, kv[index])
        names = ["fp_input", "quant_input"] if target == "both" else [target]
        expected = sum((output - targets[name]).square().mean().item() for name in names) / len(names)
        assert found[index]["validation_before"] == pytest.approx(expected, rel=1e-5)
        reference, ours = targets["fp_input"], output


def test_full_precision_start_takes_the_rotated_equalized_weights(quantized, tmp_path):
    models, _, _ = quantized
    quantized_block = load_block(models.initial, 1)
    weights = finetuning.use_full_precision_(quantized_block, models.rotated, models.initial, 1)
    shift = quantized_block.input_layernorm.quantizer.shift  # the mean input has no error left
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
    for name, weight in weights.items():  # the quantized ones are these, rounded
        rounded = quantized_block.get_submodule(name).dense_weight(torch.float32)
        assert ((rounded - weight).norm() / weight.norm()).item() < 0.2
    started = run(quantized, tmp_path / "a", start="full_precision", blocks=MEASURED)
    assert all(block["changed_integers"] > 0 for block in started)  # to nearest is not what GPTQ chose
    assert all(block["changed_integers"] == 0 for block in run(quantized, tmp_path / "b", blocks=MEASURED))


# --- The loop --------------------------------------------------------------------------------------------------------


def test_rates_of_zero_freeze_their_group(quantized):
    for frozen, moving in (("weight_lr", "quantizers"), ("quant_lr", "weights")):
        trainer, trainables, data = trainer_of(quantized, {frozen: 0.0})
        before = {kind: [p.detach().clone() for p in getattr(trainables, kind)] for kind in ("quantizers", "weights")}
        trainer.train_(data, data, 0)
        for kind, values in before.items():
            after = getattr(trainables, kind)
            moved = any(not torch.equal(a, b) for a, b in zip(after, values, strict=True))
            assert moved == (kind == moving), (frozen, kind)


def test_nothing_to_train_leaves_the_start(quantized, tmp_path):
    blocks = run(quantized, tmp_path, blocks={"quant_lr": 0.0, "weight_lr": 0.0})
    assert [block["best_epoch"] for block in blocks] == [0, 0, 0]
    models = quantized[0]
    for index in range(3):
        tensors, _ = load_tensors(tmp_path / BLOCK.format(index=index), "finetuning")
        for name, tensor in models.initial.load_block_tensors(index).items():
            assert torch.equal(tensors[f"model.layers.{index}.{name}"], tensor), name


def test_gradients_are_clipped_to_the_length_asked_for(quantized, monkeypatch):
    trainer, _, data = trainer_of(quantized, {"clip_grad": 1e-3})
    lengths = []
    monkeypatch.setattr(
        trainer.optimizer,
        "step",
        lambda: lengths.append(math.sqrt(sum(p.grad.square().sum().item() for p in trainer.parameters))),
    )
    trainer.differentiate(data, torch.arange(4))
    assert math.sqrt(sum(p.grad.square().sum().item() for p in trainer.parameters)) > 1e-2
    trainer.step(data, torch.arange(4), 0, 1)
    assert lengths == [pytest.approx(1e-3, rel=1e-3)]


def test_learning_rates_follow_the_cosine_to_their_floor(quantized, monkeypatch):
    trainer, _, data = trainer_of(quantized, {"quant_lr": 0.01, "weight_lr": 0.002, "epochs": 2, "min_lr_factor": 10})
    seen = []
    monkeypatch.setattr(
        trainer.optimizer, "step", lambda: seen.append([group["lr"] for group in trainer.optimizer.param_groups])
    )
    trainer.train_(data, data, 0)
    shape = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert seen == [[pytest.approx(0.01 * s), pytest.approx(0.002 * s)] for s in shape]


def test_each_epoch_has_an_order_of_its_own_and_all_windows(quantized, monkeypatch):
    trainer, _, data = trainer_of(quantized, {"epochs": 3, "batch_size": 1})
    seen = []
    monkeypatch.setattr(trainer, "step", lambda data, windows, *position: seen.append(int(windows)))
    trainer.train_(data, data, 3)
    epochs = [seen[:4], seen[4:8], seen[8:]]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_best_epoch_is_restored_after_a_late_divergence(quantized, monkeypatch):
    good, _, data = trainer_of(quantized, {"epochs": 1, "quant_lr": 0.001, "weight_lr": 0.0})
    good.train_(data, data, 0)
    trainer, _, data = trainer_of(quantized, {"epochs": 4, "quant_lr": 0.001, "weight_lr": 0.0})
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
    for ours, theirs in zip(trainer.parameters, good.parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_training_stops_early_and_the_counter_starts_again(quantized, monkeypatch):
    trainer, _, data = trainer_of(quantized, {"epochs": 9, "early_stop": 2})
    measured = iter([5.0, 4.0, 4.5, 3.0, 3.5, 3.6, 1.0])
    monkeypatch.setattr(trainer, "evaluate", lambda data: {"validation": next(measured)})
    outcome = trainer.train_(data, data, 0)
    assert [row["validation"] for row in outcome.history] == [5.0, 4.0, 4.5, 3.0, 3.5, 3.6]
    assert outcome.best_epoch == 3


def test_a_nan_step_is_skipped_and_halves_the_rates(quantized, monkeypatch):
    trainer, _, data = trainer_of(quantized)
    before = [p.detach().clone() for p in trainer.parameters]
    losses = trainer.losses
    monkeypatch.setattr(trainer, "losses", lambda *args: losses(*args) * math.nan)
    assert trainer.step(data, torch.arange(2), 0, 1) is None
    assert all(torch.equal(p, b) for p, b in zip(trainer.parameters, before, strict=True))
    monkeypatch.undo()
    assert trainer.step(data, torch.arange(2), 0, 1) is not None
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.0025, 0.0005])


def test_three_failures_in_a_row_end_a_block_in_its_best_state_and_are_named(quantized, tmp_path, monkeypatch, caplog):
    losses, calls = BlockTrainer.losses, []

    def broken(self, data, rows):
        """Of the second block, from the second epoch on."""
        calls.append(id(self))
        block = list(dict.fromkeys(calls)).index(id(self))
        bad = block == 1 and torch.is_grad_enabled() and len(self.state.history) == 2
        return losses(self, data, rows) * (math.inf if bad else 1.0)

    kept = []  # so that no two trainers have the same id
    init = BlockTrainer.__init__
    monkeypatch.setattr(BlockTrainer, "__init__", lambda self, *args: (kept.append(self), init(self, *args))[1])
    monkeypatch.setattr(BlockTrainer, "losses", broken)
    blocks = run(quantized, tmp_path, blocks={"batch_size": 1})
    assert [block["failure"] is None for block in blocks] == [True, False, True]
    assert blocks[1]["best_epoch"] <= 1
    assert len(blocks[1]["history"]) == 2
    metrics = summarise_blocks(blocks)
    assert metrics["blocks_failed"] == [1]
    assert "block 1: 3 steps in a row" in caplog.text
    assert "training was given up in blocks 1" in caplog.text


@pytest.mark.parametrize("end_to_end", [False, True])
def test_rates_that_ruin_everything_keep_the_state_before_training(quantized, tmp_path, end_to_end):
    """Losses are NaN then, which JSON cannot say."""
    alone = {"enabled": not end_to_end, "quant_lr": 1e3, "weight_lr": 0.0 if end_to_end else 1e3}
    together = {"enabled": end_to_end, "quant_lr": 1e3, "prefix_lr": 1e30, "norm_lr": 1e30}
    metrics, checkpoint = run_whole(quantized, tmp_path, blocks=alone, end_to_end=together)
    report = json.loads((checkpoint.folder / "report.json").read_text())
    histories = [report["end_to_end"]["history"]] if end_to_end else [b["history"] for b in report["blocks"]]
    losses = [row["validation"] for history in histories for row in history]
    assert None in losses or len(losses) == len(histories)  # not finite, or given up in the first epoch
    assert all(history[0]["validation"] > 0 for history in histories)
    best = [report["end_to_end"]["best_epoch"]] if end_to_end else [b["best_epoch"] for b in report["blocks"]]
    assert all(math.isfinite(history[epoch]["validation"]) for history, epoch in zip(histories, best, strict=True))
    assert metrics["validation_ratio"] <= 1.0
    block = load_block(checkpoint, 0)
    assert all(torch.isfinite(tensor.float()).all() for tensor in block.state_dict().values())


def test_a_loss_that_is_not_finite_to_begin_with_is_said(quantized, monkeypatch):
    trainer, _, data = trainer_of(quantized)
    monkeypatch.setattr(trainer, "evaluate", lambda data: {"validation": math.nan})
    with pytest.raises(TrainingError, match="the loss before training is not finite; the quantized model"):
        trainer.train_(data, data, 0)


# --- What is written -------------------------------------------------------------------------------------------------


def test_the_checkpoint_computes_what_was_trained(quantized, tmp_path):
    """Validation losses in the report are those of the blocks as loaded from the artifact."""
    models, _, validation = quantized
    metrics, checkpoint = run_whole(quantized, tmp_path, blocks={"target": "fp_input"})
    assert metrics["blocks_failed"] == []
    report = (tmp_path / "out" / "report.json").read_text()
    blocks = yaml.safe_load(report)["blocks"]
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    kv = load_prefix_kv(checkpoint.folder, "finetuning")
    assert torch.equal(kv, load_prefix_kv(models.initial.folder, "quantizer_init"))
    reference, ours = models.rotated.embed(validation), checkpoint.embed(validation)
    reference_kv = compute_rotated_prefix_kv(models.rotated, models.original.embed(PREFIX), runner)
    for index in range(3):
        block = load_block(checkpoint, index)
        assert block.mlp.down_proj.weight.dtype == torch.int8
        runner.advance_(load_block(models.rotated, index), reference, reference_kv[index])
        runner.advance_(block, ours, kv[index])
        error = (ours - reference).square().mean().item()
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
    ids = torch.randint(0, 320, (6, 16), generator=torch.Generator().manual_seed(1))
    init = yaml.safe_load((ROOT / "params.yaml").read_text())["quantizer_init"]
    init = init | {group: init[group] | values for group, values in changes.items()} | {"mse_samples": 2}
    nothing = torch.zeros(0, dtype=torch.int64)
    init_quantizers(
        rotated,
        tmp_path / "q",
        params=QuantizerInitParams.model_validate(init),
        prefix_token_ids=nothing,
        prefix_embeddings=original.embed(nothing),
        token_ids=ids[:4],
        runner=runner,
        work_folder=tmp_path / "w",
        header=make_header("quantizer_init", {"test": 2}),
    )
    models = Models(original, rotated, Checkpoint(tmp_path / "q", "quantizer_init"))
    metrics, checkpoint = run_whole((models, ids[:4], ids[4:]), tmp_path, end_to_end={"enabled": True})
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


# --- Resume, offload -------------------------------------------------------------------------------------------------


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("where", ["in a block", "between blocks", "in a write", "end to end"])
def test_a_killed_run_continues_and_ends_with_the_same_bytes(where, quantized, tmp_path, monkeypatch):
    end = {"end_to_end": {"enabled": True}}
    run_whole(quantized, tmp_path / "a", **end)
    with monkeypatch.context() as patch:
        kill_at(where, patch)
        with pytest.raises(KeyboardInterrupt):
            run_whole(quantized, tmp_path / "b", **end)
    run_whole(quantized, tmp_path / "b", **end)
    assert bytes_of(tmp_path / "b" / "out") == bytes_of(tmp_path / "a" / "out")


@pytest.mark.parametrize("failing", [[1], [1, 2, 3]])
def test_a_killed_epoch_continues_behind_the_step_that_was_kept_last(failing, quantized, tmp_path, monkeypatch):
    """Steps that fail, the rates halved for them, and that three in a row are too many, are known on both sides."""
    monkeypatch.setattr(trainer_module, "_KEEP_EVERY", 2)
    end = {"blocks": MEASURED, "end_to_end": ALL_MOVE | {"batch_size": 1}}
    differentiate, seen, order = EndToEndTrainer.differentiate, [], []

    def watched(self, data, windows, at=None):
        seen.append(windows.tolist())
        if len(seen) == at:
            raise KeyboardInterrupt
        loss = differentiate(self, data, windows)
        return math.nan if windows.tolist() in [order[step] for step in failing if order] else loss

    def run_watched(name, at=None):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(EndToEndTrainer, "differentiate", functools.partialmethod(watched, at=at))
            return run_whole(quantized, tmp_path / name, **end)[0]

    run_watched("order")
    order += seen
    whole_metrics = run_watched("a")
    whole = seen[:]
    assert len(whole) == (8 if failing == [1] else 4)
    with pytest.raises(KeyboardInterrupt):
        run_watched("b", at=4)
    assert run_watched("b") == whole_metrics
    assert whole_metrics["end_to_end"]["failed"] == (len(failing) == 3)
    assert seen == whole[2:]  # killed in the fourth step; two were kept
    assert bytes_of(tmp_path / "b/out") == bytes_of(tmp_path / "a/out")


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
    elif where == "between blocks":  # the block is written, the streams behind it are not
        patch.setattr(finetuning, "save_generation", dying(finetuning.save_generation, 2))
    elif where == "in a write":
        from pipeline.runtime import artifacts

        patch.setattr(artifacts, "save_file", dying(artifacts.save_file, 4, before=False))
    else:
        patch.setattr(EndToEndTrainer, "losses", dying(EndToEndTrainer.losses, 6))


def test_an_unfinished_run_of_other_settings_is_not_continued(quantized, tmp_path, caplog):
    run(quantized, tmp_path)
    models, train, validation = quantized
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    other = make_header("finetuning", {"test": 2})
    finetune_blocks(models, train, validation, settings(MEASURED), Place(runner, Offload(None), tmp_path, other))
    assert "had other settings or inputs" in caplog.text


def test_without_epochs_only_the_windows_that_saturation_is_counted_on_are_run(quantized, tmp_path):
    models, train, validation = quantized
    more = models, torch.cat((train, train.flip(0))), validation
    blocks = run(more, tmp_path / "a", blocks=MEASURED)
    _, saved = load_generation(tmp_path / "a", HEADER, Ranks())
    assert saved["quantized.train"].shape[0] == PROBED_WINDOWS < len(more[1])
    alone = models, more[1][:PROBED_WINDOWS], validation
    assert run(alone, tmp_path / "b", blocks=MEASURED) == blocks
    seen = {site for block in blocks for site in block["saturation"]}
    assert seen == set(Site)


@pytest.mark.parametrize("target", ["fp_input", "both"])
def test_offloaded_streams_give_the_same_bytes_and_leave_nothing(target, quantized, tmp_path):
    run(quantized, tmp_path / "a", blocks={"target": target})
    run(quantized, tmp_path / "b", offload=tmp_path / "streams", blocks={"target": target})
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert list((tmp_path / "streams").iterdir()) == []


def test_offloaded_streams_are_removed_after_a_failure(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(BlockTrainer, "losses", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(quantized, tmp_path / "b", offload=tmp_path / "streams")
    assert list((tmp_path / "streams").iterdir()) == []


# --- End to end ------------------------------------------------------------------------------------------------------


KEEPINGS = {"graphs": Keeping(recompute=False), "hidden states": HIDDEN_STATES, "streamed": Keeping(stream=True)}
ALL_MOVE = {"enabled": True, "epochs": 2, "quant_lr": 0.01, "norm_lr": 0.01, "prefix_lr": 0.01}


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_kept_recomputed_and_streamed_blocks_give_the_same_bytes(autocast, quantized, tmp_path):
    models, train, _ = quantized
    same = models, train, train  # so that the best epoch is a trained one
    values = {"blocks": MEASURED, "end_to_end": ALL_MOVE, "autocast": autocast}
    for name, keeping in KEEPINGS.items():
        metrics, _ = run_whole(same, tmp_path / name, keeping, **values)
        assert metrics["end_to_end"]["best_epoch"] == 2
    run_whole(same, tmp_path / "files", KEEPINGS["streamed"], tmp_path / "offload", **values)
    assert list((tmp_path / "offload").iterdir()) == []
    expected = bytes_of(tmp_path / "graphs/out")
    for name in ("hidden states", "streamed", "files"):
        assert bytes_of(tmp_path / name / "out") == expected


def test_weights_of_one_streamed_block_are_in_memory_at_a_time(quantized, tmp_path, monkeypatch):
    """Every block is read once forwards and once backwards; the last and the first are still there at the turns."""
    run(quantized, tmp_path, blocks=MEASURED)
    models, train, _ = quantized
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    kv = load_prefix_kv(models.initial.folder, "quantizer_init")
    place = Place(runner, Offload(None), tmp_path, HEADER, keeping=KEEPINGS["streamed"])
    params = settings(end_to_end=ALL_MOVE).end_to_end
    trainer = EndToEndTrainer(models.initial, models.original, kv, params, "none", place)
    data = ModelData(models.initial.embed(train), run_original(models.original, train, runner), 4)
    blocks, read, present = trainer.blocks, [], []
    load, run_block = blocks._load, runner.run
    monkeypatch.setattr(blocks, "_load", lambda index: (read.append(index), load(index))[1])

    def watched(block, *args):
        there = [n for n, own in enumerate(blocks) if own.mlp.up_proj.weight.device.type != "meta"]
        present.append((list(blocks).index(block), there))
        return run_block(block, *args)

    monkeypatch.setattr(runner, "run", watched)
    for _ in range(2):
        trainer.differentiate(data, torch.arange(2))
    assert present == [(index, [index]) for index in (0, 1, 2, 2, 1, 0) * 2]
    assert read == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    with torch.no_grad():
        trainer.losses(data, slice(0, 2))
    assert read[9:] == [1, 2]


def test_a_run_killed_in_a_streamed_backward_pass_ends_with_the_same_bytes(quantized, tmp_path, monkeypatch):
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
    assert bytes_of(tmp_path / "b/out") == bytes_of(tmp_path / "a/out")


def test_all_blocks_are_trained_on_windows_of_their_own(quantized, tmp_path):
    """Of another number and length; blocks before that are not touched by them."""
    together = torch.randint(0, 320, (6, 9), generator=torch.Generator().manual_seed(3))
    end = {"end_to_end": ALL_MOVE}
    found = []
    for name, own in (("a", None), ("b", together)):
        metrics, checkpoint = run_whole(quantized, tmp_path / name, together=own, **end)
        report = json.loads((checkpoint.folder / "report.json").read_text())
        found.append(
            (report["blocks"], metrics["end_to_end"]["kl_before"], report["end_to_end"]["history"][1]["train"])
        )
    (blocks, before, train), (other_blocks, other_before, other_train) = found
    assert (other_blocks, other_before) == (blocks, before)
    assert other_train != train


def test_end_to_end_training_lowers_the_divergence_of_what_is_written(quantized, tmp_path):
    models, train, _validation = quantized
    same = models, train, train  # so few tokens of a random model say nothing about others
    end = {"enabled": True, "epochs": 4, "quant_lr": 0.003, "norm_lr": 0.003, "prefix_lr": 0.003, "early_stop": 9}
    metrics, checkpoint = run_whole(same, tmp_path, blocks=MEASURED, end_to_end=end)
    assert metrics["end_to_end"]["kl_after"] < metrics["end_to_end"]["kl_before"]
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    kv = load_prefix_kv(checkpoint.folder, "finetuning")
    assert not torch.equal(kv, load_prefix_kv(models.initial.folder, "quantizer_init"))

    def divergence(checkpoint, kv):
        """From transformers' own logits of the original."""
        from tests.conftest import make_model

        hidden, _, _ = compute_final_hidden(checkpoint, {"x": train}, runner, kv)
        with torch.no_grad():
            ours = checkpoint.load_lm_head().logits(hidden["x"]).log_softmax(-1)
            reference = make_model("llama_tied")(train).logits.log_softmax(-1)
        return (reference.exp() * (reference - ours)).sum(-1).mean().item()

    assert divergence(checkpoint, kv) == pytest.approx(metrics["end_to_end"]["kl_after"], rel=1e-3)
    before = divergence(models.initial, load_prefix_kv(models.initial.folder, "quantizer_init"))
    assert before == pytest.approx(metrics["end_to_end"]["kl_before"], rel=1e-3)
    for index in range(3):  # integers stand still
        for name, tensor in checkpoint.load_block_tensors(index).items():
            if tensor.dtype == torch.int8:
                assert torch.equal(tensor, models.initial.load_block_tensors(index)[name])


def test_products_are_computed_in_what_autocast_says(quantized, tmp_path):
    """`auto` is none on a CPU; bfloat16 is nearly as good, and what is trained stays in float32."""
    found = {}
    for kind in ("auto", "none", "bfloat16"):
        found[kind], _ = run_whole(quantized, tmp_path / kind, autocast=kind, blocks={"epochs": 1}, end_to_end=ALL_MOVE)
    paths = {kind: bytes_of(tmp_path / kind / "out") for kind in found}
    assert paths["auto"] == paths["none"] != paths["bfloat16"]
    full, narrow = (found[kind]["end_to_end"] for kind in ("none", "bfloat16"))
    assert narrow["kl_after"] < narrow["kl_before"]
    assert narrow["kl_after"] == pytest.approx(full["kl_after"], rel=0.1)
    for name, tensor in Checkpoint(tmp_path / "bfloat16/out", "finetuning").load_block_tensors(0).items():
        assert tensor.dtype in (torch.float32, torch.int8), name


@pytest.mark.parametrize("rate", ["quant_lr", "norm_lr", "prefix_lr"])
def test_end_to_end_groups_are_frozen_by_a_rate_of_zero(rate, quantized, tmp_path):
    models, train, _validation = quantized
    run(quantized, tmp_path, blocks=MEASURED)
    values = settings().end_to_end.model_dump() | {"quant_lr": 0.0, "norm_lr": 0.0, "prefix_lr": 0.0, rate: 0.01}
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    kv = load_prefix_kv(models.initial.folder, "quantizer_init")
    place = Place(runner, Offload(None), tmp_path, HEADER)
    params = EndToEndParams.model_validate(values)
    trainer = EndToEndTrainer(models.initial, models.original, kv, params, "none", place)
    data = ModelData(models.initial.embed(train), run_original(models.original, train, runner), 4)
    trainer.step(data, torch.arange(4), 0, 1)
    (tmp_path / "out").mkdir()
    moved_kv = not torch.equal(trainer.write_(tmp_path / "out"), kv)
    moved = set()
    for index in range(3):
        before, _ = load_tensors(tmp_path / BLOCK.format(index=index), "finetuning")
        after, _ = load_tensors(tmp_path / "out" / BLOCK.format(index=index), "finetuning")
        moved |= {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    expected = {"quant_lr": {"scale", "weight_scale"}, "norm_lr": {"weight"}, "prefix_lr": set()}
    assert moved == expected[rate]
    assert moved_kv == (rate == "prefix_lr")


def test_prefix_positions_are_in_no_loss(quantized):
    """The block's output has no row for them: they are keys and values only."""
    models, train, _ = quantized
    trainer, _, data = trainer_of(quantized)
    assert trainer.prefix_kv.shape[-2] == 2
    assert trainer.runner.run(trainer.block, data.inputs, trainer.prefix_kv).shape == data.inputs.shape
    assert compute_prefix_kv(models.rotated, models.rotated.embed(train[0, :2]), trainer.runner).shape[-2] == 2
