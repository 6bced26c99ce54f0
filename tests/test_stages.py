"""The stage scripts, run in one process or as a user runs them, on a tiny model and a local corpus."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.evaluation import harness
from pipeline.inference.loading import load
from pipeline.models.checkpoint import Checkpoint
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.quantization.equalization import scale_prefix, select_block
from pipeline.rotation.matrices import load_rotation
from pipeline.runtime.artifacts import load_tensors
from pipeline.runtime.unfinished import describe_code
from pipeline.text.start_token import find_added_token
from pipeline.text.windows import load_windows
from pipeline.training.streamed import TrainedBlocks
from stages.report import QUANTIZER_INIT, draw_budget
from tests.conftest import ROOT, WINDOW, read_json, write_params
from tests.evaluation.test_harness import local_task

BEFORE_QUANTIZER = (
    "model",
    "corpora prose",
    "generation",
    "calibration",
    "rotation",
    "prefix_search",
    "prefix_training",
)
ALL = (
    *BEFORE_QUANTIZER,
    "quantizer_init",
    "finetuning",
    "evaluation original",
    "evaluation original_prefix",
    "evaluation quantizer_init",
    "evaluation finetuning",
    "export",
    "evaluation export",
    "activation_plots original",
    "activation_plots rotated",
    "activation_plots prefixed",
    "activation_plots quantized",
    "report",
)


COMPUTED = tuple(stage for stage in ALL if stage.split()[0] not in ("activation_plots", "report"))
SHORT_LENGTHS = {"search": 8, "train": 16, "end_to_end": 16, "validation": 16, "evaluation": 48}
EVALUATED = ("original", "original_prefix", "quantizer_init", "finetuning", "export")


def run(*stages, monkeypatch):
    for stage in stages:
        name, *arguments = stage.split()
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_module(f"stages.{name}", run_name="__main__", alter_sys=False)


def fails(stage, monkeypatch):
    with pytest.raises(SystemExit) as error:
        run(stage, monkeypatch=monkeypatch)
    assert str(error.value).startswith("error: ")
    return str(error.value)


def change(project, dotted, value):
    params = yaml.safe_load((project / "params.yaml").read_text())
    *path, last = dotted.split(".")
    group = params
    for key in path:
        group = group[key]
    group[last] = value
    write_params(project, params)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_whole_pipeline_and_its_repetition(project, monkeypatch):
    change(project, "prefix_search.outlier_threshold", 1.5)
    run(*ALL, monkeypatch=monkeypatch)
    first = contents(project / "artifacts") | contents(project / "data")
    metrics = {name: read_json(project / f"metrics/evaluation/{name}.json") for name in ("original", "quantizer_init")}
    assert metrics["quantizer_init"]["quantizers_fired"] == 3 * 13
    assert metrics["quantizer_init"]["settings"]["prefix_tokens"] > 0
    assert metrics["quantizer_init"]["kl"]["prose"] > 0.001
    assert metrics["original"]["perplexity"]["prose"] > 1
    for path in (project / "metrics").rglob("*.json"):
        is_cost = path.relative_to(project / "metrics").parts[0] == "runtime"
        assert ({"seconds", "peak_rss_gib"} <= set(read_json(path))) == is_cost
    assert not (project / ".work/quantizer_init").exists()
    leftovers = [path for path in project.rglob(".*") if path.is_file() or path.suffix == ".partial"]
    assert leftovers == []

    run(*ALL, monkeypatch=monkeypatch)
    second = contents(project / "artifacts") | contents(project / "data")
    for found in (first, second):
        found.pop("report/report.html")  # it says what the run cost
    assert second == first
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in first)


def test_a_generated_corpus_is_sampled_once_and_feeds_calibration(project, monkeypatch):
    """With it, the project needs no text at all. Other settings sample it again, other corpora do not."""
    generation = {"tokens": 3000, "length": 64, "batch_size": 16}
    change(project, "corpora.mine", {"source": "generated", "generation": generation})
    for split in ("search", "train", "end_to_end", "validation", "evaluation"):
        change(project, f"calibration.{split}.corpora", ["mine"])
    run("model", "corpora mine", "generation", "calibration", monkeypatch=monkeypatch)
    metrics = read_json(project / "metrics/generation.json")["mine"]
    assert metrics["tokens"] >= 3000
    assert metrics["tokens_per_second"] > 0
    assert set(metrics["dropped"]) == {"short", "loop", "near_duplicate"}
    assert read_json(project / "metrics/calibration.json")["train_tokens"] > 0
    first = contents(project / "artifacts/generation")
    assert {"report.json", "mine/train.jsonl", "mine/artifact.json"} <= first.keys()
    change(project, "corpora.other", {"source": str(project / "prose.txt")})
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.inference.sampling.Sampler.sample_batch", None)  # calling it would fail
        run("generation", monkeypatch=monkeypatch)
    assert contents(project / "artifacts/generation") == first
    change(project, "corpora.mine.generation.seed", 1)
    run("generation", monkeypatch=monkeypatch)
    assert contents(project / "artifacts/generation")["mine/train.jsonl"] != first["mine/train.jsonl"]
    for split in ("search", "train", "end_to_end", "validation", "evaluation"):
        change(project, f"calibration.{split}.corpora", ["prose"])
    change(project, "corpora", {"prose": {"source": str(project / "prose.txt")}})
    run("generation", monkeypatch=monkeypatch)
    assert contents(project / "artifacts/generation").keys() == {"report.json"}


def test_metrics_count_conversations_and_skipped_rows(project, monkeypatch):
    chat = [{"role": "user", "content": "How old is the house on the hill, and who lived there?"}] * 4
    rows = [
        {"text": value} for value in (None, *[chat] * 30, " ", *["A plain text about a house and a hill. " * 9] * 30)
    ]
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(project, "corpora.prose.source", str(project / "rows.jsonl"))
    run("model", "corpora prose", monkeypatch=monkeypatch)
    counts = read_json(project / "metrics/corpora/prose.json")
    assert (counts["skipped_rows"], counts["conversations"]) == (2, 30)
    assert "holds conversations, but the tokenizer has no chat template" in fails("calibration", monkeypatch)
    (project / "artifacts/model/chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    run("calibration", monkeypatch=monkeypatch)
    assert read_json(project / "metrics/calibration.json")["chat_template"] == "the tokenizer's, for 30 conversations"


def test_export_before_the_evaluations_it_quotes_names_them(project, monkeypatch):
    run(*BEFORE_QUANTIZER, "quantizer_init", "finetuning", monkeypatch=monkeypatch)
    assert re.search(r"original\.json is missing\. Rerun .* evaluation@original", fails("export", monkeypatch))
    run("evaluation original", monkeypatch=monkeypatch)
    assert re.search(r"finetuning\.json is missing\. Rerun .* evaluation@finetuning", fails("export", monkeypatch))
    assert not [path for path in (project / "artifacts").iterdir() if "export" in path.name]


def test_blocks_that_are_not_trained_one_by_one_are_trained_together(project, monkeypatch):
    """Use the defaults, `blocks.enabled: false`. The bytes are the same wherever hidden states are kept."""
    defaults = yaml.safe_load((ROOT / "params.yaml").read_text())["finetuning"]
    assert not defaults["blocks"]["enabled"]
    change(project, "finetuning.blocks", defaults["blocks"])
    change(project, "calibration.end_to_end.windows", 6)
    run(*BEFORE_QUANTIZER, "quantizer_init", "finetuning", monkeypatch=monkeypatch)
    metrics = read_json(project / "metrics/finetuning.json")
    assert (metrics["blocks_unchanged"], metrics["changed_integers"], metrics["validation_ratio"]) == (3, 0, 1)
    assert metrics["end_to_end"]["kl_after"] <= metrics["end_to_end"]["kl_before"]
    first = contents(project / "artifacts/finetuning")
    change(project, "runtime.offload", "always")
    run("finetuning", monkeypatch=monkeypatch)
    assert contents(project / "artifacts/finetuning") == first


@pytest.mark.parametrize("use", ["none", "found"])
def test_sixteen_bits_everywhere_is_the_original(use, project, monkeypatch):
    """A rotated, equalized and prefixed model is still the same model."""
    change(project, "prefix_search.outlier_threshold", 1.5)
    for site in ("weights", "activations", "keys", "values"):
        change(project, f"quantizer_init.{site}.bits", 16)
    change(project, "quantizer_init.embedding_dtype", "float32")
    change(project, "finetuning.end_to_end.enabled", False)  # it would bring the prefixed model nearer to the original
    change(project, "prefix.use", use)
    run(*COMPUTED, monkeypatch=monkeypatch)
    assert read_json(project / "metrics/finetuning.json")["blocks_unchanged"] == 3
    assert (
        read_json(project / "metrics/evaluation/finetuning.json")["perplexity"]
        == (read_json(project / "metrics/evaluation/quantizer_init.json")["perplexity"])
    )
    variants = ("original_prefix", "quantizer_init")
    original, quantized = (read_json(project / f"metrics/evaluation/{v}.json") for v in variants)
    assert quantized["settings"]["prefix_tokens"] == (0 if use == "none" else original["settings"]["prefix_tokens"])
    assert (quantized["settings"]["prefix_tokens"] > 0) == (use == "found")
    assert quantized["perplexity"]["prose"] == pytest.approx(original["perplexity"]["prose"], rel=1e-4)
    assert quantized["kl"]["prose"] == pytest.approx(original["kl"]["prose"], abs=1e-5)
    assert quantized["quantizers_fired"] == 0


@pytest.mark.parametrize("use", ["none", "found", "trained", "discretised"])
def test_sixteen_bits_everywhere_is_the_original_reading_a_start_token(use, project, monkeypatch):
    """Without a prefix, all windows have it. With a prefix that ends in it, only the original's windows have it."""
    local_task(project, "colours")
    change(project, "evaluation.task_folder", str(project))
    change(project, "evaluation.tasks", {"colours": {"limit": 3}})
    change(project, "calibration.start_token", "always")
    change(project, "prefix_search.outlier_threshold", 1.5)
    for key, value in {"enabled": use in ("trained", "discretised"), "epochs": 1, "length": 2}.items():
        change(project, f"prefix_training.{key}", value)
    for site in ("weights", "activations", "keys", "values"):
        change(project, f"quantizer_init.{site}.bits", 16)
    change(project, "quantizer_init.embedding_dtype", "float32")
    change(project, "prefix.use", use)
    run(*COMPUTED, monkeypatch=monkeypatch)
    found = {name: read_json(project / f"metrics/evaluation/{name}.json") for name in EVALUATED}
    start, nothing = "start token (id 0) before each window", "none added"
    front = {name: metrics["settings"]["special_tokens"] for name, metrics in found.items()}
    own = start if use == "none" else nothing
    assert front == dict.fromkeys(EVALUATED, own) | {"original": start}
    assert all(metrics["settings"]["targets_per_window"] == 47 for metrics in found.values())
    expected = found["original" if use == "none" else "original_prefix"]
    assert found["quantizer_init"]["perplexity"]["prose"] == pytest.approx(expected["perplexity"]["prose"], rel=1e-4)
    assert found["quantizer_init"]["tasks"] == expected["tasks"]
    assert found["export"]["perplexity"] == found["finetuning"]["perplexity"]
    assert found["export"]["tasks"] == found["finetuning"]["tasks"]
    end_to_end = read_json(project / "metrics/finetuning.json")["end_to_end"]
    assert read_json(project / "metrics/finetuning.json")["blocks_unchanged"] == 3
    if use == "none":
        assert found["original_prefix"]["kl"]["prose"] == pytest.approx(0, abs=1e-6)
        assert found["quantizer_init"]["kl"]["prose"] == pytest.approx(0, abs=1e-5)
        assert end_to_end["kl_before"] == pytest.approx(0, abs=1e-5)
        assert found["original_prefix"]["tasks"] == found["original"]["tasks"]
    else:
        assert end_to_end["kl_before"] > 1e-4
    assert read_json(project / "metrics/calibration.json")["start_token"] == {"id": 0, "why": "always: BOS '<s>'"}


