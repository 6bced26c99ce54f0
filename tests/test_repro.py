"""`dvc repro` in a repository of its own: what reruns when, and what a user gets to see."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, tiny_params, write_params


@pytest.fixture(scope="module")
def repository(tmp_path_factory, model_folders):
    """A clone with a tiny model and corpus, run once."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("pipeline", "stages", "dvc.yaml", ".gitignore", ".dvcignore"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    corpus = folder / "prose.txt"
    shutil.copyfile(ROOT / "tests" / "prose.txt", corpus)
    (folder / "data").mkdir()
    params = tiny_params(model_folders["llama_tied"], corpus)
    params["prefix_search"]["outlier_threshold"] = 1.5
    write_params(folder, params)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    dvc(folder, "init", "-q")
    dvc(folder, "config", "core.analytics", "false")
    dvc(folder, "config", "cache.type", "reflink,hardlink,copy")
    repro(folder)
    return folder


def dvc(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def repro(folder: Path, *options: str) -> set[str]:
    """Run `dvc repro`; the stages that ran."""
    return set(re.findall(r"Running stage '([^']+)'", dvc(folder, "repro", *options)))


def change(folder: Path, group: str, **values: object) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params[group] |= values
    write_params(folder, params)


def test_nothing_changed_reruns_nothing(repository):
    assert repro(repository) == set()


def test_a_quantizer_key_reruns_only_its_stage_and_what_is_made_of_it(repository):
    change(repository, "quantizer_init", equalize=False)
    stages = {"quantizer_init", "finetuning"}
    made = {"export", "evaluation@export", "report"}
    assert repro(repository) == stages | made | {f"evaluation@{stage}" for stage in stages}


def test_the_outlier_threshold_does_not_rerun_rotation(repository):
    before = (repository / "params.yaml").read_text()
    change(repository, "prefix_search", outlier_threshold=1.2)
    would_run = repro(repository, "--dry")
    assert "prefix_search" in would_run
    assert not would_run & {"model", "calibration", "rotation", "evaluation@original"}
    (repository / "params.yaml").write_text(before)


def test_a_training_key_reruns_nothing_else_while_training_is_off(repository):
    change(repository, "prefix_training", epochs=7)
    assert repro(repository) == {"prefix_training", "report"}


def test_runtime_settings_rerun_nothing(repository):
    change(repository, "runtime", batch_size=1, threads=2)
    assert repro(repository) == set()


def test_another_corpus_refetches_no_other_and_reruns_no_model_stage(repository):
    shutil.copyfile(repository / "prose.txt", repository / "other.txt")
    change(repository, "corpora", other={"source": str(repository / "other.txt")})
    assert repro(repository) == {"corpora@other", "calibration", "report"}


def test_a_changed_evaluation_split_reruns_only_what_reads_it(repository):
    params = yaml.safe_load((repository / "params.yaml").read_text())
    params["calibration"]["evaluation"]["windows"] = 1
    write_params(repository, params)
    ran = repro(repository)
    variants = ("original", "original_prefix", "quantizer_init", "finetuning", "export")
    assert ran == {"calibration", "export", "report", *(f"evaluation@{variant}" for variant in variants)}


def test_a_setting_can_be_overridden_on_the_command_line_in_exponent_form(repository):
    change(repository, "prefix_search", outlier_threshold="1.5e0")
    repro(repository)
    assert "perplexity.prose" in dvc(repository, "metrics", "show")


def test_the_graph_has_rotation_and_prefix_search_side_by_side(repository):
    graph = dvc(repository, "dag", "--mermaid")
    names = dict(re.findall(r'(node\d+)\["([^"]+)"\]', graph))
    edges = {(names[a], names[b]) for a, b in re.findall(r"(node\d+)-->(node\d+)", graph)}
    assert ("model", "rotation") in edges
    assert ("model", "prefix_search") in edges
    assert not edges & {("rotation", "prefix_search"), ("prefix_search", "rotation")}
    assert ("corpora@prose", "calibration") in edges
    assert ("quantizer_init", "evaluation@quantizer_init") in edges
    assert {
        ("rotation", "finetuning"),
        ("quantizer_init", "finetuning"),
        ("finetuning", "evaluation@finetuning"),
        ("finetuning", "export"),
        ("export", "evaluation@export"),
    } <= edges
    assert ("prefix_search", "evaluation@original") not in edges


def commit(folder: Path) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    subprocess.run(["git", *identity, "commit", "-q", "-m", "state", "--allow-empty"], cwd=folder, check=True)


def test_artifacts_are_shared_through_a_remote_and_a_clone_reruns_nothing(repository, tmp_path):
    repro(repository)
    dvc(repository, "remote", "add", "-f", "-d", "shared", str(tmp_path / "remote"))
    dvc(repository, "push", "-q")
    commit(repository)
    subprocess.run(["git", "clone", "-q", str(repository), str(tmp_path / "clone")], check=True)
    dvc(tmp_path / "clone", "pull", "-q")
    assert repro(tmp_path / "clone") == set()
    for name in ("export", "finetuning"):
        assert sorted(path.name for path in (tmp_path / "clone/artifacts" / name).iterdir()) == sorted(
            path.name for path in (repository / "artifacts" / name).iterdir()
        )


def test_an_experiment_takes_unchanged_stages_from_the_cache_and_is_compared_by_few_columns(repository):
    repro(repository)
    commit(repository)
    before = (repository / "params.yaml").read_text()
    output = dvc(repository, "exp", "run", "--temp", "-n", "wide", "-S", "finetuning.end_to_end.epochs=1")
    ran = set(re.findall(r"Running stage '([^']+)'", output))
    assert ran == {"finetuning", "evaluation@finetuning", "export", "evaluation@export", "report"}
    assert (repository / "params.yaml").read_text() == before
    makefile = (ROOT / "Makefile").read_text()
    columns = re.search(r"^COLUMNS = (.+)$", makefile, re.MULTILINE)[1].replace("$$", "$")
    table = dvc(repository, "exp", "show", "--csv", "--drop", ".*", "--keep", columns)
    head, *rows = [line.split(",") for line in table.strip().splitlines()]
    assert any(row[head.index("Experiment")] == "wide" for row in rows)
    names = [name.rpartition(":")[2] for name in head]
    assert {"bits", "prefix", "ppl.prose", "ratio.prose", "minutes", "gib", "mib"} <= set(names)
    assert len(names) < 20
