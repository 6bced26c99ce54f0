"""Conversations in all their forms become the text that the tokenizer's own `apply_chat_template` gives for the row."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.text.calibration import WindowsError, render_documents
from pipeline.text.conversations import Conversation, parse_messages
from pipeline.text.corpora import CorpusError, fetch_corpus, read_documents, read_local_documents
from tests.conftest import make_tokenizer

# Reads every field of a message, content as a string or in parts, and tools.
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{{ documents }}{{ style }}"
    "{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}] "
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}<call {{ call.id }}>{{ call.function | tojson }}{% endfor %}"
    "{% if m.tool_call_id %}<answer to {{ m.tool_call_id }}>{% endif %}\n{% endfor %}"
)
STRINGS_ONLY = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
PRINTS_LISTS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
DROPS_LISTS = (
    "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% endif %}\n{% endfor %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "unit": None}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
WITH_TOOLS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?", "name": "Ada"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "-3", "tool_call_id": "c1", "name": "weather"},
    {"role": "assistant", "content": "Cold."},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two."}]},
    {"role": "assistant", "content": "Yes."},
]
JOINED = [{"role": "user", "content": "One. Two."}, {"role": "assistant", "content": "Yes."}]


def make_chat_tokenizer(template=TEMPLATE):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def read_rows(rows, folder, field="messages"):
    """Return the rows as a corpus gives them back, through its JSONL files."""
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 20))
    (folder / "out").mkdir()
    fetch_corpus(str(path), None, field, folder / "out")
    return read_documents(folder / "out/train.jsonl")[: len(rows)]


def render_row(row, folder, template=TEMPLATE, field="messages"):
    return render_documents(read_rows([row], folder, field), make_chat_tokenizer(template), "x")[0]


@pytest.mark.parametrize(
    ("row", "arguments"),
    [
        ({"messages": WITH_TOOLS}, {}),
        ({"messages": WITH_TOOLS, "tools": TOOLS}, {"tools": TOOLS}),
        ({"messages": WITH_TOOLS, "tools": json.dumps(TOOLS)}, {"tools": TOOLS}),
        ({"messages": WITH_TOOLS, "tools": [json.dumps(tool) for tool in TOOLS]}, {"tools": TOOLS}),
        ({"messages": WITH_TOOLS, "tools": None, "id": 7}, {}),
        ({"messages": WITH_TOOLS, "tools": []}, {"tools": []}),
        ({"messages": WITH_TOOLS, "documents": [{"title": "a"}]}, {"documents": [{"title": "a"}]}),
        ({"messages": WITH_TOOLS, "chat_template_kwargs": {"style": "terse"}}, {"style": "terse"}),
        ({"messages": PARTS}, {}),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL]}, *JOINED]}, {}),
        ({"messages": [{"role": "user", "content": None}, *JOINED]}, {}),
        ({"messages": [{"role": "user", "content": [], "tool_call_id": "x"}, *JOINED]}, {}),
        ({"messages": [{"role": "ipython", "content": "any role", "extra": {"a": [1, None, True, 0.5]}}]}, {}),
    ],
)
def test_every_field_of_a_row_reaches_the_template(row, arguments, tmp_path):
    expected = make_chat_tokenizer().apply_chat_template(row["messages"], tokenize=False, **arguments)
    assert render_row(row, tmp_path) == expected


def test_sharegpt_is_renamed_to_role_and_content(tmp_path):
    speakers = ["system", "human", "gpt", "tool", "user", "assistant", "chatgpt", "observation"]
    roles = ["system", "user", "assistant", "tool", "user", "assistant", "assistant", "tool"]
    turns = [{"from": speaker, "value": f"Turn of {speaker}.", "name": "n"} for speaker in speakers]
    row = {"conversations": turns, "tools": json.dumps(TOOLS)}
    messages = [{"role": role, "content": turn["value"], "name": "n"} for role, turn in zip(roles, turns, strict=True)]
    expected = make_chat_tokenizer().apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert render_row(row, tmp_path, field="conversations") == expected


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(WITH_TOOLS),
        json.dumps(WITH_TOOLS, indent=2),
        " " + json.dumps({"messages": WITH_TOOLS}),
        str(WITH_TOOLS),  # as pandas writes lists to CSV
        json.dumps([{"content": message.pop("content"), **message} for message in json.loads(json.dumps(WITH_TOOLS))]),
    ],
)
def test_messages_stored_as_text_are_read(text, tmp_path):
    expected = make_chat_tokenizer().apply_chat_template(WITH_TOOLS, tokenize=False)
    assert render_row({"messages": text}, tmp_path) == expected


def test_messages_stored_as_text_bring_their_tools(tmp_path):
    expected = make_chat_tokenizer().apply_chat_template(JOINED, tools=TOOLS, tokenize=False)
    text = json.dumps({"messages": JOINED, "tools": TOOLS})
    assert render_row({"text": text}, tmp_path, field="text") == expected


def test_sharegpt_in_a_csv_file_is_read(tmp_path):
    turns = [{"from": "human", "value": 'Say "a", b.'}, {"from": "gpt", "value": "Yes."}]
    quoted = json.dumps(turns).replace('"', '""')
    (tmp_path / "x.csv").write_text(f'id,conversations,tools\n1,"{quoted}",\n')
    documents = read_local_documents(tmp_path / "x.csv", "conversations")
    assert documents == [
        Conversation([{"role": "user", "content": 'Say "a", b.'}, {"role": "assistant", "content": "Yes."}])
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '[{"a": 1}]',
        '[{"role": "admin", "members": []}]',
        "[{'a': 1}]",
        "[{ not JSON",
        '{"messages": 5}',
        "[{}]",
    ],
)
def test_other_texts_in_brackets_stay_texts(text):
    assert parse_messages(text) is None


@pytest.mark.parametrize("template", [STRINGS_ONLY, PRINTS_LISTS, DROPS_LISTS])
def test_parts_are_joined_for_a_template_that_takes_only_strings(template, tmp_path):
    expected = make_chat_tokenizer(template).apply_chat_template(JOINED, tokenize=False)
    assert render_row({"messages": PARTS}, tmp_path, template) == expected


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": [{"type": "image"}]}], r"has a part of type 'image' in message 1 \(part 1\)"),
        (
            [JOINED[0], {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "x": 1}]}],
            r"part of type 'image_url' in message 2 \(part 2\)\. Only parts of type 'text' can be read",
        ),
        ([{"role": "user", "content": [{"type": "input_audio", "data": ""}]}], r"part of type 'input_audio'"),
        ([{"role": "user", "content": ["plain"]}], r"part of type 'str' in message 1"),
        ([{"role": "user", "content": [{"type": "text", "text": 7}]}], r"has a part without text in message 1"),
        ([{"role": "user"}], r"its item 1 is not a message with role and content \(or from and value\)"),
        ([{"role": "user", "content": 7}], r"its item 1 is not a message"),
        ([{"role": 5, "content": "a"}], r"its item 1 is not a message"),
        ([{"from": "narrator", "value": "a"}], r"message 1 with from='narrator'. Allowed are system, human,"),
        ([{"from": None, "value": "a"}], r"message 1 with from=None"),
        (
            '[{"role": "user", "content": "cut o',
            r"begins like a list of messages stored as text, but is not JSON",
        ),
        ("[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]", r"Store it by json\.dumps"),
        ([{"role": "user", "content": "a", "note": "\ud800"}], r"holds half of a character"),
    ],
)
def test_messages_that_no_template_can_read_are_refused_by_name(messages, message, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(CorpusError, match=rf"x\.jsonl, row 1, .*{message}"):
        read_local_documents(tmp_path / "x.jsonl", "messages")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tools", "not JSON", r"tools='not JSON'\. Expected is a list of objects, or the same as JSON text"),
        ("tools", {"name": "a"}, r"Expected is a list of objects"),
        ("tools", ["search"], r"tools=\['search'\]"),
        ("documents", [1], r"documents=\[1\]"),
        ("chat_template_kwargs", [{}], r"chat_template_kwargs=\[\{\}\]\. Expected is an object"),
    ],
)
def test_fields_for_the_template_are_refused_by_name(name, value, message, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": JOINED, name: value}) + "\n")
    with pytest.raises(CorpusError, match=rf"row 1, holds messages, and .*{message}"):
        read_local_documents(tmp_path / "x.jsonl", "messages")
    (tmp_path / "y.jsonl").write_text(json.dumps({"messages": "a text", name: value}) + "\n")
    assert read_local_documents(tmp_path / "y.jsonl", "messages") == ["a text"]


def test_bytes_are_refused_and_dates_become_text(tmp_path):
    table = pyarrow.table({"messages": [[{"role": "user", "content": "a", "image": b"\x89PNG"}]]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"row 1, holds 4 bytes in image of message 1"):
        read_local_documents(tmp_path / "x.parquet", "messages")
    day = pyarrow.scalar(0, pyarrow.timestamp("s")).as_py()
    table = pyarrow.table({"messages": [[{"role": "user", "content": "a", "time": day}]]})
    pyarrow.parquet.write_table(table, tmp_path / "y.parquet")
    (conversation,) = read_local_documents(tmp_path / "y.parquet", "messages")
    assert conversation.messages[0]["time"] == "1970-01-01 00:00:00"


def test_conversations_that_say_nothing_are_skipped(tmp_path):
    rows = [
        [{"role": "user", "content": None}],
        [{"role": "user", "content": " "}, {"role": "assistant", "content": [{"type": "text", "text": ""}]}],
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    assert read_local_documents(tmp_path / "x.jsonl", "messages") == [Conversation(rows[2])]


def test_fields_that_the_template_leaves_out_are_logged(tmp_path, caplog):
    render_row({"messages": WITH_TOOLS[3:], "tools": TOOLS}, tmp_path, PRINTS_LISTS)
    assert "x: the chat template leaves out these fields of messages: name, tool_call_id, tools" in caplog.text
    caplog.clear()
    (tmp_path / "again").mkdir()
    render_row({"messages": WITH_TOOLS, "tools": TOOLS}, tmp_path / "again")
    assert caplog.text == ""


def test_the_template_for_tools_is_taken_of_several(tmp_path):
    templates = {"default": PRINTS_LISTS, "tool_use": TEMPLATE}
    expected = make_chat_tokenizer().apply_chat_template(WITH_TOOLS, tools=TOOLS, tokenize=False)
    assert render_row({"messages": WITH_TOOLS, "tools": TOOLS}, tmp_path, templates) == expected


def test_a_template_that_fails_is_one_line(tmp_path):
    row = {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    with pytest.raises(WindowsError, match=r"x: the chat template refuses conversation 1 \(.*content"):
        render_row(row, tmp_path, STRINGS_ONLY)


LLAMA_DATE = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "Today: {{ date_string }} {{ messages[0].content }}"
)


@pytest.mark.parametrize(
    ("template", "more", "expected"),
    [
        (LLAMA_DATE, {}, "Today: 26 Jul 2024 Hi"),
        (LLAMA_DATE, {"chat_template_kwargs": {"date_string": "1 May 1999"}}, "Today: 1 May 1999 Hi"),
        ("{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}", {}, "2024-07-26 Hi"),
        ("{{ strftime_now('%A %H:%M') }} {{ messages[0].content }}", {}, "Friday 00:00 Hi"),
    ],
)
def test_the_text_of_a_template_does_not_depend_on_the_day(template, more, expected, tmp_path):
    row = {"messages": [{"role": "user", "content": "Hi"}]} | more
    assert render_row(row, tmp_path, template) == expected
