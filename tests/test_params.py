import copy
import difflib
import re
from datetime import date

import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import modify_yaml

from pipeline.params import Params, check_against_model, load_params, parse_params
from pipeline.quantization.params import QuantizerInitParams, resolve_site
from pipeline.runtime.params import ParamsError
from tests.conftest import ROOT

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
DEFAULT = yaml.safe_load(TEXT)


def changed(dotted: str, value: object) -> dict:
    params = copy.deepcopy(DEFAULT)
    *path, last = dotted.split(".")
    group = params
    for key in path:
        group = group[key]
    group[last] = value
    return params


def test_the_default_file_is_valid():
    params = load_params(ROOT / "params.yaml")
    assert params.quantizer_init.weights.bits == 4
    assert params.prefix.use == "found"


def test_defaults_of_the_typed_params_are_the_values_of_the_default_file():
    assert Params().model_dump() == load_params(ROOT / "params.yaml").model_dump()
    assert QuantizerInitParams() == Params().quantizer_init


@pytest.mark.parametrize(
    "key",
    [
        "runtime",
        "corpora",
        "model.revision",
        "calibration.end_to_end.length",
        "calibration.search.windows",
        "prefix_training.weights.kl",
        "quantizer_init.values.range",
        "evaluation.tasks",
    ],
)
def test_keys_with_a_default_are_not_left_out_of_a_file(key):
    params = copy.deepcopy(DEFAULT)
    *path, last = key.split(".")
    group = params
    for name in path:
        group = group[name]
    del group[last]
    with pytest.raises(ParamsError, match=rf"1 problem\s+{re.escape(key)}: missing. Add it"):
        parse_params(params)


def test_a_generated_corpus_has_tokens_and_no_number_of_documents():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["corpora"]["mine"] = {"source": "generated", "max_documents": 9}
    with pytest.raises(ParamsError, match=r"corpora\.mine\.max_documents=9 .* Set corpora\.mine\.generation\.tokens"):
        parse_params(params)


