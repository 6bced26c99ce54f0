"""Run pipeline stages with changed params outside DVC, each result once.

A stage's folder is named after what determines its result: its code, its params and its inputs' folders, all read from
dvc.yaml; what comes from a stage that always runs (`sources`) counts by its content. Rows of a benchmark that share
stages share their folders, and a benchmark that is started again continues.
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
    """Stages run below `folder` (some GB; delete it when done)."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._looked_at: set[Path] = set()  # folders of stages that always run: here, once

    def run(self, stage: str, params: dict[str, Any]) -> Path:
        """Run `stage` (say, `evaluation@original`) and all it needs; the folder it ran in.

        Raises:
            subprocess.CalledProcessError: the stage failed; its output has been shown.
        """
        parse_params(params)
        stages = expand_stages(params)
        spec = stages[stage]
        upstream = {name: self.run(name, params) for name in _producers(stages, spec)}
        code = {path: fingerprint_file(ROOT / path) for path in spec.get("deps", []) if path.endswith(".py")}
        values = {key: _look_up(params, key) for key in spec.get("params", [])}
        runtime = params["runtime"]["threads"], params["runtime"]["device"]
        inputs = sorted(_identify(stages[name], path, spec.get("deps", [])) for name, path in upstream.items())
        key = fingerprint({"code": code, "params": values, "inputs": inputs, "runtime": runtime})
        folder = self.folder / f"{stage}-{key}"
        if folder in self._looked_at or (not _always_runs(spec) and (folder / "done").is_file()):
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
            self._looked_at.add(folder)
        return folder

    def metrics(self, stage: str, params: dict[str, Any]) -> dict[str, Any]:
        """Run `stage` and return its metrics file."""
        folder = self.run(stage, params)
        name, _, key = stage.partition("@")
        return json.loads(
            (folder / "metrics" / f"{name}/{key}.json" if key else folder / f"metrics/{name}.json").read_text()
        )

    def plan(self, stage: str, params: dict[str, Any]) -> float:
        """GiB of memory that `--plan` says `stage` takes, with its inputs ready."""
        return self.need(stage, params)["memory"]

    def need(self, stage: str, params: dict[str, Any]) -> dict[str, float]:
        """What `--plan` says `stage` takes, with its inputs ready: "memory", "GPU", "disk", "hidden states", in GiB."""
        folder = self.run(stage, params)
        name, _, variant = stage.partition("@")
        command = [sys.executable, "-m", f"stages.{name}", *([variant] if variant else []), "--plan"]
        done = subprocess.run(command, cwd=folder, env=_environment(), check=True, stdout=subprocess.PIPE, text=True)
        return {
            name: float(size)
            for name, size in re.findall(r"(memory|GPU|disk|hidden states),? ([\d.]+) GiB", done.stdout)
        }


def make_parser(description: str | None, rows: Collection[str], default: Collection[str] | None = None) -> Parser:
    """The arguments every benchmark has: --rows (default: all), --json, --work."""
    parser = Parser(description=description)
    chosen = list(rows if default is None else default)
    parser.add_argument("--rows", nargs="*", choices=rows, default=chosen, help=f"default: {', '.join(chosen)}")
    parser.add_argument("--json", type=Path, help="keep rows in this file")
    parser.add_argument("--work", type=Path, default=Path(".work/benchmarks"), help="where stages run")
    return parser


def read_rows(path: Path | None) -> dict[str, Any]:
    """The rows that an earlier run kept in --json."""
    if path is None or not path.is_file():
        return {}
    with reading(lambda why: PipelineError(f"{path} holds no rows ({why}); name another file, or remove it")):
        return json.loads(path.read_text(encoding="utf-8"))


def read_params() -> dict[str, Any]:
    """The project's params.yaml as a plain mapping."""
    return yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def find_device() -> torch.device:
    """Where params.yaml's `runtime.device` computes."""
    return select_device(parse_params(read_params()).runtime)


def override(params: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with dotted keys changed: {"quantizer_init.weights.bits": 8}. Raises KeyError on unknown keys."""
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
    """The stages of dvc.yaml with every `foreach` written out, as DVC does."""
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
    """Keep a finished row, in memory and in the JSON file when there is one."""
    rows[name] = values
    if path is not None:
        write_json(path, rows)


def _environment() -> dict[str, str]:
    """This process's, with the project in front of where else Python looks."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def _always_runs(stage: dict[str, Any]) -> bool:
    return bool(stage.get("always_changed"))


def _identify(stage: dict[str, Any], folder: Path, deps: list[str]) -> str:
    """What an input from `stage`, run in `folder`, is: the folder's name; its content where the stage always runs."""
    if not _always_runs(stage):
        return folder.name
    read = [dep for dep in deps if any(Path(dep).is_relative_to(out) for out in _list_written(stage))]
    return fingerprint([fingerprint_file(folder / dep) for dep in read])


def _list_written(stage: dict[str, Any]) -> list[str]:
    entries = [*stage["outs"], *stage.get("metrics", [])]
    return [path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)]


def _producers(stages: dict[str, dict[str, Any]], spec: dict[str, Any]) -> list[str]:
    """The stages whose outs `spec` depends on: an out is a dependency, holds one, or lies in one."""
    found = []
    for name, stage in stages.items():
        for out in _list_written(stage):
            if any(Path(out).is_relative_to(dep) or Path(dep).is_relative_to(out) for dep in spec.get("deps", [])):
                found.append(name)
    return found


def _look_up(params: dict[str, Any], dotted: str) -> Any:
    value: Any = params
    for key in dotted.split("."):
        value = value[key]
    return value
