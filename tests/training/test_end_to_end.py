"""End-to-end fine-tuning: the divergence falls, groups can be frozen, integers do not change."""

import json

import pytest
import torch

from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.blocks.walk import BlockRunner
from pipeline.evaluation.perplexity import compute_final_hidden
from pipeline.models.checkpoint import BLOCK, Checkpoint
from pipeline.runtime.artifacts import load_tensors
from pipeline.training.divergence import mean_divergence
from pipeline.training.end_to_end import EndToEndTrainer
from pipeline.training.params import EndToEndParams
from pipeline.training.reference import run_original
from pipeline.training.state import TrainingError
from tests.conftest import make_model
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


def test_end_to_end_windows_do_not_touch_the_first_phase(quantized, tmp_path):
    """They may differ from the train windows in number and length."""
    together = torch.randint(0, 320, (6, 9), generator=torch.Generator().manual_seed(3))
    end = {"end_to_end": ALL_MOVE}
    results = []
    for name, windows in (("a", None), ("b", together)):
        metrics, checkpoint = run_whole(quantized, tmp_path / name, together=windows, **end)
        report = json.loads((checkpoint.folder / "report.json").read_text())
        results.append(
            (report["blocks"], metrics["end_to_end"]["kl_before"], report["end_to_end"]["history"][1]["train"])
        )
    (blocks, before, train), (other_blocks, other_before, other_train) = results
    assert (other_blocks, other_before) == (blocks, before)
    assert other_train != train


def test_training_lowers_the_divergence_of_the_written_checkpoint(quantized, tmp_path):
    models, train, _validation = quantized
    same = models, train, train  # so few tokens of a random model say nothing about others
    end = {"enabled": True, "epochs": 4, "quant_lr": 0.003, "norm_lr": 0.003, "prefix_lr": 0.003, "early_stop": 9}
    metrics, checkpoint = run_whole(same, tmp_path, blocks=MEASURED, end_to_end=end)
    assert metrics["end_to_end"]["kl_after"] < metrics["end_to_end"]["kl_before"]
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    kv = load_prefix_kv(checkpoint.folder, "finetuning")
    assert not torch.equal(kv, load_prefix_kv(models.initial.folder, "quantizer_init"))

    def divergence(checkpoint, kv):
        """Compute it from transformers' own logits of the original."""
        hidden = compute_final_hidden(checkpoint, {"x": train}, runner, kv).hidden
        with torch.no_grad():
            quantized_logs = checkpoint.load_lm_head().logits(hidden["x"]).log_softmax(-1)
            reference = make_model("llama_tied")(train).logits.log_softmax(-1)
        return (reference.exp() * (reference - quantized_logs)).sum(-1).mean().item()

    assert divergence(checkpoint, kv) == pytest.approx(metrics["end_to_end"]["kl_after"], rel=1e-3)
    before = divergence(models.initial, load_prefix_kv(models.initial.folder, "quantizer_init"))
    assert before == pytest.approx(metrics["end_to_end"]["kl_before"], rel=1e-3)
    for index in range(3):  # integers do not change
        for name, tensor in checkpoint.load_block_tensors(index).items():
            if tensor.dtype == torch.int8:
                assert torch.equal(tensor, models.initial.load_block_tensors(index)[name])


def test_autocast_narrows_products_and_keeps_parameters_in_float32(quantized, tmp_path):
    """`auto` is none on a CPU, and bfloat16 is nearly as good."""
    models, train, _validation = quantized
    same = models, train, train  # whether other windows gain from so few tokens depends on the CPU's rounding
    metrics = {}
    for kind in ("auto", "none", "bfloat16"):
        metrics[kind], _ = run_whole(same, tmp_path / kind, autocast=kind, blocks={"epochs": 1}, end_to_end=ALL_MOVE)
    paths = {kind: read_bytes(tmp_path / kind / "out") for kind in metrics}
    assert paths["auto"] == paths["none"] != paths["bfloat16"]
    full, narrow = (metrics[kind]["end_to_end"] for kind in ("none", "bfloat16"))
    assert narrow["kl_after"] < narrow["kl_before"]
    assert narrow["kl_after"] == pytest.approx(full["kl_after"], rel=0.1)
    for name, tensor in Checkpoint(tmp_path / "bfloat16/out", "finetuning").load_block_tensors(0).items():
        assert tensor.dtype in (torch.float32, torch.int8), name


