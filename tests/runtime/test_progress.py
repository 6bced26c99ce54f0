"""The bar a person watches: what is iterated, and the current loss at its end."""

import io

import pytest
import torch

from pipeline.params import load_params
from pipeline.runtime import progress
from tests.conftest import ROOT, read_json


@pytest.fixture
def postfixes(monkeypatch):
    seen = []
    monkeypatch.setattr(progress.tqdm, "set_postfix", lambda bar, values, refresh: seen.append((bar.desc, values)))
    make = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda *args, disable, **options: make(*args, file=io.StringIO(), **options))
    return seen


def test_values_go_to_the_bar_begun_last_and_nowhere_without_one(postfixes):
    progress.note_progress(loss=1.0)
    for _ in progress.show_progress(range(2), 2, "outer"):
        progress.note_progress(loss=0.123456)
        for _ in progress.show_progress(range(1), 1, "inner"):
            progress.note_progress(loss=2.0, epoch=3)
    progress.note_progress(loss=1.0)
    assert postfixes == [("outer", {"loss": "0.1235"}), ("inner", {"loss": "2", "epoch": "3"})] * 2


def test_a_bar_that_is_left_early_is_gone(postfixes):
    for _ in progress.show_progress(range(5), 5, "left"):
        break
    progress.note_progress(loss=1.0)
    assert postfixes == []
    assert list(progress.show_progress(iter("abc"), 3, "whole")) == ["a", "b", "c"]


def test_no_stage_begins_before_every_elementwise_function_has_been_called_on_one_thread(tmp_path, monkeypatch):
    calls = []

    def spy(function):
        return lambda x: calls.append((function.__name__, x.dtype, x.numel())) or function(x)

    monkeypatch.setattr(progress, "_MKL_FUNCTIONS", [spy(function) for function in progress._MKL_FUNCTIONS])
    with progress.run_stage("model", tmp_path / "metrics.json", load_params(ROOT / "params.yaml").runtime) as metrics:
        metrics["calls"] = len(calls)
    for name in ("cos", "sin", "exp", "log", "sqrt", "tanh", "erf"):
        for dtype in (torch.float32, torch.float64):
            assert calls.count((name, dtype, 1)) == 1
    assert read_json(tmp_path / "metrics.json")["calls"] == len(calls)
