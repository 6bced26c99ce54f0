"""What `robustness.py` breaks, how, and by what it judges what was accepted.

A kind is a function (random, bases, folder) -> Trial: it makes a broken copy below `folder`, and says what is then
done with it. `Bases` makes the whole ones, once.
"""

import bz2
import contextlib
import copy
import csv
import functools
import gzip
import io
import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from pipeline.evaluation import texts
from pipeline.importing.import_model import import_model
from pipeline.inference import generation
from pipeline.inference.loading import load
from pipeline.inference.prefixed_model import assemble_model
from pipeline.inspection.import_gate import check_import
from pipeline.models.checkpoint import Checkpoint
from pipeline.params import load_params
from pipeline.runtime.artifacts import replacing_folder
from pipeline.text.corpora import SPLITS, fetch_corpus, read_documents
from tests.conftest import PROSE, ROOT, make_model, make_tokenizer, tiny_params
from tests.export.test_folder import make_export
from tests.importing.gguf_models import convert_tensors, describe, write_gguf

TOKEN_IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(1))
SAMPLE = "The house of 12 doors, émigré <s> and\n\nthe rest."
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**30, -(10**18), 0.5, 1e-300, 1e300, math.inf, math.nan),
    *(
        "",
        " ",
        "x",
        "true",
        "none",
        "5e-5",
        "nan",
        "1e400",
        "../..",
        "/",
        "\x00",
        "é\u2028",
        "x" * 5000,
        "float32",
        "max",
    ),
    *([], {}, [None], [[]], {"": None}, [1, 2, 3], ["x"], {"a": {"b": []}}),
]


@dataclass
class Trial:
    """A broken input and what is done with it.

    Attributes:
        mutation: what was broken.
        act: what an entry point does.
        judge: when that went well, what a reference says against it, or None.
        writes: what there must not be after a refusal.
        keeps: what must be as it was, whatever happens.
        disk: bytes after which a file cannot grow any more, or None.
    """

    mutation: str
    act: Callable[[], None]
    judge: Callable[[], str | None] = lambda: None
    writes: tuple[Path, ...] = ()
    keeps: Path | None = None
    disk: int | None = None


