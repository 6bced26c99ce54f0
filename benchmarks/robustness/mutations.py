"""Damage at random: to bytes, to nested values, to folders and to tensors. Every draw comes from the `rng` given."""

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VALUES = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**30, -(10**18), 0.5, 1e-300, 1e300, math.inf, math.nan),
    *("", " ", "x", "true", "none", "5e-5", "nan", "1e400"),
    *("../..", "/", "\x00", "é\u2028", "x" * 5000, "float32", "max"),
    *([], {}, [None], [[]], {"": None}, [1, 2, 3], ["x"], {"a": {"b": []}}),
]


def break_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Return damaged bytes, and the damage in words."""
    changed, place = bytearray(data), rng.randrange(len(data) + 1)
    kind = rng.choice(["flip", "cut", "cut to nothing", "insert", "append", "overwrite", "repeat", "zeros"])
    some = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 12)))
    if kind == "flip" and data:
        place %= len(data)
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[place:]
    elif kind == "cut to nothing":
        changed.clear()
    elif kind == "insert":
        changed[place:place] = some
    elif kind == "append":
        changed += some
    elif kind == "overwrite":
        changed[place : place + len(some)] = some
    elif kind == "repeat":
        changed[place:place] = data[place : place + rng.randrange(1, 200)]
    else:
        changed[place : place + 64] = bytes(min(64, len(data) - place))
    return bytes(changed), f"{kind} at {place}"


def break_json(rng: random.Random, value: Any) -> tuple[Any, str]:
    """Return a nested value with one key or item replaced, removed, added or renamed, and the damage in words."""
    whole = copy.deepcopy(value)
    places = [path for path in walk_json(whole) if path]
    if not places:
        return rng.choice(VALUES), "all of it"
    path = rng.choice(places)
    holder = whole
    for key in path[:-1]:
        holder = holder[key]
    key, name = path[-1], ".".join(map(str, path))
    kind = rng.choice(["replace", "replace", "replace", "nudge", "remove", "add", "rename"])
    if kind == "nudge" and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = holder[key] * rng.choice([-1, 2, 0.5, 0]) + rng.choice([0, 1, -1])
    elif kind == "remove":
        del holder[key]
    elif kind == "add" and isinstance(holder, dict):
        holder[rng.choice(["surprise", "bits", "0", ""])] = rng.choice(VALUES)
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = rng.choice(VALUES)
        return whole, f"{name} = {str(holder[key])[:40]!r}"
    return whole, f"{kind} {name}"


def walk_json(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths of a nested value and of everything in it, at most 200 items per level."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    paths = [path]
    for key, item in list(items)[:200]:
        paths += walk_json(item, (*path, key))
    return paths


def break_folder(rng: random.Random, folder: Path) -> str:
    """Damage, remove or replace a file of a folder, or add one, and return the damage in words."""
    path = rng.choice(sorted(folder.iterdir()))
    kind = rng.choice(["bytes", "bytes", "json", "json", "json", "remove", "add", "swap", "pointer", "folder"])
    if kind == "json":
        path = rng.choice([file for file in sorted(folder.glob("*.json")) if file.name != "tokenizer.json"])
        value, what = break_json(rng, json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(value), encoding="utf-8")
        return f"{path.name}: {what}"
    if kind == "bytes":
        data, what = break_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        return f"{path.name}: {what}"
    if kind == "add":
        name = rng.choice(["model-00002-of-00002.safetensors", "adapter_config.json", "x.bin", "é.txt", "merges.txt"])
        (folder / name).write_bytes(rng.choice([b"", b"{}", b"x" * 100]))
        return f"add {name}"
    if kind == "swap":
        other = rng.choice(sorted(folder.iterdir()))
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two), other.write_bytes(one)
        return f"swap {path.name} and {other.name}"
    path.unlink()
    if kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    elif kind == "folder":
        path.mkdir()
    return f"{kind} {path.name}"


def break_tensors(rng: random.Random, path: Path) -> str:
    """Remove, rename or add a tensor of a safetensors file, or change its shape, type or content; return the damage."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(["remove", "rename", "double", "nan", "infinite", "flat", "fewer", "int8", "half", "add", "zero"])
    if kind in ("remove", "rename"):
        tensors.pop(name)
    if kind == "rename":
        tensors[f"{name}_"] = tensor
    elif kind == "add":
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(2)
    elif kind != "remove":
        ruined = tensor.clone()
        ruined.view(-1)[rng.randrange(ruined.numel())] = math.nan if kind == "nan" else math.inf
        choices = {"double": tensor.double(), "nan": ruined, "infinite": ruined, "flat": tensor.flatten()}
        choices |= {"fewer": tensor[:-1].clone(), "int8": tensor.to(torch.int8), "half": tensor.half()}
        tensors[name] = choices.get(kind, torch.zeros_like(tensor))
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name}: {kind}"


def draw_disk(rng: random.Random) -> tuple[int | None, str]:
    """Return a limit of bytes per file in 6 % of all draws, otherwise None; and the same in words."""
    if rng.random() > 0.06:
        return None, ""
    size = rng.choice([0, 100, 5_000, 30_000])
    return size, f"disk full at {size}, "