def test_integers_are_trained_only_from_the_integers_of_quantizer_init():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["quantizer_init"]["keep_unrounded"] = True
    params["finetuning"]["end_to_end"]["weights"] = "straight_through"
    parse_params(params)
    params["finetuning"]["start"] = "full_precision"
    with pytest.raises(
        ParamsError, match=r"weights='straight_through': starts .* Set finetuning\.start: quantizer_init"
    ):
        parse_params(params)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantizer_init.mse_sample", 4, r"quantizer_init\.mse_sample: unknown key. Did you mean 'mse_samples'"),
        ("quantizer_init.keys.rnge", "max", r"quantizer_init\.keys\.rnge: unknown key. Did you mean 'range'"),
        ("quantizer_init.weights.mode", "static", r"quantizer_init\.weights\.mode: unknown key"),
        ("quantizer_init.values.range", "minmax", r"values\.range='minmax': allowed are 'max', 'percentile', 'tensor'"),
        ("finetuning.end_to_end.weights", "soft_rounding", r"weights='soft_rounding': needs .*keep_unrounded: true"),
        ("quantizer_init.keys.before_rope", True, r"keys\.before_rope=true: R3 acts .* Set rotation\.r3: identity"),
        ("corpora.news.generation", {}, r"corpora\.news\.generation belongs to source: generated, .* Remove it, or"),
        ("corpora.news.sorce", "x", r"corpora\.news\.sorce: unknown key. Did you mean 'source'"),
        ("bits", 4, r"bits: unknown key. Remove it. Known here: activation_plots, calibration, corpora"),
        ("rotation.r1", "hadamrd", r"rotation\.r1='hadamrd': allowed are .*Did you mean 'hadamard'"),
        ("prefix.use", "nothing", r"prefix\.use='nothing': allowed are 'none', 'found', 'trained'"),
        ("quantizer_init.weights.bits", 9, r"weights\.bits=9: allowed are 2, 3, 4, 5, 6, 7, 8 or 16"),
        ("quantizer_init.weights.bits", "four", r"weights\.bits='four': allowed are 2, 3"),
        ("calibration.train.windows", "many", r"calibration\.train\.windows='many' \(str\).*integer"),
        ("calibration.train.windows", 0, r"calibration\.train\.windows=0 .*greater than or equal to 1"),
        ("calibration.seed", 1.5, r"calibration\.seed=1\.5 \(float\).*integer"),
        ("prefix_search.outlier_threshold", 1.0, r"outlier_threshold=1\.0 .*greater than 1"),
        ("prefix_search.start_token_counts", "yes", r"start_token_counts='yes' \(str\).*boolean"),
        ("corpora.news.max_documents", "all", r"corpora\.news\.max_documents='all'"),
        ("calibration.train.corpora", ["wikipdia"], r"calibration\.train\.corpora='wikipdia' is not among the corpora"),
        ("calibration.train.corpora", ["news", "news"], "names a corpus twice"),
        ("calibration.end_to_end.window", 8, r"calibration\.end_to_end\.window: unknown key. Did you mean 'windows'"),
        (
            "calibration.train.corpora",
            {"wikipdia": 1},
            r"calibration\.train\.corpora='wikipdia' is not among the corpora",
        ),
        ("calibration.train.corpora", {"news": 0}, r"calibration\.train\.corpora\.news=0 .*greater than 0"),
        ("calibration.train.corpora", {"news": "all"}, r"calibration\.train\.corpora\.news='all' .*number"),
        (
            "calibration.train.corpora",
            {"news": 1, "wikipedia": 99},
            r"corpora\.news=1\.0 is less than one of 16 windows",
        ),
        ("calibration.evaluation.corpora", {"news": 1}, r"calibration\.evaluation\.corpora=.*list"),
        ("quantizer_init.weights.group_size", 0, r"group_size=0: allowed are -1"),
        ("prefix.use", "trained", r"prefix\.use='trained': no prefix is trained. Set prefix_training\.enabled: true"),
        ("prefix_training.loss_type", "l1", r"loss_type='l1': allowed are 'quantization', 'outlier', 'l2' or 'var'"),
        ("prefix_training.learning_rate", 0, r"learning_rate=0 .*greater than 0"),
        ("model.source", "packaged:llama", r"model\.source='packaged:llama' is not packaged; packaged are"),
        ("corpora.news.source", "packaged:new", r"packaged are: packaged:wikipedia, packaged:news"),
        (
            "calibration.seed",
            2**70,
            r"calibration\.seed=1180591620717411303424 \(int\).*whole numbers go up to 2147483647",
        ),
        ("corpora.news.max_documents", 10**30, r"max_documents=1000.*whole numbers go up to 2147483647"),
        ("activation_plots.surface_blocks", [0, 2**40], r"surface_blocks=\[0, 1099511627776\].*go up to 2147483647"),
        ("runtime.processes", 10**9, r"runtime\.processes=1000000000 .*less than or equal to 1024"),
    ],
)
def test_messages_about_bad_values_name_key_value_and_allowed_values(key, value, message):
    with pytest.raises(ParamsError, match=message):
        parse_params(changed(key, value))


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        ("finetuning.epochs", 20, "finetuning.blocks.epochs and finetuning.blocks.enabled: true"),
        ("finetuning.epochs", 0, "finetuning.blocks.epochs and finetuning.blocks.enabled: true"),
        ("finetuning.batch_size", 4, "finetuning.blocks.batch_size"),
        ("finetuning.weight_lr", 5e-6, "finetuning.blocks.weight_lr"),
        ("finetuning.target", "both", "finetuning.blocks.target"),
    ],
)
def test_old_keys_are_refused_with_their_new_names(key, value, names):
    with pytest.raises(ParamsError, match=re.escape(f"  {key}: renamed. Use {names}.") + "$"):
        parse_params(changed(key, value))


def test_a_group_of_old_keys_is_refused_with_every_new_name():
    params = copy.deepcopy(DEFAULT)
    blocks = params["finetuning"].pop("blocks")
    del blocks["enabled"]
    params["finetuning"] |= blocks
    with pytest.raises(ParamsError) as error:
        parse_params(params)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == len(blocks) + 1
    assert "  finetuning.blocks: missing. Add it (see the commented params.yaml in git)." in lines
    for key in blocks:
        assert any(line.startswith(f"  finetuning.{key}: renamed. Use finetuning.blocks.{key}") for line in lines)


