import copy

import pytest
import yaml
from conftest import ROOT

from pipeline.params import ParamsError, check_against_model, load_params, parse_params

DEFAULT = yaml.safe_load((ROOT / "params.yaml").read_text())


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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantizer_init.scale_serch", "mse", r"quantizer_init\.scale_serch: unknown key; did you mean 'scale_search'"),
        ("corpora.news.sorce", "x", r"corpora\.news\.sorce: unknown key; did you mean 'source'"),
        ("bits", 4, r"bits: unknown key; remove it \(known here: calibration, corpora"),
        ("rotation.r1", "hadamrd", r"rotation\.r1='hadamrd': allowed are .*did you mean 'hadamard'"),
        ("prefix.use", "nothing", r"prefix\.use='nothing': allowed are 'none' or 'found'"),
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
        ("quantizer_init.weights.group_size", 0, r"group_size=0: allowed are -1"),
        ("model.source", "packaged:llama", r"model\.source='packaged:llama' is not packaged; packaged are"),
        ("corpora.news.source", "packaged:new", r"packaged are: packaged:wikipedia, packaged:news"),
    ],
)
def test_bad_values_name_key_value_and_what_is_allowed(key, value, message):
    with pytest.raises(ParamsError, match=message):
        parse_params(changed(key, value))


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


def test_group_size_that_does_not_divide_lists_every_layer():
    params = parse_params(changed("quantizer_init.weights.group_size", 128))
    with pytest.raises(ParamsError, match=r"group_size=128 does not divide in_features=200 \(a\.down_proj\)") as error:
        check_against_model(params, {"a.q_proj": 256, "a.down_proj": 200, "a.o_proj": 100}, 2048)
    assert "a.o_proj" in str(error.value)
    assert "a.q_proj" not in str(error.value)
    check_against_model(params, {"a.q_proj": 256}, 2048)


def test_windows_longer_than_the_model_are_listed():
    params = parse_params(changed("calibration.evaluation.length", 4096))
    with pytest.raises(ParamsError, match=r"evaluation\.length=4096 exceeds .*max_position_embeddings=2048"):
        check_against_model(params, {}, 2048)
    check_against_model(params, {}, 8192)


def test_missing_and_broken_files_say_so(tmp_path):
    with pytest.raises(ParamsError, match="does not exist"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(ParamsError, match="not valid YAML"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("just words")
    with pytest.raises(ParamsError, match="must hold groups"):
        load_params(tmp_path / "params.yaml")


def test_every_key_is_explained_by_a_comment_above_it_or_its_group():
    lines = (ROOT / "params.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.strip() and not line.lstrip().startswith(("#", "-")) and line.startswith("  ") and ":" in line:
            above = lines[number - 1].strip()
            explained = above.startswith("#") or _sibling_or_parent_is_explained(lines, number)
            assert explained, line


def _sibling_or_parent_is_explained(lines: list[str], number: int) -> bool:
    """A key inside a group whose comment lists its keys, such as `windows:` under `train:`."""
    indent = len(lines[number]) - len(lines[number].lstrip())
    for above in range(number - 1, -1, -1):
        text = lines[above]
        if text.strip() and len(text) - len(text.lstrip()) < indent and not text.lstrip().startswith("#"):
            return lines[above - 1].lstrip().startswith("#") or _sibling_or_parent_is_explained(lines, above)
    return False
