"""Fingerprint the code that a stage runs, so that `dvc repro` reruns exactly the stages that a change can affect.

    fingerprint_stage(Path("stages/rotation.py"), root)
    -> {"pipeline/rotation/merging.py": "5d1f…", …, "stages/rotation.py": "09ab…"}

The fingerprint lists the stage's script and every module of this project that it imports, directly or through others,
each with a hash of its syntax tree. These parts of a module are left out of the hash, since they change no result:

- comments, docstrings and the layout of lines
- messages: text with at least one space that is passed to an exception or to a logger

A module that uses `__file__` may load the files next to it (C++ sources, YAML), so their bytes are hashed too.

Some modules compute no result at all and are not followed (`EXEMPT`). Otherwise a constant of a memory plan, or a check
in the params of another stage, would rerun everything. Whoever changes the layout of artifacts raises
`artifacts.FORMAT_VERSION` instead.

Imports that only exist at run time (`importlib.import_module`, `exec`, …) would escape it, so they are refused.
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import PipelineError

# Modules and rooms that compute no result. The script of a stage is never exempt.
EXEMPT = (
    "pipeline/runtime/",
    "pipeline/planning/",
    "pipeline/params.py",
    "stages/opening.py",
    "stages/launcher.py",
)
PACKAGES = ("pipeline", "stages")  # of this project, whose modules stages run
_DYNAMIC = {"__import__", "import_module", "exec", "eval", "run_path", "run_module", "spec_from_file_location"}
_TEXT_CALLS = ("Error", "Exception", "Warning")  # classes whose names end like this take messages
_LOGGERS = {"logger", "logging", "warnings"}


class CodeError(PipelineError):
    """The code of a stage cannot be fingerprinted; the message names the file and the line."""


@dataclass
class CodeReader:
    """Reads the modules below `root`; each is parsed once, however many stages reach it.

    Attributes:
        root: the folder that holds `pipeline/` and `stages/`.
    """

    root: Path
    _trees: dict[str, ast.Module] = field(default_factory=dict)
    _hashes: dict[str, str] = field(default_factory=dict)

    def fingerprint_stage(self, script: str) -> dict[str, str]:
        """Return path below `root` -> hash, for a stage's script, the modules that it reaches and the files they load.

        Raises:
            CodeError: a module is missing, is not valid Python, or imports dynamically.
        """
        reached: set[str] = set()
        waiting = [script]
        while waiting:
            path = waiting.pop()
            reached.add(path)
            waiting += [module for module in self.list_imports(path) if module not in reached and not is_exempt(module)]
        files = {file for path in reached for file in self._list_loaded_files(path)}
        return {path: self._hash(path) for path in sorted(reached | files)}

    def list_imports(self, path: str) -> set[str]:
        """Return the modules of this project that the module at `path` imports, wherever the statement is."""
        modules: set[str] = set()
        for node in ast.walk(self._parse(path)):
            match node:
                case ast.Import(names=names):
                    for alias in names:
                        modules |= self._resolve(alias.name, f"{path}:{node.lineno}")
                case ast.ImportFrom(module=module, level=0, names=names) if module is not None:
                    modules |= self._resolve(module, f"{path}:{node.lineno}")
                    for alias in names:  # a name in the module, or a module of the package
                        modules |= self._find_module(f"{module}.{alias.name}")
                case ast.ImportFrom():
                    raise CodeError(
                        f"{path}:{node.lineno}: a relative import. Write the name out: pipeline.ROOM.MODULE."
                    )
                case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if self._is_dynamic(node.func, name):
                    raise CodeError(
                        f"{path}:{node.lineno}: {name}() imports or runs code that no fingerprint can cover. Use an "
                        "import statement."
                    )
        return modules

    @staticmethod
    def _is_dynamic(function: ast.expr, name: str) -> bool:
        # model.eval() and cursor.exec() are methods; the built-in functions are plain names.
        return name in _DYNAMIC and (isinstance(function, ast.Name) or name not in ("exec", "eval"))

    def _resolve(self, module: str, place: str) -> set[str]:
        """Return the files that importing `module` runs. Raises CodeError if it is not in this project."""
        if module.partition(".")[0] not in PACKAGES:
            return set()  # another project's package, installed next to these
        files = self._find_module(module)
        if not files:
            raise CodeError(f"{place}: there is no module {module}")
        return files

    def _find_module(self, module: str) -> set[str]:
        """Return the file of a dotted name and the `__init__.py` of each package around it; empty if there is none."""
        parts = module.split(".")
        stem = "/".join(parts)
        files = [path for path in (f"{stem}.py", f"{stem}/__init__.py") if (self.root / path).is_file()]
        if not files or parts[0] not in PACKAGES:
            return set()
        packages = ["/".join((*parts[:count], "__init__.py")) for count in range(1, len(parts))]
        return {*files, *(path for path in packages if (self.root / path).is_file())}

    def _list_loaded_files(self, path: str) -> Iterator[str]:
        names = {node.id for node in ast.walk(self._parse(path)) if isinstance(node, ast.Name)}
        if "__file__" not in names:
            return
        for file in (self.root / path).parent.rglob("*"):
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                yield file.relative_to(self.root).as_posix()

    def _parse(self, path: str) -> ast.Module:
        if path not in self._trees:
            try:
                self._trees[path] = ast.parse((self.root / path).read_text(encoding="utf-8"), filename=path)
            except OSError as error:
                raise CodeError(f"{path} cannot be read ({error.strerror}). Restore it from git.") from None
            except (SyntaxError, ValueError) as error:
                raise CodeError(f"{path} is not valid Python ({error}).") from None
        return self._trees[path]

    def _hash(self, path: str) -> str:
        """Return the first 16 hex digits of the SHA-256 of a module's syntax tree, or of another file's bytes."""
        if path not in self._hashes:
            is_module = path.endswith(".py")
            content = describe_tree(self._parse(path)).encode() if is_module else (self.root / path).read_bytes()
            self._hashes[path] = hashlib.sha256(content).hexdigest()[:16]
        return self._hashes[path]


def is_exempt(path: str) -> bool:
    """Return whether the module at `path` computes no result; see `EXEMPT`."""
    return any(path.startswith(exempt) for exempt in EXEMPT)


def describe_tree(node: ast.AST) -> str:
    """Return a syntax tree as text, the same for Python 3.11 to 3.13, without docstrings and messages.

    `ast.dump` would not do, because its output differs between versions of Python.
    """
    match node:
        case ast.Call() if takes_message(node.func):
            parts = [node.func, *node.args, *(keyword.value for keyword in node.keywords)]
            return f"Message({', '.join(describe_tree(part) for part in parts if not is_message(part))})"
        case ast.Constant(value=value):
            return repr(value)
    fields = [(name, _describe_value(value)) for name, value in ast.iter_fields(node) if name != "kind"]
    return f"{type(node).__name__}({', '.join(f'{name}={text}' for name, text in fields if text)})"


def _describe_value(value: Any) -> str:
    """Return a field of a syntax tree as text; "" where it is empty, as fields are that only newer versions have."""
    if isinstance(value, list):
        nodes = [item for item in value if not _is_text_statement(item)]
        return "[" + ", ".join(_describe_value(item) for item in nodes) + "]" if nodes else ""
    if isinstance(value, ast.AST):
        return describe_tree(value)
    return "" if value is None else repr(value)


def _is_text_statement(node: Any) -> bool:
    """Return whether a node is a docstring, or another string that is a whole statement."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def takes_message(function: ast.expr) -> bool:
    """Return whether a call of `function` makes an exception or writes a log line."""
    match function:
        case ast.Name(id=name) | ast.Attribute(attr=name) if name.endswith(_TEXT_CALLS):
            return True
        case ast.Attribute(value=ast.Name(id=name)):
            return name in _LOGGERS
    return False


def is_message(node: ast.expr) -> bool:
    """Return whether an argument is text for people: a string or f-string with a space in it, or a sum of those.

    A single word may be data that an `except` clause reads, so it counts as code.
    """
    match node:
        case ast.Constant(value=str(text)):
            return " " in text
        case ast.JoinedStr(values=parts):
            return any(isinstance(part, ast.Constant) and is_message(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add() | ast.Mod(), right=right):
            return is_message(left) or is_message(right)
    return False