def test_all_problems_are_reported_at_once():
    params = changed("rotation.r1", "hadamrd")
    params["prefix"]["use"] = 3
    del params["model"]["dtype"]
    with pytest.raises(ParamsError, match="3 problems") as error:
        parse_params(params)
    for key in ("rotation.r1", "prefix.use", "model.dtype: missing"):
        assert key in str(error.value)


@pytest.mark.parametrize("written", ["6.4e1", "64", "5e1", "5.0e+1"])
def test_numbers_written_with_an_exponent_are_numbers(written):
    # PyYAML reads 5e1 as a string, and `dvc exp run -S` writes that form.
    value = yaml.safe_load(f"x: {written}")["x"]
    assert parse_params(changed("prefix_search.outlier_threshold", value)).prefix_search.outlier_threshold == float(
        written
    )


WIDTHS = {"q_proj": 256, "down_proj": 200, "o_proj": 100, "mlp_hidden": 200, "key": 64, "value": 64}


def test_group_size_that_does_not_divide_lists_every_site():
    params = parse_params(changed("quantizer_init.weights.group_size", 128))
    with pytest.raises(
        ParamsError, match=r"weights\.group_size=128: does not divide 200, the width of down_proj"
    ) as error:
        check_against_model(params, WIDTHS, 4, 2048)
    assert "width of o_proj" in str(error.value)
    assert "q_proj" not in str(error.value)
    assert "mlp_hidden" not in str(error.value)
    check_against_model(params, {"q_proj": 256}, 4, 2048)
    params = parse_params(changed("quantizer_init.keys.group_size", 48))
    with pytest.raises(ParamsError, match=r"1 problem\s+quantizer_init\.keys\.group_size=48: does not divide 64"):
        check_against_model(params, WIDTHS, 4, 2048)


def test_target_layers_that_do_not_exist_are_listed():
    params = parse_params(changed("prefix_training.target_layers", [1, 4]))
    with pytest.raises(ParamsError, match=r"prefix_training\.target_layers=4: the model has blocks 0 to 3"):
        check_against_model(params, {}, 4, 2048)


def test_windows_longer_than_the_model_are_listed():
    params = parse_params(changed("calibration.evaluation.length", 4096))
    with pytest.raises(ParamsError, match=r"evaluation\.length=4096 exceeds the 2048 positions"):
        check_against_model(params, {}, 4, 2048)
    check_against_model(params, {}, 4, 8192)
    check_against_model(params, {}, 4, 8192, sliding_window=512)


@pytest.mark.parametrize(
    ("changes", "room"),
    [
        ({}, 8),  # found, of any length
        ({"prefix.length": 3}, 3),
        ({"prefix.use": "none"}, 0),
        ({"prefix.use": "none", "prefix_training.enabled": True, "prefix_training.length": 12}, 12),
        ({"prefix.use": "trained", "prefix_training.enabled": True, "prefix_training.length": None}, 8),
    ],
)
def test_windows_leave_room_for_the_prefix(changes, room):
    for excess in (0, 1):
        raw = changed("calibration.evaluation.length", 2048 - room + excess)
        for dotted, value in changes.items():
            group, key = dotted.split(".")
            raw[group][key] = value
        if not excess:
            check_against_model(parse_params(raw), {}, 4, 2048)
            continue
        message = (
            rf"1 problem\s+.*evaluation\.length={2049 - room} .*2048 positions.*less {room} for .*at most {2048 - room}"
        )
        with pytest.raises(ParamsError, match=message):
            check_against_model(parse_params(raw), {}, 4, 2048)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [("r1", "online", "hadamard"), ("r4", "hadamard", "identity"), ("r5", "hadamard", "identity")],
)
def test_formats_of_others_and_online_rotations_are_refused_at_once(name, value, instead):
    raw = changed("export.formats", ["gguf"])
    raw["rotation"] |= {"r1": "hadamard", "r4": "identity", "r5": "identity"}
    parse_params(raw)
    raw["rotation"][name] = value
    message = rf"gguf cannot carry rotation\.{name}='{value}', which acts online. Set rotation\.{name}: {instead}"
    with pytest.raises(ParamsError, match=message):
        parse_params(raw)