class Bases:
    """The whole inputs, made when they are first asked for, below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.expected: dict[str, Any] = {}
        torch.set_num_threads(1)
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()

    def prepare(self, kind: str) -> None:
        for name in {"export": ["export"], "command": ["export", "texts"], "checkpoint": ["checkpoint"]}.get(kind, []):
            self.find(name)
        if kind == "gguf":
            self.find("gguf")

    def find(self, name: str) -> Path:
        path = self.root / name
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            getattr(self, f"_make_{name}")(path)
        return path

    def _make_checkpoint(self, path: Path) -> None:
        make_model("llama_tied").save_pretrained(path)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        tokenizer.save_pretrained(path)

    def _make_gguf(self, path: Path) -> None:
        path.mkdir()
        write_gguf(path / "model.gguf", make_model("llama_tied"), make_tokenizer())

    def _make_texts(self, path: Path) -> None:
        path.mkdir()
        (path / "prose.txt").write_text(PROSE, encoding="utf-8")

    def _make_export(self, path: Path) -> None:
        imported = self.root / "imported"
        import_model(str(self.find("checkpoint")), None, torch.float32, imported)
        made, _, _ = make_export({"llama_tied": imported}, self.root / "making")
        shutil.move(made, path)
        model, tokenizer = load(path)
        self.expected["export"] = compute_logits(model), tokenizer(SAMPLE)["input_ids"]


@torch.no_grad()
def compute_logits(model: Any) -> torch.Tensor:
    return model(TOKEN_IDS % model.config.vocab_size).logits


# --- Ways to break things --------------------------------------------------------------------------------------------


def break_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
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
    """One key or item of a nested value replaced, gone, added, or under another name."""
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
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path]
    for key, own in list(items)[:200]:
        found += walk_json(own, (*path, key))
    return found


def break_folder(rng: random.Random, folder: Path) -> str:
    """One file of a folder changed, gone, or joined by another."""
    path = rng.choice(sorted(folder.iterdir()))
    kind = rng.choice(["bytes", "bytes", "json", "json", "json", "remove", "add", "swap", "pointer", "folder"])
    if kind == "json":
        path = rng.choice([own for own in sorted(folder.glob("*.json")) if own.name != "tokenizer.json"])
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
    """One tensor of a safetensors file gone, renamed, or of another shape, type or content."""
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
    if rng.random() > 0.06:
        return None, ""
    size = rng.choice([0, 100, 5_000, 30_000])
    return size, f"disk full at {size}, "


# --- Kinds -----------------------------------------------------------------------------------------------------------


def break_params(rng: random.Random, bases: Bases, folder: Path) -> Trial:
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
    found: list[Any] = []

    def judge() -> str | None:
        return compare_values(yaml.safe_load(path.read_text(encoding="utf-8")), found[0].model_dump())

    return Trial(what, lambda: found.append(load_params(path)), judge, keeps=folder)


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
    """Whether what stands in the file is what was understood; numbers may stand there as text, and are rounded once."""
    if isinstance(raw, dict) and isinstance(parsed, dict):
        problems = (compare_values(own, parsed.get(key), f"{where}.{key}") for key, own in raw.items())
        return next((problem for problem in problems if problem), None)
    if isinstance(raw, list) and isinstance(parsed, list) and len(raw) == len(parsed):
        problems = (compare_values(*pair, f"{where}[]") for pair in zip(raw, parsed, strict=True))
        return next((problem for problem in problems if problem), None)
    same = raw == parsed and isinstance(raw, bool) == isinstance(parsed, bool)
    if not same and isinstance(raw, str | int) and type(parsed) in (int, float) and type(raw) is not bool:
        with contextlib.suppress(ValueError, OverflowError):
            same = float(raw) == parsed
    return None if same else f"{where}: {raw!r} stands there, {parsed!r} was understood"


ROWS: list[tuple[Any, str]] = [  # what a row's text may be, and what becomes of it
    *((value, "skipped") for value in (None, "", "  \n", [])),
    *((value, "refused") for value in (7, -0.5, True, {}, {"a": 1}, ["x"], [{"role": "user"}], "\ud800", [[]], [None])),
    *(([{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}], "kept") for text in ("Hi", "é")),
    *(
        (text, "kept")
        for text in ("a", "x" * 200_000, 'quo"te, and comma', "two\n\nparagraphs", "a\u2028\x85", "\ufeffx")
    ),
]


def break_corpus(rng: random.Random, bases: Bases, folder: Path) -> Trial:
    suffix = rng.choice([".jsonl", ".json", ".csv", ".parquet", ".txt"])
    rows: list[Any] = [f"Document {number} says {rng.random()}." for number in range(rng.choice([0, 1, 5, 30, 60]))]
    fate, what = "kept", "whole"
    if rows and rng.random() < 0.6 and suffix in (".jsonl", ".json"):
        value, fate = rng.choice(ROWS)
        place = rng.randrange(len(rows))
        rows[place], what = value, f"row {place} is {str(value)[:30]!r}"
    data = write_rows(rows, suffix)
    damaged = fate == "kept" and rng.random() < 0.5
    if damaged:
        data, what = break_bytes(rng, data)
    compression = rng.choice(["", "", ".gz", ".bz2", ".zst"]) if suffix != ".parquet" else ""
    data = compress(data, compression)
    if compression and rng.random() < 0.3:
        data, more = break_bytes(rng, data)
        what, damaged = f"{what}, {compression} {more}", True
    source = folder / "in"
    nested = rng.random() < 0.3
    path = (
        source / rng.choice(["", "a/b"]) / f"{rng.choice(['x', 'train', 'test-00000-of-00001'])}{suffix}{compression}"
    )
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    disk, full = draw_disk(rng)
    out, field = folder / "out", rng.choice(["text"] * 9 + ["body"])

    def act() -> None:
        with replacing_folder(out) as partial:
            fetch_corpus(str(source if nested else path), None, field, partial)

    def judge() -> str | None:
        documents = [document for split in SPLITS for document in read_documents(out / f"{split}.jsonl")]
        found = [document if isinstance(document, str) else document.messages for document in documents]
        expected = read_reference(path, suffix, compression) if damaged else keep_texts(rows, suffix)
        if expected is None:
            return None  # the reference cannot read it at all
        if fate == "refused" or (field == "body" and suffix != ".txt"):
            return "rows that hold no text were accepted"
        return (
            None
            if sorted(map(str, found)) == sorted(map(str, expected))
            else f"{len(found)} of {len(expected)} documents"
        )

    return Trial(f"{full}{path.name}: {what}", act, judge, (out,), source, disk)


def write_rows(rows: list[Any], suffix: str) -> bytes:
    if suffix == ".jsonl":
        return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps([{"text": row} for row in rows]).encode()
    if suffix == ".txt":
        return "\n\n".join(rows).encode()
    if suffix == ".csv":
        text = io.StringIO(newline="")
        csv.writer(text).writerows([["text", "id"], *([row, "1"] for row in rows)])
        return text.getvalue().encode()
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())}), sink)
    return sink.getvalue()


def compress(data: bytes, compression: str) -> bytes:
    if compression == ".zst":
        return pyarrow.compress(data, codec="zstd", asbytes=True)
    return {"": bytes, ".gz": functools.partial(gzip.compress, mtime=0), ".bz2": bz2.compress}[compression](data)


def keep_texts(rows: list[Any], suffix: str) -> list[Any]:
    fates = [next((fate for value, fate in ROWS if value is row), "kept") for row in rows]
    return [row for row, fate in zip(rows, fates, strict=True) if fate == "kept"]


def read_reference(path: Path, suffix: str, compression: str) -> list[str] | None:
    """The texts as pyarrow reads them, or as they stand; None where that fails."""
    try:
        data = path.read_bytes()
        data = {"": bytes, ".gz": gzip.decompress, ".bz2": bz2.decompress}.get(compression, read_zstd)(data)
        if suffix == ".txt":
            text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            parts, part = [], []
            for line in [*text.split("\n"), ""]:
                if line.strip():
                    part.append(line)
                elif part:
                    parts.append("\n".join(part))
                    part = []
            return parts
        if suffix == ".json":
            values = [row["text"] for row in json.loads(data)]
        elif suffix == ".parquet":
            values = pyarrow.parquet.read_table(io.BytesIO(data))["text"].to_pylist()
        elif suffix == ".csv":
            kept = pyarrow.csv.ConvertOptions(column_types={"text": pyarrow.string()}, strings_can_be_null=False)
            parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
            values = pyarrow.csv.read_csv(io.BytesIO(data), parse_options=parse, convert_options=kept)[
                "text"
            ].to_pylist()
        else:
            schema = pyarrow.schema({"text": pyarrow.string()})
            values = pyarrow.json.read_json(
                io.BytesIO(data), parse_options=pyarrow.json.ParseOptions(explicit_schema=schema)
            )["text"].to_pylist()
        return [value for value in values if value and value.strip()]
    except Exception:
        return None


def read_zstd(data: bytes) -> bytes:
    return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()


def break_checkpoint(rng: random.Random, bases: Bases, folder: Path) -> Trial:
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
    return import_trial(rng, what, source, source, {}, folder)


def break_gguf(rng: random.Random, bases: Bases, folder: Path) -> Trial:
    source = folder / "in"
    source.mkdir()
    path = source / "model.gguf"
    if rng.random() < 0.7:
        data = bases.find("gguf").joinpath("model.gguf").read_bytes()
        end = rng.choice([200, 2000, len(data)])  # most of what can go wrong stands at the beginning
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
    return import_trial(rng, what, path, source, {"gguf_file": "model.gguf"}, folder)


def import_trial(
    rng: random.Random, what: str, source: Path, holder: Path, options: dict[str, str], folder: Path
) -> Trial:
    out, gate = folder / "out", functools.partial(check_import, limit=8 << 30)
    disk, full = draw_disk(rng)

    def judge() -> str | None:
        checkpoint = Checkpoint(out, "model")
        ours, sample = compute_logits(assemble_model(checkpoint)), checkpoint.tokenizer(SAMPLE)["input_ids"]
        try:
            kept = {"dtype": torch.float32, "output_loading_info": True, "attn_implementation": "sdpa"}
            model, report = AutoModelForCausalLM.from_pretrained(holder, **kept, **options)
            theirs = compute_logits(model.eval())
            theirs_sample = AutoTokenizer.from_pretrained(holder, **options)(SAMPLE)["input_ids"]
        except Exception as error:
            return f"transformers refuses what was imported ({error})"
        if report["missing_keys"]:
            return f"transformers finds no values for {report['missing_keys']}"
        if sample != theirs_sample:
            return "the tokenizer gives other ids"
        off = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
        return None if off <= 1e-4 else f"logits are off by {off:.2g}"

    def act() -> None:
        import_model(str(source), None, torch.float32, out, check_result=gate)

    return Trial(f"{full}{what}", act, judge, (out,), holder, disk)


def break_export(rng: random.Random, bases: Bases, folder: Path) -> Trial:
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
    said = io.StringIO()

    def act() -> None:
        sys.argv, sys.stdin = [name, *arguments], io.TextIOWrapper(io.BytesIO(b""))
        with contextlib.redirect_stdout(said):
            main()

    def judge() -> str | None:
        if name == "generate":
            return None
        try:
            shown = json.loads(said.getvalue(), parse_constant=lambda constant: 1 / 0)
        except (ValueError, ZeroDivisionError):
            return f"no JSON: {said.getvalue()[:200]}"
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
}
WEIGHTS = (30, 28, 12, 5, 15, 10)
