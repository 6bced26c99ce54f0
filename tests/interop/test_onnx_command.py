"""`prefixquant onnx-generate` names the extra. Its continuations are tested in test_onnx_session.py."""

import pytest

from pipeline.runtime.arguments import ArgumentError
from prefixquant.command import dispatch


def test_without_the_extra_the_command_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["prefixquant", "onnx-generate", str(tmp_path), "The house"])
    with pytest.raises(ArgumentError, match=r"pip install 'prefixquant-pipeline\[onnx\]'"):
        dispatch()
