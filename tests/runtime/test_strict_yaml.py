"""Keys given twice and keys that are not text are listed with their lines, wherever they are."""

import pytest
import yaml

from pipeline.runtime.strict_yaml import read_strict_yaml
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("a: 1\nb: 2\na: 3", ["a: given 2 times, on lines 1 and 3. Keep one of them."]),
        ("a:\n  b: 1\n  c: 2\n  b: 1", ["a.b: given 2 times, on lines 2 and 4. Keep one of them."]),
        ("a:\n  - b: 1\n    b: 2", ["a[0].b: given 2 times, on lines 2 and 3. Keep one of them."]),
        ("a: {b: 1, b: 2}", ["a.b: given 2 times, on line 1. Keep one of them."]),
        ("a: 1\n'a': 2\n\"a\": 3", ["a: given 3 times, on lines 1, 2 and 3. Keep one of them."]),
        (
            "a: {c: 1, c: 2}\nb:\n  d: 1\n  d: 2\na: 3",
            [
                "a.c: given 2 times, on line 1. Keep one of them.",
                "b.d: given 2 times, on lines 3 and 4. Keep one of them.",
                "a: given 2 times, on lines 1 and 5. Keep one of them.",
            ],
        ),
    ],
)
def test_every_key_that_is_given_twice_is_listed_with_its_lines(text, problems):
    assert read_strict_yaml(text)[1] == problems


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, "a boolean") for name in ("no", "yes", "on", "off", "No", "TRUE", "false")],
        *[(name, "a number") for name in ("12", "1.5", "0x1F", "1_000", "12:30", ".inf", "-3")],
        *[(name, "null") for name in ("null", "~")],
        ("2024-01-31", "a date"),
    ],
)
def test_a_name_that_yaml_reads_as_something_else_stays_text_and_is_listed(name, kind):
    values, problems = read_strict_yaml(f"a: 1\ncorpora:\n  {name}: x\n")
    assert values == {"a": 1, "corpora": {name: "x"}}
    message = f'line 3: YAML reads the name {name!r} as {kind}, not as text. Put it in quotes: "{name}".'
    assert problems == [f"corpora.{name}: {message}"]
    assert read_strict_yaml(f'a: 1\ncorpora:\n  "{name}": x\n') == (values, [])


def test_a_name_in_quotes_and_without_them_is_given_twice():
    assert read_strict_yaml('no: 1\n"no": 2')[1] == [
        "no: line 1: YAML reads the name 'no' as a boolean, not as text. Put it in quotes: \"no\".",
        "no: given 2 times, on lines 1 and 2. Keep one of them.",
    ]


def test_anchors_merges_and_values_are_read_as_pyyaml_reads_them():
    text = "a: &a {b: 1, c: [yes, 12, ~, 2024-01-31]}\nd: {<<: *a, b: 2}\ne: *a\nf: &f [*f]\n"
    values, problems = read_strict_yaml(text)
    assert problems == []
    assert {key: values[key] for key in "ade"} == {key: yaml.safe_load(text)[key] for key in "ade"}
    params = (ROOT / "params.yaml").read_text()
    assert read_strict_yaml(params) == (yaml.safe_load(params), [])


@pytest.mark.parametrize("text", ["a: [", "? [1]\n: 2", "a: !!python/object:os.system x", "a: 1\n---\nb: 2"])
def test_text_that_is_not_yaml_or_not_safe_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        read_strict_yaml(text)


def test_a_long_key_is_shown_in_part():
    (problem,) = read_strict_yaml(f"{'k' * 500}: 1\n{'k' * 500}: 2")[1]
    assert problem == f"{'k' * 80}…: given 2 times, on lines 1 and 2. Keep one of them."


@pytest.mark.parametrize(("written", "value"), [("017", 15), ("1:30", 90), ("-0_17", -15), ("1:30.5", 90.5)])
def test_numbers_that_dvc_reads_as_others_are_listed(written, value):
    """YAML 1.2 has 17 and text there."""
    _, problems = read_strict_yaml(f"a:\n- 1\n- {written}\n")
    message = f"line 3: YAML 1.1 reads this as {value}, and DVC as something else. Write {value}, or"
    assert problems == [f'a[1]={written}: {message} "{written}" for text.']
    assert read_strict_yaml("a: [0, 00, 10, -3, 0.5, 1e5, 1_000, '017', 2024-01-31, yes]")[1] == []
