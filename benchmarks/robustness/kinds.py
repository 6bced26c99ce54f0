"""A function for each kind of input: it damages a copy below `folder`, and returns the action that follows.

A reference judges every accepted input: transformers' own loading of the same files, or the values in the file.
"""

import contextlib
import functools
import io
import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.robustness.bases import SAMPLE, Bases, compute_logits
from benchmarks.robustness.calls import call_export
from benchmarks.robustness.corpus import break_corpus
from benchmarks.robustness.messages import make_rows
from benchmarks.robustness.mutations import break_bytes, break_folder, break_json, break_tensors, draw_disk
from benchmarks.robustness.trial import Trial
from benchmarks.tiny_gguf import convert_tensors, describe, write_gguf
from benchmarks.tiny_models import make_model, make_tokenizer, tiny_params
from benchmarks.workspace import ROOT
from pipeline.evaluation import texts
from pipeline.importing.import_model import import_model
from pipeline.inference import generation
from pipeline.inference.loading import load
from pipeline.inference.prefixed_model import assemble_model
from pipeline.inspection.import_gate import check_import
from pipeline.models.checkpoint import Checkpoint
from pipeline.params import load_params


def break_params(rng: random.Random, bases: Bases, folder: Path) -> Trial:
    """Damage a params file: its values, its bytes, or the text of one value."""
    path, corpus = folder / "params.yaml", folder / "corpus"
    if rng.random() < 0.5:
        value, what = break_json(rng, tiny_params(Path("model"), corpus))
        if rng.random() < 0.3:
            value, more = break_json(rng, value)
            what += f", {more}"
        path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
    else:
        text = (ROOT / "params.yaml").read_bytes()
        if rng.random() < 0.7:
            text, what = break_bytes(rng, text)
        else:
            lines = text.split(b"\n")
            settings = [
                place for place, line in enumerate(lines) if b":" in line and not line.lstrip().startswith(b"#")
            ]
            line, what = rng.choice(settings), rng.choice(list(YAML))
            lines[line] = lines[line].partition(b":")[0] + b": " + YAML[what]
            text, what = b"\n".join(lines), f"line {line}: {what}"
        path.write_bytes(text)
    loaded: list[Any] = []

    def judge() -> str | None:
        return compare_values(yaml.safe_load(path.read_text(encoding="utf-8")), loaded[0].model_dump())

    return Trial(what, lambda: loaded.append(load_params(path)), judge, unchanged=folder)


YAML = {
    "a tab": b"\tx",
    "a date": b"2024-13-45",
    "an object": b"!!python/object/apply:os.getcwd []",
    "an anchor without one": b"*nowhere",
    "itself": b"&a [*a]",
    "a bomb": b"{a: &a [1,1,1,1,1,1,1,1], b: &b [*a,*a,*a,*a,*a,*a,*a,*a], c: &c [*b,*b,*b,*b,*b,*b,*b,*b], "
    b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c], e: &e [*d,*d,*d,*d,*d,*d,*d,*d], f: [*e,*e,*e,*e,*e,*e,*e,*e]}",
    "deep": b"[" * 3000 + b"]" * 3000,
    "binary": b"!!binary 'x'",
    "a number of many digits": b"1" * 5000,
    "a set": b"!!set {a, b}",
    "half a quote": b"'x",
    "a list as key": b"{[1, 2]: 3}",
    "another document": b"1\n---\nx: 2",
    "not UTF-8": b"\xff\xfe",
}


def compare_values(raw: Any, parsed: Any, where: str = "") -> str | None:
    """Return the first value that was understood differently than it is written, in words, or None.

    Numbers may be written as text, and are rounded once.
    """
    if isinstance(raw, dict) and isinstance(parsed, dict):
        problems = (compare_values(value, parsed.get(key), f"{where}.{key}") for key, value in raw.items())
        return next((problem for problem in problems if problem), None)
    if isinstance(raw, list) and isinstance(parsed, list) and len(raw) == len(parsed):
        problems = (compare_values(*pair, f"{where}[]") for pair in zip(raw, parsed, strict=True))
        return next((problem for problem in problems if problem), None)
    same = raw == parsed and isinstance(raw, bool) == isinstance(parsed, bool)
    if not same and isinstance(raw, str | int) and type(parsed) in (int, float) and type(raw) is not bool:
        with contextlib.suppress(ValueError, OverflowError):
            same = float(raw) == parsed
    return None if same else f"{where}: {raw!r} is written, {parsed!r} was understood"


