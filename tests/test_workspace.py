"""Stages that benchmarks run outside DVC: each result once, and never from another text than the present one."""

import shutil
import subprocess

import pytest

from benchmarks.workspace import Workspace, override
from tests.conftest import PROSE_FILE, read_json, tiny_params


@pytest.fixture
def started(monkeypatch):
    """Return a list that collects the commands that are run."""
    commands = []
    run = subprocess.run

    def note(command, **options):
        commands.append(" ".join(command[2:]))
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", note)
    return commands


def test_sources_are_checked_once_and_a_changed_one_reruns_only_its_readers(tmp_path, model_folders, started):
    corpus = tmp_path / "prose.txt"
    shutil.copyfile(PROSE_FILE, corpus)
    params = tiny_params(model_folders["llama_tied"], corpus)
    workspace = Workspace(tmp_path / "work")
    folder = workspace.run("corpora@prose", params)
    assert started == ["stages.code", "stages.sources", "stages.corpora prose"]
    assert workspace.run("corpora@prose", params) == folder
    assert len(started) == 3
    (tmp_path / "tasks").mkdir()
    other = override(
        params, {"model.source": str(model_folders["qwen2"]), "evaluation.task_folder": str(tmp_path / "tasks")}
    )
    assert workspace.run("corpora@prose", other) == folder
    assert started[3:] == ["stages.sources"]

    corpus.write_text(corpus.read_text().replace("the", "THE"))
    changed = Workspace(tmp_path / "work").run("corpora@prose", params)
    assert started[4:] == ["stages.code", "stages.sources", "stages.corpora prose"]
    characters = [read_json(path / "metrics/corpora/prose.json")["train"] for path in (folder, changed)]
    assert characters[0] == characters[1]
    assert "THE" in (changed / "data/prose/train.jsonl").read_text()
    assert "THE" not in (folder / "data/prose/train.jsonl").read_text()
