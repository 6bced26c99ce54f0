"""Presets are complete params files that say what their names say."""

import re

import pytest
import yaml

from pipeline.params import load_params
from tests.conftest import ROOT

PRESETS = {path.stem: path for path in sorted((ROOT / "presets").glob("*.yaml"))}


def keys_of(values, path=()):
    """Every key, but those of corpora and tasks, which have names of their own."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict) and key not in ("corpora", "tasks"):
            yield from keys_of(value, (*path, key))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_have_exactly_the_keys_there_are(name):
    params = load_params(PRESETS[name])
    own = set(keys_of(yaml.safe_load(PRESETS[name].read_text())))
    ours = set(keys_of(yaml.safe_load((ROOT / "params.yaml").read_text())))
    if params.calibration.end_to_end is None:
        ours = {key for key in ours if key[:2] != ("calibration", "end_to_end") or len(key) == 2}
    assert own == ours
    assert f"make preset NAME={name}" in PRESETS[name].read_text()
    bits = re.search(r"w(\d+)a(\d+)kv(\d+)", name)
    init = params.quantizer_init
    found = (init.weights.bits, init.activations.bits, init.keys.bits)
    assert found == tuple(map(int, bits.groups()))
    assert init.values.bits == init.keys.bits
    if length := re.search(r"trained-prefix-(\d+)", name):
        assert params.prefix_training.length == int(length[1])
        assert params.prefix.use == "trained"
        assert params.prefix_training.enabled


def test_the_documents_prefix_lengths_are_there():
    assert {"3", "8", "10"} <= {name.rpartition("-")[2] for name in PRESETS if "w4a4kv4-trained-prefix" in name}


def test_presets_differ_as_the_documents_say():
    params = {name: load_params(path) for name, path in PRESETS.items()}
    distilled = params["deepseek-r1-distill-qwen-7b-w4a4kv4"]
    assert distilled.model.source == "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    assert distilled.prefix.use == "found"
    assert (distilled.finetuning.blocks.enabled, distilled.finetuning.end_to_end.enabled) == (False, False)
    assert {group.range for _, group in distilled.quantizer_init if hasattr(group, "range")} == {"block"}
    assert set(distilled.evaluation.tasks) == {"piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande"}
    finetuning = {name: preset.finetuning.blocks for name, preset in params.items()}
    for name, epochs in (
        ("deepseek-r1-distill-qwen-7b-w4a4kv4-finetuned", 20),
        ("llama-2-7b-w4a4kv4-finetuned", 20),
        ("llama-2-7b-w4a8kv4-finetuned", 10),
    ):
        assert (finetuning[name].enabled, finetuning[name].epochs) == (True, epochs)
    large = finetuning["llama-3-70b-w4a4kv4-finetuned"]
    assert (large.quant_lr, large.weight_lr, large.loss_type) == (2e-5, 2e-6, "mse")
    assert finetuning["llama-2-70b-w4a4kv4-finetuned"].loss_type == "skip_mse"
    dynamic = params["llama-2-7b-w4a4kv4-dynamic"].quantizer_init
    assert all(
        group.mode == "dynamic" and group.clipping for group in (dynamic.activations, dynamic.keys, dynamic.values)
    )
    for name, kind in (
        ("llama-2-7b-w4a8kv8-trained-prefix-8", "l2"),
        ("llama-3-8b-w4a8kv8-trained-prefix-8", "outlier"),
    ):
        own = params[name]
        assert (own.prefix_training.loss_type, own.prefix_training.epochs) == (kind, 20)
        assert (own.quantizer_init.weights.group_size, own.quantizer_init.weights.symmetric) == (128, False)
        assert (own.quantizer_init.activations.group_size, own.quantizer_init.keys.group_size) == (64, 64)
        assert own.runtime.max_memory == "65GiB"
    assert params["smollm2-135m-w4a16kv16-compressed-tensors"].export.formats == ["compressed-tensors"]
    for name, kind in (
        ("w8a8kv16-int8", "int"),
        ("w8a8kv16-fp8", "fp8_e4m3"),
        ("w4a4kv16-nvfp4", "nvfp4"),
        ("w4a4kv16-mxfp4", "mxfp4"),
    ):
        own = params[f"smollm2-135m-{name}"]
        init = own.quantizer_init
        assert (init.weights.format, init.activations.format, init.keys.bits) == (kind, kind, 16)
        assert (own.export.formats, own.export.drop, own.prefix.use) == (["compressed-tensors"], [], "none")
        assert not (init.weights.centered)
        assert not (init.activations.centered)
    assert params["smollm2-135m-w8a8kv16-int8"].quantizer_init.activations.symmetric is False
