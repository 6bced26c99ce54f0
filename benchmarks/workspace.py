"""Run pipeline stages with changed params outside DVC, each result once.

A stage's folder is named after everything that determines its result, as dvc.yaml lists it: its params and its inputs.
Inputs from stages that always run (`code`, `sources`) count by their content. Rows of a benchmark that share stages
share their folders, and a benchmark that is started again continues.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.params import parse_params
from pipeline.runtime.arguments import Parser
from pipeline.runtime.artifacts import fingerprint, fingerprint_file, write_json
from pipeline.runtime.errors import PipelineError, reading
from pipeline.runtime.progress import select_device

ROOT = Path(__file__).resolve().parents[1]


class Workspace:
    """Runs stages in subfolders of `folder`, which take some GB. Delete it afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._always_run: set[Path] = set()  # folders of stages that always run, which this object has run

    def run(self, stage: str, params: dict[str, Any]) -> Path:
        """Run a stage (such as `evaluation@original`) and all stages that it needs, and return the folder it ran in.

        Raises:
            subprocess.CalledProcessError: the stage failed. Its output has been shown.
        """
        parse_params(params)
        stages = expand_stages(params)
        spec = stages[stage]
        deps = spec.get("deps", [])
        upstream = {name: self.run(name, params) for name in _list_producers(stages, deps)}
        values = {key: _look_up(params, key) for key in spec.get("params", [])}
        runtime = params["runtime"]["threads"], params["runtime"]["device"]
        inputs = sorted(_identify(stages[name], path, deps) for name, path in upstream.items())
        key = fingerprint({"params": values, "inputs": inputs, "runtime": runtime})
        folder = self.folder / f"{stage}-{key}"
        if folder in self._always_run or (not _always_runs(spec) and (folder / "done").is_file()):
            return folder
        if not _always_runs(spec):
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        for name, path in upstream.items():
            for out in _list_written(stages[name]):
                (folder / out).parent.mkdir(parents=True, exist_ok=True)
                (folder / out).symlink_to(path / out)
        command = [sys.executable, *spec["cmd"].split()[1:]]
        subprocess.run(command, cwd=folder, env=_environment(), check=True)
        (folder / "done").touch()
        if _always_runs(spec):
            self._always_run.add(folder)
        return folder

    def metrics(self, stage: str, params: dict[str, Any]) -> dict[str, Any]:
        """Run a stage and return its metrics, with its seconds and memory."""
        folder = self.run(stage, params)
        file = f"{stage.replace('@', '/')}.json"
        return json.loads((folder / "metrics" / file).read_text()) | json.loads(
            (folder / "metrics/runtime" / file).read_text()
        )

    def plan(self, stage: str, params: dict[str, Any]) -> float:
        """Return the memory in GiB that `--plan` gives for a stage whose inputs are ready."""
        return self.need(stage, params)["memory"]

    def need(self, stage: str, params: dict[str, Any]) -> dict[str, float]:
        """Return the plan of a stage whose inputs are ready, in GiB: "memory", "GPU", "disk", "hidden states"."""
        folder = self.run(stage, params)
        name, _, variant = stage.partition("@")
        command = [sys.executable, "-m", f"stages.{name}", *([variant] if variant else []), "--plan"]
        done = subprocess.run(command, cwd=folder, env=_environment(), check=True, stdout=subprocess.PIPE, text=True)
        return {
            name: float(size)
            for name, size in re.findall(r"(memory|GPU|disk|hidden states),? ([\d.]+) GiB", done.stdout)
        }


def make_parser(description: str | None, rows: Collection[str], default: Collection[str] | None = None) -> Parser:
    """Return a parser with the arguments of every benchmark: --rows (default: all), --json, --work."""
    parser = Parser(description=description)
    chosen = list(rows if default is None else default)
    parser.add_argument("--rows", nargs="*", choices=rows, default=chosen, help=f"default: {', '.join(chosen)}")
    parser.add_argument("--json", type=Path, help="keep finished rows in this file")
    parser.add_argument("--work", type=Path, default=Path(".work/benchmarks"), help="where stages run")
    return parser


def read_rows(path: Path | None) -> dict[str, Any]:
    """Return the rows that an earlier run kept in --json."""
    if path is None or not path.is_file():
        return {}
    with reading(lambda why: PipelineError(f"--json {path}: has no rows ({why}). Name another file, or remove it.")):
        return json.loads(path.read_text(encoding="utf-8"))


def read_params() -> dict[str, Any]:
    """Return the project's params.yaml as a plain mapping."""
    return yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def find_device() -> torch.device:
    """Return the device of params.yaml's `runtime.device`."""
    return select_device(parse_params(read_params()).runtime)


def override(params: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with dotted keys changed: {"quantizer_init.weights.bits": 8}. Raises KeyError on unknown keys."""
    changed = copy.deepcopy(params)
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        group = changed
        for key in path:
            group = group[key]
        if last not in group:
            raise KeyError(dotted)
        group[last] = value
    return changed


def expand_stages(params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the stages of dvc.yaml with every `foreach` expanded, as DVC does."""
    stages = {}
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].items():
        if "foreach" not in stage:
            stages[name] = stage
            continue
        items = params[stage["foreach"][2:-1]] if isinstance(stage["foreach"], str) else stage["foreach"]
        for key, item in items.items():
            text = json.dumps(stage["do"]).replace("${key}", key)
            for field, value in item.items():
                text = text.replace("${item." + field + "}", str(value))
            stages[f"{name}@{key}"] = json.loads(text)
    return stages


def append_row(path: Path | None, rows: dict[str, Any], name: str, values: dict[str, Any]) -> None:
    """Keep a finished row in `rows`, and in the JSON file if there is one."""
    rows[name] = values
    if path is not None:
        write_json(path, rows)


def _environment() -> dict[str, str]:
    """Return this process's environment, with the project first in Python's path."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def _always_runs(stage: dict[str, Any]) -> bool:
    return bool(stage.get("always_changed"))


def _identify(stage: dict[str, Any], folder: Path, deps: list[str]) -> str:
    """Return the identity of an input from `stage`: its folder's name, or its content if the stage always runs."""
    if not _always_runs(stage):
        return folder.name
    read = [dep for dep in deps if any(Path(dep).is_relative_to(out) for out in _list_written(stage))]
    return fingerprint([fingerprint_file(folder / dep) for dep in read])


def _list_written(stage: dict[str, Any]) -> list[str]:
    """Return the paths of everything that a stage writes."""
    entries = [*stage["outs"], *stage.get("metrics", [])]
    return [path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)]


def _list_producers(stages: dict[str, dict[str, Any]], deps: list[str]) -> list[str]:
    """Return the stages that write a dependency: an out is a dependency, contains one, or is inside one."""
    return [
        name
        for name, stage in stages.items()
        for out in _list_written(stage)
        if any(Path(out).is_relative_to(dep) or Path(dep).is_relative_to(out) for dep in deps)
    ]


def _look_up(params: dict[str, Any], dotted: str) -> Any:
    value: Any = params
    for key in dotted.split("."):
        value = value[key]
    return value
