"""Presets hold the keys that differ from params.yaml, fit their names, and are merged without losing a comment."""

import itertools
import re
import subprocess

import pytest
import yaml
from dvc.utils.serialize import dumps_yaml, loads_yaml

from pipeline import presets
from pipeline.params import load_params, parse_params
from pipeline.presets import apply_preset, list_presets, merge_preset, merge_values
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.params import ParamsError
from tests.conftest import ROOT

PRESETS = {path.stem: path for path in sorted((ROOT / "presets").glob("*.yaml"))}
PARAMS = (ROOT / "params.yaml").read_text(encoding="utf-8")
DEFAULTS = yaml.safe_load(PARAMS)
OFFICIAL = [name for name, path in PRESETS.items() if "model" in yaml.safe_load(path.read_text(encoding="utf-8"))]


def resolve(name):
    """Return the whole params that a preset gives."""
    return merge_values(DEFAULTS, yaml.safe_load(PRESETS[name].read_text(encoding="utf-8")))


def look_up(values, dotted):
    for key in dotted.split("."):
        values = values[key]
    return values


def list_leaves(values, path=()):
    """Return (path, value) for every value that is not a mapping of settings. Names of the user's choice are values."""
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("corpora", "tasks"):
            yield from list_leaves(value, (*path, key))
        else:
            yield (*path, key), value


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve_to_valid_params_that_fit_their_names(name):
    params = parse_params(resolve(name))
    init = params.quantizer_init
    bits = (init.weights.bits, init.activations.bits, init.keys.bits)
    assert bits == tuple(map(int, re.search(r"w(\d+)a(\d+)kv(\d+)", name).groups()))
    assert init.values.bits == init.keys.bits
    if length := re.search(r"trained-prefix-(\d+)", name):
        assert params.prefix_training.length == int(length[1])
        assert params.prefix.use == "trained"
        assert params.prefix_training.enabled


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_only_keys_that_differ_from_params_yaml(name):
    for path, value in list_leaves(yaml.safe_load(PRESETS[name].read_text(encoding="utf-8"))):
        assert value != look_up(DEFAULTS, ".".join(path)), path


@pytest.mark.parametrize("name", PRESETS)
def test_presets_rely_on_the_defaults_that_their_comments_name(name):
    title, relies, *comments = itertools.takewhile(lambda line: line[0] == "#", PRESETS[name].read_text().splitlines())
    assert list_presets(ROOT / "presets")[name] == title.removeprefix("# ")
    assert relies == "# Relies on these defaults of params.yaml:"
    assert comments
    resolved = resolve(name)
    for comment in comments:
        key, value = re.fullmatch(r"#   ([\w.,{}]+): (\S+)", comment).groups()
        choices = re.search(r"\{(.+)\}", key)
        for choice in choices[1].split(",") if choices else [""]:
            dotted = re.sub(r"\{.+\}", choice, key)
            assert look_up(resolved, dotted) == look_up(DEFAULTS, dotted) == yaml.safe_load(value), dotted


@pytest.mark.parametrize("name", PRESETS)
def test_merged_text_has_the_values_and_every_comment(name):
    text = merge_preset(PARAMS, PRESETS[name].read_text(encoding="utf-8"), name)
    assert yaml.safe_load(text) == resolve(name)
    comments = [[line for line in file.splitlines() if line.lstrip().startswith("#")] for file in (PARAMS, text)]
    assert comments[0] == comments[1]
    assert dumps_yaml(loads_yaml(text, typ="rt")) == text  # the form that DVC writes


