"""The stages of dvc.yaml, with every `foreach` expanded, in the order in which DVC runs them.

`dvc repro` needs none of this. Progress lines say which stage of how many is running, and `python -m stages.run` runs
the stages on machines without DVC.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml.

    Attributes:
        name: such as `rotation` or `evaluation@original`.
        command: the command that runs it.
        deps: files and folders that it reads.
        params: keys of params.yaml that it reads, with dots.
        written: files and folders that it writes, metrics included.
        persistent: the paths in `written` that the stage updates instead of replacing.
        always_run: whether it runs even if nothing has changed.
    """

    name: str
    command: str
    deps: tuple[str, ...]
    params: tuple[str, ...]
    written: tuple[str, ...]
    persistent: tuple[str, ...]
    always_run: bool

    def feeds(self, other: "Stage") -> bool:
        """Return whether `other` reads something that this stage writes."""
        return any(_overlap(out, dep) for out in self.written for dep in other.deps)


def read_stages(folder: Path) -> list[Stage]:
    """Return the stages of the project in `folder`; none where it has no dvc.yaml or no params.yaml."""
    files = [folder / "dvc.yaml", folder / "params.yaml"]
    if not all(path.is_file() for path in files):
        return []
    project, params = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in files)
    return list_stages(project["stages"], params)


def list_stages(described: Mapping[str, Any], params: Mapping[str, Any]) -> list[Stage]:
    """Return the stages that dvc.yaml describes, each after all stages whose outputs it reads."""
    stages: dict[str, Stage] = {}
    for name, stage in described.items():
        if "foreach" not in stage:
            stages[name] = _make_stage(name, stage)
            continue
        items = stage["foreach"]
        if isinstance(items, str):  # ${corpora}
            items = params[items.strip("${}")]
        for key, item in items.items():
            text = json.dumps(stage["do"]).replace("${key}", key)
            for field, value in item.items():
                text = text.replace("${item." + field + "}", str(value))
            stages[f"{name}@{key}"] = _make_stage(f"{name}@{key}", json.loads(text))
    ordered: dict[str, Stage] = {}

    def add(stage: Stage) -> None:
        if stage.name not in ordered:
            for other in stages.values():
                if other is not stage and other.feeds(stage):
                    add(other)
            ordered[stage.name] = stage

    for stage in stages.values():
        add(stage)
    return list(ordered.values())


def _make_stage(name: str, stage: Mapping[str, Any]) -> Stage:
    entries = [*stage.get("outs", ()), *stage.get("metrics", ())]
    written = {path: {} for path in entries if isinstance(path, str)}
    for entry in entries:
        if isinstance(entry, dict):
            written |= entry
    return Stage(
        name=name,
        command=stage["cmd"],
        deps=tuple(stage.get("deps", ())),
        params=tuple(dict.fromkeys(stage.get("params", ()))),
        written=tuple(written),
        persistent=tuple(path for path, options in written.items() if options.get("persist")),
        always_run=bool(stage.get("always_changed")),
    )


def _overlap(first: str, second: str) -> bool:
    """Return whether one path is the other, or is inside it."""
    return Path(first).is_relative_to(second) or Path(second).is_relative_to(first)