def test_static_sizes_of_a_graph_are_two_or_none():
    raw = changed("export.onnx.sequence_length", 16)
    message = r"export\.onnx\.cache_length: a graph has static sizes for both lengths, or for none\. Set it"
    with pytest.raises(ParamsError, match=message):
        parse_params(raw)
    raw["export"]["onnx"]["cache_length"] = 128
    assert parse_params(raw).export.onnx.cache_length == 128


def test_onnx_carries_online_rotations_only_as_matrices():
    raw = changed("export.formats", ["onnx"])
    with pytest.raises(ParamsError, match=r"onnx cannot carry rotation\.r1='online', which acts online"):
        parse_params(raw)
    raw["export"]["onnx"]["widest_rotation"] = 1536
    parse_params(raw)


@pytest.mark.parametrize(
    ("group", "changes", "message"),
    [
        ("weights", {"bits": 16}, r"quantizer_init\.weights\.format='int16': only activations have it"),
        ("keys", {"bits": 16}, r"quantizer_init\.keys\.format='int16': only activations have it"),
        ("activations", {"bits": 8}, r"quantizer_init\.activations\.bits=8: int16 has 16 bits"),
        ("activations", {"bits": 16, "mode": "dynamic"}, r"mode='dynamic': int16 has static scales only"),
    ],
)
def test_int16_is_for_static_activations_of_16_bits(group, changes, message):
    raw = changed(f"quantizer_init.{group}.format", "int16")
    raw["quantizer_init"][group] |= changes
    with pytest.raises(ParamsError, match=message):
        parse_params(raw)


def test_int16_quantizes_and_16_bits_alone_do_not():
    raw = changed("quantizer_init.activations.bits", 16)
    assert not resolve_site(parse_params(raw).quantizer_init, "mlp_input", 0).quantized
    raw["quantizer_init"]["activations"] |= {"format": "int16", "symmetric": False}
    assert resolve_site(parse_params(raw).quantizer_init, "mlp_input", 0).quantized


def test_signs_without_a_rotation_after_them_are_refused():
    raw = changed("rotation.online_signs", True)
    parse_params(raw)
    raw["rotation"] |= {"r1": "hadamard"}
    parse_params(raw)  # R5 is left
    for nothing in ({"r5": "identity"}, {"r2": "random"}):
        with pytest.raises(ParamsError, match=r"rotation\.online_signs=true: .*Set rotation\.r1: online"):
            parse_params(raw | {"rotation": raw["rotation"] | nothing})


def test_an_adapter_of_a_model_that_slides_is_refused_at_once():
    raw = changed("export.formats", ["compressed-tensors", "peft"])
    raw["rotation"] |= {"r1": "hadamard", "r4": "identity", "r5": "identity"}
    params = parse_params(raw)
    check_against_model(params, {}, 4, 2048)
    with pytest.raises(ParamsError, match=r"export\.formats: .*\(sliding_window=512\).*Remove peft"):
        check_against_model(params, {}, 4, 2048, 512)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"sites": ["down_prj"], "bits": 8}, r"overrides\[0\]\.sites='down_prj': .*Did you mean 'down_proj'"),
        ({"sites": ["down_proj"], "blocks": [2, 4], "bits": 8}, r"blocks=4: the model has blocks 0 to 3"),
        ({"sites": ["key"], "group_size": 48}, r"overrides\[0\]\.group_size=48: does not divide 64, the width of key"),
    ],
)
def test_overrides_are_checked_against_the_model(override, message):
    params = parse_params(changed("quantizer_init.overrides", [override]))
    with pytest.raises(ParamsError, match=message):
        check_against_model(params, WIDTHS, 4, 2048)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"sites": ["down_proj"], "mode": "dynamic"}, r"overrides\[0\]\.mode: down_proj has no such setting"),
        ({"sites": ["mlp_hidden"], "rounding": "rtn"}, r"overrides\[0\]\.rounding: mlp_hidden has no such setting"),
        ({"sites": ["q_proj"], "range": "percentile"}, r"range='percentile': not for weights"),
        ({"sites": ["q_proj"]}, r"overrides\[0\] changes nothing"),
        ({"sites": ["q_proj"], "group_size": 1}, r"group_size=1: allowed are -1"),
        ({"sites": [], "bits": 8}, r"sites=\[\]"),
        ({"sites": ["q_proj"], "bit": 8}, r"bit: unknown key"),
        ({"sites": ["q_proj"], "bits": 9}, r"bits=9: allowed are"),
    ],
)
def test_contradictory_overrides_are_refused(override, message):
    with pytest.raises(ParamsError, match=message):
        parse_params(changed("quantizer_init.overrides", [override]))