def test_a_prefix_that_is_the_start_token_alone_costs_nothing_at_sixteen_bits(project, monkeypatch):
    """The original reads it before each window, the quantized model once. All stages compute the same function."""
    change(project, "calibration.start_token", "always")
    change(project, "prefix_search.outlier_threshold", 1.5)
    change(project, "prefix.length", 1)
    for site in ("weights", "activations", "keys", "values"):
        change(project, f"quantizer_init.{site}.bits", 16)
    change(project, "quantizer_init.embedding_dtype", "float32")
    run(*COMPUTED, monkeypatch=monkeypatch)
    assert read_json(project / "metrics/finetuning.json")["end_to_end"]["kl_before"] == pytest.approx(0, abs=1e-5)
    for variant in EVALUATED[1:3]:
        metrics = read_json(project / f"metrics/evaluation/{variant}.json")
        assert metrics["settings"]["prefix_tokens"] == 1
        assert metrics["kl"]["prose"] == pytest.approx(0, abs=1e-5)
    config = read_json(project / "artifacts/export/config.json")["quantization_config"]
    assert config["prefix"] == {"tokens": 1, "token_ids": [0], "start_token_id": 0}


def test_auto_is_measured_and_said(project, monkeypatch, caplog):
    change(project, "calibration.start_token", "auto")
    with caplog.at_level("INFO"):
        run("model", "corpora prose", "calibration", monkeypatch=monkeypatch)
    decision = read_json(project / "metrics/calibration.json")["start_token"]
    assert decision.keys() == {"id", "why", "loss_without", "loss_with", "standard_error"}
    assert decision["why"].startswith("auto: loss with BOS '<s>' ")
    assert f"start token before every window: {decision['id']} ({decision['why']})" in caplog.text
    cut = load_windows(project / "artifacts/calibration/train.safetensors")
    assert cut.text_start_token_id == decision["id"]
    assert cut.token_ids.shape == (3, 32)


