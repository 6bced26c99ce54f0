"""A source is described by values that are equal exactly as long as the source is the same."""

import hashlib
import os
import time

import pytest
from huggingface_hub import HfApi, constants

from pipeline.runtime import sources
from pipeline.runtime.sources import FileHashes, SourceError, describe_files, describe_hub_model, describe_package


def describe(path, hashes_file):
    with FileHashes(hashes_file) as hashes:
        return describe_files("model.source", str(path), hashes)


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def deny_reading(name):
    """Replace `hashlib.file_digest`, on a machine where one file may not be read."""
    digest = hashlib.file_digest

    def read(file, kind):
        if file.name.endswith(f"/{name}"):
            raise PermissionError(13, "Permission denied", file.name)
        return digest(file, kind)

    return read


@pytest.fixture
def hashes_file(tmp_path):
    return tmp_path / "work/hashes.json"


@pytest.fixture
def read_files(monkeypatch):
    """Return the names of the files whose contents are read."""
    names = []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: names.append(file.name.rpartition("/")[2]) or digest(file, kind)
    )
    return names


def test_only_names_and_contents_change_a_description(tmp_path, hashes_file):
    first = describe(write(tmp_path / "a", x="one", inner__y="two"), hashes_file)
    assert first == {"sha256": {"inner/y": hashlib.sha256(b"two").hexdigest(), "x": hashlib.sha256(b"one").hexdigest()}}
    assert list(first["sha256"]) == ["inner/y", "x"]
    other = write(tmp_path / "b", inner__y="two", x="one")
    write(other, **{".hidden": "1", ".git__z": "1", "__pycache__": ""} | {"inner__.swp": "1"})
    assert describe(other, hashes_file) == first
    (other / "x").rename(other / "z")
    assert describe(other, hashes_file) != first


def test_a_single_file_is_described_by_its_name_and_contents(tmp_path, hashes_file):
    write(tmp_path, **{"prose.txt": "text", "other.txt": "more"})
    assert describe(tmp_path / "prose.txt", hashes_file) == {
        "sha256": {"prose.txt": hashlib.sha256(b"text").hexdigest()}
    }


def test_a_tilde_is_the_home_folder(tmp_path, hashes_file, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "texts", x="one")
    assert describe("~/texts", hashes_file) == describe(tmp_path / "texts", hashes_file)


def test_a_split_gguf_file_is_described_by_all_its_parts(tmp_path, hashes_file):
    names = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m-00001-of-00003.gguf", "n-00001-of-00002.gguf")
    write(tmp_path, **dict.fromkeys(names, "tensors"))
    assert list(describe(tmp_path / names[0], hashes_file)["sha256"]) == list(names[:2])


def test_a_file_is_read_once_and_again_after_it_was_touched(tmp_path, hashes_file, read_files):
    folder = write(tmp_path / "a", x="one", y="two")
    first = describe(folder, hashes_file)
    assert read_files == ["x", "y"]
    stored = hashes_file.read_bytes()
    assert describe(folder, hashes_file) == first
    assert read_files == ["x", "y"]
    assert hashes_file.read_bytes() == stored
    os.utime(folder / "y")
    assert describe(folder, hashes_file) == first
    assert read_files == ["x", "y", "y"]