@pytest.mark.parametrize("rate", ["quant_lr", "norm_lr", "prefix_lr"])
def test_only_the_group_with_a_rate_above_zero_moves(rate, quantized, tmp_path):
    models, _, _ = quantized
    run_blocks(quantized, tmp_path, blocks=MEASURED)
    values = settings().end_to_end.model_dump() | {"quant_lr": 0.0, "norm_lr": 0.0, "prefix_lr": 0.0, rate: 0.01}
    trainer, data = make_end_to_end_trainer(quantized, tmp_path, EndToEndParams.model_validate(values))
    trainer.step(data, torch.arange(4), 0, 1)
    (tmp_path / "out").mkdir()
    initial_kv = load_prefix_kv(models.initial.folder, "quantizer_init")
    moved_kv = not torch.equal(trainer.write_(tmp_path / "out"), initial_kv)
    moved = set()
    for index in range(3):
        before, _ = load_tensors(tmp_path / BLOCK.format(index=index), "finetuning")
        after, _ = load_tensors(tmp_path / "out" / BLOCK.format(index=index), "finetuning")
        moved |= {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    expected = {"quant_lr": {"scale", "weight_scale"}, "norm_lr": {"weight"}, "prefix_lr": set()}
    assert moved == expected[rate]
    assert moved_kv == (rate == "prefix_lr")


WEIGHTS = ("straight_through", "soft_rounding")


def read_integers(checkpoint):
    blocks = map(checkpoint.load_block_tensors, range(checkpoint.block_count))
    return torch.cat([t.flatten() for block in blocks for t in block.values() if t.dtype == torch.int8])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_are_trained_from_the_values_before_rounding(weights, quantized, tmp_path):
    """Training starts as with fixed weights and reaches a lower loss, and the artifact has that loss."""
    models, train, _ = quantized
    same = models, train, train
    rates = {"quant_lr": 0.003, "norm_lr": 0.003, "prefix_lr": 0.003, "early_stop": 9}
    end = {"enabled": True, "epochs": 6, **rates}
    fixed, _ = run_whole(same, tmp_path / "fixed", blocks=MEASURED, end_to_end=end)
    learned = end | {"weights": weights, "weight_lr": 0.02}
    metrics, checkpoint = run_whole(same, tmp_path / weights, blocks=MEASURED, end_to_end=learned)
    before, after = (metrics["end_to_end"][name] for name in ("kl_before", "kl_after"))
    assert before == fixed["end_to_end"]["kl_before"]
    assert after < fixed["end_to_end"]["kl_after"]
    integers, initial = read_integers(checkpoint), read_integers(models.initial)
    changed = (integers != initial).float().mean().item()
    assert 0 < changed < 0.5
    assert metrics["changed_integers"] == round(changed, 5)
    assert fixed["changed_integers"] == 0
    assert -8 <= integers.min() < integers.max() <= 7
    runner = BlockRunner(models.rotated, torch.device("cpu"), 2)
    prefix_kv = load_prefix_kv(checkpoint.folder, "finetuning")
    hidden = compute_final_hidden(checkpoint, {"x": train}, runner, prefix_kv).hidden
    reference = run_original(models.original, train, runner)
    heads = checkpoint.load_lm_head(), models.original.load_lm_head()
    written = torch.stack([mean_divergence(*pair, *heads) for pair in zip(hidden["x"], reference, strict=True)]).mean()
    assert written.item() == pytest.approx(after, abs=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_rate_of_zero_leaves_all_integers_as_they_are(weights, quantized, tmp_path):
    models, _, _ = quantized
    end = ALL_MOVE | {"epochs": 1, "weights": weights, "weight_lr": 0.0}
    _, checkpoint = run_whole(quantized, tmp_path, blocks=MEASURED, end_to_end=end)
    assert torch.equal(read_integers(checkpoint), read_integers(models.initial))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_killed_run_that_trains_weights_ends_with_the_same_bytes(weights, quantized, tmp_path, monkeypatch):
    models, train, _ = quantized
    windows = torch.cat([train] * 5)  # ten steps an epoch, of which the eighth is saved
    end = {"end_to_end": ALL_MOVE | {"epochs": 1, "weights": weights, "validate_every": 9}, "blocks": MEASURED}
    run_whole((models, train, train), tmp_path / "a", together=windows, **end)
    step, calls = EndToEndTrainer.step, []

    def fail_in_the_ninth(trainer, *arguments):
        calls.append(arguments[2])
        if len(calls) == 9:
            raise KeyboardInterrupt
        return step(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(EndToEndTrainer, "step", fail_in_the_ninth)
        with pytest.raises(KeyboardInterrupt):
            run_whole((models, train, train), tmp_path / "b", together=windows, **end)
        run_whole((models, train, train), tmp_path / "b", together=windows, **end)
    assert calls == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9]
    assert read_bytes(tmp_path / "b/out") == read_bytes(tmp_path / "a/out")


def test_weights_that_cannot_be_trained_are_refused(quantized, tmp_path, monkeypatch):
    run_blocks(quantized, tmp_path, blocks=MEASURED)
    params = EndToEndParams(weights="straight_through")
    with pytest.raises(TrainingError, match=r"weights=straight_through: .* do not fit into runtime.max_memory"):
        make_end_to_end_trainer(quantized, tmp_path, params, keeping=KEEPINGS["streamed"])
    monkeypatch.setattr("pipeline.training.end_to_end.UNROUNDED", "missing-{index}.safetensors")
    with pytest.raises(
        TrainingError, match=r"lacks the weights before rounding. Set quantizer_init.keep_unrounded: true"
    ):
        make_end_to_end_trainer(quantized, tmp_path, params)
