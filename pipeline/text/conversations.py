"""Conversations: the messages of a row, and the text that a tokenizer's chat template makes of them.

    [{"role": "user", "content": "Hi"}, …]           messages; all their fields reach the template
    [{"from": "human", "value": "Hi"}, …]            ShareGPT's form, renamed to role and content
    "content": [{"type": "text", "text": "Hi"}, …]   content in parts; parts of other types are refused by name
    "content": null                                  allowed: a message that only calls tools has none
    '[{"role": "user", …}]'                          messages stored as JSON text, as CSV files and many datasets have

A row may hold more that a template reads: the fields `tools`, `documents` and `chat_template_kwargs`, as values or as
JSON text. They are arguments of `apply_chat_template`.

Templates that print today's date (`strftime_now`, as in Llama 3.2) get `TEMPLATE_DATE` instead, so that the same rows
give the same text on every day. A row's own `date_string` in `chat_template_kwargs` still counts.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.runtime.errors import PipelineError

TEMPLATE_INPUTS = ("tools", "documents", "chat_template_kwargs")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_LISTS = ("messages", "conversations")
# A text that begins like this is a list of messages, and one that cannot be read is an error.
_SURELY_MESSAGES = re.compile(
    r"""\s*\[\s*\{\s*["'](role|from)["']\s*:\s*["'](system|developer|human|user|gpt|assistant|tool)["']"""
)
# A text that begins like this may be anything written as JSON: it is a list of messages if it reads as one.
_MAYBE_MESSAGES = re.compile(r"""\s*(\[\s*\{|\{\s*["'](messages|conversations)["']\s*:)""")
_REASONING = {"reasoning", "reasoning_content", "thinking"}  # transformers passes each of them under all names

TEMPLATE_DATE = datetime(2024, 7, 26)  # the date that Llama's own templates print without a clock
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(?P<format>[^"']*)\1\s*\)""")


class RowError(PipelineError):
    """A row does not hold a text. The message lacks the place of the row, which the caller adds."""


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    Attributes:
        messages: each with `role`, usually `content`, and any other field of the row's messages.
        inputs: other arguments of `apply_chat_template` that the row holds, by their names in `TEMPLATE_INPUTS`.
    """

    messages: list[dict[str, Any]]
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """The contents of all messages, part by part."""
        return [text for message in self.messages for text in _list_texts(message.get("content"))]

    @property
    def is_empty(self) -> bool:
        """Whether no message says anything: blank contents, and no other field but names."""
        named = {"role", "content", "name"}
        others = (value for message in self.messages for name, value in message.items() if name not in named)
        return not any(text.strip() for text in self.texts) and not any(others)

    def list_strings(self) -> Iterator[str]:
        """Yield every string of the conversation, names of fields included."""
        yield from _walk_strings([self.messages, self.inputs])

    def list_fields(self) -> set[str]:
        """Return the names that a template must read so that nothing of the conversation is lost."""
        fields = {name for message in self.messages for name, value in message.items() if value not in (None, [], "")}
        inputs = {name for name, value in self.inputs.items() if value and name != "chat_template_kwargs"}
        return (fields - {"role", "content"}) | inputs | set(self.inputs.get("chat_template_kwargs", ()))

    def to_row(self) -> dict[str, Any]:
        """Return the conversation as a row of a JSONL file."""
        return {"messages": self.messages} | self.inputs

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Conversation":
        """Return the conversation that `to_row` stored."""
        return cls(row["messages"], {name: row[name] for name in TEMPLATE_INPUTS if name in row})


def read_conversation(value: list[Any], fields: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a row.

    Args:
        value: the row's messages, in one of the forms of the module's docstring.
        fields: the row's fields, of which those in `TEMPLATE_INPUTS` are taken.

    Raises:
        RowError: a message or field that no template can read.
    """
    messages = [_read_message(number, message) for number, message in enumerate(value, start=1)]
    inputs = {name: _read_input(name, fields[name]) for name in TEMPLATE_INPUTS if fields.get(name) not in (None, "")}
    return Conversation(messages, inputs)


def parse_messages(text: str) -> tuple[list[Any], dict[str, Any]] | None:
    """Return the list of messages that a text holds as JSON, and the other fields stored with it; None for other texts.

    Lists as Python writes them (`str(messages)`, in CSV files of pandas) are read as well.

    Raises:
        RowError: the text begins like a list of messages and cannot be read to its end.
    """
    if not _MAYBE_MESSAGES.match(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            value = ast.literal_eval(text.strip()) if "'" in text else None
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            value = None
        if value is None and _SURELY_MESSAGES.match(text):
            raise RowError(
                f"begins like a list of messages stored as text, but is not JSON ({error}). Store it by "
                "json.dumps(messages)."
            ) from None
    fields = value if isinstance(value, dict) else {}
    messages = next((fields[name] for name in _LISTS if name in fields), value)
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        return messages, fields
    return None


def render_conversation(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of `tokenizer.apply_chat_template`.

    Fields that are null are left out, as transformers does from 5.23 on. Where content comes in parts and the template
    takes only strings (it fails, prints the list, or leaves the texts out), the parts are joined first.

    Raises:
        Exception: anything that a template may raise.
    """
    messages = [
        {name: value for name, value in message.items() if value is not None} for message in conversation.messages
    ]
    parts = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    if parts:
        try:
            text = _apply_template(messages, conversation.inputs, tokenizer)
        except Exception:  # of a template: the same text without parts decides
            text = ""
        contents = [content.strip() for part in parts for content in _list_texts(part)]
        if all(content in text for content in contents) and not any(str(part) in text for part in parts):
            return text
        messages = [message | {"content": "".join(_list_texts(message.get("content")))} for message in messages]
    return _apply_template(messages, conversation.inputs, tokenizer)


def find_unread_fields(conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the fields of conversations that the tokenizer's chat template never names, sorted."""
    template = tokenizer.chat_template or ""
    source = "\n".join(template.values()) if isinstance(template, dict) else template
    fields = set[str]().union(*(conversation.list_fields() for conversation in conversations))
    if any(name in source for name in _REASONING):
        fields -= _REASONING
    return sorted(name for name in fields if name not in source)


def show_value(value: object) -> str:
    """Return a value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _apply_template(messages: list[dict[str, Any]], inputs: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    named = {name: value for name, value in inputs.items() if name != "chat_template_kwargs"}
    more = inputs.get("chat_template_kwargs", {})
    if tokenizer.chat_template is not None and "chat_template" not in more:
        template = tokenizer.get_chat_template(tools=named.get("tools"))
        if "strftime_now" in template:
            more = more | {"chat_template": _fix_date(template)}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **named, **more))


def _fix_date(template: str) -> str:
    """Return a template that prints `TEMPLATE_DATE`: strftime_now("%Y") -> "2024". Other formats stay as they are."""
    return _CLOCK.sub(lambda call: repr(TEMPLATE_DATE.strftime(call["format"])), template)


def _is_message(value: object) -> bool:
    """Return whether a value read from text is a message, and not some other JSON object with a role."""
    if not isinstance(value, dict):
        return False
    return {"from", "value"} <= value.keys() or ("role" in value and bool(value.keys() & {"content", "tool_calls"}))


def _read_message(number: int, message: object) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _refuse(number, message)
    if "role" not in message and "from" in message and "value" in message:
        speaker = message["from"]
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise RowError(
                f"has a message {number} with from={speaker!r}. Allowed are {', '.join(_SHAREGPT_ROLES)}. For others "
                "use the fields role and content."
            )
        others = {name: value for name, value in message.items() if name not in ("from", "value")}
        message = {"role": _SHAREGPT_ROLES[speaker], "content": message["value"]} | others
    content = message.get("content")
    extra = any(value is not None for name, value in message.items() if name not in ("role", "content"))
    if not isinstance(message.get("role"), str) or not ("content" in message or extra):
        raise _refuse(number, message)
    if isinstance(content, list):
        _check_parts(number, content)
    elif content is not None and not isinstance(content, str):
        raise _refuse(number, message)
    return {name: _make_plain(f"{name} of message {number}", value) for name, value in message.items()}


def _refuse(number: int, message: object) -> RowError:
    return RowError(
        f"is a list, but its item {number} is not a message with role and content (or from and value): "
        f"{show_value(message)}"
    )


def _check_parts(number: int, parts: list[Any]) -> None:
    for place, part in enumerate(parts, start=1):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise RowError(
                f"has a part of type {kind!r} in message {number} (part {place}). Only parts of type 'text' can be "
                "read. Remove the others, or the row."
            )
        if not isinstance(part.get("text"), str):
            raise RowError(f"has a part without text in message {number} (part {place}): {show_value(part)}")


def _read_input(name: str, value: object) -> Any:
    """Return a field that goes to the template with the messages. Raises RowError where it is of another kind."""
    expected = "an object" if name == "chat_template_kwargs" else "a list of objects"
    problem = RowError(
        f"holds messages, and {name}={show_value(value)}. Expected is {expected}, or the same as JSON text, for the "
        "chat template. Correct it, or remove the field."
    )
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, list):
            value = [json.loads(item) if isinstance(item, str) else item for item in value]
    except (ValueError, RecursionError):
        raise problem from None
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) == (name == "chat_template_kwargs") or not all(isinstance(item, dict) for item in items):
        raise problem
    return _make_plain(name, value)


def _make_plain(name: str, value: Any) -> Any:
    """Return a value as JSON can hold it; dates and other scalars of columnar files become text."""
    if isinstance(value, dict):
        return {str(key): _make_plain(name, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_make_plain(name, item) for item in value]
    if isinstance(value, bytes):
        raise RowError(f"holds {len(value)} bytes in {name}, where text is expected. Remove that field.")
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _list_texts(content: str | list[dict[str, Any]] | None) -> list[str]:
    if isinstance(content, list):
        return [part["text"] for part in content]
    return [] if content is None else [content]


def _walk_strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _walk_strings([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _walk_strings(item)
