import json

import pytest
import torch

from pipeline.pictures.summary import format_summary, paired_differences
from pipeline.runtime.artifacts import make_header, save_tensors

LOCK = """
stages:
  evaluation@finetuning:
    params:
      params.yaml:
        finetuning: {epochs: 1}
    outs: []
"""
PROJECT = "stages: {evaluation: {foreach: {original: {}, finetuning: {}}, do: {}}}"


def write_run(folder, lock=None):
    for variant, perplexity in (
        ("original", 2.0),
        ("original_prefix", 2.0),
        ("quantizer_init", 4.0),
        ("finetuning", 3),
    ):
        path = folder / f"metrics/evaluation/{variant}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"perplexity": {"prose": perplexity}}))
    prefix = {"prefix_texts": [" the"], "prefix_token_ids": [260]}
    (folder / "metrics/prefix_search.json").write_text(json.dumps(prefix))
    for variant, losses in (("quantizer_init", [1.0, 2.0]), ("finetuning", [0.5, 1.25])):
        tensors = {"loss.prose": torch.tensor(losses)}
        path = folder / f"artifacts/evaluation/{variant}.safetensors"
        save_tensors(path, tensors, make_header("evaluation", {}))
    (folder / "params.yaml").write_text("finetuning: {epochs: 2}")
    (folder / "dvc.yaml").write_text(PROJECT)
    if lock is not None:
        (folder / "dvc.lock").write_text(lock)


def test_the_summary_shows_rows_steps_and_prefix(tmp_path):
    write_run(tmp_path)
    assert format_summary(tmp_path).split("\n\n") == [
        "| | prose | ratio |\n| --- | ---: | ---: |\n| original | 2.00 | 1.00 |\n| original_prefix | 2.00 | 1.00 |\n"
        "| quantizer_init | 4.00 | 2.00 |\n| finetuning | 3.00 | 1.50 |",
        "Loss on the same windows, difference ± standard error, nats per token:\n"
        "  finetuning - quantizer_init: prose -0.6250 ± 0.1250",
        "Prefix found: [' the'] (ids [260]). All figures: metrics/",
        "Another machine, or another number of threads, adds in another order. That alone changes the perplexity of a\n"
        "quantized model by 1 to 3 %. On one machine results repeat exactly.",
    ]


def test_rows_of_an_earlier_run_are_marked_and_not_compared(tmp_path):
    write_run(tmp_path, LOCK)
    table, outdated, prefix, _ = format_summary(tmp_path).split("\n\n")
    assert "| quantizer_init | 4.00 | 2.00 |\n| finetuning (outdated) | 3.00 | 1.50 |" in table
    assert outdated == (
        "Outdated rows are results of an earlier run. `make repro` renews them:\n"
        "  finetuning: finetuning.epochs is 2, the run had 1"
    )
    assert prefix.startswith("Prefix found: ")


def test_without_results_the_summary_says_how_to_get_them(tmp_path):
    assert format_summary(tmp_path) == "Nothing has been evaluated yet. Run: make repro"


def test_paired_differences_are_by_window(tmp_path):
    write_run(tmp_path)
    paths = [tmp_path / f"artifacts/evaluation/{variant}.safetensors" for variant in ("quantizer_init", "finetuning")]
    assert paired_differences(*paths) == {"prose": pytest.approx((-0.625, 0.125))}