def test_auto_lengths_go_beyond_a_sliding_window_and_are_reported(project, model_folders, monkeypatch, caplog):
    change(project, "model.source", str(model_folders["gemma3_text"]))
    for split in ("search", "train", "end_to_end", "validation", "evaluation"):
        change(project, f"calibration.{split}.length", "auto")
    change(project, "calibration.validation.length", WINDOW)
    monkeypatch.setattr("pipeline.text.lengths.DEFAULT_LENGTHS", SHORT_LENGTHS)
    run("model", "corpora prose", "calibration", monkeypatch=monkeypatch)
    metrics = read_json(project / "metrics/calibration.json")
    lengths = {"search": 36, "train": 44, "end_to_end": 44, "validation": WINDOW, "evaluation": 56}
    assert (metrics["sliding_window"], metrics["lengths"]) == (WINDOW, lengths)
    for split in ("search", "train", "end_to_end", "validation"):
        cut = load_windows(project / f"artifacts/calibration/{split}.safetensors")
        # Three windows of 16 tokens, or two that are longer; one validation window.
        assert cut.token_ids.shape == (1 if split == "validation" else 2, lengths[split])
    assert (
        f"calibration.validation.length={WINDOW}: in layers with sliding_window={WINDOW}, these windows" in caplog.text
    )


def test_prefix_that_changes_the_unquantized_model_stops_the_stage(project, monkeypatch):
    change(project, "prefix_search.outlier_threshold", 2.0)
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    before = contents(project / "artifacts")
    harm = read_json(project / "metrics/prefix_training.json")["full_precision_kl"]["found"]
    assert harm > 0.1  # random models attend everywhere
    change(project, "prefix_training.max_kl", 0.1)
    message = fails("prefix_training", monkeypatch)
    assert message.startswith("error: prefix_training.max_kl=0.1: the found prefix changes the unquantized model by ")
    assert contents(project / "artifacts") == before
    change(project, "prefix_training.max_kl", 2 * harm)
    run("prefix_training", monkeypatch=monkeypatch)
    assert contents(project / "artifacts") == before  # the bound changes no artifact


@pytest.mark.parametrize("use", ["none", "found"])
def test_tasks_of_each_variant_begin_as_its_windows_do(use, project, monkeypatch):
    local_task(project, "colours")
    change(project, "evaluation.task_folder", str(project))
    change(project, "evaluation.tasks", {"colours": {}})
    change(project, "calibration.start_token", "always")
    change(project, "prefix_search.outlier_threshold", 1.5)
    change(project, "prefix.use", use)
    asked = []
    monkeypatch.setattr(
        harness, "run_tasks", lambda model, tokenizer, *_: asked.append(find_added_token(tokenizer)) or {}
    )
    run(*ALL[: ALL.index("activation_plots original")], monkeypatch=monkeypatch)
    assert asked == [0, *([0 if use == "none" else None] * 4)]


def test_the_prefix_is_chosen_by_the_cost_of_quantizers_after_it(project, monkeypatch):
    change(project, "prefix_search.choose", "benefit")
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    report = read_json(project / "artifacts/prefix_search/report.json")
    taken = [row for row in report["candidates"] if row["token_ids"] == report["prefix_token_ids"]]
    assert len(taken) == 1
    assert taken[0]["kl_above_best"] <= taken[0]["standard_error"]
    metrics = read_json(project / "metrics/prefix_search.json")
    assert metrics["simulated_kl"] == {"none": report["candidates"][0]["kl"], "chosen": taken[0]["kl"]}
    alone = contents(project / "artifacts/prefix_search")
    change(project, "runtime.processes", 2)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.prefix_search"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(project / "artifacts/prefix_search") == alone


def test_windows_of_another_start_token_are_not_compared(project, monkeypatch):
    run(*BEFORE_QUANTIZER, "evaluation original", monkeypatch=monkeypatch)
    change(project, "calibration.start_token", "always")
    run("calibration", monkeypatch=monkeypatch)
    assert "was made from another windows.prose than the one at hand" in fails(
        "evaluation original_prefix", monkeypatch
    )


def test_a_start_token_takes_a_position(project, monkeypatch):
    run("model", "corpora prose", monkeypatch=monkeypatch)
    change(project, "calibration.evaluation.length", 256)
    change(project, "calibration.evaluation.windows", 1)
    run("calibration", monkeypatch=monkeypatch)
    change(project, "calibration.start_token", "always")
    message = fails("calibration", monkeypatch)
    assert "evaluation.length=256 exceeds the 256 positions of this model" in message


