"""`quantize`: the work folder, the checks before any work, the copy of the export, and one whole run."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi

import prefixquant
from pipeline.inference.manifest import write_manifest
from pipeline.runtime.errors import PipelineError
from prefixquant import project
from prefixquant.project import Request, check_folders, make_environment, place_export, prepare_params, write_project
from tests.conftest import PROSE_FILE

ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0
TINY = {  # few and short windows, as benchmarks.tiny_models.tiny_params
    "prefix_search.choose": "threshold",
    "calibration.start_token": "never",
    "calibration.evaluation.windows": 2,
    "calibration.evaluation.length": 48,
    "quantizer_init.mse_samples": 2,
    "activation_plots.windows": 2,
    "runtime.threads": 1,
    "runtime.device": "cpu",
} | {
    f"calibration.{split}.{key}": value
    for split in ("search", "train", "end_to_end", "validation")
    for key, value in (("windows", 1 if split == "validation" else 3), ("length", 32))
}


@pytest.fixture
def request_of(tmp_path, model_folders):
    """Return a function that makes a request for a tiny model, with some attributes changed."""

    def make(**changes):
        values = {"source": str(model_folders["llama_tied"]), "out": tmp_path / "out", "texts": (str(PROSE_FILE),)}
        return Request(**values | {"settings": TINY} | changes)

    return make


def write_export(folder, content="x"):
    """Write a folder that has a manifest, as exports have."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    write_manifest(folder)
    return folder


def read_folder(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_paths_become_absolute(request_of, model_folders, monkeypatch):
    monkeypatch.chdir(model_folders["llama_tied"].parent)
    relative = os.path.relpath(PROSE_FILE)
    values = yaml.safe_load(prepare_params(request_of(source="llama_tied", texts=(relative,))))
    assert values["model"]["source"] == str(model_folders["llama_tied"])
    assert values["corpora"] == {"prose": {"source": str(PROSE_FILE)}}


def test_ids_of_the_hub_stay_as_they_are(request_of, monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **options: SimpleNamespace(sha="1" * 40))
    assert yaml.safe_load(prepare_params(request_of(source="org/model")))["model"]["source"] == "org/model"


def test_an_unknown_id_of_the_hub_is_refused_before_anything_is_written(request_of, monkeypatch):
    def refuse(*args, **options):
        raise OSError("404 Client Error.\nMore lines")  # as the hub's client says it

    monkeypatch.setattr(HfApi, "model_info", refuse)
    request = request_of(source="org/no-such-model")
    message = r"^MODEL='org/no-such-model': there is no such folder, and the Hugging Face Hub names no such model \(404"
    with pytest.raises(PipelineError, match=message):
        project.run_request(request)
    assert not request.work_folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "./no-such-model"}, r"MODEL='\./no-such-model': there is no such folder"),
        ({"source": "gone.gguf"}, r"MODEL='gone\.gguf': there is no such file"),
        ({"source": "packaged:gpt"}, r"model\.source='packaged:gpt' is not packaged"),
        ({"texts": ("gone.txt",)}, r"--text gone\.txt: there is no such file or folder"),
        ({"texts": ("wikitext2",)}, r"--text wikitext2: a file or folder is expected"),
        ({"recipe": "w4a4"}, r"--recipe=w4a4: there is no such recipe"),
        ({"settings": {"quantizer_init.weights.bit": 4}}, r"quantizer_init\.weights\.bit: unknown key. Did you mean"),
    ],
)
def test_bad_input_is_refused_before_any_work(changes, message, request_of, tmp_path):
    with pytest.raises(PipelineError, match=message):
        project.run_request(request_of(**changes))
    assert list(tmp_path.iterdir()) == []


def test_a_packaged_source_without_its_package_is_refused_before_any_work(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(project, "PACKAGES", {"packaged:smollm2-135m": "no-such-package"})
    with pytest.raises(PipelineError, match="needs the package no-such-package"):
        project.run_request(request_of(source="packaged:smollm2-135m"))
    assert list(tmp_path.iterdir()) == []


def test_without_dvc_the_extra_is_named(request_of, monkeypatch):
    monkeypatch.setattr(project.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PipelineError, match=r"pip install 'prefixquant-pipeline\[quantize\]'"):
        prepare_params(request_of())


def test_a_folder_that_is_no_export_is_not_replaced(request_of, tmp_path):
    (tmp_path / "out").mkdir()
    check_folders(request_of())  # empty
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(PipelineError, match="exists and is not an exported model"):
        project.run_request(request_of())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PipelineError, match=r"--out=.*file: is a file"):
        project.run_request(request_of(out=tmp_path / "file"))
    assert read_folder(tmp_path) == {"out/thesis.txt": b"mine", "file": b"mine"}


