"""Merge a preset into params.yaml: `make preset NAME=llama-2-7b-w4a4kv4`, or `python -m pipeline.presets NAME`.

A preset is a YAML file in presets/ with only the keys that differ from the params.yaml that comes with the project. A
mapping is merged key by key where its keys are settings, and replaced as a whole where its keys are names that the user
chose (`corpora`, `evaluation.tasks`, shares of corpora). Lists are replaced.

The text is edited in place: only lines with a changed value change, and comments stay. The difference is printed.

A preset is always merged into the committed params.yaml, never into what an earlier preset wrote, so that one name
gives one result. Local changes would be lost, so a preset is refused where there are any, unless `--force` (FORCE=1) is
given. Without git, local changes are those since the last preset, whose result is kept in .work/presets/.
"""

import argparse
import difflib
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.params import list_known_keys, parse_params
from pipeline.runtime.errors import PipelineError, reading, run_main
from pipeline.runtime.files import replacing
from pipeline.runtime.git import read_committed
from pipeline.runtime.params import ParamsError

PARAMS = Path("params.yaml")
PRESETS = Path("presets")
MEMORY = Path(".work/presets")  # base.yaml: params.yaml before the first preset. written.yaml: the last result


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, with null as an empty value: the form that `dvc exp run -S` writes."""


_Dumper.add_representer(type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", ""))


def list_presets(folder: Path = PRESETS) -> dict[str, str]:
    """Return every preset's name with the first line of its comment."""
    files = sorted(folder.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files}


def format_list() -> str:
    """Return every preset's name with its title below."""
    return "\n".join(f"{name}\n    {title}" for name, title in list_presets().items())


def merge_preset(base: str, preset: str, where: str = "preset") -> str:
    """Return the text of params.yaml with the keys of a preset changed and all comments outside of them kept.

    Args:
        base: text of a params.yaml.
        preset: text of a preset, a nested mapping of the keys to change.
        where: name of the preset for messages.

    Raises:
        ParamsError: the preset has a key that does not exist, or gives values that are not allowed.
    """
    with reading(lambda why: ParamsError(f"{where} is not valid YAML: {why}")):
        changes = yaml.safe_load(preset)
    if not isinstance(changes, dict):
        raise ParamsError(f"{where} must hold groups of keys (model:, corpora:, …), got {type(changes).__name__}")
    merged = merge_values(yaml.safe_load(base), changes)
    parse_params(merged, where=f"params.yaml with {where}")
    text, root = base, yaml.compose(base, yaml.SafeLoader)
    with reading(lambda why: ParamsError(f"params.yaml cannot be edited in place ({why}). Restore it from git.")):
        for start, end, written in sorted(_list_edits(root, changes), reverse=True):
            text = text[:start] + written + text[end:]
        if yaml.safe_load(text) != merged:
            raise ValueError("its mappings are not in block form")
    return text


def merge_values(values: dict[str, Any], changes: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return `values` with `changes` merged in: settings key by key, mappings by name and lists as a whole.

    Args:
        values: params, or the group of them at `path`.
        changes: the keys to change, nested as in `values`.
    """
    merged = dict(values)
    for key, change in changes.items():
        if isinstance(values.get(key), dict) and _holds_settings(change, (*path, key)):
            merged[key] = merge_values(values[key], change, (*path, key))
        else:
            merged[key] = change
    return merged


def apply_preset(name: str, *, force: bool = False) -> str:
    """Merge a preset into params.yaml in the current folder, and return the difference as a unified diff.

    Raises:
        ParamsError: there is no such preset, or it does not fit.
        PipelineError: params.yaml has local changes and `force` is False.
    """
    file = PRESETS / f"{name}.yaml"
    if not file.is_file():
        close = difflib.get_close_matches(name, list_presets(), n=1)
        hint = f"Did you mean {close[0]}?" if close else "Use one of these:"
        raise ParamsError(f"preset {name!r}: there is no {file}. {hint}\n{format_list()}")
    current = PARAMS.read_text(encoding="utf-8")
    base, changed = _find_base(current)
    if changed and not force:
        raise PipelineError(
            f"params.yaml: has local changes that preset {name} would overwrite. Commit them, undo them, or overwrite "
            "them with FORCE=1."
        )
    text = merge_preset(base, file.read_text(encoding="utf-8"), where=str(file))
    for path, content in ((MEMORY / "base.yaml", base), (MEMORY / "written.yaml", text), (PARAMS, text)):
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    before, after = (content.splitlines(keepends=True) for content in (current, text))
    return "".join(difflib.unified_diff(before, after, "params.yaml before", f"params.yaml with preset {name}"))


def _find_base(current: str) -> tuple[str, bool]:
    """Return the text that a preset is merged into, and whether params.yaml has changes of the user's."""
    remembered = {name: MEMORY / f"{name}.yaml" for name in ("base", "written")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in remembered.items() if path.is_file()}
    committed = read_committed(PARAMS)
    base = committed
    if base is None or base == texts.get("written"):  # no git, or the result of a preset was committed
        base = texts.get("base", current)
    return base, current not in (base, committed, texts.get("written"))


def _holds_settings(value: Any, path: tuple[str, ...]) -> bool:
    """Return whether a value at `path` is a mapping whose keys are settings, not names that the user chose."""
    return isinstance(value, dict) and bool(list_known_keys(path))


def _list_edits(
    node: yaml.Node | None, changes: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, new text) for every value below `node` that `changes` changes."""
    entries = {key.value: (key, value) for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}
    for name, change in changes.items():
        if name not in entries:
            raise ParamsError(f"params.yaml: {'.'.join((*path, name))} is missing. Restore it from git.")
        key, value = entries[name]
        if isinstance(value, yaml.MappingNode) and _holds_settings(change, (*path, name)):
            yield from _list_edits(value, change, (*path, name))
        else:
            written = yaml.dump({name: change}, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
            written = textwrap.indent(written.rstrip("\n"), " " * key.start_mark.column).lstrip(" ")
            yield key.start_mark.index, _find_end(value), written


def _find_end(node: yaml.Node) -> int:
    """Return the index after the last character of a value. A block mapping's own mark is after the next comments."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style:
        return node.end_mark.index
    last = node.value[-1]
    return _find_end(last[1] if isinstance(node, yaml.MappingNode) else last)


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge a preset into params.yaml; without NAME, list the presets.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a file in presets/, without .yaml")
    parser.add_argument("--force", action="store_true", help="overwrite local changes of params.yaml")
    arguments = parser.parse_args()
    if arguments.name is None:
        print(format_list())
        return
    print(apply_preset(arguments.name, force=arguments.force) or "params.yaml: already has these values.")


if __name__ == "__main__":
    run_main(main)