def test_a_mapping_of_settings_is_merged_and_one_of_names_is_replaced():
    base = PARAMS.replace("    windows: 16\n", "    windows: 16  # a comment at the end of the line\n")
    mine = {"corpora": ["mine"]}
    preset = yaml.safe_dump(
        {
            "corpora": {"mine": {"source": "~/text.jsonl"}, "wikipedia": {"source": "packaged:wikipedia"}},
            "calibration": {
                "train": {"windows": 5, "corpora": {"mine": 3, "wikipedia": 2}},
                "end_to_end": None,
                **dict.fromkeys(("search", "validation", "evaluation"), mine),
            },
            "quantizer_init": {"overrides": [{"sites": ["down_proj"], "bits": 8}]},
        }
    )
    merged = yaml.safe_load(merge_preset(base, preset))
    assert merged["corpora"] == {"mine": {"source": "~/text.jsonl"}, "wikipedia": {"source": "packaged:wikipedia"}}
    assert merged["calibration"]["train"] == {"corpora": {"mine": 3, "wikipedia": 2}, "windows": 5, "length": "auto"}
    assert merged["calibration"]["end_to_end"] is None
    assert merged["quantizer_init"]["overrides"] == [{"sites": ["down_proj"], "bits": 8}]
    assert "windows: 5  # a comment at the end of the line" in merge_preset(base, preset)
    back = merge_preset(merge_preset(PARAMS, "calibration: {end_to_end: null}"), yaml.safe_dump(DEFAULTS))
    assert yaml.safe_load(back) == DEFAULTS


def test_errors_of_a_preset_name_it_and_the_key():
    with pytest.raises(ParamsError, match=r"params\.yaml with mine: 1 problem\s+quantizer_init\.keys\.bit: unknown"):
        merge_preset(PARAMS, "quantizer_init: {keys: {bit: 4}}", "mine")
    with pytest.raises(ParamsError, match=r"rotation\.r1='hadamrd': allowed are .*Did you mean 'hadamard'"):
        merge_preset(PARAMS, "rotation: {r1: hadamrd}", "mine")
    with pytest.raises(ParamsError, match="mine is not valid YAML"):
        merge_preset(PARAMS, "rotation: [", "mine")
    with pytest.raises(ParamsError, match=r"mine must hold groups of keys .* got list"):
        merge_preset(PARAMS, "[rotation]", "mine")
    with pytest.raises(ParamsError, match=r"params\.yaml cannot be edited in place"):
        merge_preset(yaml.safe_dump(DEFAULTS, default_flow_style=True), "calibration: {search: {corpora: [news]}}")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Make a folder with params.yaml and the presets, without git, and a function that runs git in it."""
    (tmp_path / "params.yaml").write_text(PARAMS, encoding="utf-8")
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def run_git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    return run_git


def read_written():
    return presets.PARAMS.read_text(encoding="utf-8")


@pytest.mark.parametrize("has_git", [True, False])
def test_local_changes_are_overwritten_by_force_only(project, has_git):
    """Each preset is merged into the committed file, or without git into the one before the first preset."""
    if has_git:
        project("init")
        project("add", "params.yaml")
        project("commit", "-m", "params")
    name, other = "w8a8kv16-int8", "llama-2-7b-w4a4kv4"
    difference = apply_preset(name)
    assert "-    bits: 4\n+    bits: 8\n" in difference
    assert difference.startswith("--- params.yaml before\n+++ params.yaml with preset w8a8kv16-int8\n")
    written = read_written()
    assert yaml.safe_load(written) == resolve(name)
    assert apply_preset(name) == ""

    changed = merge_preset(written, "runtime: {threads: 1}")
    presets.PARAMS.write_text(changed, encoding="utf-8")
    with pytest.raises(PipelineError, match=r"params\.yaml: has local changes .* overwrite them with FORCE=1"):
        apply_preset(other)
    assert read_written() == changed
    assert "threads: 1" in apply_preset(other, force=True)
    assert yaml.safe_load(read_written()) == resolve(other)
    apply_preset(name)  # what a preset wrote is not a local change, and one preset leaves nothing of another
    assert read_written() == written


def test_a_preset_after_a_committed_one_leaves_nothing_of_it(project):
    project("init")
    project("add", "params.yaml")
    project("commit", "-m", "params")
    apply_preset("llama-2-7b-w4a4kv4")
    project("commit", "-am", "preset")
    apply_preset("w8a8kv16-int8")
    assert load_params(presets.PARAMS) == parse_params(resolve("w8a8kv16-int8"))


def test_a_preset_keeps_committed_changes_of_other_keys(project):
    presets.PARAMS.write_text(merge_preset(PARAMS, "runtime: {task_batch_size: 3}"), encoding="utf-8")
    project("init")
    project("add", "params.yaml")
    project("commit", "-m", "params")
    apply_preset("llama-2-7b-w4a4kv4")
    assert load_params(presets.PARAMS).runtime.task_batch_size == 3


def test_an_unknown_name_is_refused_with_the_nearest_and_the_list(project):
    with pytest.raises(ParamsError, match=r"there is no presets/llama-2-7b-w4a4\.yaml\. Did you mean llama-2-7b"):
        apply_preset("llama-2-7b-w4a4")
    with pytest.raises(ParamsError, match=r"there is no presets/xyz\.yaml\. Use one of these:\n(.+\n    .+\n)+w8a8kv8"):
        apply_preset("xyz")


def test_the_documents_prefix_lengths_are_there():
    assert {"3", "8", "10"} <= {name.rpartition("-")[2] for name in PRESETS if "w4a4kv4-trained-prefix" in name}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_presets_have_the_official_settings(name):
    """Check the settings that all of them share, whatever params.yaml's defaults become."""
    resolved = resolve(name)
    for key, value in {
        "calibration.seed": 42,
        "calibration.search.windows": 64,
        "calibration.train.windows": 512,
        "calibration.train.length": 1024,
        "calibration.validation.windows": 64,
        "calibration.end_to_end": None,
        "calibration.evaluation.corpora": ["wikitext2"],
        "calibration.evaluation.length": 2048,
        "calibration.evaluation.windows": None,
        "rotation.r1": "hadamard",
        "rotation.r2": "hadamard",
        "rotation.r3": "hadamard",
        "rotation.r4": "hadamard",
        "rotation.r5": "identity",
        "rotation.online_signs": False,
        "prefix_search.choose": "threshold",
        "prefix_search.site": "down_proj_input",
        "prefix_search.outlier_threshold": 64.0,
        "prefix_search.start_token_counts": False,
        "prefix_training.learning_rate": 1e-3,
        "prefix.length": None,
        "quantizer_init.weights.rounding": "rtn",
        "quantizer_init.equalize": [],
        "quantizer_init.overrides": [],
        "finetuning.end_to_end.enabled": False,
    }.items():
        assert look_up(resolved, key) == value, key
    for group in ("weights", "activations", "keys", "values"):
        settings = resolved["quantizer_init"][group]
        assert (settings["format"], settings["centered"], settings["range"]) == ("int", False, "block")


