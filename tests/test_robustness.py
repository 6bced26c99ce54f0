"""`python -m benchmarks.robustness`: three hundred mutations of what users hand in; and its faults are seen."""

import errno
import os
import time

import pytest

from benchmarks import robustness
from benchmarks.robustness import count_faults, format_table, run_trial, try_mutation
from benchmarks.robustness_cases import KINDS, Bases, Trial
from pipeline.runtime.errors import PipelineError

COUNT = 300


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp("bases") / "whole")


def test_three_hundred_mutations_are_read_rightly_or_refused_in_words(bases, tmp_path):
    rows = {f"0/{number}": try_mutation(0, number, bases, tmp_path / "trial") for number in range(COUNT)}
    assert count_faults(rows) == 0, format_table(rows)
    assert {row["kind"] for row in rows.values()} == set(KINDS)
    outcomes = [row["outcome"] for row in rows.values()]
    assert outcomes.count("right") > 30  # it is not all refused
    assert outcomes.count("refused") > 100


def test_a_mutation_is_determined_by_seed_and_number(bases, tmp_path):
    kind = robustness.choose_kind(0, 5)
    first, second = (try_mutation(0, 5, bases, tmp_path / "trial") for _ in range(2))
    assert first["kind"] == kind
    assert first["mutation"] == second["mutation"]


def raising(error):
    def act():
        raise error

    return act


def test_every_fault_is_seen(tmp_path):
    def write(name):
        return lambda: (tmp_path / name).write_text("half")

    def refuse_late():
        write("out")()
        raise PipelineError("too late")

    assert run_trial(Trial("", raising(TypeError("x"))), tmp_path)[0] == "traceback"
    assert run_trial(Trial("", raising(SystemExit(3))), tmp_path)[0] == "traceback"
    assert run_trial(Trial("", raising(PipelineError("x"))), tmp_path) == ("refused", "error: x")
    assert run_trial(Trial("", raising(OSError(errno.ENOSPC, "full"))), tmp_path)[0] == "refused"
    assert run_trial(Trial("", lambda: None), tmp_path) == ("right", "")
    assert run_trial(Trial("", lambda: None, lambda: "other logits"), tmp_path) == ("silent", "other logits")
    assert run_trial(Trial("", refuse_late, writes=(tmp_path / "out",)), tmp_path)[0] == "half"
    assert run_trial(Trial("", write("in"), keeps=tmp_path), tmp_path)[0] == "half"
    assert run_trial(Trial("", lambda: (tmp_path / "big").write_bytes(bytes(99)), disk=9), tmp_path)[0] == "refused"
    assert run_trial(Trial("", write(".x.tmp")), tmp_path)[0] == "half"


def test_a_hang_and_a_death_are_seen(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "PATIENCE", 1.0)
    monkeypatch.setattr(robustness, "choose_kind", lambda seed, number: "params")
    monkeypatch.setitem(KINDS, "params", lambda *args: Trial("", lambda: time.sleep(30)))
    assert try_mutation(0, 0, bases, tmp_path / "trial")["outcome"] == "hang"
    monkeypatch.setitem(KINDS, "params", lambda *args: Trial("", os.abort))
    assert try_mutation(0, 0, bases, tmp_path / "trial")["message"].startswith("the process died")
