"""Write docs/settings.md, the settings reference, from params.yaml and the typed params.

Meanings come from the comments of params.yaml, types and bounds from `pipeline/params.py:Params`, defaults from the
values. `python .ci/settings.py` (`make settings`) writes the page. tests/test_settings_page.py compares it with both
sources.
"""

import itertools
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/settings.md"
WIDTH = 120
INTRODUCTION = """\
# Settings reference

After reading this page you know every key of `params.yaml`: its meaning, its allowed values and its default.

`make settings` writes this page from the comments of `params.yaml` and the types in the code. "Empty" means null. To
change a value, edit the file and run `dvc repro`, or try it with `-S` ([experiments.md](experiments.md)).

"""


def render_page(text: str, params: type[BaseModel]) -> str:
    """Return the page for the text of params.yaml and the typed params."""
    comments = read_comments(text)
    parts = [INTRODUCTION]
    for group, value in yaml.safe_load(text).items():
        parts += _render_group((group,), value, params.model_fields[group].annotation, comments)
    return "".join(parts).rstrip() + "\n"


def read_comments(text: str) -> dict[tuple[str, ...], list[str]]:
    """Return {path of a key: lines of its comment}, without `#` and without ruled titles.

    A comment may also describe siblings of its key, each in a part that begins with `SIBLING: `. Text before such parts
    is returned under (*path, "before").
    """
    comments: dict[tuple[str, ...], list[str]] = {}
    stack: list[tuple[int, str]] = []
    pending: list[str] = []
    header = True  # the first block describes the file
    for line in text.splitlines():
        content = line.strip()
        if content.startswith("#"):
            if not content.startswith("# ---"):
                pending.append(content[1:].removeprefix(" "))
        elif match := re.match(r"( *)([\w-]+):", line):
            indent = len(match[1])
            stack = [(depth, name) for depth, name in stack if depth < indent] + [(indent, match[2])]
            comments[tuple(name for _, name in stack)] = pending
            pending = []
        elif not content and header:
            pending, header = [], False
    return _split_siblings(comments)


def _split_siblings(comments: dict[tuple[str, ...], list[str]]) -> dict[tuple[str, ...], list[str]]:
    split: dict[tuple[str, ...], list[str]] = {path: [] for path in comments}
    for path, lines in comments.items():
        siblings = {other[-1] for other in comments if other[:-1] == path[:-1]}
        target = path
        before: list[str] = []
        parts: dict[tuple[str, ...], list[str]] = {}
        for line in lines:
            name, colon, rest = line.partition(": ")
            if colon and name in siblings:
                target = (*path[:-1], name)
                parts.setdefault(target, []).append(rest[:1].upper() + rest[1:])
            elif parts:
                parts[target].append(line)
            else:
                before.append(line)
        if parts and before:
            split[(*path, "before")] = before
        elif before:
            parts[path] = before
        for named, described in parts.items():
            split[named] = [*split[named], *described]
    return split


def describe_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return the allowed values of a key in words, such as `integer >= 1, or empty`."""
    if get_origin(annotation) is Annotated:
        return describe_type(get_args(annotation)[0], [*metadata, *get_args(annotation)[1:]])
    if get_origin(annotation) in (Union, UnionType):
        return ", or ".join(describe_type(variant) for variant in get_args(annotation))
    if get_origin(annotation) is Literal:
        return "`" + " | ".join(map(str, get_args(annotation))) + "`"
    if get_origin(annotation) is list:
        return f"list of {describe_type(get_args(annotation)[0])}"
    words = {bool: "`true | false`", int: "integer", float: "number", str: "text", NoneType: "empty"}
    constraints = [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]
    limits = [
        f"{sign} {getattr(constraint, bound):g}"
        for constraint in constraints
        for bound, sign in {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}.items()
        if hasattr(constraint, bound)
    ]
    return f"{words.get(annotation, 'mapping')} {' and '.join(limits)}".strip()


def find_group(annotation: Any) -> type[BaseModel] | None:
    """Return the typed group that a key holds, also where it may be empty; None for any other key."""
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    groups = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
    return groups[0] if groups else None


def _render_group(
    path: tuple[str, ...], value: Any, annotation: Any, comments: dict[tuple[str, ...], list[str]]
) -> Iterator[str]:
    """Yield a heading, the text, a list of keys, and then the groups inside."""
    yield f"{'#' * (len(path) + 1)} `{'.'.join(path)}`\n\n"
    yield from _render_text(comments[path])
    group = find_group(annotation)
    if group is None:  # corpora and tasks: names are free
        yield f"Default: {_show(value)}.\n\n"
        return
    inner_groups = [key for key, inner in value.items() if isinstance(inner, dict)]
    for key, inner in value.items():
        if key not in inner_groups:
            field = group.model_fields[key]
            allowed = describe_type(field.annotation, field.metadata)
            yield from _render_key(key, allowed, inner, comments[(*path, key)])
    yield "\n"
    for key in inner_groups:
        yield from _render_text(comments.get((*path, key, "before"), []))
        yield from _render_group((*path, key), value[key], group.model_fields[key].annotation, comments)


def _render_key(key: str, allowed: str, value: Any, lines: list[str]) -> Iterator[str]:
    example = [line for line in lines if line.startswith("  ")]
    text = " ".join(line for line in lines if not line.startswith("  "))
    # params.yaml repeats the type
    text = text.removeprefix(allowed.strip("`") + ". ").removesuffix(f" An {allowed}.")
    yield _fill(f"- **`{key}`** ({allowed}; default {_show(value)}). {_link(text)}".strip(), "    ") + "\n"
    if example:
        yield "\n    ```\n" + textwrap.indent(textwrap.dedent("\n".join(example)), "    ") + "\n    ```\n\n"


def _render_text(lines: list[str]) -> Iterator[str]:
    """Yield paragraphs and lists of names."""
    for indented, block in itertools.groupby(lines, lambda line: line.startswith("  ")):
        if indented:
            items: list[str] = []
            for line in block:
                if match := re.match(r"  (\S+)\s{2,}(.+)", line):
                    items.append(f"- **`{match[1]}`**: {match[2]}")
                else:
                    items[-1] += " " + line.strip()
            yield "\n".join(_fill(_link(item), "    ") for item in items) + "\n\n"
        else:
            for paragraph in re.split(" (?=Typed in )", " ".join(block)):
                yield _fill(_link(paragraph)) + "\n\n"


def _fill(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH - 4, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _link(text: str) -> str:
    """Return a text with links to pages, and with code in backticks."""
    text = re.sub(r"(?:pipeline|stages)/[\w/]+\.py|(?<=and )\w+\.py|(?<=, )\w+\.py", r"`\g<0>`", text)
    text = re.sub(r"\bdocs/([\w/]+\.md)(#[\w-]+)?", r"[\1](\1\2)", text)
    return text.replace("*.", "\\*.")


def _show(value: Any) -> str:
    if value is None:
        return "empty"
    shown = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("...\n").strip()
    return f"`{shown}`"


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from pipeline.params import Params

    PAGE.write_text(render_page((ROOT / "params.yaml").read_text(encoding="utf-8"), Params), "utf-8")


if __name__ == "__main__":
    main()
