"""docs/settings.md is generated from params.yaml and the typed params (.ci/settings.py), and follows both."""

import importlib.util
import re
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from pipeline.params import Params
from pipeline.runtime.params import Group, Number
from tests.conftest import ROOT

SPEC = importlib.util.spec_from_file_location("settings_page", ROOT / ".ci/settings.py")
settings = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(settings)
PARAMS = (ROOT / "params.yaml").read_text(encoding="utf-8")


def list_keys(values, group):
    """Return [(path, value)] of all keys, down to those whose type is not a group."""
    for key, value in values.items():
        inner = settings.find_group(group.model_fields[key].annotation)
        if inner is None:
            yield (key,), value
        else:
            yield from (((key, *path), value) for path, value in list_keys(value, inner))


def test_the_page_is_up_to_date():
    """If this fails, run: make settings."""
    assert settings.PAGE.read_text(encoding="utf-8") == settings.render_page(PARAMS, Params)


def test_the_page_has_every_key_with_its_default_and_every_comment():
    flat = " ".join(settings.PAGE.read_text(encoding="utf-8").split())
    keys = list(list_keys(yaml.safe_load(PARAMS), Params))
    assert len(keys) > 90
    for path, value in keys:
        section = flat.split(f"# `{'.'.join(path[:-1])}` ", 1)[-1]
        assert f"**`{path[-1]}`** (" in section or f"# `{'.'.join(path)}`" in flat, path
        assert f"default {settings._show(value)})" in section or f"Default: {settings._show(value)}." in flat, path
    words = [line.strip("# ").split()[-1].strip("`()[]") for line in PARAMS.splitlines() if line.startswith("  #")]
    assert len(words) > 100
    assert not [word for word in words if re.fullmatch(r"[\w.]+", word) and word not in flat]


SAMPLE = """\
# Of the file.

# --- A title ---
# What the group holds:
#   first   a text
#           of two lines
# Typed in a.py; used by b.py.
group:
  # before both
  # second: the second key
  # first: the first key
  first:
  second: 0.5
  third: [1]
"""


class Sample(Group):
    first: Literal["a", "b"] | None
    second: Annotated[Number, Field(gt=0, le=1)]
    third: list[int]


class SampleParams(Group):
    group: Sample


def test_comments_belong_to_the_keys_that_they_name():
    comments = settings.read_comments(SAMPLE)
    assert comments["group", "first"] == ["The first key"]
    assert comments["group", "second"] == ["The second key"]
    assert comments["group", "first", "before"] == ["before both"]
    assert comments[("group",)][0] == "What the group holds:"


def test_a_page_by_hand():
    page = settings.render_page(SAMPLE, SampleParams).removeprefix(settings.INTRODUCTION)
    assert page == (
        "## `group`\n\nWhat the group holds:\n\n- **`first`**: a text of two lines\n\nTyped in a.py; used by b.py.\n\n"
        "- **`first`** (`a | b`, or empty; default empty). The first key\n"
        "- **`second`** (number > 0 and <= 1; default `0.5`). The second key\n"
        "- **`third`** (list of integer; default `[1]`).\n"
    )


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "`true | false`"),
        (str, "text"),
        (dict[str, int], "mapping"),
        (Annotated[int, Field(ge=2)] | None, "integer >= 2, or empty"),
        (list[Annotated[int, Field(ge=0)]], "list of integer >= 0"),
    ],
)
def test_types_in_words(annotation, words):
    assert settings.describe_type(annotation) == words
