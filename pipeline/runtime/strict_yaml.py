"""YAML read so that nothing is dropped silently: every key is given once, and every key is text.

    values, problems = read_strict_yaml("seed: 1\\nno: 2\\nseed: 3")
    values      # {"seed": 3, "no": 2}
    problems    # ["no: line 2: YAML reads …", "seed: given 2 times, on lines 1 and 3. …"]

PyYAML keeps the last of several equal keys without a message. It reads the names `no`, `on` and `12` as a boolean or a
number. Here such names stay text, so that a caller can check the values too and list all problems together. It also
reads `017` as 15 and `1:30` as 90, which DVC does not.
"""

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_KINDS = {"bool": "a boolean", "int": "a number", "float": "a number", "null": "null", "timestamp": "a date"}
_OTHER_BASES = re.compile(r"[-+]?(0[0-7_]*[1-7][0-7_]*|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
_SHOWN = 80  # characters of a key


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which lists the problems of a document before it builds the document's values."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []
        self._checked: set[yaml.Node] = set()

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        if root is not None:
            self._check_node_(root, "")
        return root

    def _check_node_(self, node: yaml.Node, path: str) -> None:
        """List the problems of `node` and of all nodes inside it. Keys that are not text become text."""
        if node in self._checked:  # an alias
            return
        self._checked.add(node)
        if isinstance(node, yaml.ScalarNode):
            self._check_number_(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._check_node_(item, f"{path}[{index}]")
        elif isinstance(node, yaml.MappingNode):
            key_lines: dict[str, list[int]] = {}
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):  # a list as a key is refused when values are built
                    name = _join(path, key.value)
                    self._check_key_(key, name)
                    key_lines.setdefault(name, []).append(_line(key))
                    self._check_node_(value, name)
            self.problems += [_describe_repeated(name, lines) for name, lines in key_lines.items() if len(lines) > 1]

    def _check_number_(self, node: yaml.ScalarNode, path: str) -> None:
        """List a number in base 8 or 60, which DVC and other readers of YAML 1.2 take for another value."""
        if node.tag not in (f"{_TAG}int", f"{_TAG}float") or not _OTHER_BASES.fullmatch(node.value):
            return
        value = self.construct_object(node)
        self.problems.append(
            f"{path}={node.value}: line {_line(node)}: YAML 1.1 reads this as {value}, and DVC as something else. "
            f'Write {value}, or "{node.value}" for text.'
        )

    def _check_key_(self, key: yaml.ScalarNode, name: str) -> None:
        kind = _KINDS.get(key.tag.removeprefix(_TAG))
        if kind is not None:
            self.problems.append(
                f"{name}: line {_line(key)}: YAML reads the name {key.value!r} as {kind}, not as text. "
                f'Put it in quotes: "{key.value}".'
            )
            key.tag = f"{_TAG}str"


def read_strict_yaml(text: str) -> tuple[Any, list[str]]:
    """Return the value of a YAML document, and its problems, each with the path and the lines of its key.

    Raises:
        yaml.YAMLError: `text` is not YAML.
    """
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data(), loader.problems
    finally:
        loader.dispose()


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _join(path: str, key: str) -> str:
    key = " ".join(key.split())
    shown = key if len(key) <= _SHOWN else f"{key[:_SHOWN]}…"
    return f"{path}.{shown}" if path else shown


def _describe_repeated(name: str, lines: list[int]) -> str:
    *first, last = map(str, dict.fromkeys(lines))
    places = f"on lines {', '.join(first)} and {last}" if first else f"on line {last}"
    return f"{name}: given {len(lines)} times, {places}. Keep one of them."
