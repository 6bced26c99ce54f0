"""The progress bar, the metrics file, and platforms that lack what Linux gives."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pipeline.params import load_params
from pipeline.runtime import progress
from tests.conftest import ROOT, read_json
from tests.export.test_folder import TEXT, make_export

RUNTIME = load_params(ROOT / "params.yaml").runtime
# Modules of the standard library that Windows lacks.
POSIX_ONLY = ("resource", "fcntl", "termios", "pwd", "grp", "pty", "syslog")
# Missing for this project's own modules only: other packages choose by sys.platform what they import.
LOAD_AN_EXPORT = """
import builtins, json, sys
import torch
plain_import, missing = builtins.__import__, sys.argv[3].split(",")

def import_as_on_windows(name, globals=None, *rest, **options):
    if name in missing and (globals or {}).get("__name__", "").startswith("pipeline"):
        raise ModuleNotFoundError(name)
    return plain_import(name, globals, *rest, **options)

builtins.__import__ = import_as_on_windows
import pipeline.evaluate, pipeline.generate, pipeline.hf, pipeline.lm_eval_tasks
from pipeline.quantized_model import load
model, _ = load(sys.argv[1])
text = torch.tensor(json.loads(sys.argv[2]))
tokens = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=4, do_sample=False)
print(json.dumps(tokens.tolist()))
"""
WITHOUT_DISTRIBUTED = """
import sys, types
import torch
torch.distributed = sys.modules["torch.distributed"] = types.ModuleType("torch.distributed")
torch.distributed.is_available = lambda: False
from pipeline.runtime.progress import is_first_rank, show_progress
from pipeline.runtime.ranks import ALONE
assert is_first_rank() and list(show_progress(range(2), 2, "x")) == [0, 1]
ALONE.sum_(torch.ones(1))
ALONE.wait()
"""


@pytest.fixture
def postfixes(monkeypatch):
    shown = []
    monkeypatch.setattr(progress.tqdm, "set_postfix", lambda bar, values, refresh: shown.append((bar.desc, values)))
    make = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda *args, disable, **options: make(*args, file=io.StringIO(), **options))
    return shown


def test_noted_values_go_to_the_bar_that_was_started_last(postfixes):
    progress.note_progress(loss=1.0)
    for _ in progress.show_progress(range(2), 2, "outer"):
        progress.note_progress(loss=0.123456)
        for _ in progress.show_progress(range(1), 1, "inner"):
            progress.note_progress(loss=2.0, epoch=3)
    progress.note_progress(loss=1.0)
    assert postfixes == [("outer", {"loss": "0.1235"}), ("inner", {"loss": "2", "epoch": "3"})] * 2


def test_a_bar_that_is_left_early_gets_no_values(postfixes):
    for _ in progress.show_progress(range(5), 5, "left"):
        break
    progress.note_progress(loss=1.0)
    assert postfixes == []
    assert list(progress.show_progress(iter("abc"), 3, "whole")) == ["a", "b", "c"]


def test_every_elementwise_function_is_called_on_one_number_before_a_stage_begins(tmp_path, monkeypatch):
    calls = []

    def spy(function):
        return lambda x: calls.append((function.__name__, x.dtype, x.numel())) or function(x)

    monkeypatch.setattr(progress, "_MKL_FUNCTIONS", [spy(function) for function in progress._MKL_FUNCTIONS])
    with progress.run_stage("model", tmp_path / "metrics.json", RUNTIME) as metrics:
        metrics["calls"] = len(calls)
    for name in ("cos", "sin", "exp", "log", "sqrt", "tanh", "erf"):
        for dtype in (torch.float32, torch.float64):
            assert calls.count((name, dtype, 1)) == 1
    assert read_json(tmp_path / "metrics.json")["calls"] == len(calls)


def run_python(program, *arguments):
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_export_loads_and_generates_without_modules_that_windows_lacks(imported, tmp_path):
    folder, evaluated, _ = make_export(imported, tmp_path)
    expected = evaluated.generate(TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=4, do_sample=False)
    printed = run_python(LOAD_AN_EXPORT, str(folder), json.dumps(TEXT.tolist()), ",".join(POSIX_ONLY))
    assert json.loads(printed.splitlines()[-1]) == expected.tolist()


def test_one_process_works_with_a_torch_that_was_built_without_distributed():
    run_python(WITHOUT_DISTRIBUTED)


def test_metrics_leave_out_a_peak_that_the_platform_does_not_give(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_STATUS", tmp_path / "no such file")
    monkeypatch.setitem(sys.modules, "resource", None)
    with progress.run_stage("model", tmp_path / "metrics.json", RUNTIME) as metrics:
        metrics["value"] = 1
    written = read_json(tmp_path / "metrics.json")
    assert written["value"] == 1
    assert "seconds" in written
    assert "peak_rss_gib" not in written
    assert progress.current_rss_gib() == 0


@pytest.mark.parametrize(("platform", "maximum"), [("darwin", 3 * 2**30), ("linux", 3 * 2**20)])
def test_getrusage_counts_in_bytes_on_macos_and_in_kib_elsewhere(platform, maximum, tmp_path, monkeypatch):
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=maximum))
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(progress, "_STATUS", tmp_path / "no such file")
    monkeypatch.setattr(sys, "platform", platform)
    assert progress.peak_rss_gib() == 3


def test_sizes_are_read_from_the_status_file_where_there_is_one(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t 3145728 kB\nVmRSS:\t 1048576 kB\n")
    monkeypatch.setattr(progress, "_STATUS", status)
    assert (progress.peak_rss_gib(), progress.current_rss_gib()) == (3, 1)
