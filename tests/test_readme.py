"""What the README tells a reader to type must exist."""

import itertools
import math
import re

import pytest
import torch
import yaml

from benchmarks.quality import format_table
from benchmarks.summary import mean_and_error, read_evaluations
from benchmarks.workspace import expand_stages, override, read_params
from pipeline.params import parse_params
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_result_table_is_what_the_metrics_in_git_say():
    """`make table` prints it; the committed metrics are those of the default run."""
    assert format_table(read_evaluations()) in README


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    targets |= set(re.search(r"^SWEEPS := (.+)$", makefile, re.MULTILINE)[1].split())
    named = set(re.findall(r"`make ([\w-]+)`", README)) | set(re.findall(r"^    make ([\w-]+)", README, re.MULTILINE))
    assert {"repro", "test"} <= named <= targets


def test_modules_and_files_exist():
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for path in re.findall(r"`((?:pipeline|benchmarks|metrics)/[\w/]+\.(?:py|json))`", README):
        if not re.search(r"[A-Z]", path):
            assert (ROOT / path).is_file(), path


def test_overrides_are_valid_params():
    commands = re.findall(r"dvc exp run (.+)", README)
    assert len(commands) >= 4
    for command in commands:
        pairs = [pair.split("=", 1) for pair in re.findall(r"-S (\S+)", command)]
        queued = "--queue" in command  # of a list every value is an experiment of its own
        choices = [[(key, value) for value in (values.split(",") if queued else [values])] for key, values in pairs]
        for chosen in itertools.product(*choices):
            parse_params(override(read_params(), {key: yaml.safe_load(value) for key, value in chosen}))


def test_the_yaml_examples_are_valid():
    override_example, example = re.findall(r"```yaml\n(.+?)```", README, re.DOTALL)
    params = read_params()
    params["quantizer_init"] |= yaml.safe_load(override_example)["quantizer_init"]
    assert parse_params(params).quantizer_init.overrides[0].blocks == [2, 11, 28]
    params["corpora"] |= yaml.safe_load(example)["corpora"]
    assert set(parse_params(params).corpora) == {"wikipedia", "news", "mine", "c4"}


def test_every_stage_is_in_the_table_and_the_graph():
    for name in expand_stages(read_params()):
        stage, _, variant = name.partition("@")
        assert re.search(rf"\| `{stage}[`@]", README), name
        assert stage in README.split("```mermaid")[1].split("```")[0]
        assert variant in README


def test_supported_families_are_those_of_the_code():
    from pipeline.models.architectures import ARCHITECTURES, IMPORTED_AS

    (listed,) = re.findall(r"families: ([\w, ]+)\.", README)
    assert [name.lower() for name in listed.split(", ")] == sorted(ARCHITECTURES | IMPORTED_AS)


def test_paired_differences_of_a_hand_computed_case():
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))


def test_sweeps_set_keys_that_exist_to_values_they_take():
    makefile = (ROOT / "Makefile").read_text()
    sweeps = re.findall(r"^sweep-[\w-]+: SWEEP = (.+)$", makefile, re.MULTILINE)
    assert len(sweeps) == 4
    for sweep in sweeps:
        for key, values in re.findall(r"-S ([\w.]+)=(\S+)", sweep):
            for value in values.split(","):
                parse_params(override(read_params(), {key: yaml.safe_load(value)}))


def test_the_plots_page_needs_no_network():
    folder = ROOT / "docs/plots"
    template = (folder / "template.html").read_text()
    scripts = re.findall(r'<script src="([^"]+)">', template)
    assert len(scripts) == 3
    for script in scripts:
        assert script.startswith("../docs/plots/")
        assert (ROOT / script.removeprefix("../")).stat().st_size > 10_000
    assert "{plot_divs}" in template
    assert "{scripts}" not in template
    assert "html_template = ../docs/plots/template.html" in (ROOT / ".dvc/config").read_text()
    licences = (folder / "LICENSES.txt").read_text()
    assert all(f"== {name} " in licences for name in ("vega", "vega-lite", "vega-embed"))
