"""`prefixquant compare`: the numbers of each run, and only the settings that differ."""

import json

import pytest
import yaml

from pipeline.runtime.errors import PipelineError
from prefixquant import compare

RESULT = {"bits": "W4A4KV4 static", "prefix": "found (3)", "ratio": {"news": 1.187}, "mib": 106.61}


@pytest.fixture
def make_run(tmp_path):
    def make(name, settings, **changes):
        work = tmp_path / f"{name}.work"
        (work / "metrics/runtime").mkdir(parents=True)
        (work / "dvc.yaml").write_text("stages: {}\n")
        (work / "params.yaml").write_text(yaml.safe_dump(settings))
        (work / "metrics/report.json").write_text(json.dumps(RESULT | changes))
        (work / "metrics/runtime/report.json").write_text(json.dumps({"minutes": 19}))
        return work

    return make


def test_results_and_the_settings_that_differ(make_run, monkeypatch, capsys):
    first = make_run("first", {"model": {"source": "m"}, "prefix": {"use": "found"}, "tasks": {}})
    changes = {"ratio": {"news": 1.5, "mine": 2.0}, "mib": 90, "prefix": "none (0 tokens)"}
    make_run("second", {"model": {"source": "m"}, "prefix": {"use": None}, "tasks": {"piqa": {"limit": 3}}}, **changes)
    out = first.with_name("second")  # the --out of a run names its work folder
    page = first.with_name("comparison.html")
    monkeypatch.setattr("sys.argv", ["prefixquant compare", str(first), str(out), str(first), "--page", str(page)])
    compare.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == ["", f"With pictures: {page}"]
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in printed[:-2]]
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
    lines = compare.compare_runs(compare.read_runs([one, two]))
    assert [line.split()[0] for line in lines[1:3]] == [str(one), str(two)]
    assert lines[-1] == "All settings are equal."
    assert len(compare.compare_runs(compare.read_runs([one, one]))) == 2


def test_a_run_without_report_is_named(make_run):
    one, two = make_run("one", {}), make_run("two", {})
    (two / "metrics/report.json").unlink()
    with pytest.raises(PipelineError, match=r"two\.work/metrics/report\.json: does not exist"):
        compare.read_runs([one, two])
    (one / "metrics/report.json").write_text('{"bits": "W4"}')
    with pytest.raises(PipelineError, match="lacks prefix, ratio, mib"):
        compare.read_runs([one])


def test_the_page_has_a_point_for_each_run_and_corpus_and_the_settings_that_differ(make_run):
    first = make_run("first", {"calibration": {"seed": 3}})
    second = make_run("second", {"calibration": {"seed": 4}}, ratio={"news": 1.5, "mine": 2.0}, bits="<W8>")
    (second / "metrics/runtime/report.json").unlink()  # as after `dvc pull` without it
    page = compare.build_comparison(compare.read_runs([first, second]))
    assert page.count("<svg") == 3
    assert page.count("<circle") == 3 + 3 + 1  # by size, by bits, and by time, which one run lacks
    assert "<title>second.work, mine: 2</title>" in page
    assert "&lt;W8&gt;" in page
    assert "<W8>" not in page
    assert "<td>calibration.seed</td><td>3</td><td>4</td>" in page


def test_without_folders_the_experiments_of_the_project_are_compared(make_run, monkeypatch):
    """Minutes are not in git, so an experiment's minutes come from DVC's cache."""
    project = make_run("project", {"calibration": {"seed": 3}})
    lock = {"stages": {"report": {"outs": [{"path": "metrics/runtime/report.json", "md5": "ab12"}]}}}
    texts = {
        "metrics/report.json": json.dumps(RESULT),
        "params.yaml": "calibration: {seed: 4}",
        "dvc.lock": yaml.safe_dump(lock),
    }
    cached = project / ".dvc/cache/files/md5/ab/12"
    cached.parent.mkdir(parents=True)
    cached.write_text('{"minutes": 7}')
    monkeypatch.chdir(project)
    monkeypatch.setattr(compare, "list_experiments", lambda: {"seed-4": "c0ffee"})
    monkeypatch.setattr(compare, "read_committed", lambda name, revision: texts.get(name.as_posix()))
    runs = compare.read_experiments()
    assert [(run.name, run.results["minutes"]) for run in runs] == [("workspace", 19), ("seed-4", 7)]
    assert compare.compare_runs(runs)[-1].split() == ["calibration.seed", "3", "4"]


def test_a_folder_without_results_and_experiments_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match="no run to compare"):
        compare.read_experiments()
