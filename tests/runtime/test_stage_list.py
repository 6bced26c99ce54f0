"""The stages of dvc.yaml, expanded and in order."""

import subprocess
import sys

import yaml

from pipeline.runtime.stage_list import list_stages, read_stages
from tests.conftest import ROOT


def test_stages_come_after_those_that_they_read():
    stages = read_stages(ROOT)
    for index, stage in enumerate(stages):
        assert not [later.name for later in stages[index + 1 :] if later.feeds(stage)], stage.name


def test_stages_are_those_that_dvc_lists():
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only", "dvc.yaml"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert sorted(stage.name for stage in read_stages(ROOT)) == sorted(done.stdout.split())


def test_foreach_is_expanded_with_its_items():
    stages = {stage.name: stage for stage in read_stages(ROOT)}
    assert stages["corpora@news"].command == "python -m stages.corpora news"
    assert stages["corpora@news"].params == ("corpora.news",)
    assert stages["evaluation@export"].deps[-4:] == (
        "artifacts/export",
        "artifacts/export",
        "artifacts/evaluation/original.safetensors",
        "artifacts/evaluation/finetuning.safetensors",
    )
    assert stages["evaluation@export"].written[-1] == "metrics/evaluation/export.json"
    assert stages["sources"].always_run
    assert stages["sources"].persistent == ("artifacts/sources",)


def test_corpora_come_from_params():
    project = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    names = [stage.name for stage in list_stages(project["stages"], {"corpora": {"mine": {"source": "x"}}})]
    assert [name for name in names if name.startswith("corpora")] == ["corpora@mine"]


def test_a_folder_that_is_no_project_has_no_stages(tmp_path):
    assert read_stages(tmp_path) == []
