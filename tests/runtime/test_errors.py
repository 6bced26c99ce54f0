"""Mistakes of the user and failures of the machine are one message; bugs keep their traceback."""

import errno
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from pipeline.runtime import artifacts
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
def test_errors_that_are_not_bugs_are_one_message(error, message, monkeypatch):
    with pytest.raises(SystemExit) as end:
        run_main(raising(error))
    assert end.value.code.startswith(message)
    assert "\n" not in end.value.code
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(type(error)):
        run_main(raising(error))


def test_bugs_keep_their_traceback():
    for bug in (TypeError("x"), KeyError("x"), AssertionError(), RuntimeError("shapes"), ZeroDivisionError()):
        with pytest.raises(type(bug)):
            run_main(raising(bug))


def test_an_interruption_ends_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as end:
        run_main(raising(KeyboardInterrupt()))
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_closed_pipe_ends_without_a_traceback():
    program = "from pipeline.runtime.errors import run_main; run_main(lambda: [print('x' * 9999) for _ in range(999)])"
    command = f'{sys.executable} -c "{program}" | head -c 5'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "xxxxx"
    assert done.stderr == ""


def test_reading_turns_exceptions_into_one_described_error():
    damaged = reading(lambda reason: PipelineError(f"x is damaged ({reason})"))
    with pytest.raises(PipelineError, match=r"^x is damaged \(no 'a'\)$") as raised, damaged:
        {}["a"]
    assert isinstance(raised.value.__cause__, KeyError)  # for the traceback
    with pytest.raises(PipelineError, match=r"^inner$"), reading(lambda reason: PipelineError(reason)):
        raise PipelineError("inner")
    with pytest.raises(OSError, match="No space"), reading(lambda reason: PipelineError(reason)):
        raise OSError(errno.ENOSPC, "No space left on device")
    panic = type("PanicException", (BaseException,), {})  # as Rust libraries raise it
    with pytest.raises(PipelineError, match=r"^panicked$"), reading(lambda reason: PipelineError(reason)):
        raise panic("panicked")
    with pytest.raises(KeyboardInterrupt), reading(lambda reason: PipelineError(reason)):
        raise KeyboardInterrupt


def test_was_raised_in_knows_the_raising_module_and_the_type():
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2).view(3)
    assert was_raised_in(raised.value, "tests")
    assert was_raised_in(raised.value, "other", "tests.runtime")
    assert not was_raised_in(raised.value, "pipeline")
    assert not was_raised_in(raised.value, "tests.run")
    assert was_raised_in(SafetensorError("x"), "safetensors")


def test_a_full_disk_leaves_no_partial_file(tmp_path, monkeypatch):
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
