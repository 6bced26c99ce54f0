"""A hand-written dvc.lock of stages text -> windows -> model -> evaluation@a, and changes that make each outdated.

That DVC itself writes such a file is tested in tests/test_repro.py.
"""

import copy
import hashlib
import json

import pytest
import yaml

from pipeline.pictures.outdated import find_outdated, read_outdated

PARAMS = {"corpora": {"prose": {"source": "x"}}, "windows": {"length": 8}, "model": {"rate": "1e-2", "bits": [4, 8]}}
PROJECT = {
    "stages": {
        "sources": {"always_changed": True},
        "corpora": {"foreach": "${corpora}", "do": {}},
        "windows": {},
        "model": {},
        "evaluation": {"foreach": {"a": {}}, "do": {}},
    }
}


def md5(text):
    return hashlib.md5(text.encode()).hexdigest()


def entry(path, text):
    return {"path": path, "hash": "md5", "md5": md5(text), "size": len(text)}


def folder_entry(path, files):
    listed = json.dumps([{"md5": md5(text), "relpath": name} for name, text in sorted(files.items())], sort_keys=True)
    sizes = {"size": sum(map(len, files.values())), "nfiles": len(files)}
    return {"path": path, "hash": "md5", "md5": md5(listed) + ".dir", **sizes}


CORPUS = {"train.jsonl": "some text", "sub/test.jsonl": "more"}
LOCK = {
    "stages": {
        "sources": {"outs": [folder_entry("artifacts/sources", {"prose.json": "1"})]},
        "corpora@prose": {
            "deps": [entry("artifacts/sources/prose.json", "1"), entry("stages/corpora.py", "code")],
            "params": {"params.yaml": {"corpora.prose": {"source": "x"}}},
            "outs": [folder_entry("data/prose", CORPUS)],
        },
        "windows": {
            "deps": [folder_entry("data", {f"prose/{name}": text for name, text in CORPUS.items()})],
            "params": {"params.yaml": {"windows": {"length": 8}}},
            "outs": [folder_entry("artifacts/windows", {"train": "w1", "test": "w2"})],
        },
        "model": {
            "deps": [entry("artifacts/windows/train", "w1")],
            "params": {"params.yaml": {"model": {"rate": 0.01, "bits": [4, 8]}}},
            "outs": [entry("artifacts/model", "m")],
        },
        "evaluation@a": {
            "deps": [entry("artifacts/model", "m"), entry("artifacts/windows/test", "w2")],
            "outs": [entry("metrics/evaluation/a.json", "{}")],
        },
    }
}
FILES = {
    "artifacts/sources/prose.json": "1",
    "data/prose/train.jsonl": "some text",
    "data/prose/sub/test.jsonl": "more",
    "artifacts/windows/train": "w1",
    "artifacts/windows/test": "w2",
    "artifacts/model": "m",
    "metrics/evaluation/a.json": "{}",
}


@pytest.fixture
def project(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def find(project=None, params=PARAMS, lock=LOCK):
    return find_outdated(lock, params, always_run=["sources"], folder=project)


def test_nothing_is_outdated_after_a_run_nor_in_a_fresh_clone(project, tmp_path):
    assert find(project) == {}
    assert find() == {}
    clone = tmp_path / "clone"
    (clone / "metrics/evaluation").mkdir(parents=True)
    (clone / "metrics/evaluation/a.json").write_text("{}")
    (clone / "data").mkdir()
    (clone / "data/.gitkeep").touch()
    assert find(clone) == {}


def test_a_changed_value_makes_its_stage_and_all_after_it_outdated(project):
    params = copy.deepcopy(PARAMS)
    params["model"]["bits"] = [4, 4]
    reason = "model.bits is [4, 4], the run had [4, 8]"
    assert find(project, params) == {"model": reason, "evaluation@a": f"model is outdated: {reason}"}
    params = copy.deepcopy(PARAMS)
    del params["windows"]["length"]
    assert find(project, params)["windows"] == "windows.length is missing, the run had 8"
    assert set(find(project, params)) == {"windows", "model", "evaluation@a"}
    params = PARAMS | {"windows": {"length": 8, "start": True}}
    assert find(project, params)["windows"] == "windows.start is true, the run had missing"
    params = PARAMS | {"model": {"rate": 0.02, "bits": [4, 8]}}
    assert find(project, params)["model"] == "model.rate is 0.02, the run had 0.01"


def test_an_input_that_another_run_wrote_makes_its_reader_outdated():
    lock = copy.deepcopy(LOCK)
    lock["stages"]["model"]["outs"] = [entry("artifacts/model", "another")]
    assert find(lock=lock) == {"evaluation@a": "artifacts/model has changed"}


@pytest.mark.parametrize(
    ("name", "first", "reason"),
    [
        ("artifacts/sources/prose.json", "corpora@prose", "artifacts/sources/prose.json has changed"),
        ("data/prose/train.jsonl", "windows", "data has changed"),
        ("artifacts/windows/train", "model", "artifacts/windows/train has changed"),
        ("metrics/evaluation/a.json", "evaluation@a", "metrics/evaluation/a.json is not the file that the stage wrote"),
    ],
)
@pytest.mark.parametrize("length", ["same", "longer"])
def test_a_changed_file_makes_its_reader_outdated(name, first, reason, length, project):
    text = FILES[name]
    (project / name).write_text(text[:-1] + "#" if length == "same" else text + "#")
    assert find(project)[first] == reason
    stages = list(LOCK["stages"])
    assert sorted(find(project), key=stages.index) == stages[stages.index(first) :]


def test_stages_that_are_gone_from_the_project_do_not_count():
    lock = copy.deepcopy(LOCK)
    lock["stages"]["corpora@gone"] = {
        "params": {"params.yaml": {"corpora.gone": {"source": "y"}}},
        "outs": [folder_entry("data/gone", {})],
    }
    files = {
        "dvc.lock": yaml.safe_dump(lock),
        "params.yaml": yaml.safe_dump(PARAMS),
        "dvc.yaml": yaml.safe_dump(PROJECT),
    }
    assert read_outdated(files.get) == {}
    changed = PARAMS | {"windows": {"length": 9}}
    assert set(read_outdated((files | {"params.yaml": yaml.safe_dump(changed)}).get)) == {
        "windows",
        "model",
        "evaluation@a",
    }
    assert read_outdated((files | {"dvc.lock": None}).get) == {}
