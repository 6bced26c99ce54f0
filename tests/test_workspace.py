"""Stages that benchmarks run outside DVC: each result once, and none of another text than is there now."""

import shutil
import subprocess

import pytest

from benchmarks.workspace import ROOT, Workspace, override
from tests.conftest import read_json, tiny_params


@pytest.fixture
def started(monkeypatch):
    """The commands that are run."""
    commands = []
    run = subprocess.run

    def note(command, **options):
        commands.append(" ".join(command[2:]))
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", note)
    return commands


def test_sources_are_looked_at_once_and_another_one_reruns_no_stage_that_does_not_read_it(
    tmp_path, model_folders, started
):
    corpus = tmp_path / "prose.txt"
    shutil.copyfile(ROOT / "tests/prose.txt", corpus)
    params = tiny_params(model_folders["llama_tied"], corpus)
    workspace = Workspace(tmp_path / "work")
    folder = workspace.run("corpora@prose", params)
    assert sorted(started) == ["stages.code", "stages.corpora prose", "stages.sources"]
    assert workspace.run("corpora@prose", params) == folder
    assert len(started) == 3
    (tmp_path / "tasks").mkdir()
    other = override(
        params, {"model.source": str(model_folders["qwen2"]), "evaluation.task_folder": str(tmp_path / "tasks")}
    )
    assert workspace.run("corpora@prose", other) == folder
    assert [name for name in started[3:] if name != "stages.code"] == ["stages.sources"]
    before = len(started)

    corpus.write_text(corpus.read_text().replace("the", "THE"))
    changed = Workspace(tmp_path / "work").run("corpora@prose", params)
    assert [name for name in started[before:] if name != "stages.code"] == ["stages.sources", "stages.corpora prose"]
    characters = [read_json(path / "metrics/corpora/prose.json")["train"] for path in (folder, changed)]
    assert characters[0] == characters[1]
    assert "THE" in (changed / "data/prose/train.jsonl").read_text()
    assert "THE" not in (folder / "data/prose/train.jsonl").read_text()
