"""Recipes and the user's choices become a params.yaml with all of its comments."""

import pytest
import yaml
from dvc.utils.serialize import modify_yaml

from pipeline.params import parse_params
from pipeline.runtime.errors import PipelineError
from prefixquant.package_data import find_data
from prefixquant.recipes import (
    DEFAULT_RECIPE,
    format_recipes,
    list_recipes,
    make_params,
    name_texts,
    parse_setting,
)

DEFAULTS = find_data("params.yaml").read_text(encoding="utf-8")


def test_recipes_are_the_presets_that_name_no_model():
    recipes = list_recipes()
    assert DEFAULT_RECIPE in recipes
    assert "w8a8kv16-int8" in recipes
    assert not [name for name in recipes if name.startswith("llama")]
    assert all(name in format_recipes() for name in recipes)


def test_the_default_recipe_changes_the_model_alone():
    changed = [
        (before, after)
        for before, after in zip(DEFAULTS.splitlines(), make_params("/a/model").splitlines(), strict=True)
        if before != after
    ]
    assert changed == [("  source: packaged:smollm2-135m", "  source: /a/model")]


@pytest.mark.parametrize("recipe", list_recipes())
def test_every_recipe_gives_valid_params_with_every_comment(recipe):
    text = make_params("org/model", recipe=recipe)
    assert parse_params(yaml.safe_load(text)).model.source == "org/model"
    comments = [[line for line in file.splitlines() if line.lstrip().startswith("#")] for file in (DEFAULTS, text)]
    assert comments[0] == comments[1]


@pytest.mark.parametrize(
    "choices",
    [
        {"bits": "W4A8KV4", "finetune": "none"},
        {"texts": ["/a/ä b.txt", "/c.txt"]},
        {"settings": {"quantizer_init.overrides": [{"sites": ["key"], "bits": 8}], "evaluation.tasks.piqa.limit": 5}},
    ],
)
def test_params_of_a_work_folder_have_the_form_that_dvc_writes(choices, tmp_path):
    """So that `dvc exp run -S` in a work folder changes one line."""
    path = tmp_path / "params.yaml"
    path.write_text(make_params("/a model/x", **choices), encoding="utf-8")
    with modify_yaml(path):
        pass
    assert path.read_text(encoding="utf-8") == make_params("/a model/x", **choices)


def test_choices_win_over_the_recipe_and_settings_over_all():
    text = make_params(
        "m",
        recipe="w4a8kv4",
        bits="w3A4kv8",
        finetune="long",
        settings={"quantizer_init.keys.bits": 6, "calibration.end_to_end.windows": 5},
    )
    params = parse_params(yaml.safe_load(text))
    init = params.quantizer_init
    assert (init.weights.bits, init.activations.bits, init.keys.bits, init.values.bits) == (3, 4, 6, 8)
    assert params.calibration.end_to_end.windows == 5
    assert params.finetuning.end_to_end.enabled


@pytest.mark.parametrize(
    ("finetune", "enabled", "windows"), [("none", False, 96), ("short", True, 96), ("long", True, 384)]
)
def test_finetune_chooses_training_and_its_text(finetune, enabled, windows):
    params = parse_params(yaml.safe_load(make_params("m", finetune=finetune)))
    assert params.finetuning.end_to_end.enabled == enabled
    assert params.calibration.end_to_end.windows == windows
    assert not params.finetuning.blocks.enabled


def test_texts_take_the_place_of_all_corpora():
    params = parse_params(yaml.safe_load(make_params("m", texts=["/a/my text.txt", "/b/my text.txt", "/c/übung"])))
    names = ["my_text", "my_text_2", "bung"]
    assert {name: corpus.source for name, corpus in params.corpora.items()} == dict(
        zip(names, ["/a/my text.txt", "/b/my text.txt", "/c/übung"], strict=True)
    )
    assert all(split.corpora == names for split in params.calibration.splits().values())
    assert params.calibration.train.windows == 16
    assert params.evaluation.tasks == {}


def test_a_setting_adds_to_mappings_of_names():
    settings = {"corpora.mine.source": "/x.txt", "evaluation.tasks.piqa.limit": 5}
    values = yaml.safe_load(make_params("m", settings=settings))
    assert list(values["corpora"]) == ["wikipedia", "news", "mine"]
    assert values["evaluation"]["tasks"] == {
        "word_analogies": {"limit": 64},
        "last_word_wikipedia": {"limit": 48},
        "piqa": {"limit": 5},
    }


def test_names_of_texts_are_names_of_folders():
    assert name_texts(["/a/b.txt", "/c/b.jsonl", "/d/b", "/e/...", "é"]) == ["b", "b_2", "b_3", "text", "text_2"]


@pytest.mark.parametrize(
    ("word", "setting"),
    [
        ("a.b=3", ("a.b", 3)),
        ("a=[x, 2]", ("a", ["x", 2])),
        ("a=", ("a", None)),
        ("a=b=c", ("a", "b=c")),
    ],
)
def test_settings_are_yaml(word, setting):
    assert parse_setting(word) == setting


@pytest.mark.parametrize("word", ["a.b", "=3", "a=[x", "a={"])
def test_settings_that_are_none_are_refused(word):
    with pytest.raises(PipelineError, match=r"^--set "):
        parse_setting(word)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"recipe": "w4a4k4"}, r"--recipe=w4a4k4: there is no such recipe\. Did you mean w4a4kv4\?"),
        ({"recipe": "x"}, r"Use one of these:\n  w4a16kv16-compressed-tensors  W4"),
        ({"bits": "W4A4"}, r"--bits=W4A4: expected the form W4A4KV4"),
        ({"bits": "W9A4KV4"}, r"quantizer_init\.weights\.bits=9: allowed are"),
        ({"finetune": "all"}, r"--finetune=all: unknown\. Use one of none, short, long\."),
        ({"settings": {"a.b": 1}}, r"with --set: 1 problem\s+a: unknown key"),
        ({"settings": {"rotation.r1": "hadamrd"}}, r"Did you mean 'hadamard'"),
        ({"settings": {"rotation": 1, "rotation.r1": "online"}}, r"rotation\.r1: another choice gives this key"),
        ({"settings": {"rotation.r1": "online", "rotation": 1}}, r"rotation: another choice gives this key"),
    ],
)
def test_choices_that_cannot_be_used_are_refused_by_name(choices, message):
    with pytest.raises(PipelineError, match=message):
        make_params("m", **choices)