@pytest.mark.parametrize("keeps_times", [False, True])
def test_a_change_of_the_same_size_is_noticed(keeps_times, tmp_path, hashes_file):
    folder = write(tmp_path / "a", x="one")
    first = describe(folder, hashes_file)
    status = (folder / "x").stat()
    time.sleep(0.02)  # a file system's clock has ticks
    (folder / "x").write_text("two")
    if keeps_times:  # as `cp -p` and `rsync -t` leave it
        os.utime(folder / "x", ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (folder / "x").stat().st_mtime_ns == status.st_mtime_ns
    assert describe(folder, hashes_file)["sha256"]["x"] == hashlib.sha256(b"two").hexdigest() != first["sha256"]["x"]


def test_files_read_before_an_error_are_not_read_again(tmp_path, hashes_file, read_files, monkeypatch):
    folder = write(tmp_path / "a", x="one", y="two")
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", deny_reading("y"))
        with pytest.raises(SourceError, match="a/y cannot be read"):
            describe(folder, hashes_file)
    describe(folder, hashes_file)
    assert read_files == ["x", "y"]


def test_a_damaged_hashes_file_is_replaced(tmp_path, hashes_file):
    folder = write(tmp_path / "a", x="one")
    first = describe(folder, hashes_file)
    hashes_file.write_text("{")
    assert describe(folder, hashes_file) == first


def test_a_file_that_cannot_be_read_is_named_with_its_key(tmp_path, hashes_file, monkeypatch):
    folder = write(tmp_path / "a", x="one")
    monkeypatch.setattr(hashlib, "file_digest", deny_reading("x"))
    with pytest.raises(SourceError, match=r"^model\.source='.*/a': .*/a/x cannot be read \(Permission denied\)\.$"):
        describe(folder, hashes_file)


def test_a_package_is_described_by_its_version():
    assert describe_package("model.source", "packaged:x", "pytest") == {
        "package": "pytest",
        "version": pytest.__version__,
    }
    with pytest.raises(SourceError, match=r"^model\.source='packaged:x': needs the package no-such. Run: pip install"):
        describe_package("model.source", "packaged:x", "no-such")


COMMITS = "1" * 40, "2" * 40


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Fake the hub's answer: a commit, or None where it is not reached. No model is downloaded yet."""
    answer = {"sha": COMMITS[0], "asked": []}

    def model_info(self, repository, revision, timeout):
        answer["asked"].append((repository, revision))
        if answer["sha"] is None:
            raise ConnectionError("Name or service not known\nand a second line")
        return type("Info", (), {"sha": answer["sha"]})

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return answer


def test_a_hub_model_is_described_by_its_commit_which_stays_when_offline(hub, caplog):
    first = describe_hub_model("model.source", "org/model", None, {})
    assert first == {"repository": "org/model", "revision": None, "commit": COMMITS[0]}
    hub["sha"] = None
    assert describe_hub_model("model.source", "org/model", None, first) == first
    assert "(Name or service not known); using the last known commit, 11111111" in caplog.text
    hub["sha"] = COMMITS[1]
    assert describe_hub_model("model.source", "org/model", None, first)["commit"] == COMMITS[1]
    assert hub["asked"] == [("org/model", None)] * 3


@pytest.mark.parametrize("asked", [("org/other", None), ("org/model", "v2")])
def test_the_commit_of_another_model_is_not_used(asked, hub):
    first = describe_hub_model("model.source", "org/model", None, {})
    hub["sha"] = None
    repository, revision = asked
    at = r" at the revision 'v2'" if revision else ""
    message = (
        rf"model\.source='{repository}': there is no such folder, and the Hugging Face Hub names no such model{at}"
    )
    with pytest.raises(SourceError, match=message + r" \(Name or service not known\)\. Check the spelling"):
        describe_hub_model("model.source", *asked, first)


def test_the_commit_downloaded_last_is_used_when_offline(hub, tmp_path):
    hub["sha"] = None
    folder = tmp_path / "hub/models--org--model"
    write(folder, refs__main=COMMITS[1], **{f"snapshots__{COMMITS[1]}__config.json": "{}"})
    assert describe_hub_model("model.source", "org/model", None, {})["commit"] == COMMITS[1]


def test_a_revision_that_is_a_commit_needs_no_hub(hub):
    assert describe_hub_model("model.source", "org/model", COMMITS[1], {})["commit"] == COMMITS[1]
    assert hub["asked"] == []


def test_a_hub_that_does_not_answer_costs_no_more_than_the_patience(hub, monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: time.sleep(5))
    monkeypatch.setattr(sources, "_PATIENCE", 0.1)
    last = {"repository": "org/model", "revision": None, "commit": COMMITS[0]}
    start = time.monotonic()
    assert describe_hub_model("model.source", "org/model", None, last) == last
    assert time.monotonic() - start < 2


def test_an_impossible_repository_name_is_refused(hub):
    hub["sha"] = None
    with pytest.raises(SourceError, match=r"^model\.source='no such\.\.name': there is no such folder"):
        describe_hub_model("model.source", "no such..name", None, {})


def test_files_of_linked_folders_count(tmp_path, hashes_file):
    """The corpora read them."""
    folder, elsewhere = write(tmp_path / "corpus", a="one"), write(tmp_path / "elsewhere", b="two")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    assert list(describe(folder, hashes_file)["sha256"]) == ["a", "linked/b"]
