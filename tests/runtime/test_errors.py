"""What is not ours to crash on is one message; a bug of ours keeps its traceback, and so does everything when asked."""

import errno
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from pipeline.runtime import artifacts
from pipeline.runtime.arguments import ArgumentError, Parser, check_writable, device, positive, whole
from pipeline.runtime.artifacts import make_header, replacing_folder, save_tensors
from pipeline.runtime.errors import TRACEBACK, PipelineError, reading, run_main, was_raised_in
from tests.conftest import ROOT


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PipelineError("a; do b"), "error: a; do b"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device (PREFIXQUANT_TRACEBACK=1"),
        (FileNotFoundError(2, "No such file", "x.json"), "error: [Errno 2] No such file: 'x.json' (PREFIXQUANT"),
        (MemoryError(), "error: out of memory (PREFIXQUANT_TRACEBACK=1 shows where)"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "error: CUDA out of memory. Tried (PREFIX"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "error: DefaultCPUAllocator: can't"),
        (SafetensorError("I/O error: No space left"), "error: I/O error: No space left (PREFIX"),
        (subprocess.CalledProcessError(1, ["x"]), "error: Command '['x']' returned non-zero exit status 1. (PREFIX"),
    ],
)
def test_what_is_no_bug_is_one_message(error, message, monkeypatch):
    with pytest.raises(SystemExit) as end:
        run_main(raising(error))
    assert end.value.code.startswith(message)
    assert "\n" not in end.value.code
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(type(error)):
        run_main(raising(error))


def test_a_bug_shows_as_one():
    for bug in (TypeError("x"), KeyError("x"), AssertionError(), RuntimeError("shapes"), ZeroDivisionError()):
        with pytest.raises(type(bug)):
            run_main(raising(bug))


def test_an_interruption_is_no_error(capsys):
    with pytest.raises(SystemExit) as end:
        run_main(raising(KeyboardInterrupt()))
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_who_stops_listening_sees_no_traceback():
    program = "from pipeline.runtime.errors import run_main; run_main(lambda: [print('x' * 9999) for _ in range(999)])"
    command = f'{sys.executable} -c "{program}" | head -c 5'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "xxxxx"
    assert done.stderr == ""


def test_what_is_read_is_a_matter_of_its_file():
    damaged = reading(lambda why: PipelineError(f"x is damaged ({why})"))
    with pytest.raises(PipelineError, match=r"^x is damaged \(no 'a'\)$") as found, damaged:
        {}["a"]
    assert isinstance(found.value.__cause__, KeyError)  # kept for a traceback
    with pytest.raises(PipelineError, match=r"^own$"), reading(lambda why: PipelineError(why)):
        raise PipelineError("own")
    with pytest.raises(OSError, match="No space"), reading(lambda why: PipelineError(why)):
        raise OSError(errno.ENOSPC, "No space left on device")
    panic = type("PanicException", (BaseException,), {})  # as libraries in Rust raise
    with pytest.raises(PipelineError, match=r"^panicked$"), reading(lambda why: PipelineError(why)):
        raise panic("panicked")
    with pytest.raises(KeyboardInterrupt), reading(lambda why: PipelineError(why)):
        raise KeyboardInterrupt


def test_who_raised_it():
    with pytest.raises(RuntimeError) as found:
        torch.ones(2).view(3)
    assert was_raised_in(found.value, "tests")
    assert was_raised_in(found.value, "other", "tests.runtime")
    assert not was_raised_in(found.value, "pipeline")
    assert not was_raised_in(found.value, "tests.run")
    assert was_raised_in(SafetensorError("x"), "safetensors")


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    folder = tmp_path / "artifact"
    with replacing_folder(folder) as partial:
        (partial / "old").write_text("whole")

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts, "save_file", full)

    def main():
        with replacing_folder(folder) as partial:
            (partial / "half").write_text("x")
            save_tensors(partial / "x.safetensors", {"a": torch.ones(1)}, make_header("model", {}))

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code.startswith("error: No space left on device")
    assert [path.name for path in tmp_path.rglob("*")] == ["artifact", "old"]


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        (whole(1), "0", "'0' is no whole number of 1 to"),
        (whole(1), "1.5", "is no whole number"),
        (whole(1), "9" * 30, "is no whole number"),
        (positive, "-1", "'-1' is no number of 0 or more"),
        (positive, "nan", "is no number"),
        (positive, "inf", "is no number"),
        (device, "cuda:99", r"'cuda:99' cannot be used \("),
        (device, "quantum", r"'quantum' cannot be used \("),
        (device, "meta", "'meta' holds no numbers"),
    ],
)
def test_arguments_are_checked_before_any_work(kind, text, problem):
    parser = Parser()
    parser.add_argument("--x", type=kind)
    with pytest.raises(ArgumentError, match=rf"argument --x: .*{problem}.*; --help lists what is allowed"):
        parser.parse_args([f"--x={text}"])


def test_where_nothing_can_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new/folder/x.json")
    for path in (tmp_path, tmp_path / "file/x.json"):
        with pytest.raises(ArgumentError, match="cannot be written"):
            check_writable(path)