def test_a_folder_that_is_no_work_folder_is_not_used(request_of, tmp_path):
    work = tmp_path / "notes"
    work.mkdir()
    (work / "a.txt").write_text("mine")
    with pytest.raises(PipelineError, match=r"notes: exists and is not a work folder"):
        project.run_request(request_of(work=work))
    assert read_folder(work) == {"a.txt": b"mine"}


def test_out_inside_the_work_folder_or_work_inside_the_model_is_refused(request_of, tmp_path, model_folders):
    with pytest.raises(PipelineError, match="is inside the work folder"):
        check_folders(request_of(work=tmp_path, out=tmp_path / "out"))
    copy = shutil.copytree(model_folders["llama_tied"], tmp_path / "model")
    with pytest.raises(PipelineError, match=r"the work folder .*model/out\.work is inside"):
        prepare_params(request_of(source=str(copy), out=copy / "out"))


@pytest.mark.skipif(ROOT_USER, reason="root may write everywhere")
def test_folders_that_cannot_be_written_are_refused(request_of, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(PipelineError, match="cannot be written"):
        check_folders(request_of(out=locked / "out"))


def test_a_file_in_the_place_of_a_parent_is_refused(request_of, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match=r"cannot be written, because .*file is not a folder"):
        check_folders(request_of(out=tmp_path / "file/out", work=tmp_path / "work"))


def test_an_export_takes_the_place_of_another_in_whole(tmp_path):
    export, out = write_export(tmp_path / "export", "new"), write_export(tmp_path / "out", "old")
    (export / "config.json").chmod(0o444)  # as in DVC's cache
    place_export(export, out)
    assert read_folder(out) == read_folder(export)
    assert os.access(out / "config.json", os.W_OK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "out"]


def test_a_copy_that_fails_leaves_the_earlier_export(tmp_path, monkeypatch):
    export, out = write_export(tmp_path / "export", "new"), write_export(tmp_path / "out", "old")

    def fail(source, target, **options):
        Path(target).mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", fail)
    with pytest.raises(OSError, match="No space left"):
        place_export(export, out)
    assert (out / "config.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "out"]


def test_the_environment_keeps_caches_in_the_work_folder(tmp_path):
    environment = make_environment(tmp_path)
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "MPLCONFIGDIR"):
        assert Path(environment[name]).is_relative_to(tmp_path)
    first = Path(environment["PATH"].split(os.pathsep)[0])
    assert (first / "python").exists()


def test_a_stage_that_fails_leaves_out_as_it_was(request_of, tmp_path, monkeypatch):
    write_export(tmp_path / "out", "old")
    monkeypatch.setattr(project, "run_project", lambda folder: (_ for _ in ()).throw(PipelineError("stopped")))
    with pytest.raises(PipelineError, match="stopped"):
        project.run_request(request_of())
    assert (tmp_path / "out/config.json").read_text() == "old"


def test_writing_a_project_keeps_its_results(tmp_path):
    write_project(tmp_path, "a: 1\n")
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/x").write_text("kept")
    write_project(tmp_path, "a: 2\n")
    assert (tmp_path / "params.yaml").read_text() == "a: 2\n"
    assert (tmp_path / "artifacts/x").read_text() == "kept"
    assert "no_scm = true" in (tmp_path / ".dvc/config").read_text()


def test_a_whole_run_its_repetition_and_another_setting(request_of, tmp_path, monkeypatch, capfd, model_folders):
    """Nothing is written outside of `out` and the work folder; another setting runs only what it changes."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    options = {"texts": [PROSE_FILE], "finetune": "none", "settings": TINY}
    source, out = model_folders["llama_tied"], tmp_path / "out"
    assert prefixquant.quantize(source, out, **options) == out
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.work", "home"}
    assert list(home.iterdir()) == []
    model, tokenizer = prefixquant.load(out)
    assert model.generate(**tokenizer(["The house"], return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    assert "Running stage 'quantizer_init'" in capfd.readouterr().out

    first = read_folder(out)
    prefixquant.quantize(source, out, **options)
    assert read_folder(out) == first
    printed = capfd.readouterr().out
    assert "Stage 'finetuning' didn't change, skipping" in printed
    assert "Running stage 'model'" not in printed

    settings = TINY | {"export.max_shard_size": "10KB"}
    prefixquant.quantize(source, out, **options | {"settings": settings}, clean=True)
    printed = capfd.readouterr().out
    assert "Running stage 'export'" in printed
    assert "Running stage 'quantizer_init'" not in printed
    assert len(list(out.glob("*.safetensors"))) > 1
    assert {path.name for path in tmp_path.iterdir()} == {"out", "home"}