def test_bfloat16_from_end_to_end_stays_near_float32(project, monkeypatch):
    change(project, "prefix_search.outlier_threshold", 1.5)
    perplexities = []
    for dtype in ("float32", "bfloat16"):
        change(project, "model.dtype", dtype)
        change(project, "rotation.dtype", dtype)
        run(*COMPUTED, monkeypatch=monkeypatch)
        metrics = read_json(project / "metrics/evaluation/original.json")
        perplexities.append(metrics["perplexity"]["prose"])
        assert read_json(project / "metrics/evaluation/quantizer_init.json")["quantizers_fired"] == 39
        assert read_json(project / "metrics/evaluation/export.json")["largest_difference_to_finetuning"] == 0
    assert load_prefix_kv(project / "artifacts/quantizer_init", "quantizer_init").dtype == torch.bfloat16
    assert perplexities[1] == pytest.approx(perplexities[0], rel=0.05)
    assert "dtype_logit_deviation" in read_json(project / "metrics/rotation.json")

    def load_with_rounded_means(*args, **options):
        model, tokenizer = load(*args, **options)
        for name, buffer in model.named_buffers():
            if name.endswith(".mean"):
                buffer.copy_(buffer.bfloat16())
        return model, tokenizer

    monkeypatch.setattr("pipeline.inference.loading.load", load_with_rounded_means)
    message = fails("evaluation export", monkeypatch)
    assert re.search(
        r"evaluation@export, bfloat16: .* window \d+ of prose differ .* at most 0\.03 is rounding", message
    )


def test_the_prefix_kv_in_use_belongs_to_the_rotated_model(project, monkeypatch):
    change(project, "prefix_search.outlier_threshold", 1.5)
    run(*BEFORE_QUANTIZER, "quantizer_init", monkeypatch=monkeypatch)
    found, _ = load_tensors(project / "artifacts/prefix_search/prefix.safetensors", "prefix_search")
    kv = load_prefix_kv(project / "artifacts/quantizer_init", "quantizer_init")
    assert kv.shape == (3, 2, 2, len(found["token_ids"]), 12)
    stored, _ = load_tensors(project / "artifacts/quantizer_init/equalization.safetensors", "quantizer_init")
    r2 = load_rotation(project / "artifacts/rotation", "r2")
    kv = scale_prefix(kv[0], select_block(stored, 0), r2, inverse=True).unsqueeze(0)
    # Block 0's values of the rotated model, by the model's own code: the norm folded, its output rotated.
    rotated = Checkpoint(project / "artifacts/rotation", "rotation")
    embedded = rotated.embed(found["token_ids"])
    normed = embedded / (embedded.square().mean(-1, keepdim=True) + rotated.config.rms_norm_eps).sqrt()
    values = hadamard_transform(normed) @ rotated.load_block_tensors(0)["self_attn.v_proj.weight"].T
    assert torch.allclose(kv[0, 1], values.view(-1, 2, 12).transpose(0, 1), atol=1e-5)


def test_all_blocks_are_trained_on_windows_of_their_own_or_on_trains(project, monkeypatch):
    change(project, "calibration.end_to_end", {"corpora": ["prose"], "windows": 4, "length": 24})
    run(*BEFORE_QUANTIZER, "quantizer_init", "finetuning", monkeypatch=monkeypatch)
    path = project / "artifacts/calibration/end_to_end.safetensors"
    assert load_windows(path).token_ids.shape == (4, 24)
    first = contents(project / "artifacts/finetuning")
    change(project, "calibration.end_to_end", None)
    run("calibration", "finetuning", monkeypatch=monkeypatch)
    assert path.read_bytes() == (project / "artifacts/calibration/train.safetensors").read_bytes()
    second = contents(project / "artifacts/finetuning")
    assert first["plots/blocks.json"] == second["plots/blocks.json"]
    assert first["plots/end_to_end.json"] != second["plots/end_to_end.json"]


def test_without_outliers_the_run_continues_with_an_empty_prefix(project, monkeypatch, caplog):
    change(project, "prefix_search.outlier_threshold", 1e6)
    run(*ALL, monkeypatch=monkeypatch)
    assert "the prefix is empty" in read_json(project / "artifacts/prefix_search/report.json")["why"]
    assert read_json(project / "metrics/quantizer_init.json")["prefix_tokens"] == 0
    original, prefixed = (read_json(project / f"metrics/evaluation/{v}.json") for v in ("original", "original_prefix"))
    assert original["perplexity"] == prefixed["perplexity"]


def test_searched_ranges_err_less_than_whole_ones(project, monkeypatch):
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    change(project, "quantizer_init.weights.rounding", "rtn")
    errors = {}
    for method in ("max", "layer"):
        for group in ("weights", "activations", "keys", "values"):
            change(project, f"quantizer_init.{group}.range", method)
        run("quantizer_init", monkeypatch=monkeypatch)
        report = read_json(project / "artifacts/quantizer_init/report.json")["blocks"]
        errors[method] = {site: values["relative_error"] for site, values in report[0]["sites"].items()}
        assert report[0]["sites"].keys() >= {"attention_input", "key", "value", "mlp_hidden", "down_proj"}
    assert all(errors["layer"][site] <= errors["max"][site] for site in errors["layer"])
    assert errors["layer"]["down_proj"] < errors["max"]["down_proj"]