def break_checkpoint(rng: random.Random, bases: Bases, folder: Path) -> Trial:
    """Damage a checkpoint folder: a tensor, the config, or a file."""
    source = folder / "in"
    shutil.copytree(bases.find("checkpoint"), source)
    kind = rng.random()
    if kind < 0.35:
        what = break_tensors(rng, source / "model.safetensors")
    elif kind < 0.6:
        path = source / "config.json"
        value, what = break_json(rng, json.loads(path.read_text()))
        path.write_text(json.dumps(value))
        what = f"config.json: {what}"
    else:
        what = break_folder(rng, source)
    return import_trial(rng, what, source, holder=source, options={}, folder=folder)


def break_gguf(rng: random.Random, bases: Bases, folder: Path) -> Trial:
    """Damage a GGUF file: its bytes, a setting, or a tensor."""
    source = folder / "in"
    source.mkdir()
    path = source / "model.gguf"
    if rng.random() < 0.7:
        data = bases.find("gguf").joinpath("model.gguf").read_bytes()
        end = rng.choice([200, 2000, len(data)])  # most mistakes are in the beginning
        head, what = break_bytes(rng, data[:end])
        path.write_bytes(head + data[end:])
    else:
        model = make_model("llama_tied")
        if rng.random() < 0.5:
            name, (value, kind) = rng.choice(sorted(describe(model).items()))
            changed = rng.choice([None, (0, kind), (1, kind), (value * 2, kind), (value + 1, kind), (10**6, kind)])
            what = f"{name} = {changed}"
            write_gguf(path, model, make_tokenizer(), settings={f"llama.{name}": changed})
        else:
            name, values = rng.choice(sorted(convert_tensors(model).items()))
            changed = rng.choice([None, values[:-1], values * math.nan, values * 0])
            what = f"{name} changed"
            write_gguf(path, model, make_tokenizer(), tensors={name: changed})
    return import_trial(rng, what, path, holder=source, options={"gguf_file": "model.gguf"}, folder=folder)


def import_trial(
    rng: random.Random, what: str, source: Path, *, holder: Path, options: dict[str, str], folder: Path
) -> Trial:
    """Return a trial that imports a damaged model, and compares it with transformers' own loading.

    Args:
        what: the damage in words.
        source: as `model.source`.
        holder: folder of the source.
        options: options of transformers' `from_pretrained(holder, …)`.
        folder: folder of the trial.
    """
    out, gate = folder / "out", functools.partial(check_import, limit=8 << 30)
    disk, full = draw_disk(rng)

    def judge() -> str | None:
        checkpoint = Checkpoint(out, "model")
        logits, sample = compute_logits(assemble_model(checkpoint)), checkpoint.tokenizer(SAMPLE)["input_ids"]
        try:
            loading = {"dtype": torch.float32, "output_loading_info": True, "attn_implementation": "sdpa"}
            model, report = AutoModelForCausalLM.from_pretrained(holder, **loading, **options)
            reference = compute_logits(model.eval())
            reference_sample = AutoTokenizer.from_pretrained(holder, **options)(SAMPLE)["input_ids"]
        except Exception as error:
            return f"transformers refuses what was imported ({error})"
        if report["missing_keys"]:
            return f"transformers finds no values for {report['missing_keys']}"
        if sample != reference_sample:
            return "the tokenizer gives other ids"
        off = ((logits - reference).abs().max() / reference.abs().max().clamp_min(1e-30)).item()
        return None if off <= 1e-4 else f"logits are off by {off:.2g}"

    def act() -> None:
        import_model(str(source), None, torch.float32, out, check_result=gate)

    return Trial(f"{full}{what}", act, judge, (out,), holder, disk)


