"""Rows of conversations in many forms, and the text that `apply_chat_template` gives for the row."""

import json
import random
from pathlib import Path
from typing import Any

from benchmarks.robustness.bases import Bases
from benchmarks.robustness.trial import Trial
from benchmarks.tiny_models import make_tokenizer
from pipeline.runtime.artifacts import replacing_folder
from pipeline.text.calibration import render_documents
from pipeline.text.corpora import SPLITS, fetch_corpus, read_documents

# Prints every field that a message may have, as templates of models with tools do.
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% if m.name %}[{{ m.name }}]{% endif %}{{ '\n' }}{% endfor %}"
)
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def make_rows(rng: random.Random, bases: Bases, folder: Path) -> Trial:
    """Write conversations as JSON lines or JSON, in one of the forms that data sets have."""
    plain = [_make_row(rng, number) for number in range(rng.randrange(20, 60))]
    form = rng.choice(["plain", "parts", "sharegpt", "text", "damaged"])
    rows, refused = [row | {} for row in plain], False
    if form == "parts":
        rows = [row | {"messages": [_split(rng, message) for message in row["messages"]]} for row in plain]
    elif form == "sharegpt":
        plain = [{"messages": [{"role": m["role"], "content": m["content"]} for m in _keep_said(row)]} for row in plain]
        rows = [
            {"conversations": [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in row["messages"]]}
            for row in plain
        ]
    elif form == "text":
        rows = [row | {"messages": json.dumps(row["messages"])} for row in plain]
    elif form == "damaged":
        message = rng.choice(DAMAGED)
        rows[rng.randrange(len(rows))], refused = {"messages": [message]}, True
        form = f"damaged: {message}"
    field = "conversations" if form == "sharegpt" else "messages"
    suffix = rng.choice([".jsonl", ".json"])
    indent = rng.choice([None, 2]) if suffix == ".json" else None
    whole = rng.choice([rows, {"data": rows}]) if suffix == ".json" else rows
    source, out = folder / "in", folder / "out"
    source.mkdir()
    path = source / f"rows{suffix}"
    text = "".join(json.dumps(row) + "\n" for row in rows) if suffix == ".jsonl" else json.dumps(whole, indent=indent)
    path.write_text(text, encoding="utf-8")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rendered: list[str] = []

    def act() -> None:
        with replacing_folder(out) as partial:
            fetch_corpus(str(path), None, field, partial)
        documents = [document for split in SPLITS for document in read_documents(out / f"{split}.jsonl")]
        rendered.extend(render_documents(documents, tokenizer, "train"))

    def judge() -> str | None:
        if refused:
            return "a message that no template can read was accepted"
        expected = [
            tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False) for row in plain
        ]
        if sorted(rendered) == sorted(expected):
            return None
        return f"{len(set(expected) - set(rendered))} of {len(expected)} rows are rendered otherwise"

    return Trial(f"{path.name}, {form}, indent {indent}, {len(rows)} rows", act, judge, (), source)


DAMAGED: list[Any] = [
    {"role": "user"},
    {"content": "no role"},
    {"role": 7, "content": "x"},
    {"role": "user", "content": 7},
    {"role": "user", "content": [{"type": "image", "image": "x.png"}]},
    {"from": "nobody", "value": "x"},
    "a text",
    None,
]


def _make_row(rng: random.Random, number: int) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"Question {number}: é {rng.random()}"}]
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    if rng.random() < 0.3:
        messages += [
            {"role": "assistant", "content": None, "tool_calls": CALL},
            {"role": "tool", "name": "add", "content": "3"},
        ]
    answer: dict[str, Any] = {"role": "assistant", "content": "Yes.\n\nAnd more."}
    messages.append(answer | ({"reasoning_content": "Think."} if rng.random() < 0.3 else {}))
    return {"messages": messages} | ({"tools": TOOLS} if rng.random() < 0.3 else {})


def _split(rng: random.Random, message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose content is a list of one or two parts."""
    content = message["content"]
    if content is None:
        return message
    place = rng.randrange(len(content))
    texts = [content[:place], content[place:]] if place else [content]
    return message | {"content": [{"type": "text", "text": text} for text in texts]}


def _keep_said(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages that ShareGPT's form can hold."""
    return [message for message in row["messages"] if message["role"] in SHAREGPT and message["content"]]
