"""Run the stages of dvc.yaml in order without DVC, for machines where DVC cannot be installed.

    python -m stages.run                 # all stages
    python -m stages.run finetuning      # this one and all stages that it needs

A stage is skipped if its params, the files that it reads and the files that it wrote are as they were when it last ran.
Hashes of these are kept in .work/run.json. There is no cache: going back to earlier settings runs stages again. DVC is
the normal way; do not use both in one folder.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.params import load_params
from pipeline.runtime.arguments import ArgumentError, Parser
from pipeline.runtime.errors import PipelineError, run_main
from pipeline.runtime.files import write_json
from pipeline.runtime.sources import FileHashes, read_json
from pipeline.runtime.stage_list import Stage, read_stages

PARAMS = Path("params.yaml")
RECORD = Path(".work/run.json")  # stage -> a hash of everything that it read and wrote
HASHES = Path(".work/run-hashes.json")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="run these and all stages that they need")
    arguments = parser.parse_args()
    load_params(PARAMS)
    params = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    for stage in select_stages(read_stages(Path()), arguments.stages):
        run_stage(stage, params)


def select_stages(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """Return the named stages and all stages that they need, in order; all stages if none is named.

    Raises:
        ArgumentError: there is no such stage.
    """
    known = [stage.name for stage in stages]
    for name in names:
        if name not in known:
            raise ArgumentError(f"{name!r}: unknown stage. dvc.yaml has: {', '.join(known)}.")
    needed = set(names or known)
    for stage in reversed(stages):  # every stage comes after those that it needs
        if stage.name in needed:
            needed |= {other.name for other in stages if other is not stage and other.feeds(stage)}
    return [stage for stage in stages if stage.name in needed]


def run_stage(stage: Stage, params: dict[str, Any]) -> None:
    """Run a stage unless nothing has changed since it last ran, and record its inputs and outputs.

    Raises:
        PipelineError: it failed. Its message has been shown.
    """
    record = read_json(RECORD)
    with FileHashes(HASHES) as hashes:
        state = describe_state(stage, params, hashes)
    if not stage.always_run and state is not None and record.get(stage.name) == state:
        print(f"{stage.name}: unchanged, skipped", flush=True)
        return
    for path in map(Path, stage.written):  # as DVC does, so that nothing of an earlier run is left
        if str(path) not in stage.persistent:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    program, *words = stage.command.split()
    command = [sys.executable if program == "python" else program, *words]
    if code := subprocess.run(command, check=False).returncode:
        raise PipelineError(
            f"{stage.name} ended with exit code {code}. Correct the cause. The same command then continues."
        )
    with FileHashes(HASHES) as hashes:
        write_json(RECORD, read_json(RECORD) | {stage.name: describe_state(stage, params, hashes)})


def describe_state(stage: Stage, params: dict[str, Any], hashes: FileHashes) -> str | None:
    """Return a hash of a stage's command, params, inputs and outputs; None if one of these files is missing."""
    values: dict[str, Any] = {"command": stage.command, "params": {key: _look_up(params, key) for key in stage.params}}
    for path in map(Path, (*stage.deps, *stage.written)):
        if not path.exists():
            return None
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        values[path.as_posix()] = {file.as_posix(): hashes.hash(file) for file in files}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _look_up(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        values = values[key]
    return values


if __name__ == "__main__":
    run_main(main)
