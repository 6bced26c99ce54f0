"""Files are written whole or not at all."""

import json

import pytest

from pipeline.runtime.files import replacing, write_json


def test_json_is_written_whole_and_refuses_nan(tmp_path):
    write_json(tmp_path / "deep" / "x.json", {"b": 1.5, "a": "é"})
    assert json.loads((tmp_path / "deep" / "x.json").read_text()) == {"b": 1.5, "a": "é"}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "deep/x.txt"
    with replacing(path) as temporary:
        temporary.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["x.txt"]
