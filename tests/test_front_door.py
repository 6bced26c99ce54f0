"""The files that a stranger reads first: licence, citation, changelog, guides, security notes, workflow."""

import ast
import fnmatch
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from pipeline.version import VERSION
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOW = (ROOT / ".github/workflows/ci.yml").read_text()
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
SOURCES = [path for folder in ("pipeline", "stages") for path in (ROOT / folder).rglob("*.py")]


def find_targets(text):
    """Return the targets of all `make TARGET …` in a text that begin a line or a command."""
    commands = re.findall(r"(?:^|run: |`)\s*make ((?:[a-z-]+ ?)+)", text, re.MULTILINE)
    return {target for command in commands for target in command.split()}


def is_target(name):
    return re.search(rf"^{name}:", MAKEFILE, re.MULTILINE) is not None


def test_the_version_is_written_once_and_named_the_same_everywhere():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "pipeline.version.VERSION"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    versions = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert versions[0] == VERSION


def test_the_version_needs_no_imports():
    tree = ast.parse((ROOT / "pipeline/version.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_licence_and_notices_are_part_of_the_package():
    project = PROJECT["project"]
    assert project["license"] == "Apache-2.0"
    texts = [(ROOT / name).read_text() for name in project["license-files"]]
    assert "Apache License\n                           Version 2.0, January 2004" in texts[0]
    assert all("Copyright 2026 The PrefixQuant pipeline contributors" in text for text in texts)
    vendored = [path.name for path in (ROOT / "docs/plots").glob("*.js")]
    assert vendored
    assert all(name in texts[1] for name in vendored)


def test_the_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["project"]["license"]
    assert [author["name"] for author in PROJECT["project"]["authors"]] == [citation["authors"][0]["name"]]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2410.05265"
    assert len(paper["authors"]) == 6


@pytest.mark.parametrize("page", PAGES)
def test_links_and_make_targets_of_a_page_exist(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("https://")]
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert [target for target in find_targets(text) if not is_target(target)] == []


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_a_page_names_exist(page):
    """Capital letters stand for a name: ROOM, MODULE, NAME."""
    paths = re.findall(r"`((?:pipeline|stages|tests|docs|\.ci|\.github)/[\w./-]+)`", (ROOT / page).read_text())
    assert [path for path in paths if not re.search(r"\b[A-Z]{2,}\b", path) and not (ROOT / path).exists()] == []


def test_the_workflow_and_ci_run_call_make_targets():
    jobs = yaml.safe_load(WORKFLOW)["jobs"]
    targets = {*jobs["check"]["strategy"]["matrix"]["target"], "test", "serve-test"}
    assert all(is_target(target) for target in targets)
    assert find_targets((ROOT / ".ci/run").read_text()) <= targets


def test_the_workflow_tests_the_versions_of_python_that_the_package_names():
    versions = yaml.safe_load(WORKFLOW)["jobs"]["test"]["strategy"]["matrix"]["python"]
    classifiers = PROJECT["project"]["classifiers"]
    assert [f"Programming Language :: Python :: {version}" for version in versions] == [
        line for line in classifiers if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
    ]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"


def test_every_target_of_the_makefile_has_a_line_of_help():
    needed_by_others = {"setup", "repository", "commit", "format"}
    targets = set(re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.MULTILINE)) - needed_by_others
    described = set(re.findall(r"[a-z-]+", " ".join(re.findall(r"^# make ([a-z, -]+)", MAKEFILE, re.MULTILINE))))
    assert {target for target in targets if not target.startswith("sweep-")} <= described


def test_pickles_and_foreign_code_are_never_loaded():
    """SECURITY.md promises it. The name `trust_remote_code` may appear only in docstrings and messages."""
    forbidden_modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "diskcache"}
    unsafe_yaml = {
        f"yaml.{name}" for name in ("Loader", "CLoader", "FullLoader", "UnsafeLoader", "unsafe_load", "full_load")
    }
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.partition(".")[0] for alias in node.names} & forbidden_modules, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in forbidden_modules, path
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in unsafe_yaml, (path, node.lineno)
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("torch.load", "eval", "exec"), (path, node.lineno)
                assert "trust_remote_code" not in [keyword.arg for keyword in node.keywords], (path, node.lineno)


def test_security_notes_are_about_the_pinned_diskcache_and_make_moves_its_folder():
    text = (ROOT / "SECURITY.md").read_text()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert f"`diskcache` {pins['diskcache']}" in text
    assert f"dvc-data {pins['dvc-data'].rpartition('.')[0]}" in text
    folder = "export DVC_SITE_CACHE_DIR ?= $(CURDIR)/.dvc/tmp/site-cache"
    assert folder in MAKEFILE
    assert "`.dvc/tmp/site-cache`" in text
    assert "/tmp" in (ROOT / ".dvc/.gitignore").read_text().splitlines()


def test_make_says_how_to_begin_a_repository(tmp_path, monkeypatch):
    """Cases: no repository, a DVC that needs none, a repository without a commit, and one with a commit."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def make(target):
        command = ["make", "-f", ROOT / "Makefile", "-o", "setup", target]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.stderr.split(" Run: ")[0].replace("\t", "") if done.returncode else None

    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    assert re.search(r"error: DVC needs a git\s+repository in this folder\.$", make("repository"))
    assert re.search(r"error: experiments need a git repository with a\s+commit\.$", make("commit"))
    program = tmp_path / ".venv/bin/dvc"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n[ \"$*\" = 'config core.no_scm' ] && echo true\n")
    program.chmod(0o755)
    assert make("repository") is None  # DVC was told that there is no git
    program.unlink()
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    assert make("repository") is None
    assert "repository with a" in make("commit")
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "start"], cwd=tmp_path, check=True)
    assert make("repository") is None
    assert make("commit") is None


def test_files_other_than_modules_are_in_the_package_and_in_the_smoke_test():
    package_data = PROJECT["tool"]["setuptools"]["package-data"]["pipeline"]
    folder = ROOT / "pipeline"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    data = {name for name in files if not name.endswith((".py", ".pyc"))}
    assert {name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in package_data)} == set()
    smoke = ast.parse((ROOT / ".ci/smoke.py").read_text())
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in smoke.body if isinstance(node, ast.Assign)}
    assert set(values["DATA"]) == data
    modules = (*values["MODULES"], *values["COMMANDS"])
    assert [name for name in modules if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()] == []


def test_the_smoke_test_refuses_a_source_tree():
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, ".ci/smoke.py"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "is not an installed package" in done.stderr


def test_pre_commit_runs_the_pinned_ruff():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"].split() for hook in repository["hooks"]]
    assert [(entry[0], entry[1]) for entry in entries] == [(".venv/bin/ruff", "check"), (".venv/bin/ruff", "format")]


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: make setup")
def test_the_documentation_builds_without_a_broken_link(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<h1" in (tmp_path / "index.html").read_text()
