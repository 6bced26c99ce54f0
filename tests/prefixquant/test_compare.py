"""`prefixquant compare`: the numbers of each run, and only the settings that differ."""

import json

import pytest
import yaml

from pipeline.runtime.errors import PipelineError
from prefixquant import compare

RESULT = {"bits": "W4A4KV4 static", "prefix": "found (3)", "ratio": {"news": 1.187}, "mib": 106.61, "minutes": 19}


@pytest.fixture
def make_run(tmp_path):
    def make(name, settings, **changes):
        work = tmp_path / f"{name}.work"
        (work / "metrics").mkdir(parents=True)
        (work / "dvc.yaml").write_text("stages: {}\n")
        (work / "params.yaml").write_text(yaml.safe_dump(settings))
        (work / "metrics/report.json").write_text(json.dumps(RESULT | changes))
        return work

    return make


def test_results_and_the_settings_that_differ(make_run, monkeypatch, capsys):
    first = make_run("first", {"model": {"source": "m"}, "prefix": {"use": "found"}, "tasks": {}})
    changes = {"ratio": {"news": 1.5, "mine": 2.0}, "mib": 90, "prefix": "none (0 tokens)"}
    make_run("second", {"model": {"source": "m"}, "prefix": {"use": None}, "tasks": {"piqa": {"limit": 3}}}, **changes)
    out = first.with_name("second")  # the --out of a run names its work folder
    monkeypatch.setattr("sys.argv", ["prefixquant compare", str(first), str(out), str(first)])
    compare.main()
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["run", "bits", "prefix", "ratio news", "ratio mine", "MiB", "minutes"],
        ["first.work", "W4A4KV4 static", "found (3)", "1.187", "-", "106.61", "19"],
        ["second.work", "W4A4KV4 static", "none (0 tokens)", "1.5", "2.0", "90", "19"],
        [],
        ["setting that differs", "first.work", "second.work"],
        ["prefix.use", "found", "null"],
        ["tasks", "{}", "-"],
        ["tasks.piqa.limit", "-", "3"],
    ]


def test_equal_settings_and_equal_names(make_run, tmp_path):
    settings = {"calibration": {"seed": 3}}
    one, two = make_run("a/run", settings), make_run("b/run", settings)
    lines = compare.compare_runs([one, two])
    assert [line.split()[0] for line in lines[1:3]] == [str(one), str(two)]
    assert lines[-1] == "All settings are equal."
    assert len(compare.compare_runs([one, one])) == 2


def test_a_run_without_report_is_named(make_run):
    one, two = make_run("one", {}), make_run("two", {})
    (two / "metrics/report.json").unlink()
    with pytest.raises(PipelineError, match=r"two\.work/metrics/report\.json: does not exist"):
        compare.compare_runs([one, two])
    (one / "metrics/report.json").write_text('{"bits": "W4"}')
    with pytest.raises(PipelineError, match="lacks prefix, ratio, mib, minutes"):
        compare.compare_runs([one])
