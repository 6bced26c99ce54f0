"""The progress bar, the files of metrics and cost, and platforms that lack what Linux gives."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from pipeline.params import load_params
from pipeline.runtime import progress
from pipeline.runtime.stage_list import read_stages
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
    """Return (bar, text after it) of everything that is shown on a terminal."""
    shown = []
    monkeypatch.setattr(progress, "current_rss_gib", lambda: 0.5)
    monkeypatch.setattr(progress.tqdm, "set_postfix_str", lambda bar, text, refresh: shown.append((bar.desc, text)))
    make = progress.tqdm
    # A stage that ran before in this process may have hidden all bars.
    monkeypatch.setattr(make, "__init__", getattr(make, progress._HIDDEN, make.__init__))
    monkeypatch.setattr(progress, "tqdm", lambda *args, disable, **options: make(*args, file=io.StringIO(), **options))
    return shown


def test_noted_values_and_memory_go_to_the_bar_that_was_started_last(postfixes):
    progress.note_progress(loss=1.0)
    for _ in progress.show_progress(range(2), 2, "outer"):
        progress.note_progress(loss=0.123456)
        for _ in progress.show_progress(range(1), 1, "inner"):
            progress.note_progress(loss=2.0, epoch=3)
    progress.note_progress(loss=1.0)
    inner = [("inner", "0.50 GiB"), ("inner", "loss=2, epoch=3, 0.50 GiB")]
    noted = ("outer", "loss=0.1235, 0.50 GiB")
    assert postfixes == [("outer", "0.50 GiB"), noted, *inner, noted, noted, *inner]


def test_a_bar_that_is_left_early_gets_no_values(postfixes):
    for _ in progress.show_progress(range(5), 5, "left"):
        break
    progress.note_progress(loss=1.0)
    assert postfixes == [("left", "0.50 GiB")]
    assert list(progress.show_progress(iter("abc"), 3, "whole")) == ["a", "b", "c"]


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only entry is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress, "current_rss_gib", lambda: 0.77)
    return now


def test_a_line_says_place_time_time_left_and_memory(clock):
    assert progress.describe_progress("model 3/20", 5) == "model 3/20: 0:05, 0.77 GiB"
    for block in progress.show_progress(range(30), 30, "quantizing"):
        if block == 0:
            assert progress.describe_progress("a 1/2", 1) == "a 1/2: quantizing, block 1 of 30, 0:01, 0.77 GiB"
        if block == 10:
            clock[0] = 50.0
            line = "a 1/2: quantizing, block 11 of 30, 1:02, about 1:40 left, 0.77 GiB"
            assert progress.describe_progress("a 1/2", 62) == line
            for _ in progress.show_progress(range(3), 3, "inner", "step"):
                assert progress.describe_progress("a 1/2", 62) == line


def test_without_a_terminal_there_are_lines_at_both_ends_and_in_between(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)  # which is no project
    caplog.set_level("INFO")
    with progress.run_stage("rotation", tmp_path / "metrics.json", tmp_path / "cost.json", RUNTIME):
        for _ in progress.show_progress(range(1), 1, "rotating blocks"):
            time.sleep(0.2)
    first, *between, last = [record.getMessage() for record in caplog.records]
    assert first == "rotation: begins"
    assert between
    assert all(re.fullmatch(r"rotation: (rotating blocks, block 1 of 1, )?0:00, [\d.]+ GiB", line) for line in between)
    assert re.fullmatch(r"rotation: done in 0:00, [\d.]+ GiB", last)


def test_a_stage_of_a_project_is_shown_with_its_place(monkeypatch, tmp_path, caplog):
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    count = len(read_stages(tmp_path))
    caplog.set_level("INFO")
    costs = tmp_path / "metrics/runtime"
    progress.write_json(costs / "quantizer_init.json", {"seconds": 412})
    with progress.run_stage("finetuning", tmp_path / "metrics/finetuning.json", costs / "finetuning.json", RUNTIME):
        pass
    place = [stage.name for stage in read_stages(tmp_path)].index("finetuning") + 1
    lines = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(rf"finetuning {place}/{count}: begins, about \d+:\d\d for the stages after it", lines[0])
    assert lines[1].startswith(f"finetuning {place}/{count}: done in 0:00")


WITH_BARS = """
import sys
from tqdm import tqdm
from pipeline.runtime.progress import hide_bars, show_progress
hide_bars()
for _ in tqdm(range(3), disable=False, desc="another package"):
    pass
for _ in show_progress(range(3), 3, "this project"):
    pass
"""


def test_bars_of_other_packages_leave_no_fragments_in_a_file():
    done = subprocess.run([sys.executable, "-c", WITH_BARS], cwd=ROOT, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_every_elementwise_function_is_called_on_one_number_before_a_stage_begins(tmp_path, monkeypatch):
    calls = []

    def spy(function):
        return lambda x: calls.append((function.__name__, x.dtype, x.numel())) or function(x)

    monkeypatch.setattr(progress, "_MKL_FUNCTIONS", [spy(function) for function in progress._MKL_FUNCTIONS])
    with progress.run_stage("model", tmp_path / "metrics.json", tmp_path / "cost.json", RUNTIME) as metrics:
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


def test_figures_that_differ_between_machines_are_in_a_file_of_their_own(tmp_path):
    with progress.run_stage("report", tmp_path / "metrics.json", tmp_path / "cost.json", RUNTIME) as metrics:
        metrics |= {"mib": 106.6, "minutes": 16.7, "gib": 4.13}
    cost = read_json(tmp_path / "cost.json")
    assert read_json(tmp_path / "metrics.json") == {"mib": 106.6}
    assert cost.keys() >= {"seconds", "minutes", "gib"}
    assert (cost["minutes"], cost["gib"]) == (16.7, 4.13)


def test_the_cost_leaves_out_a_peak_that_the_platform_does_not_give(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_STATUS", tmp_path / "no such file")
    monkeypatch.setitem(sys.modules, "resource", None)
    with progress.run_stage("model", tmp_path / "metrics.json", tmp_path / "cost.json", RUNTIME) as metrics:
        metrics["value"] = 1
    assert read_json(tmp_path / "metrics.json") == {"value": 1}
    assert read_json(tmp_path / "cost.json").keys() == {"seconds"}
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
