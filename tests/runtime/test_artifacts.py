"""Artifacts come back as they were written, and damaged or foreign ones name the stage to rerun."""

import importlib.metadata
import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.runtime import artifacts
from pipeline.runtime.artifacts import (
    ArtifactError,
    Header,
    check_input,
    check_same_origin,
    list_versions,
    load_tensors,
    load_unfinished,
    make_content_header,
    make_header,
    read_header,
    replacing_folder,
    save_tensors,
    write_folder_header,
    write_json,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int8)}


def test_results_do_not_depend_on_the_length_of_the_header(tmp_path):
    """A product with one row rounds differently where the mapped matrix is not aligned to 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    matrix, row = torch.randn(1536, 576, generator=generator), torch.randn(1, 576, generator=generator)
    products = []
    for length in range(0, 96, 3):
        header = Header("rotation", "0" * 16, versions={"torch": "é" + "9" * length})
        save_tensors(tmp_path / "x.safetensors", {"matrix": matrix}, header)
        tensors, loaded = load_tensors(tmp_path / "x.safetensors", "rotation")
        assert loaded.versions == header.versions
        assert tensors["matrix"].data_ptr() % artifacts.ALIGNMENT == 0
        products.append(torch.nn.functional.linear(row, tensors["matrix"]))
    assert all(torch.equal(product, products[0]) for product in products)


def test_tensors_and_header_are_read_as_they_were_written(tmp_path):
    header = make_header("rotation", {"seed": 1}, {"model": make_header("model", {})})
    save_tensors(tmp_path / "x.safetensors", TENSORS, header)
    tensors, loaded = load_tensors(tmp_path / "x.safetensors", "rotation")
    assert loaded == header
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_same_input_gives_the_same_bytes_and_one_metadata_key(tmp_path):
    header = make_header("rotation", {"b": 1, "a": [1, 2]}, {"x": make_header("model", {}), "w": make_header("m", {})})
    save_tensors(tmp_path / "1.safetensors", TENSORS, header)
    save_tensors(tmp_path / "2.safetensors", dict(reversed(TENSORS.items())), header)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    with safe_open(tmp_path / "1.safetensors", framework="pt") as file:
        assert list(file.metadata()) == ["prefixquant"]


def test_fingerprints_change_with_values_and_inputs():
    base = make_header("s", {"a": 1}, {"model": make_header("model", {})})
    assert make_header("s", {"a": 1}, {"model": make_header("model", {})}) == base
    assert make_header("s", {"a": 2}, {"model": make_header("model", {})}).fingerprint != base.fingerprint
    assert make_header("s", {"a": 1}, {"model": make_header("model", {"x": 0})}).fingerprint != base.fingerprint


def test_missing_damaged_and_foreign_files_name_the_stage_to_rerun(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ArtifactError, match=r"x\.safetensors is missing.*dvc repro .* rotation"):
        load_tensors(path, "rotation")
    save_tensors(path, TENSORS, make_header("rotation", {}))
    whole = path.read_bytes()
    for cut in (4, 40, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError, match=r"is damaged.*dvc repro .* rotation"):
            load_tensors(path, "rotation")
    save_file(TENSORS, path)
    with pytest.raises(ArtifactError, match="was not written by this project"):
        load_tensors(path, "rotation")
    save_tensors(path, TENSORS, make_header("model", {}))
    with pytest.raises(ArtifactError, match="was written by the stage model, not rotation"):
        load_tensors(path, "rotation")


def test_another_format_version_is_refused(tmp_path):
    save_tensors(
        tmp_path / "x.safetensors", TENSORS, Header("rotation", "0", format_version=artifacts.FORMAT_VERSION + 1)
    )
    with pytest.raises(ArtifactError, match=r"format version 3, this code reads 2"):
        load_tensors(tmp_path / "x.safetensors", "rotation")


def test_check_input_refuses_an_artifact_of_other_inputs():
    model, other = make_header("model", {}), make_header("model", {"x": 1})
    rotation = make_header("rotation", {}, {"model": model})
    check_input(rotation, "model", model, "artifacts/rotation")
    with pytest.raises(ArtifactError, match=r"artifacts/rotation was made from another model.*dvc repro .* rotation"):
        check_input(rotation, "model", other, "artifacts/rotation")
    prefix = make_header("prefix_search", {}, {"model": other})
    with pytest.raises(ArtifactError, match="rotation and prefix_search were made from different models"):
        check_same_origin(rotation, prefix, "model")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, make_header("rotation", {}))
    before = path.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(artifacts, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(path, {"a": torch.zeros(1)}, make_header("rotation", {}))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_failed_folder_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "out"
    with replacing_folder(folder) as partial:
        (partial / "old").write_text("1")

    def be_interrupted():
        with replacing_folder(folder) as partial:
            (partial / "half").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["old"]
    with replacing_folder(folder) as partial:
        (partial / "new").write_text("3")
    assert [file.name for file in folder.iterdir()] == ["new"]


def test_a_file_in_place_of_a_folder_leaves_no_partial_folder(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(NotADirectoryError), replacing_folder(tmp_path / "out") as partial:
        (partial / "new").write_text("1")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_a_folder_without_header_names_the_stage(tmp_path):
    with pytest.raises(ArtifactError, match=r"artifact\.json is missing.*model"):
        read_header(tmp_path, "model")


@pytest.fixture
def installed(monkeypatch):
    """Package -> version, as importlib.metadata gives it; changes count at once."""
    packages = {"torch": "2.13.0", "gguf": "0.17.1"}

    def find_version(package):
        if package not in packages:
            raise importlib.metadata.PackageNotFoundError(package)
        if isinstance(packages[package], Exception):
            raise packages[package]
        return packages[package]

    monkeypatch.setattr(importlib.metadata, "version", find_version)
    monkeypatch.setattr(artifacts, "_read_versions", artifacts._read_versions.__wrapped__)
    return packages


def read_stored_header(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["prefixquant"])


def test_headers_record_the_versions_of_installed_packages():
    versions = make_header("rotation", {}).versions
    assert versions["torch"] == torch.__version__
    for package in ("transformers", "tokenizers", "safetensors", "numpy", "gguf"):
        assert versions[package] == importlib.metadata.version(package)
    assert make_content_header("model", TENSORS).versions == versions
    assert artifacts._read_versions() is artifacts._read_versions()  # read once
    versions["torch"] = "changed"
    assert list_versions()["torch"] == torch.__version__


@pytest.mark.parametrize("damage", [None, "", KeyError("Version"), OSError("cannot be read")])
def test_a_package_that_is_missing_or_damaged_is_left_out(damage, installed):
    installed["numpy"] = damage
    assert make_header("rotation", {}).versions == {"torch": "2.13.0", "gguf": "0.17.1"}


def test_versions_are_stored_in_files_and_folders_and_come_back(tmp_path, installed):
    header = make_header("rotation", {})
    save_tensors(tmp_path / "x.safetensors", TENSORS, header)
    write_folder_header(tmp_path, header)
    for path in (tmp_path / "x.safetensors", tmp_path):
        assert read_header(path, "rotation").versions == {"torch": "2.13.0", "gguf": "0.17.1"}
    assert read_stored_header(tmp_path / "x.safetensors")["versions"] == {"gguf": "0.17.1", "torch": "2.13.0"}


def test_versions_change_neither_fingerprints_nor_resumed_work(tmp_path, installed, caplog):
    model = make_header("model", {})
    before = make_header("rotation", {}, {"model": model})
    save_tensors(tmp_path / "x.safetensors", TENSORS, before)
    installed["torch"] = "2.14.0"
    installed["lm-eval"] = "0.4.13"
    after = make_header("rotation", {}, {"model": make_header("model", {})})
    assert after.versions != before.versions
    assert after.fingerprint == before.fingerprint
    assert after == before
    check_input(before, "model", make_header("model", {}), tmp_path)
    check_same_origin(before, after, "model")
    with caplog.at_level(logging.WARNING):
        resumed = load_unfinished(tmp_path / "x.safetensors", after)
    assert torch.equal(resumed["a"], TENSORS["a"])
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_artifacts_of_older_versions_have_no_versions_and_are_read(kind, tmp_path):
    header = make_header("rotation", {"seed": 1})
    stored = {"stage": "rotation", "fingerprint": header.fingerprint, "inputs": {}, "format_version": 2}
    path = tmp_path / "x.safetensors"
    if kind == "file":
        save_file(TENSORS, path, metadata={"prefixquant": json.dumps(stored)})
        assert load_unfinished(path, header) is not None
    else:
        path = tmp_path
        write_json(tmp_path / "artifact.json", stored)
    assert read_header(path, "rotation") == header
    assert read_header(path, "rotation").versions == {}
