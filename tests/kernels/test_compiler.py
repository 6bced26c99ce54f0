"""Kernels are compiled once, for this machine, and everything works without them."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from pipeline.kernels import compiler

ROOT = Path(__file__).parents[2]
BROKEN = "this is not C++\n"


def count_calls(monkeypatch):
    calls = []
    plain = compiler._call
    monkeypatch.setattr(compiler, "_call", lambda command: calls.append(command) or plain(command))
    return calls


@pytest.mark.skipif(not compiler.find_kernels(), reason="no C++ compiler")
def test_a_source_is_compiled_once_and_again_when_it_or_torch_changes(tmp_path, monkeypatch):
    source, folder, calls = tmp_path / "one.cpp", tmp_path / "deep/er", count_calls(monkeypatch)
    source.write_text("int one() { return 1; }\n")
    library = compiler.build(source, folder)
    assert library.is_file()
    assert compiler.build(source, folder) == library
    assert len(commands := list_builds(calls)) == 2, commands  # compile, link
    source.write_text("int one() { return 2; }\n")
    assert compiler.build(source, folder) != library
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    compiler.build(source, folder)
    assert len(list_builds(calls)) == 6
    assert sorted(path.suffix for path in folder.iterdir()) == [".so"] * 3  # and no other file


def list_builds(calls):
    return [command for command in calls if "--version" not in command]


@pytest.mark.skipif(not compiler.find_kernels(), reason="no C++ compiler")
def test_one_of_two_simultaneous_builds_compiles(tmp_path, monkeypatch):
    source, folder, calls = tmp_path / "one.cpp", tmp_path / "built", count_calls(monkeypatch)
    source.write_text("int one() { return 1; }\n")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: compiler.build(source, folder), range(2))
    assert first == second
    assert len(list_builds(calls)) == 2


@pytest.mark.skipif(not compiler.find_kernels(), reason="no C++ compiler")
def test_a_library_that_cannot_be_loaded_is_compiled_again(tmp_path, monkeypatch):
    source, folder, calls = tmp_path / "one.cpp", tmp_path / "built", count_calls(monkeypatch)
    source.write_text("int one() { return 1; }\n")
    library = compiler.build(source, folder)
    library.write_bytes(b"")
    compiler.load_library(source, folder)
    assert len(list_builds(calls)) == 4
    assert library.stat().st_size > 0
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: "env c++")  # two words
    assert compiler.build(source, folder) != library


@pytest.mark.skipif(not compiler.find_kernels(), reason="no C++ compiler")
def test_a_failed_compilation_leaves_no_file_and_shows_the_compilers_error(tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text(BROKEN)
    with pytest.raises(subprocess.CalledProcessError) as error:
        compiler.build(source, tmp_path / "built")
    assert "broken.cpp" in error.value.stderr
    assert list((tmp_path / "built").iterdir()) == []


def break_compiler(monkeypatch, tmp_path, kind):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if kind == "no compiler":
        monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: "no-such-compiler")
    if kind == "no folder":
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path / "file"))
    else:
        monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    if kind == "an error":
        (tmp_path / "broken.cpp").write_text(BROKEN)
        monkeypatch.setattr(compiler, "SOURCE", tmp_path / "broken.cpp")


@pytest.mark.parametrize("kind", ["no compiler", "no folder", "an error"])
def test_a_machine_without_kernels_is_reported_once(kind, tmp_path, monkeypatch, caplog):
    break_compiler(monkeypatch, tmp_path, kind)
    find = compiler.functools.cache(compiler.find_kernels.__wrapped__)
    with caplog.at_level(logging.WARNING):
        assert not find()
        assert not find()
    (record,) = caplog.records
    assert "kernels for this processor cannot be compiled, so slower ones are used" in record.message
    assert kind != "an error" or "error:" in record.message


# Runs in another process, because operators can be defined only once.
PLAIN = """
import os, sys
from pathlib import Path
import pytest, torch
from pipeline.kernels import compiler
compiler._COMPILED = tuple(flag for flag in compiler._COMPILED if not flag.startswith("-march"))
os.environ["TORCH_EXTENSIONS_DIR"] = sys.argv[1]
assert compiler.find_kernels()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.skipif(not compiler.find_kernels(), reason="no C++ compiler")
def test_kernels_without_native_instructions_are_exact_too(tmp_path):
    files = [f"tests/kernels/test_{name}.py" for name in ("nibble_product", "rotated_codes")]
    command = [sys.executable, "-c", PLAIN, str(tmp_path), *files, "-k", "exact or float64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert len(list(tmp_path.rglob("*.so"))) == 1
