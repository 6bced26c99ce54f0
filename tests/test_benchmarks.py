"""The benchmark programs start, and imports go one way: tests -> benchmarks -> pipeline."""

import ast
import importlib
import sys

import pytest

from tests.conftest import ROOT

PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    if "def main()" in path.read_text(encoding="utf-8")
)


def list_imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize(
    ("folder", "forbidden"), [("benchmarks", {"tests"}), ("pipeline", {"benchmarks", "tests", "stages"})]
)
def test_no_module_imports_from_a_folder_that_builds_on_it(folder, forbidden):
    paths = list((ROOT / folder).rglob("*.py"))
    assert len(paths) > 20
    for path in paths:
        assert not forbidden & {name.partition(".")[0] for name in list_imports(path)}, path


def test_every_program_is_in_a_folder_by_topic():
    assert len(PROGRAMS) == 22
    assert {program.split(".")[1] for program in PROGRAMS} == {"quality", "speed", "serving", "robustness", "peers"}
    for topic in ("quality", "robustness"):
        assert (ROOT / "benchmarks" / topic / "__main__.py").is_file()


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_explain_themselves(program, monkeypatch, capsys):
    module = importlib.import_module(program)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out
