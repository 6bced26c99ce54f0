"""Sweeps by `dvc exp run --temp`: with DVC replaced by a list of its commands, and in a project of one small stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline import experiments
from pipeline.experiments import find_unfinished, list_combinations, name_experiment, run_sweep
from pipeline.runtime.git import list_experiments, read_committed


def test_choices_are_combined_as_dvc_combines_them():
    assert list_combinations(["a.b=1,2", "c=x"]) == [["a.b=1", "c=x"], ["a.b=2", "c=x"]]
    assert len(list_combinations(["a.b=1,2", "c=x,y,z"])) == 6
    assert list_combinations(["~a.b", "+a.b={x:5,y:1}"]) == [["~a.b", "+a.b={x:5,y:1}"]]
    assert list_combinations(["a.b=[x,y]"]) == [["a.b=[x,y]"]]


def test_names_say_the_settings_and_are_names_of_git():
    assert name_experiment(["quantizer_init.weights.bits=4", "prefix.use=none"]) == "weights.bits-4-prefix.use-none"
    for overrides in (["~a.b", "+a.b={x: 5, y: 1}"], ["model.source=~/models/a b"]):
        name = name_experiment(overrides)
        subprocess.run(["git", "check-ref-format", f"refs/exps/aa/bb/{name}"], check=True)


def test_other_overrides_have_other_names_all_of_which_git_accepts():
    """A sweep removes an experiment of the same name, and DVC would refuse a name that git does not accept."""
    values = ["/a/b", "/a-b", "/a b", "../a", "a/..", "a.lock", "", "1e+2", "1e-2", "[x,y]", "{x:y}", "ä", "a" * 300]
    names = [name_experiment([f"model.source={value}"]) for value in values]
    names += [name_experiment(["~model.source"]), name_experiment(["+model.source=ä"])]
    assert len(set(names)) == len(names) == 15
    for name in names:
        assert len(name.encode()) < 200
        subprocess.run(["git", "check-ref-format", f"refs/exps/aa/bb/{name}"], check=True)
        assert not name.startswith("-")


def test_a_sweep_runs_all_experiments_in_order_and_names_those_that_failed(monkeypatch, capsys):
    commands = []

    def run(command, check):
        commands.append(" ".join(command))
        return subprocess.CompletedProcess(command, 1 if "a.b=2" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(experiments, "list_experiments", lambda: {"a.b-3": "0"})
    assert run_sweep(["a.b=1,2,3"]) == ["a.b-2"]
    assert commands == [
        "dvc exp run --temp --name a.b-1 -S a.b=1",
        "dvc exp run --temp --name a.b-2 -S a.b=2",
        "dvc exp remove --quiet a.b-3",
        "dvc exp run --temp --name a.b-3 -S a.b=3",
    ]
    assert "=== experiment 2 of 3: a.b=2" in capsys.readouterr().out


@pytest.mark.parametrize(("recorded", "unfinished"), [(1, {}), (2, {"mine": "a.b is 1, the run had 2"})])
def test_experiments_whose_report_is_of_another_run_are_found(recorded, unfinished, monkeypatch):
    files = {
        "params.yaml": {"a": {"b": 1}},
        "dvc.lock": {"stages": {"report": {"params": {"params.yaml": {"a": {"b": recorded}}}}}},
        "dvc.yaml": {"stages": {"report": {}}},
    }
    monkeypatch.setattr(experiments, "list_experiments", lambda: {"mine": "0123"})
    monkeypatch.setattr(experiments, "read_committed", lambda path, revision: yaml.safe_dump(files[str(path)]))
    assert find_unfinished() == unfinished


STAGE = """\
import json, yaml
from pathlib import Path
params = yaml.safe_load(Path("params.yaml").read_text())
Path("metrics.json").write_text(json.dumps({"quotient": params["a"] / params["b"]}))
"""
PIPELINE = """\
stages:
  divide:
    cmd: python divide.py
    deps: [divide.py]
    params: [a, b]
    metrics: [metrics.json: {cache: false}]
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a function that runs `dvc` in a project of one stage with the params a, b and folder."""
    monkeypatch.chdir(tmp_path)
    for role in ("AUTHOR", "COMMITTER"):  # of the experiments' commits
        monkeypatch.setenv(f"GIT_{role}_NAME", "me")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "me@x")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / ".dvc/tmp/site-cache"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")

    def run_dvc(*words):
        subprocess.run([sys.executable, "-m", "dvc", *words], check=True, stdout=subprocess.DEVNULL)

    Path("divide.py").write_text(STAGE)
    Path("dvc.yaml").write_text(PIPELINE)
    Path("params.yaml").write_text("a: 6\nb: 1\nfolder: .\n")
    subprocess.run(["git", "init", "--quiet"], check=True)
    run_dvc("init", "--quiet")
    run_dvc("repro", "--quiet")
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run(["git", "commit", "--quiet", "-m", "start"], check=True)
    return run_dvc


def read_experiments():
    """Return name -> (params, quotient) of the experiments."""
    found = {}
    for name, revision in list_experiments().items():
        params, metrics = (read_committed(Path(file), revision) for file in ("params.yaml", "metrics.json"))
        found[name] = yaml.safe_load(params), json.loads(metrics)["quotient"]
    return found


def test_sweeps_do_not_add_up_neither_in_one_nor_after_another_nor_after_a_failure(project):
    start = {"a": 6, "b": 1, "folder": "."}
    assert run_sweep(["a=2,4"]) == []
    assert run_sweep(["b=0,3"]) == ["b-0"]  # 6 / 0
    assert run_sweep(["folder=../x"]) == []
    found = read_experiments()
    assert sorted(found.values(), key=str) == sorted(
        [
            (start | {"a": 2}, 2.0),
            (start | {"a": 4}, 4.0),
            (start | {"b": 3}, 2.0),
            (start | {"folder": "../x"}, 6.0),
        ],
        key=str,
    )
    assert {"a-2", "a-4", "b-3"} < found.keys()
    assert yaml.safe_load(Path("params.yaml").read_text()) == start
    assert json.loads(Path("metrics.json").read_text()) == {"quotient": 6.0}


def test_experiments_in_place_add_up_until_the_documented_reset(project):
    """See docs/experiments.md: `git checkout params.yaml && dvc repro` resets the project."""
    project("exp", "run", "--quiet", "-S", "a=4")
    project("exp", "run", "--quiet", "-S", "b=2")
    assert json.loads(Path("metrics.json").read_text()) == {"quotient": 2.0}
    project("exp", "run", "--quiet", "--temp", "-n", "apart", "-S", "b=4")  # it starts from the present file
    assert read_experiments()["apart"] == ({"a": 4, "b": 4, "folder": "."}, 1.0)
    subprocess.run(["git", "checkout", "--quiet", "params.yaml"], check=True)
    project("repro", "--quiet")
    assert json.loads(Path("metrics.json").read_text()) == {"quotient": 6.0}
    subprocess.run(["git", "diff", "--quiet", "HEAD"], check=True)
