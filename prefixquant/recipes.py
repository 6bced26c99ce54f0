"""Recipes, and the params.yaml that a recipe and the user's choices give.

A recipe is a preset that names no model. Choices are merged into it in this order, and later ones override earlier
ones: the recipe, `--bits`, `--finetune`, the model, `--text`, `--set`.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.params import list_known_keys
from pipeline.presets import merge_preset
from pipeline.runtime.arguments import ArgumentError
from prefixquant.package_data import find_data

DEFAULT_RECIPE = "w4a4kv4"
_BITS = re.compile(r"W(\d+)A(\d+)KV(\d+)", re.IGNORECASE)
FINETUNING: dict[str, dict[str, Any]] = {
    "none": {"finetuning.blocks.enabled": False, "finetuning.end_to_end.enabled": False},
    "short": {"finetuning.end_to_end.enabled": True, "finetuning.end_to_end.epochs": 1},
    # Four times the text of `short`, each window read once (docs/lab/ablations.md).
    "long": {
        "finetuning.end_to_end.enabled": True,
        "finetuning.end_to_end.epochs": 1,
        "calibration.end_to_end.windows": 384,
    },
}


def list_recipes() -> dict[str, str]:
    """Return every recipe's name with the first line of its comment."""
    recipes = {}
    for path in sorted(find_data("presets").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if "model" not in yaml.safe_load(text):
            recipes[path.stem] = text.partition("\n")[0].lstrip("# ")
    return recipes


def format_recipes() -> str:
    """Return a line for every recipe."""
    recipes = list_recipes()
    width = max(map(len, recipes))
    return "\n".join(f"  {name:{width}}  {title}" for name, title in recipes.items())


def make_params(
    source: str,
    *,
    recipe: str = DEFAULT_RECIPE,
    bits: str | None = None,
    finetune: str | None = None,
    texts: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a params.yaml, with the comments of the one that comes with the project.

    Args:
        source: the value of `model.source`.
        recipe, bits, finetune, settings: see `prefixquant.quantize`.
        texts: absolute paths of files and folders. They take the place of all corpora, and of tasks, which read the
            packaged corpora.

    Raises:
        ArgumentError: there is no such recipe, or `bits` or `finetune` cannot be read.
        ParamsError: a setting does not exist, or its value is not allowed.
    """
    recipes = list_recipes()
    if recipe not in recipes:
        close = difflib.get_close_matches(recipe, recipes, n=1)
        hint = f"Did you mean {close[0]}?" if close else "Use one of these:"
        raise ArgumentError(f"--recipe={recipe}: there is no such recipe. {hint}\n{format_recipes()}")
    if finetune is not None and finetune not in FINETUNING:
        raise ArgumentError(f"--finetune={finetune}: unknown. Use one of {', '.join(FINETUNING)}.")
    text = find_data("params.yaml").read_text(encoding="utf-8")
    text = merge_preset(text, (find_data("presets") / f"{recipe}.yaml").read_text(encoding="utf-8"), f"recipe {recipe}")
    for choices in (_read_bits(bits), FINETUNING.get(finetune or "", {}), {"model.source": source}):
        text = _merge(text, choices, "the command's options")
    if texts:
        text = _use_texts(text, texts)
    return _merge(text, dict(settings or {}), "--set")


def parse_setting(word: str) -> tuple[str, Any]:
    """Return the key and the value of `--set key=value`: "calibration.seed=3" -> ("calibration.seed", 3).

    Raises:
        ArgumentError: there is no `=`, or the value is not YAML.
    """
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise ArgumentError(f"--set {word}: expected KEY=VALUE, such as calibration.train.windows=64.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ArgumentError(
            f"--set {word}: the value is not YAML. Put text with special characters in quotes."
        ) from None


def _read_bits(bits: str | None) -> dict[str, Any]:
    if bits is None:
        return {}
    if (match := _BITS.fullmatch(bits)) is None:
        raise ArgumentError(
            f"--bits={bits}: expected the form W4A4KV4, with the bits of weights, activations, KV cache."
        )
    weights, activations, cache = map(int, match.groups())
    sites = {"weights": weights, "activations": activations, "keys": cache, "values": cache}
    return {f"quantizer_init.{site}.bits": number for site, number in sites.items()}


def _use_texts(text: str, paths: Sequence[str]) -> str:
    """Return params with the user's texts as the only corpora."""
    names = name_texts(paths)
    values = yaml.safe_load(text)
    changes: dict[str, Any] = {"corpora": {name: {"source": path} for name, path in zip(names, paths, strict=True)}}
    splits = {name: split for name, split in values["calibration"].items() if isinstance(split, dict)}
    changes["calibration"] = {name: {"corpora": list(names)} for name in splits}
    changes["evaluation"] = {"tasks": {}}
    return merge_preset(text, yaml.safe_dump(changes, sort_keys=False), "--text")


def name_texts(paths: Sequence[str]) -> list[str]:
    """Return a corpus name for each path: the letters, digits, `-` and `_` of its stem, numbered where it repeats."""
    names: list[str] = []
    for path in paths:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(path).stem).strip("_") or "text"
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}_{number}", number + 1
        names.append(name)
    return names


def _merge(text: str, choices: Mapping[str, Any], where: str) -> str:
    """Return params with dotted keys changed.

    Raises:
        ParamsError: a key does not exist, or a value is not allowed.
    """
    if not choices:
        return text
    nested: dict[str, Any] = {}
    for dotted, value in choices.items():
        *path, last = dotted.split(".")
        group = nested
        for key in path:
            group = group.setdefault(key, {}) if isinstance(group, dict) else group
        if not isinstance(group, dict) or last in group:
            raise ArgumentError(
                f"{dotted}: another choice gives this key or the group that it is in. Keep one of them."
            )
        group[last] = value
    return merge_preset(text, yaml.safe_dump(_fill(nested, yaml.safe_load(text)), sort_keys=False), where)


def _fill(changes: dict[str, Any], values: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return `changes` with the present entries of mappings by name (corpora, tasks), which a preset would replace.

    An empty mapping stays empty: `evaluation.tasks={}` removes all tasks.
    """
    filled = {}
    for key, change in changes.items():
        present = values.get(key) if isinstance(values, dict) else None
        if isinstance(change, dict) and change and isinstance(present, dict):
            change = _fill(change, present, (*path, key))
            if not list_known_keys((*path, key)):
                change = present | change
        filled[key] = change
    return filled