def test_presets_differ_as_the_documents_say():
    params = {name: parse_params(resolve(name)) for name in PRESETS}
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
        trained = params[name]
        assert (trained.prefix_training.loss_type, trained.prefix_training.epochs) == (kind, 20)
        assert (trained.quantizer_init.weights.group_size, trained.quantizer_init.weights.symmetric) == (128, False)
        assert (trained.quantizer_init.activations.group_size, trained.quantizer_init.keys.group_size) == (64, 64)
        assert trained.runtime.max_memory == "65GiB"
    assert params["w4a16kv16-compressed-tensors"].export.formats == ["compressed-tensors"]
    for name, kind in (
        ("w8a8kv16-int8", "int"),
        ("w8a8kv16-fp8", "fp8_e4m3"),
        ("w4a4kv16-nvfp4", "nvfp4"),
        ("w4a4kv16-mxfp4", "mxfp4"),
    ):
        packaged = params[name]
        init = packaged.quantizer_init
        assert (init.weights.format, init.activations.format, init.keys.bits) == (kind, kind, 16)
        assert (packaged.export.formats, packaged.export.drop) == (["compressed-tensors"], [])
        assert packaged.prefix.use == "none"
        assert not (init.weights.centered)
        assert not (init.activations.centered)
    assert params["w8a8kv16-int8"].quantizer_init.activations.symmetric is False
