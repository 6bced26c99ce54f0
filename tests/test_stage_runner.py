"""`python -m stages.run`: the stages of dvc.yaml without DVC. Small stages replace the project's."""

import subprocess
import sys

import pytest
import yaml

from pipeline.runtime.arguments import ArgumentError
from pipeline.runtime.stage_list import read_stages
from stages.run import select_stages
from tests.conftest import ROOT

# Each stage notes its name, fails if a file `fail` exists, and copies its input with a parameter added.
SCRIPT = """
import pathlib, sys, yaml
name, source, target = sys.argv[1:]
with open("ran.txt", "a") as file:
    print(name, file=file)
if pathlib.Path("fail").exists():
    sys.exit(3)
seed = yaml.safe_load(open("params.yaml"))["rotation"]["seed"]
pathlib.Path(target).mkdir(parents=True)
pathlib.Path(target, "out.txt").write_text(f"{pathlib.Path(source).read_text()} {seed if name == 'b' else ''}")
"""
DVC_YAML = {
    "stages": {
        "c": {"cmd": "python work.py c b/out.txt c", "deps": ["b"], "outs": ["c"]},
        "a": {"cmd": "python work.py a input.txt a", "deps": ["input.txt"], "outs": ["a"]},
        "b": {"cmd": "python work.py b a/out.txt b", "deps": ["a/out.txt"], "params": ["rotation.seed"], "outs": ["b"]},
        "d": {"cmd": "python work.py d input.txt d", "deps": ["input.txt"], "outs": ["d"], "always_changed": True},
    }
}


@pytest.fixture
def run(project):
    """Return a function that runs stages in the folder of the fixture `project`, and returns those that ran."""
    (project / "work.py").write_text(SCRIPT)
    (project / "input.txt").write_text("x")
    (project / "dvc.yaml").write_text(yaml.safe_dump(DVC_YAML, sort_keys=False))

    def run_stages(*names, code=0):
        (project / "ran.txt").write_text("")
        command = [sys.executable, "-m", "stages.run", *names]
        done = subprocess.run(command, cwd=project, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return (project / "ran.txt").read_text().split()

    return run_stages


def test_stages_run_in_order_and_again_only_where_something_changed(run, project):
    assert run() == ["a", "b", "c", "d"]
    assert run() == ["d"]
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["rotation"]["seed"] = 7
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    assert run() == ["b", "c", "d"]
    assert (project / "c/out.txt").read_text().split() == ["x", "7"]
    (project / "input.txt").write_text("yy")
    assert run() == ["a", "b", "c", "d"]
    (project / "b/out.txt").unlink()
    assert run("b") == ["b"]


def test_a_stage_that_fails_stops_the_run_which_continues_there(run, project):
    (project / "fail").touch()
    assert run(code=1) == ["a"]
    (project / "fail").unlink()
    assert run() == ["a", "b", "c", "d"]


def test_a_stage_is_run_with_those_that_it_needs():
    stages = read_stages(ROOT)
    names = [stage.name for stage in select_stages(stages, ["rotation"])]
    assert names == ["code", "sources", "model", "rotation"]
    assert select_stages(stages, []) == stages
    with pytest.raises(ArgumentError, match="'rotatoin': unknown stage"):
        select_stages(stages, ["rotatoin"])