def test_dynamic_percentiles_are_refused():
    params = changed("quantizer_init.activations.mode", "dynamic")
    params["quantizer_init"]["activations"]["range"] = "percentile"
    with pytest.raises(ParamsError, match=r"activations\.range='percentile': needs mode: static"):
        parse_params(params)


def test_an_override_that_makes_percentiles_dynamic_is_refused():
    params = changed("quantizer_init.overrides", [{"sites": ["mlp_hidden"], "mode": "dynamic"}])
    parse_params(params)
    params["quantizer_init"]["activations"]["range"] = "percentile"
    with pytest.raises(ParamsError, match=r"overrides\[0\]: mlp_hidden would be dynamic with range='percentile'"):
        parse_params(params)


def test_the_last_override_that_names_site_and_block_wins():
    overrides = [
        {"sites": ["down_proj", "key"], "bits": 8},
        {"sites": ["down_proj"], "blocks": [2], "bits": 6, "symmetric": False},
    ]
    init = parse_params(changed("quantizer_init.overrides", overrides)).quantizer_init
    down_proj = [resolve_site(init, "down_proj", block) for block in (1, 2)]
    assert [(settings.bits, settings.symmetric) for settings in down_proj] == [(8, True), (6, False)]
    assert resolve_site(init, "key", 0).bits == 8
    assert resolve_site(init, "value", 0).bits == 4


def write_changed(folder, *replacements):
    """Write params.yaml with pieces of its text replaced."""
    text = (ROOT / "params.yaml").read_text()
    for old, new in replacements:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "params.yaml").write_text(text)
    return folder / "params.yaml"


def test_keys_given_twice_are_reported_together_with_other_problems(tmp_path):
    path = write_changed(tmp_path, ("  r2: hadamard\n", "  r2: hadamrd\n  r2: hadamrd\n"))
    path.write_text(path.read_text() + "\nexport:\n  formats: []\n")
    with pytest.raises(ParamsError) as error:
        load_params(path)
    for key in (r"rotation\.r2", "export"):
        assert re.search(rf"\n  {key}: given 2 times, on lines \d+ and \d+\. Keep one of them\.", str(error.value))
    assert "rotation.r2='hadamrd': allowed are" in str(error.value)


@pytest.mark.parametrize(("name", "kind"), [("no", "a boolean"), ("yes", "a boolean"), ("12", "a number")])
def test_a_corpus_named_like_a_boolean_or_a_number_needs_quotes(name, kind, tmp_path):
    path = write_changed(
        tmp_path,
        ("  news:\n    source: packaged:news\n", f"  news:\n    source: packaged:news\n  {name}:\n    source: x\n"),
    )
    with pytest.raises(
        ParamsError, match=rf"corpora\.{name}: line \d+: YAML reads the name '{name}' as {kind}.*quotes: \"{name}\"\."
    ):
        load_params(path)
    path.write_text(path.read_text().replace(f"  {name}:\n", f'  "{name}":\n'))
    assert name in load_params(path).corpora