def test_two_processes_give_the_result_of_one(project, monkeypatch):
    """Started as a user starts it, with torch's launcher; hidden states in files."""
    change(project, "prefix_search.outlier_threshold", 1.5)
    change(project, "quantizer_init.activations.range", "percentile")
    change(project, "quantizer_init.budget.kv_cache", 6.0)
    change(project, "calibration.validation.windows", 2)
    change(project, "prefix_training.enabled", True)
    change(project, "prefix_training.simulate", False)  # else a scale is of all windows of a batch
    quantized = ("quantizer_init", "finetuning", "evaluation original", "evaluation finetuning")
    run(*BEFORE_QUANTIZER, *quantized, monkeypatch=monkeypatch)
    shared = ("prefix_search", "prefix_training", *quantized)
    alone = {stage: read_json(project / f"metrics/{stage.replace(' ', '/')}.json") for stage in shared}
    prefix = contents(project / "artifacts/prefix_search")
    first, _ = load_tensors(project / "artifacts/quantizer_init/block-00000.safetensors", "quantizer_init")
    chosen = read_json(project / "artifacts/quantizer_init/report.json")["bits"]["kv_cache"]["overrides"]
    change(project, "runtime.processes", 2)
    change(project, "runtime.offload", "always")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for stage in shared:
        (project / f"metrics/{stage.replace(' ', '/')}.json").unlink()
        command = [sys.executable, "-m", *f"stages.{stage}".split()]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if stage == "quantizer_init":
            report = read_json(project / "artifacts/quantizer_init/report.json")
            assert report["bits"]["kv_cache"]["overrides"] == chosen
            second, _ = load_tensors(project / "artifacts/quantizer_init/block-00000.safetensors", "quantizer_init")
            for name, tensor in first.items():
                # A percentile is one of bfloat16's numbers; an integer on the edge of two may go either way.
                same = (second[name].float() - tensor.float()).abs() <= 1e-2 * tensor.float().abs().max()
                assert same.float().mean() > 0.99, name
    found = {stage: read_json(project / f"metrics/{stage.replace(' ', '/')}.json") for stage in shared}
    assert contents(project / "artifacts/prefix_search") == prefix
    loss = alone["prefix_training"]["validation_loss"]
    assert found["prefix_training"]["validation_loss"] == pytest.approx(loss, rel=1e-2)
    assert found["evaluation original"]["perplexity"] == alone["evaluation original"]["perplexity"]
    loss = alone["finetuning"]["end_to_end"]["kl_before"]
    assert found["finetuning"]["end_to_end"]["kl_before"] == pytest.approx(loss, rel=5e-2)
    # Training amplifies the order of sums: one process with two threads is as far from one with a single thread.
    perplexity = alone["evaluation finetuning"]["perplexity"]["prose"]
    assert found["evaluation finetuning"]["perplexity"]["prose"] == pytest.approx(perplexity, rel=0.1)
    assert list((project / ".work").glob("*/*")) == []


def test_a_streamed_run_is_the_resident_one(project, monkeypatch):
    """Compare prefix training and fine-tuning. Only max_memory differs. Two ranks differ by the order of sums."""
    change(project, "prefix_search.outlier_threshold", 1.5)
    change(project, "calibration.validation.windows", 2)
    change(project, "prefix_training.enabled", True)
    change(project, "prefix_training.simulate", False)  # else a scale is of all windows of a batch
    change(project, "prefix_training.epochs", 2)
    change(project, "prefix.use", "trained")
    run(*BEFORE_QUANTIZER, "quantizer_init", "finetuning", monkeypatch=monkeypatch)
    stages = ("prefix_training", "finetuning")
    resident = {stage: contents(project / f"artifacts/{stage}") for stage in stages}
    metrics = {stage: read_json(project / f"metrics/{stage}.json") for stage in stages}
    change(project, "runtime.max_memory", "1MiB")
    read = []
    bring = TrainedBlocks.bring
    monkeypatch.setattr(
        TrainedBlocks, "bring", lambda self, *args: (read.append(self.keeping.stream), bring(self, *args))[1]
    )
    for stage in stages:
        read.clear()
        run(stage, monkeypatch=monkeypatch)
        assert read
        assert all(read)
        assert contents(project / f"artifacts/{stage}") == resident[stage]
    change(project, "runtime.processes", 2)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for stage in stages:
        command = [sys.executable, "-m", f"stages.{stage}"]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    found = {stage: read_json(project / f"metrics/{stage}.json") for stage in stages}
    for when in ("before", "after"):
        one, two = (own["prefix_training"]["validation_loss"][when] for own in (metrics, found))
        assert two == pytest.approx(one, rel=1e-2)
        one, two = (own["finetuning"]["end_to_end"][f"kl_{when}"] for own in (metrics, found))
        assert two == pytest.approx(one, rel=5e-2)
    assert list((project / ".work").glob("*/*")) == []


# Read by every process at its start: the second rank ends in the step DIES_AT, without a word, as if killed.
DYING = """
import os
from pipeline.training import end_to_end, trainer

trainer._KEEP_EVERY = 2
steps, plain = [], end_to_end.EndToEndTrainer.differentiate

def differentiate(self, *args):
    steps.append(1)
    if os.environ.get("RANK") == "1" and len(steps) == int(os.environ["DIES_AT"]):
        os._exit(9)
    with open(f"steps-{os.environ.get('RANK')}", "a") as file:
        file.write("step ")
    return plain(self, *args)

end_to_end.EndToEndTrainer.differentiate = differentiate
"""


