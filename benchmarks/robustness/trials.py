"""Damage inputs of users at random, and count right results, refusals and wrong handling.

    python -m benchmarks.robustness --seed 0 --count 1000
    python -m benchmarks.robustness --seed 0 --first 250 --count 250 --json robustness.json      # a part; keeps rows

Each mutation is determined by seed and number. It changes one place of a params file, a corpus, a checkpoint, a GGUF
file, an exported folder or a command line, all of tiny models, or it fills the disk. Intact models and texts are also
used in unusual ways (kinds `calls` and `messages`). The entry point then runs as a user runs it, in a process of its
own, for at most 60 seconds. The outcome is one of

    right       accepted, and a reference agrees: transformers' own loading of the same files, pyarrow's reading of the
                same rows, the values in the file
    refused     one message, exit code 1, and nothing written
    traceback   anything else that was raised, or a process that died
    hang        not done after 60 seconds
    half        something half written was left
    silent      accepted without an error, and the reference differs

The last four are faults. They are listed with number and message.
"""

import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.robustness.bases import Bases
from benchmarks.robustness.kinds import KINDS, WEIGHTS
from benchmarks.robustness.trial import Trial
from benchmarks.workspace import read_rows
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.errors import run_main
from pipeline.runtime.files import write_json

OUTCOMES = ("right", "refused", "traceback", "hang", "half", "silent")
FAULTS = OUTCOMES[2:]
PATIENCE = 60.0  # seconds


def main() -> None:
    parser = Parser(prog="python -m benchmarks.robustness", description=__doc__)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--first", type=whole(0), default=0, help="number of the first mutation")
    parser.add_argument("--count", type=whole(1), default=1000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path, help="keep finished mutations in this file, and skip them later")
    arguments = parser.parse_args()
    rows = read_rows(arguments.json)
    with tempfile.TemporaryDirectory() as work:
        bases = Bases(Path(work) / "bases")
        for number in range(arguments.first, arguments.first + arguments.count):
            kind, name = choose_kind(arguments.seed, number), f"{arguments.seed}/{number}"
            if kind not in arguments.kinds or name in rows:
                continue
            rows[name] = try_mutation(arguments.seed, number, bases, Path(work) / "trial")
            if arguments.json and number % 20 == 0:
                write_json(arguments.json, rows)
    if arguments.json:
        write_json(arguments.json, rows)
    print(format_table(rows))


def choose_kind(seed: int, number: int) -> str:
    """Return the kind of a mutation, one of `KINDS`."""
    return random.Random(f"{seed}/{number}").choices(list(KINDS), WEIGHTS)[0]


def try_mutation(seed: int, number: int, bases: Bases, folder: Path) -> dict[str, Any]:
    """Run a mutation in a child process and return its row: "kind", "mutation", "outcome", "message", "seconds"."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kind = choose_kind(seed, number)
    bases.prepare(kind)  # here, so that every child has it
    start, (reader, writer) = time.perf_counter(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        result = _run_child(seed, number, kind, bases, folder)
        with os.fdopen(writer, "w") as file:
            json.dump(result, file)
        os._exit(0)
    os.close(writer)
    result = _collect(child, reader)
    return {"kind": kind} | result | {"seconds": round(time.perf_counter() - start, 2)}


def _collect(child: int, reader: int) -> dict[str, str]:
    """Return the child's result, or that it died or took too long."""
    end, received = time.monotonic() + PATIENCE, b""
    while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(reader, 65536)
        received += part
        if not part:
            _, status = os.waitpid(child, 0)
            os.close(reader)
            died = {"mutation": "?", "outcome": "traceback", "message": f"the process died (status {status})"}
            return json.loads(received) if received else died
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    return {"mutation": "?", "outcome": "hang", "message": f"not done after {PATIENCE:g} seconds"}


def _run_child(seed: int, number: int, kind: str, bases: Bases, folder: Path) -> dict[str, str]:
    mutation = "?"
    # A fork makes a new pool of torch's threads. If several threads ask for it first, one of them may find none.
    torch.set_num_threads(1)
    with (folder / "output").open("w+") as output:
        for target in (1, 2):
            os.dup2(output.fileno(), target)
        sys.stdout = sys.stderr = output
        try:
            trial = KINDS[kind](random.Random(f"{seed}/{number}/mutation"), bases, folder)
            mutation = trial.mutation
            outcome, message = run_trial(trial, folder)
        except BaseException:  # raised by the mutation or the reference: a fault of this program, shown as one
            outcome, message = "traceback", traceback.format_exc()[-600:]
    result = {"mutation": mutation, "outcome": outcome, "message": message}
    return {key: text.encode(errors="backslashreplace").decode() for key, text in result.items()}


def run_trial(trial: Trial, folder: Path) -> tuple[str, str]:
    """Act as a user does, judge the result, and return (outcome, message)."""
    before = snapshot(trial.unchanged)
    message = _act(trial)
    if message is not None and message.startswith("Traceback"):
        return "traceback", message
    left = [path.name for path in folder.rglob(".*") if path.name.endswith((".tmp", ".partial"))]
    if left:
        return "half", f"left behind: {', '.join(left)}"
    if snapshot(trial.unchanged) != before:
        return "half", "an input has changed"
    if message is not None:
        there = [path.name for path in trial.writes if path.exists()]
        return ("half", f"{message}; but {', '.join(there)} was written") if there else ("refused", message)
    problem = trial.judge()
    return ("right", "") if problem is None else ("silent", problem)


def _act(trial: Trial) -> str | None:
    """Return None if the input was accepted, otherwise the message of a refusal, or a traceback."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trial.disk is not None:  # writing beyond a file's limit fails as it does on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (trial.disk, limits[1]))
    try:
        run_main(trial.act)
    except SystemExit as end:
        if end.code in (None, 0):
            return None
        if isinstance(end.code, str) and end.code.startswith("error: ") and len(end.code) < 20_000:
            return end.code
        return f"Traceback: ended with {end.code!r}, without a message"
    except BaseException:
        return "Traceback " + traceback.format_exc()[-1500:]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return None


def snapshot(folder: Path | None) -> dict[str, bytes]:
    """Return the contents of all files of a folder by path."""
    if folder is None or not folder.exists():
        return {}
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def format_table(rows: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table with a line for each seed and kind, followed by the faults."""
    lines = ["| seed | handed in | mutations | " + " | ".join(OUTCOMES) + " |", "| --- " * (3 + len(OUTCOMES)) + "|"]
    seeds = sorted({name.partition("/")[0] for name in rows}, key=int)
    for seed in seeds:
        of_seed = [row for name, row in rows.items() if name.partition("/")[0] == seed]
        for kind in (*KINDS, "all"):
            counts = Counter(row["outcome"] for row in of_seed if kind in (row["kind"], "all"))
            if total := sum(counts.values()):
                cells = [seed, kind, total, *(counts[outcome] for outcome in OUTCOMES)]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    for name, row in rows.items():
        if row["outcome"] in FAULTS:
            lines += ["", f"{name} {row['kind']}: {row['outcome']}: {row['mutation']}", row["message"]]
    return "\n".join(lines)


def count_faults(rows: dict[str, dict[str, Any]]) -> int:
    """Return how many rows are faults."""
    return sum(row["outcome"] in FAULTS for row in rows.values())
