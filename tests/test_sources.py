"""The stage `sources`, run in one process or as DVC runs it."""

import os
import runpy
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT, read_json, write_params


def run():
    runpy.run_module("stages.sources", run_name="__main__", alter_sys=False)


def change(project, dotted, value):
    params = yaml.safe_load((project / "params.yaml").read_text())
    *path, last = dotted.split(".")
    group = params
    for key in path:
        group = group[key]
    group[last] = value
    write_params(project, params)


def written(project):
    root = project / "artifacts/sources"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_each_source_has_a_file_of_its_own_that_changes_with_it_alone(project):
    (project / "tasks").mkdir()
    (project / "tasks/own.yaml").write_text("task: own")
    change(project, "corpora.c4", {"source": "c4", "max_documents": 9})
    change(project, "corpora.news", {"source": "packaged:news"})
    change(project, "corpora.mine", {"source": "generated"})
    change(project, "evaluation.task_folder", "tasks")
    run()
    first = written(project)
    corpora = {f"corpora/{name}.json" for name in ("prose", "c4", "news", "mine")}
    assert first.keys() == {"model.json", *corpora, "tasks.json"}
    assert read_json(project / "artifacts/sources/corpora/mine.json") == {}
    assert read_json(project / "artifacts/sources/corpora/c4.json")["repository"] == "allenai/c4"
    assert read_json(project / "artifacts/sources/corpora/news.json") == {"package": "gensim", "version": "4.4.0"}
    assert {"config.json", "model.safetensors"} <= set(read_json(project / "artifacts/sources/model.json")["sha256"])
    assert str(project).encode() not in b"".join(first.values())
    run()
    assert written(project) == first

    for source, file in (("prose.txt", "corpora/prose.json"), ("tasks/own.yaml", "tasks.json")):
        before = written(project)
        (project / source).write_text("something else")
        run()
        assert {name for name, content in written(project).items() if content != before[name]} == {file}


def test_hashes_of_earlier_sources_are_forgotten(project):
    change(project, "corpora.news", {"source": "packaged:news"})
    run()
    params = yaml.safe_load((project / "params.yaml").read_text())
    del params["corpora"]["news"]
    write_params(project, params)
    run()
    assert written(project).keys() == {"model.json", "corpora/prose.json", "tasks.json"}
    assert written(project)["tasks.json"] == b"{}\n"


def test_it_starts_without_torch_and_other_slow_imports(project):
    code = (
        "import runpy, sys\n"
        "runpy.run_module('stages.sources', run_name='__main__', alter_sys=False)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'lm_eval', 'huggingface_hub'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert done.stderr.startswith("sources: model ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.source", "./nowhere", "model.source='./nowhere': there is no such folder"),
        ("model.source", "~/nowhere", "model.source='~/nowhere': there is no such folder"),
        ("model.source", "nowhere.GGUF", "model.source='nowhere.GGUF': there is no such file"),
        ("corpora.prose.source", "nowhere.txt", "corpora.prose.source='nowhere.txt': no such file or folder. Correct"),
        ("evaluation.task_folder", "nowhere", "evaluation.task_folder='nowhere': there is no such folder"),
        ("evaluation.task_folder", ".", "evaluation.task_folder='.': holds this project itself. Use a folder"),
        ("rotation.r1", "hadamrd", "params.yaml: 1 problem"),
    ],
)
def test_a_missing_source_is_one_message_and_nothing_is_written(key, value, message, project):
    change(project, key, value)
    with pytest.raises(SystemExit) as error:
        run()
    assert str(error.value).startswith(f"error: {message}")
    assert not (project / "artifacts").exists()