def break_export(rng: random.Random, bases: Bases, folder: Path) -> Trial:
    """Damage a file of an exported folder."""
    source = folder / "in"
    shutil.copytree(bases.find("export"), source)
    what = break_folder(rng, source)
    logits, sample = bases.expected["export"]
    loaded: list[Any] = []

    def act() -> None:
        loaded.extend(load(source))

    def judge() -> str | None:
        if not torch.equal(compute_logits(loaded[0]), logits):
            return "other logits"
        return None if loaded[1](SAMPLE)["input_ids"] == sample else "the tokenizer gives other ids"

    return Trial(what, act, judge, (), source)


NUMBERS = ("0", "-1", "1", "2", "8", "32", "100", "100000", "x", "", "1e3", "9" * 30, "0.5", "nan", "inf")


def break_command(rng: random.Random, bases: Bases, folder: Path) -> Trial:
    """Draw odd arguments for `pipeline.evaluate` or `pipeline.generate`."""
    export, text = bases.find("export"), bases.find("texts") / "prose.txt"
    (folder / "empty.txt").write_text("")
    result = folder / "result.json"
    if rng.random() < 0.6:
        main, name = texts.main, "evaluate"
        arguments = [str(export), "--text", str(text), "--length", "32", "--windows", "2"]
        options = {"--length": NUMBERS, "--windows": NUMBERS, "--batch-size": NUMBERS, "--text-field": ["", "text"]}
        options |= {"--text": [str(text), str(folder / "empty.txt"), str(folder), "nowhere"], "--tasks": [",", ""]}
        options |= {"--device": ["cuda", "cuda:9", "meta", "x", ""], "--arithmetic": ["integer", "x"]}
        options |= {"--json": [str(result), str(result), str(folder), "/proc/x/y", str(folder / "a/b.json")]}
    else:
        main, name = generation.main, "generate"
        arguments = [str(export), "The house", "--max-new-tokens", "2"]
        options = {"--max-new-tokens": NUMBERS, "--temperature": NUMBERS, "--seed": NUMBERS, "--chat": [None]}
        options |= {"--device": ["cuda", "mps", "x"], "--arithmetic": ["float", "integer", "x"]}
    for option in rng.sample(sorted(options), rng.randrange(1, 3)):
        value = rng.choice(options[option])
        arguments += [option] if value is None else [option, value]
    if rng.random() < 0.25:
        place = rng.randrange(2 if name == "generate" else 1)
        arguments[place] = rng.choice(["", " ", "nowhere", str(folder), "\udcff", "x" * 3000, "--", str(text)])
    printed = io.StringIO()

    def act() -> None:
        sys.argv, sys.stdin = [name, *arguments], io.TextIOWrapper(io.BytesIO(b""))
        with contextlib.redirect_stdout(printed):
            main()

    def judge() -> str | None:
        if name == "generate":
            return None
        try:
            shown = json.loads(printed.getvalue(), parse_constant=lambda constant: 1 / 0)
        except (ValueError, ZeroDivisionError):
            return f"no JSON: {printed.getvalue()[:200]}"
        if result.exists() and json.loads(result.read_text()) != shown:
            return "the file holds other results"
        return None if all(value > 0 for value in shown["perplexity"].values()) else f"perplexity {shown['perplexity']}"

    what = f"{name} {' '.join(argument[:40] for argument in arguments[1:])}"
    return Trial(what.encode(errors="replace").decode(), act, judge, (result,), export)


KINDS: dict[str, Callable[[random.Random, Bases, Path], Trial]] = {
    "params": break_params,
    "corpus": break_corpus,
    "checkpoint": break_checkpoint,
    "gguf": break_gguf,
    "export": break_export,
    "command": break_command,
    "calls": call_export,
    "messages": make_rows,
}
WEIGHTS = (24, 22, 12, 5, 12, 10, 8, 7)
