"""A job array by submitit's own executors, in a project of one small stage."""

import errno
import json
import os
import subprocess
import sys

import pytest

from pipeline.job_array import main, read_options, run_array
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.git import list_experiments, read_committed
from tests.conftest import ROOT

STAGE = """\
import json, yaml
from pathlib import Path
number = yaml.safe_load(Path("params.yaml").read_text())["number"]
with open("{calls}", "a") as calls:
    calls.write(f"{number}\\n")
Path("metrics.json").write_text(json.dumps({"square": number ** 2, "inverse": 1 / number}))
"""
PIPELINE = """\
stages:
  square:
    cmd: python square.py
    deps: [square.py]
    params: [number]
    metrics: [metrics.json]
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A DVC project whose stage notes every run in `calls`, outside of the project."""
    folder = tmp_path / "project"
    folder.mkdir()
    calls = tmp_path / "calls"
    (folder / "square.py").write_text(STAGE.replace("{calls}", str(calls)))
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text("number: 1\n")
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@x"]
    for command in ([*git, "init"], [sys.executable, "-m", "dvc", "init"], [*git, "add", "."]):
        subprocess.run([*command, "--quiet"] if command[-1] == "init" else command, cwd=folder, check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "start"], cwd=folder, check=True)
    for role in ("AUTHOR", "COMMITTER"):  # of the experiments' commits
        monkeypatch.setenv(f"GIT_{role}_NAME", "me")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "me@x")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # a job is a process that imports pipeline/
    monkeypatch.chdir(folder)
    return folder


def test_jobs_run_side_by_side_a_failure_stops_none_and_the_cache_is_shared(project, tmp_path, capsys, monkeypatch):
    def run(*numbers, cluster="local"):
        options = {"project": project, "cluster": cluster, "slurm": {}, "scratch": tmp_path, "logs": tmp_path / "logs"}
        return run_array([f"number={','.join(map(str, numbers))}"], **options)

    assert run(0, 3) == ["number-0"]  # 1 / 0
    assert "number-0: failed\nnumber-3: done" in capsys.readouterr().out
    experiments = list_experiments()
    assert experiments.keys() == {"number-3"}
    lock = read_committed("dvc.lock", experiments["number-3"])
    assert "number: 3" in lock
    # The second array renews the first one's experiment from the cache. A process of DVC still writes into its clone.
    remove, full = os.rmdir, []

    def refuse_to_remove(path, **options):
        if path != "tmp":
            return remove(path, **options)
        full.append(path)
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse_to_remove)
        assert run(3, cluster="debug") == []
    assert full
    assert (tmp_path / "calls").read_text().split().count("3") == 1
    assert list_experiments().keys() == {"number-3"}
    subprocess.run([sys.executable, "-m", "dvc", "exp", "apply", "--quiet", "number-3"], check=True)
    assert json.loads((project / "metrics.json").read_text())["square"] == 9


def test_options_of_sbatch_are_numbers_or_words():
    assert read_options(["partition=gpu", "time=240", "constraint=a=b"]) == {
        "partition": "gpu",
        "time": 240,
        "constraint": "a=b",
    }
    with pytest.raises(PipelineError, match=r"--slurm gpu: expected OPTION=VALUE"):
        read_options(["gpu"])


def test_a_machine_without_slurm_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["job_array", "-S", "a=1"])
    with pytest.raises(PipelineError, match=r"--cluster=slurm: submitit cannot use it"):
        main()