def test_two_ranks_of_which_one_is_killed_continue_at_a_step_that_both_kept(project, monkeypatch):
    change(project, "finetuning.blocks.enabled", False)
    change(project, "finetuning.end_to_end.epochs", 3)
    change(project, "finetuning.end_to_end.batch_size", 2)
    change(project, "calibration.validation.windows", 2)
    run(*BEFORE_QUANTIZER, "quantizer_init", monkeypatch=monkeypatch)
    change(project, "runtime.processes", 2)
    (project / "dying").mkdir()
    (project / "dying/sitecustomize.py").write_text(DYING)

    def train(dies_at):
        for file in project.glob("steps-*"):
            file.unlink()
        paths = {"PYTHONPATH": f"{project / 'dying'}:{ROOT}", "DIES_AT": str(dies_at)}
        command = [sys.executable, "-m", "stages.finetuning"]
        done = subprocess.run(command, cwd=project, env=os.environ | paths, capture_output=True, text=True)
        return done, [len((project / f"steps-{rank}").read_text().split()) for rank in range(2)]

    done, steps = train(0)
    assert done.returncode == 0, done.stderr
    (count,) = set(steps)
    assert count >= 5
    whole, metrics = contents(project / "artifacts/finetuning"), read_json(project / "metrics/finetuning.json")
    shutil.rmtree(project / "artifacts/finetuning")
    done, steps = train(count - 1)
    assert done.returncode != 0
    assert not (project / "artifacts/finetuning/artifact.json").exists()
    done, steps = train(0)
    assert done.returncode == 0, done.stderr
    assert len(set(steps)) == 1
    # From the end of the second epoch, or of the first where a rank was still writing the second's when it ended.
    assert steps[0] in (count // 3, 2 * count // 3)
    assert contents(project / "artifacts/finetuning") == whole
    again = read_json(project / "metrics/finetuning.json")
    assert again["end_to_end"] == metrics["end_to_end"]
    assert list((project / ".work").glob("*/*")) == []


def test_a_plan_is_printed_and_nothing_is_run(project, monkeypatch, capsys):
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    change(project, "runtime.offload", "always")
    run("finetuning --plan", monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    assert text.startswith("memory ")
    assert "in files; activations are computed again)" in text
    before = contents(project / "artifacts")
    for stage in ("rotation", "prefix_search", "prefix_training", "quantizer_init", "activation_plots rotated"):
        run(f"{stage} --plan", monkeypatch=monkeypatch)
        gib = float(re.match(r"memory (\d+\.\d+) GiB, GPU 0\.00 GiB, disk", capsys.readouterr().out)[1])
        assert 0.2 < gib < 4  # a tiny model: hardly more than this process has
    run("evaluation original --plan", monkeypatch=monkeypatch)
    assert capsys.readouterr().out.startswith("memory ")
    assert contents(project / "artifacts") == before
    assert not (project / "artifacts/finetuning").exists()
    change(project, "runtime.offload", "auto")
    change(project, "runtime.max_memory", "1MiB")
    change(project, "prefix_training.enabled", True)
    for stage in ("finetuning", "prefix_training"):
        run(f"{stage} --plan", monkeypatch=monkeypatch)
        assert "in files; activations are computed again, blocks are streamed)" in capsys.readouterr().out
    change(project, "runtime.max_memory", "64GiB")
    run("finetuning --plan", monkeypatch=monkeypatch)
    assert "in memory)" in capsys.readouterr().out


def test_more_processes_than_windows_are_refused(project, monkeypatch):
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    change(project, "runtime.processes", 3)
    change(project, "calibration.evaluation.windows", 2)
    run("calibration", monkeypatch=monkeypatch)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.evaluation", "original"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "runtime.processes=3: there are only 2 windows. Use at most 2." in done.stderr


def test_a_failed_rank_is_one_message(project, monkeypatch):
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    change(project, "runtime.processes", 2)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.finetuning"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "artifacts/quantizer_init/artifact.json is missing" in done.stderr
    assert "of 2 ended with exit code 1" in done.stderr


ASYMMETRIC = {f"{group}.symmetric": False for group in ("weights", "activations", "keys", "values")}
DYNAMIC = {f"{group}.mode": "dynamic" for group in ("activations", "keys", "values")}
SEEDS = {  # the quantizers of the commands in the documents this project comes from, group sizes scaled to 12
    "W4A4KV4 static, --mse_init": {f"{g}.range": "block" for g in ("activations", "keys", "values")},
    "W4g A8 KV8 dynamic, all asymmetric, --activation_clipping": ASYMMETRIC
    | DYNAMIC
    | {"weights.group_size": 12, "activations.group_size": 6, "keys.group_size": 6, "values.group_size": 6}
    | {"activations.bits": 8, "keys.bits": 8, "values.bits": 8},
    "static asymmetric by percentiles": ASYMMETRIC
    | {f"{g}.range": "percentile" for g in ("activations", "keys", "values")},
    "mixed precision by hand": {
        "overrides": [
            {"sites": ["down_proj", "mlp_hidden"], "blocks": [0, 2], "bits": 8, "symmetric": False},
            {"sites": ["value"], "bits": 16},
        ]
    },
}


@pytest.mark.parametrize("mode", SEEDS)
def test_every_mode_is_evaluated_as_it_was_chosen(mode, project, monkeypatch):
    """The loaded model has the quantizers of the settings, and they act. The report covers every site."""
    change(project, "prefix_search.outlier_threshold", 1.5)
    for key, value in SEEDS[mode].items():
        change(project, f"quantizer_init.{key}", value)
    run(*COMPUTED, monkeypatch=monkeypatch)
    evaluated = read_json(project / "metrics/evaluation/quantizer_init.json")
    sites = 13 - (mode == "mixed precision by hand")
    assert evaluated["quantizers_fired"] == 3 * sites
    assert 0 < evaluated["kl"]["prose"] < 2  # measured: 0.1 to 1.1; the tiny model is random
    assert evaluated["lowest_sqnr"].keys() == evaluated["largest_saturation"].keys() == {"prose"}
    report = read_json(project / "artifacts/quantizer_init/report.json")["blocks"]
    assert all(len(block["sites"]) == sites for block in report)
    assert read_json(project / "metrics/evaluation/finetuning.json")["quantizers_fired"] == 3 * sites
    assert read_json(project / "metrics/finetuning.json")["validation_ratio"] <= 1
    for table in ("quantizer_init/plots/saturation.json", "evaluation/quantizer_init_saturation.json"):
        rows = read_json(project / "artifacts" / table)
        assert [row["block"] for row in rows] == [0, 1, 2]
        assert all("mlp_hidden_share" in row for row in rows)
    if mode == "mixed precision by hand":
        tensors = [
            load_tensors(project / f"artifacts/quantizer_init/block-{index:05d}.safetensors", "quantizer_init")[0]
            for index in range(3)
        ]
        kinds = [own[f"model.layers.{index}.mlp.down_proj.weight"].dtype for index, own in enumerate(tensors)]
        assert kinds == [torch.uint8, torch.int8, torch.uint8]


@pytest.mark.parametrize("use", ["trained", "discretised"])
def test_a_trained_prefix_from_end_to_end(use, project, monkeypatch):
    """Train a prefix, use it in the rotated model, cut to a length. At 16 bits the model is the original with it."""
    change(project, "prefix_search.outlier_threshold", 1.5)
    for key, value in {"enabled": True, "epochs": 2, "batch_size": 2, "length": 4}.items():
        change(project, f"prefix_training.{key}", value)
    for site in ("weights", "activations", "keys", "values"):
        change(project, f"quantizer_init.{site}.bits", 16)
    change(project, "quantizer_init.embedding_dtype", "float32")
    change(project, "prefix.use", use)
    change(project, "prefix.length", 3)
    run(*COMPUTED, monkeypatch=monkeypatch)
    variants = ("original_prefix", "quantizer_init")
    original, quantized = (read_json(project / f"metrics/evaluation/{v}.json") for v in variants)
    assert quantized["settings"]["prefix_tokens"] == original["settings"]["prefix_tokens"] == 3
    assert quantized["perplexity"]["prose"] == pytest.approx(original["perplexity"]["prose"], rel=1e-4)
    candidates, _ = load_tensors(project / "artifacts/prefix_training/prefix.safetensors", "prefix_training")
    kept, _ = load_tensors(project / "artifacts/quantizer_init/prefix.safetensors", "quantizer_init")
    expected = [] if use == "trained" else candidates["discretised.token_ids"][1:].tolist()
    assert kept["token_ids"].tolist() == expected
    metrics = read_json(project / "metrics/prefix_training.json")
    assert metrics["prefix_tokens"] == 4
    assert metrics["validation_loss"]["after"] <= metrics["validation_loss"]["before"]
    rows = read_json(project / "artifacts/prefix_training/losses.json")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert list(rows[1])[:4] == ["epoch", "train", "validation", "quantization"]
    assert rows[0]["train"] is None
    assert not (project / ".work/prefix_training").exists()
    first = contents(project / "artifacts/prefix_training")
    run("prefix_training", monkeypatch=monkeypatch)
    assert contents(project / "artifacts/prefix_training") == first


def test_a_trained_prefix_that_is_not_there_is_an_error(project, monkeypatch):
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    change(project, "prefix.use", "trained")
    assert "prefix.use='trained': no prefix is trained. Set prefix_training.enabled: true" in fails(
        "quantizer_init", monkeypatch
    )
    change(project, "prefix_training.enabled", True)
    assert "holds no trained prefix. Set prefix_training.enabled: true and run" in fails("quantizer_init", monkeypatch)


def test_keys_before_rope_from_end_to_end(project, monkeypatch):
    change(project, "rotation.r3", "identity")
    change(project, "quantizer_init.keys.before_rope", True)
    run(*COMPUTED, monkeypatch=monkeypatch)
    assert read_json(project / "metrics/evaluation/quantizer_init.json")["quantizers_fired"] == 39
    assert read_json(project / "artifacts/quantizer_init/config.json")["prefixquant"]["block"]["key_before_rope"]


def test_weights_trained_end_to_end_are_exported_as_they_were_evaluated(project, monkeypatch):
    change(project, "quantizer_init.keep_unrounded", True)
    change(project, "finetuning.end_to_end.weights", "soft_rounding")
    change(project, "finetuning.end_to_end.weight_lr", 0.1)
    change(project, "finetuning.end_to_end.reference", "alongside")
    run(*COMPUTED, monkeypatch=monkeypatch)
    assert read_json(project / "metrics/evaluation/export.json")["largest_difference_to_finetuning"] == 0
    assert not list((project / "artifacts/finetuning").glob("unrounded-*"))
    assert not list((project / "artifacts/export").glob("unrounded-*"))
    before, _ = load_tensors(project / "artifacts/quantizer_init/block-00000.safetensors", "quantizer_init")
    offsets, _ = load_tensors(project / "artifacts/quantizer_init/unrounded-00000.safetensors", "quantizer_init")
    names = {name.partition("layers.0.")[2].removesuffix(".weight") for name in before if before[name].ndim == 2}
    assert offsets.keys() <= names
    assert {offset.dtype for offset in offsets.values()} == {torch.float16}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_changes_no_scale_beyond_summation_order(batch_size, project, monkeypatch):
    run(*BEFORE_QUANTIZER, "quantizer_init", monkeypatch=monkeypatch)
    path = project / "artifacts/quantizer_init/block-00000.safetensors"
    first, _ = load_tensors(path, "quantizer_init")
    change(project, "runtime.batch_size", batch_size)
    run("quantizer_init", monkeypatch=monkeypatch)
    second, _ = load_tensors(path, "quantizer_init")
    for name, tensor in first.items():
        if name.endswith("scale"):
            assert torch.allclose(tensor, second[name], rtol=1e-5), name


@pytest.mark.parametrize(
    ("key", "value", "stage", "message"),
    [
        ("quantizer_init.wieghts", {}, "model", "unknown key. Did you mean 'weights'"),
        ("rotation.r1", "hadamrd", "rotation", "Did you mean 'hadamard'"),
        ("calibration.train.windows", 9999, "calibration", r"needs 9999 windows of 32 = 319968 tokens, the corpus has"),
        ("quantizer_init.weights.group_size", 7, "model", "group_size=7: does not divide 48, the width of q_proj"),
        (
            "quantizer_init.weights.group_size",
            7,
            "quantizer_init",
            "group_size=7: does not divide 48, the width of q_proj",
        ),
        ("runtime.device", "cuda", "prefix_search", "torch finds no GPU"),
        ("model.source", "./nowhere", "model", "there is no such folder"),
    ],
)
def test_bad_input_is_one_message_and_loses_nothing(key, value, stage, message, project, monkeypatch):
    if message == "torch finds no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    before = contents(project / "artifacts")
    change(project, key, value)
    assert message in fails(stage, monkeypatch)
    assert contents(project / "artifacts") == before


def test_deleted_damaged_and_foreign_artifacts_name_the_stage_to_rerun(project, monkeypatch):
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    train = project / "artifacts/calibration/train.safetensors"
    kept = train.read_bytes()
    train.unlink()
    assert "train.safetensors is missing" in (message := fails("quantizer_init", monkeypatch))
    assert "dvc repro --force --single-item calibration" in message
    train.write_bytes(kept[:100])
    assert "train.safetensors is damaged" in fails("quantizer_init", monkeypatch)
    shutil.copyfile(project / "artifacts/prefix_search/prefix.safetensors", train)
    assert "was written by the stage prefix_search, not calibration" in fails("quantizer_init", monkeypatch)
    train.write_bytes(kept)
    shutil.rmtree(project / "artifacts/rotation")
    assert "dvc repro --force --single-item rotation" in fails("quantizer_init", monkeypatch)


def test_artifacts_of_different_models_are_not_mixed(project, model_folders, monkeypatch):
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    change(project, "model.source", str(model_folders["qwen2"]))
    run("model", "rotation", monkeypatch=monkeypatch)
    assert "rotation and prefix_training were made from different models" in fails("quantizer_init", monkeypatch)
    assert "was made from another model than the one at hand" in fails("evaluation original_prefix", monkeypatch)


def start(project, slow_block):
    """Start quantizer_init as a separate process that waits at one block, to be killed there."""
    code = (
        "import sys, time; sys.argv = ['quantizer_init']\n"
        "import runpy, pipeline.quantization.quantizer_init as q\n"
        "init_block = q._init_block_\n"
        f"q._init_block_ = lambda *a, **k: (time.sleep(60 if a[1] == {slow_block} else 0), init_block(*a, **k))[1]\n"
        "runpy.run_module('stages.quantizer_init', run_name='__main__', alter_sys=False)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], cwd=project, env=environment, stderr=subprocess.DEVNULL)


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.05)
    time.sleep(0.5)


def kill_before(block, project):
    """Leave a quantizer_init that was killed with `block` blocks finished."""
    process = start(project, slow_block=block)
    wait_for(project / f".work/quantizer_init/block-{block - 1:05d}.safetensors")
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("block", [1, 2])
def test_a_killed_quantizer_init_continues_and_ends_with_the_same_bytes(block, project, monkeypatch, caplog):
    run(*BEFORE_QUANTIZER, "quantizer_init", monkeypatch=monkeypatch)
    undisturbed = contents(project / "artifacts/quantizer_init")
    shutil.rmtree(project / "artifacts/quantizer_init")

    kill_before(block, project)
    assert not (project / "artifacts/quantizer_init").exists()

    with caplog.at_level("INFO"):
        run("quantizer_init", monkeypatch=monkeypatch)
    assert f"continuing at block {block} of 3" in caplog.text
    assert contents(project / "artifacts/quantizer_init") == undisturbed
    assert not (project / ".work/quantizer_init").exists()


def test_an_unfinished_run_of_other_settings_is_not_continued(project, monkeypatch, caplog):
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    kill_before(2, project)
    change(project, "quantizer_init.weights.bits", 3)
    with caplog.at_level("INFO"):
        run("quantizer_init", monkeypatch=monkeypatch)
    assert "starting over: the unfinished run" in caplog.text
    resumed = contents(project / "artifacts/quantizer_init")
    run("quantizer_init", monkeypatch=monkeypatch)
    assert contents(project / "artifacts/quantizer_init") == resumed


def test_an_unfinished_run_of_other_code_is_not_continued(project, monkeypatch, caplog):
    """Its files need not fit the results of the present code for the same settings and inputs."""
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    kill_before(1, project)
    stamp = project / ".work/quantizer_init/code"
    assert stamp.read_text() == describe_code()
    stamp.write_text("another")
    with caplog.at_level("INFO"):
        run("quantizer_init", monkeypatch=monkeypatch)
    assert "the unfinished run in .work/quantizer_init is of another version of the code" in caplog.text
    assert "continuing at block" not in caplog.text
    assert not (project / ".work/quantizer_init").exists()


def test_broken_activations_are_reported_with_block_and_site(project, monkeypatch):
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    import pipeline.quantization.quantizer_init as module

    fill = module.fill_block

    def broken(checkpoint, index, tensors, *rest):
        if index == 1:
            tensors["mlp.up_proj.weight"][0, 0] = float("inf")
        return fill(checkpoint, index, tensors, *rest)

    monkeypatch.setattr(module, "fill_block", broken)
    assert "block 1: the activations at mlp_hidden are not finite" in fails("quantizer_init", monkeypatch)
    assert not (project / "artifacts/quantizer_init").exists()


def test_tasks_are_asked_of_every_variant_and_checked_before_anything_else(project, monkeypatch, lm_eval_read_once):
    local_task(project, "colours")
    change(project, "evaluation.task_folder", str(project))
    change(project, "evaluation.tasks", {"colours": {"limit": 4}, "gone": {}})
    assert "evaluation.tasks.gone: neither lm-eval nor this project has such a task" in fails("model", monkeypatch)
    change(project, "evaluation.skip_unavailable", True)
    run(*ALL, monkeypatch=monkeypatch)
    found = {
        name: read_json(project / f"metrics/evaluation/{name}.json") for name in ("original", "finetuning", "export")
    }
    assert all(metrics["task_items"] == {"colours": 4} for metrics in found.values())
    assert all(metrics["tasks_skipped"] == ["gone"] for metrics in found.values())
    assert found["export"]["tasks"] == found["finetuning"]["tasks"]
    assert found["export"]["perplexity"] == found["finetuning"]["perplexity"]
    exported, evaluated = (
        load_tensors(project / f"artifacts/evaluation/{name}.safetensors", "evaluation")[0]
        for name in ("export", "finetuning")
    )
    assert torch.equal(exported["hidden.prose"], evaluated["hidden.prose"])
    assert "colours, acc" in (project / "artifacts/export/README.md").read_text()
    report = read_json(project / "metrics/report.json")
    assert report["ppl"] == found["export"]["perplexity"]
    assert report["accuracy"] == {"colours": found["export"]["tasks"]["colours"]["acc"]}
    assert "colours, acc" in (project / "artifacts/report/report.html").read_text()


@pytest.mark.parametrize(("limit", "way"), [(None, "whole"), ("1MiB", "by block")])
def test_the_import_is_compared_with_the_source_as_memory_allows(limit, way, project, monkeypatch):
    change(project, "runtime.max_memory", limit)
    run("model", monkeypatch=monkeypatch)
    metrics = read_json(project / "metrics/model.json")
    assert metrics["import_gate"] == way
    assert metrics["max_logit_deviation"] < 1e-6


def test_an_import_that_transformers_does_not_agree_with_leaves_nothing(project, monkeypatch):
    monkeypatch.setattr("pipeline.inspection.import_gate.IMPORT_TOLERANCE", -1.0)
    assert "Nothing was written" in fails("model", monkeypatch)
    assert not (project / "artifacts").exists() or not list((project / "artifacts").iterdir())


def test_the_report_draws_a_curve_for_each_bound_of_a_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = tmp_path / QUANTIZER_INIT
    written.parent.mkdir(parents=True)
    written.write_text(json.dumps({"blocks": []}), encoding="utf-8")
    assert draw_budget(tmp_path) == []
    curve = [{"value": 4.0, "nats": 0.3}, {"value": 8.0, "nats": 0.01}]
    bits = {bound: {"value": 4.4, "curve": curve} for bound in ("weights", "time")}
    written.write_text(json.dumps({"blocks": [], "bits": bits}), encoding="utf-8")
    pictures = draw_budget(tmp_path)
    assert [path.name for path in pictures] == ["budget_weights.png", "budget_time.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
