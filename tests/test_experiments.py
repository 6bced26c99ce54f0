"""Sweeps by `dvc exp run --temp`, with DVC replaced by a list of its commands. DVC itself runs in test_repro.py."""

import subprocess

import pytest
import yaml

from pipeline import experiments
from pipeline.experiments import find_unfinished, list_combinations, name_experiment, run_sweep


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
