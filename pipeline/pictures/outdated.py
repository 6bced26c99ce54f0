"""Tell which results belong to the present params.yaml, from DVC's record of each stage in dvc.lock.

After `dvc exp run -S prefix.use=none quantizer_init`, the metrics of later stages still belong to the run before. A
stage's results are outdated if

- a value that the stage read has changed in params.yaml,
- an input has changed, or its metrics file is not the one that it wrote,
- or a stage whose output it read is outdated.

`dvc status` answers the same question, but takes seconds and fails while DVC runs. Here dvc.lock is read, and only
files up to `LARGEST` bytes are hashed. Code is not compared.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

LARGEST = 64 * 2**20  # bytes. Larger files and folders are compared by number and sizes of files


def read_outdated(read: Callable[[str], str | None], folder: Path | None = None) -> dict[str, str]:
    """Return the stages of a project whose results are outdated, each with the reason; none if there is no dvc.lock.

    Args:
        read: returns the text of dvc.lock, params.yaml and dvc.yaml, by name; None for a file that does not exist.
        folder: as for `find_outdated`.
    """
    texts = [text for name in ("dvc.lock", "params.yaml", "dvc.yaml") if (text := read(name)) is not None]
    if len(texts) < 3:
        return {}
    lock, params, project = map(_parse_yaml, texts)
    # dvc.lock keeps stages that are gone, such as those of a corpus that was removed from params.yaml.
    names = set(_list_stages(project["stages"], params))
    lock = {"stages": {name: stage for name, stage in lock["stages"].items() if name in names}}
    always_run = [name for name, stage in project["stages"].items() if stage.get("always_changed")]
    return find_outdated(lock, params, always_run=always_run, folder=folder)


def find_outdated(
    lock: Mapping[str, Any],
    params: Mapping[str, Any],
    *,
    always_run: Collection[str] = (),
    folder: Path | None = None,
) -> dict[str, str]:
    """Return the stages whose results are outdated, each with the reason.

    Args:
        lock: content of dvc.lock.
        params: content of params.yaml.
        always_run: stages that run with every `dvc repro`, such as `sources`. Their outputs count by content alone.
        folder: folder of the project, whose files are compared with dvc.lock. None: dvc.lock is compared with
            itself only.
    """
    stages = lock["stages"]
    outs = {out["path"]: (name, out) for name, stage in stages.items() for out in stage.get("outs", ())}

    @functools.cache
    def explain(name: str) -> tuple[str, str] | None:
        """Return the first stage on the way to `name` that is outdated, and why."""
        stage = stages[name]
        for key, recorded in stage.get("params", {}).get("params.yaml", {}).items():
            if (difference := _find_difference(key, recorded, _look_up(params, key))) is not None:
                return name, difference
        for dep in stage.get("deps", ()):
            related = [path for path in outs if _contains(path, dep["path"]) or _contains(dep["path"], path)]
            for producer, out in map(outs.__getitem__, related):
                if producer in always_run:
                    continue
                if out["path"] == dep["path"] and out["md5"] != dep["md5"]:
                    return name, f"{dep['path']} has changed"
                if (reason := explain(producer)) is not None:
                    return reason
            # Outputs that are not here have not changed: a fresh clone holds metrics, but no artifacts.
            if folder is None or not related or not all((folder / path).exists() for path in related):
                continue
            if _has_changed(folder, dep):
                return name, f"{dep['path']} has changed"
        for out in stage.get("outs", ()):
            if folder is not None and out["path"].startswith("metrics/") and _has_changed(folder, out):
                return name, f"{out['path']} is not the file that the stage wrote"
        return None

    outdated = {}
    for name in stages.keys() - set(always_run):
        if (explained := explain(name)) is not None:
            stage, reason = explained
            outdated[name] = reason if stage == name else f"{stage} is outdated: {reason}"
    return outdated


def _list_stages(stages: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of all stages, with a name for each variant of `foreach`."""
    for name, stage in stages.items():
        items = stage.get("foreach")
        if isinstance(items, str):  # ${corpora}
            items = _look_up(params, items.strip("${}"))
        yield from [name] if items is None else (f"{name}@{variant}" for variant in items)


def _contains(folder: str, path: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _look_up(params: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        if not isinstance(params, Mapping) or key not in params:
            return "missing"
        params = params[key]
    return params


def _find_difference(key: str, recorded: Any, value: Any) -> str | None:
    """Return the first difference between a recorded value and the present one in words, or None."""
    if isinstance(recorded, Mapping) and isinstance(value, Mapping):
        for name in {**recorded, **value}:
            words = _find_difference(f"{key}.{name}", recorded.get(name, "missing"), value.get(name, "missing"))
            if words is not None:
                return words
        return None
    if _normalize(recorded) == _normalize(value):
        return None
    return f"{key} is {_show(value)}, the run had {_show(recorded)}"


def _normalize(value: Any) -> Any:
    """Return numbers as floats, because PyYAML reads `1e-2` as a string and DVC writes it as 0.01."""
    if isinstance(value, Mapping):
        return {key: _normalize(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_normalize(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _has_changed(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Return whether a file or folder differs from its entry in dvc.lock; False if it does not exist."""
    path = folder / entry["path"]
    if not path.exists():
        return False
    files = list(_list_files(path))
    size = sum(file.stat().st_size for file in files)
    if size != entry.get("size", size) or len(files) != entry.get("nfiles", len(files)):
        return True
    return size <= LARGEST and _hash(path, files) != entry["md5"]


def _list_files(path: Path) -> Iterator[Path]:
    return (file for file in sorted(path.rglob("*")) if file.is_file()) if path.is_dir() else iter([path])


def _hash(path: Path, files: list[Path]) -> str:
    """Return DVC's hash: MD5 of a file, or of a JSON list of a folder's files with their hashes."""
    hashes = [hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() for file in files]
    if not path.is_dir():
        return hashes[0]
    names = [file.relative_to(path).as_posix() for file in files]
    listed = sorted(zip(names, hashes, strict=True))
    text = json.dumps([{"md5": md5, "relpath": name} for name, md5 in listed], sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"


def _parse_yaml(text: str) -> Any:
    """Return the content of a YAML text as `yaml.safe_load` does, in C where possible: dvc.lock takes a second."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