@pytest.mark.parametrize(("value", "kind"), [(False, "a boolean"), (12, "a number"), (date(2024, 1, 31), "a date")])
def test_a_corpus_that_a_list_names_without_quotes_needs_them(value, kind):
    with pytest.raises(
        ParamsError, match=rf"calibration\.train\.corpora.*: expected text, but .* as {kind}\. Put it in"
    ):
        parse_params(changed("calibration.train.corpora", ["news", value]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("calibration.train", None, r"calibration\.train=null: the group is empty\. .*\(corpora, length, windows\)"),
        (
            "corpora.news",
            None,
            r"corpora\.news=null: the group is empty\. .*\(generation, max_documents, source, text_field\)",
        ),
        ("quantizer_init.keys", 4, r"quantizer_init\.keys=4: expected a group of keys\. .*before_rope, bits"),
        (
            "evaluation.tasks",
            ["piqa"],
            r"evaluation\.tasks=\['piqa'\]: expected a group of keys\. .*names that you choose",
        ),
    ],
)
def test_a_group_without_keys_names_the_keys_it_needs(key, value, message):
    with pytest.raises(ParamsError, match=message):
        parse_params(changed(key, value))


@pytest.mark.parametrize("group", ["finetuning", "rotation", "corpora", "runtime"])
def test_a_whole_group_given_as_null_is_empty(group):
    raw = yaml.safe_load((ROOT / "params.yaml").read_text()) | {group: None}
    with pytest.raises(ParamsError, match=rf"1 problem\s+{group}=null: the group is empty\. Put its keys below it \("):
        parse_params(raw)


