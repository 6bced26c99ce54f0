"""`python -m benchmarks.robustness`: three hundred mutations, and the benchmark finds faults that are planted."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.robustness import trials
from benchmarks.robustness.bases import Bases
from benchmarks.robustness.kinds import KINDS
from benchmarks.robustness.trial import Trial
from benchmarks.robustness.trials import count_faults, format_table, run_trial, try_mutation
from pipeline.evaluation import texts
from pipeline.inference import generation
from pipeline.runtime.errors import PipelineError
from tests.conftest import ROOT

COUNT = 300


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp("bases") / "whole")


def test_three_hundred_mutations_are_accepted_rightly_or_refused_in_words(bases, tmp_path):
    rows = {f"0/{number}": try_mutation(0, number, bases, tmp_path / "trial") for number in range(COUNT)}
    assert count_faults(rows) == 0, format_table(rows)
    right = [row for row in rows.values() if row["outcome"] == "right"]
    assert {row["kind"] for row in right} == set(KINDS)  # each kind is accepted at least once
    commands = {row["mutation"].partition(" ")[0] for row in right if row["kind"] == "command"}
    assert commands == {"evaluate", "generate"}
    outcomes = [row["outcome"] for row in rows.values()]
    assert outcomes.count("right") > 30
    assert outcomes.count("refused") > 100


def test_a_mutation_is_determined_by_seed_and_number(bases, tmp_path):
    kind = trials.choose_kind(0, 5)
    first, second = (try_mutation(0, 5, bases, tmp_path / "trial") for _ in range(2))
    assert first["kind"] == kind
    assert first["mutation"] == second["mutation"]


@pytest.mark.parametrize("arguments", [["evaluate", "--length", "1"], ["generate", "--max-new-tokens", "0"]])
def test_a_forked_process_prints_the_message_of_the_command_line(arguments, bases, tmp_path, monkeypatch):
    name, *options = arguments
    folder = bases.find("export")
    command = [sys.executable, "-m", f"pipeline.{name}", str(folder), *options]
    typed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    monkeypatch.setattr(sys, "argv", [name, str(folder), *options])
    main = {"evaluate": texts.main, "generate": generation.main}[name]
    monkeypatch.setattr(trials, "choose_kind", lambda seed, number: "command")
    monkeypatch.setitem(KINDS, "command", lambda *args: Trial("", main))
    forked = try_mutation(0, 0, bases, tmp_path / "trial")
    assert (typed.returncode, typed.stderr) == (1, forked["message"] + "\n")
    assert forked["outcome"] == "refused"


def test_a_fork_makes_torchs_threads_anew_before_it_loads_anything(bases, tmp_path, monkeypatch):
    """Loading asks for them from several threads at once. In a fork, one of these sometimes found none."""
    asked = []
    monkeypatch.setattr(trials, "choose_kind", lambda seed, number: "command")
    monkeypatch.setitem(KINDS, "command", lambda *args: Trial(f"asked for {asked}", lambda: None))
    bases.prepare("command")
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert try_mutation(0, 0, bases, tmp_path / "trial")["mutation"] == "asked for [1]"


def raising(error):
    def act():
        raise error

    return act


def test_every_kind_of_fault_is_found(tmp_path):
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
    assert run_trial(Trial("", write("in"), unchanged=tmp_path), tmp_path)[0] == "half"
    assert run_trial(Trial("", lambda: (tmp_path / "big").write_bytes(bytes(99)), disk=9), tmp_path)[0] == "refused"
    assert run_trial(Trial("", write(".x.tmp")), tmp_path)[0] == "half"


def test_a_hang_and_a_death_are_found(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "PATIENCE", 1.0)
    monkeypatch.setattr(trials, "choose_kind", lambda seed, number: "params")
    monkeypatch.setitem(KINDS, "params", lambda *args: Trial("", lambda: time.sleep(30)))
    assert try_mutation(0, 0, bases, tmp_path / "trial")["outcome"] == "hang"
    monkeypatch.setitem(KINDS, "params", lambda *args: Trial("", lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert try_mutation(0, 0, bases, tmp_path / "trial")["message"].startswith("the process died")
