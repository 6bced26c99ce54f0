import subprocess
from pathlib import Path

import pytest

from pipeline.runtime.git import list_experiments, read_committed


@pytest.fixture
def run_git(tmp_path, monkeypatch):
    """Run git in an empty folder, which becomes the current one, and return what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def run(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return run


def test_without_a_repository_or_git_nothing_is_read(run_git, monkeypatch):
    assert read_committed(Path("a.txt")) is None
    assert list_experiments() == {}
    run_git("init")
    assert read_committed(Path("a.txt")) is None
    assert list_experiments() == {}
    monkeypatch.setenv("PATH", "")
    assert read_committed(Path("a.txt")) is None


def test_committed_files_and_experiments_of_the_last_commit_are_read(run_git):
    run_git("init")
    Path("a.txt").write_text("committed ä\n", encoding="utf-8")
    run_git("add", "a.txt")
    run_git("commit", "-m", "first")
    Path("a.txt").write_text("changed")
    assert read_committed(Path("a.txt")) == "committed ä\n"
    assert read_committed(Path("b.txt")) is None
    head = run_git("rev-parse", "HEAD")
    run_git("commit", "-am", "second")
    later = run_git("rev-parse", "HEAD")
    run_git("update-ref", f"refs/exps/{later[:2]}/{later[2:]}/mine", head)
    run_git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/of-another-commit", head)
    run_git("update-ref", "refs/exps/stash", head)
    assert list_experiments() == {"mine": head}
    assert read_committed(Path("a.txt"), head) == "committed ä\n"