def test_missing_and_broken_files_say_so(tmp_path):
    with pytest.raises(ParamsError, match="does not exist"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(ParamsError, match="not valid YAML"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("just words")
    with pytest.raises(ParamsError, match="must hold groups"):
        load_params(tmp_path / "params.yaml")


def list_leaves(values, path=()):
    """Return (dotted key, value) for everything that is not a mapping."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from list_leaves(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


def override_text(path, *overrides):
    """Return params.yaml after `dvc exp run` with an -S for each override, which DVC applies with this function."""
    path.write_text(TEXT, encoding="utf-8")
    apply_overrides(path, list(overrides))
    return path.read_text(encoding="utf-8")


def test_params_yaml_has_the_form_that_dvc_writes(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT, encoding="utf-8")
    with modify_yaml(path):
        pass
    assert path.read_text(encoding="utf-8") == TEXT


SCALARS = [(key, value) for key, value in list_leaves(DEFAULT) if not isinstance(value, list)]


@pytest.mark.parametrize("group", DEFAULT)
def test_one_override_changes_one_line(group, tmp_path):
    for key, value in SCALARS:
        if key.startswith(f"{group}."):
            other = str(not value).lower() if isinstance(value, bool) else 7 if value != 7 else 8
            changed_text = override_text(tmp_path / "params.yaml", f"{key}={other}")
            compared = difflib.ndiff(TEXT.splitlines(), changed_text.splitlines())
            changed_lines = [line for line in compared if line[0] in "+-"]
            assert len(changed_lines) == 2, key
            assert changed_lines[1].partition(":")[0].removeprefix("+ ").strip() == key.rpartition(".")[2]


@pytest.mark.parametrize("value", ["\"it's: 'a'\"", "'~/ä b/c'", "/x" * 30, "packaged:a", "'#1'"])
def test_one_override_changes_one_line_whatever_its_text(value, tmp_path):
    lines = override_text(tmp_path / "params.yaml", f"model.source={value}").splitlines()
    (changed_line,) = set(lines) - set(TEXT.splitlines())
    assert len(lines) == len(TEXT.splitlines())
    text = value[1:-1] if value[0] in "\"'" else value
    assert yaml.safe_load(changed_line) == {"source": text}
    assert yaml.safe_load("\n".join(lines))["model"]["source"] == text


@pytest.mark.parametrize(
    ("overrides", "removed", "added"),
    [
        (["+corpora.mine.source=/x.jsonl"], [], ["  mine:", "    source: /x.jsonl"]),
        (["+evaluation.tasks.piqa.limit=5"], [], ["    piqa:", "      limit: 5"]),
        (["~evaluation.tasks.word_analogies"], ["    word_analogies:", "      limit: 64"], []),
        (["calibration.train.corpora=[news]"], ["    - wikipedia"], []),
        (
            ["~calibration.train.corpora", "+calibration.train.corpora={wikipedia: 5, news: 1}"],
            ["    - wikipedia", "    - news"],
            ["      wikipedia: 5", "      news: 1"],
        ),
        (
            ["quantizer_init.overrides=[{sites: [key], bits: 8}]"],
            ["  overrides: []"],
            ["  overrides:", "  - sites:", "    - key", "    bits: 8"],
        ),
    ],
)
def test_entries_that_come_and_go_change_their_own_lines(overrides, removed, added, tmp_path):
    changed_text = override_text(tmp_path / "params.yaml", *overrides)
    compared = list(difflib.ndiff(TEXT.splitlines(), changed_text.splitlines()))
    assert sorted(line[2:] for line in compared if line[0] == "-") == sorted(removed)
    assert sorted(line[2:] for line in compared if line[0] == "+") == sorted(added)


def test_overrides_of_lists_keep_every_comment(tmp_path):
    comments = [line for line in TEXT.splitlines() if line.lstrip().startswith("#")]
    lists = [key for key, value in list_leaves(DEFAULT) if isinstance(value, list)]
    assert len(lists) == 10
    for key in lists:
        changed_text = override_text(tmp_path / "params.yaml", f"{key}=[news]")
        assert [line for line in changed_text.splitlines() if line.lstrip().startswith("#")] == comments, key


def test_every_key_is_explained_by_a_comment_above_it_or_its_group():
    lines = TEXT.splitlines()
    for number, line in enumerate(lines):
        if line.strip() and not line.lstrip().startswith(("#", "-")) and line.startswith("  ") and ":" in line:
            above = lines[number - 1].strip()
            explained = above.startswith("#") or _sibling_or_parent_is_explained(lines, number)
            assert explained, line


def _sibling_or_parent_is_explained(lines: list[str], number: int) -> bool:
    """Return whether a key is inside a group whose comment lists its keys, such as `windows:` under `train:`."""
    indent = len(lines[number]) - len(lines[number].lstrip())
    for above in range(number - 1, -1, -1):
        text = lines[above]
        if text.strip() and len(text) - len(text.lstrip()) < indent and not text.lstrip().startswith("#"):
            return lines[above - 1].lstrip().startswith("#") or _sibling_or_parent_is_explained(lines, above)
    return False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"format": "fp8_e4m3"}}, r"weights\.bits=4: fp8_e4m3 has 8 bits \(weights\)\. Set bits: 8"),
        (
            {"activations": {"format": "nvfp4", "symmetric": False}},
            r"activations\.symmetric=false: nvfp4 has no zero point",
        ),
        (
            {"keys": {"format": "mxfp4"}},
            r"keys\.mode='static': mxfp4 has no static scales \(keys\)\. Set mode: dynamic",
        ),
        ({"values": {"format": "nvfp4", "group_size": 8}}, r"values\.group_size=8: nvfp4 has blocks of 16"),
        ({"weights": {"format": "fp4"}}, r"weights\.format='fp4': allowed are .*'nvfp4'"),
    ],
)
def test_settings_that_a_number_format_fixes_cannot_be_changed(changes, message):
    raw = copy.deepcopy(DEFAULT)
    for group, values in changes.items():
        raw["quantizer_init"][group] |= values
    with pytest.raises(ParamsError, match=message):
        parse_params(raw)


def test_blocks_that_do_not_divide_a_model_are_reported():
    raw = copy.deepcopy(DEFAULT)
    raw["rotation"] |= {"r1": "block_hadamard", "block_size": 7}
    raw["quantizer_init"]["weights"]["format"] = "nvfp4"
    params = parse_params(raw)
    widths = {"attention_input": 64, "value": 64, "mlp_hidden": 96, "key": 64, "q_proj": 64, "down_proj": 56}
    with pytest.raises(ParamsError) as error:
        check_against_model(params, widths, 2, 4096)
    assert "rotation.block_size=7: does not divide 64, the width that r1 rotates" in str(error.value)
    assert "weights.format='nvfp4': its blocks of 16 do not divide 56, the width of down_proj" in str(error.value)
    assert str(error.value).count("do not divide") == 1
