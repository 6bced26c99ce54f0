import ast
import os
import shutil
import subprocess
import sys

import pytest

from pipeline.runtime.code import CodeError, CodeReader, describe_tree
from tests.conftest import ROOT

STAGES = sorted(path.stem for path in (ROOT / "stages").glob("*.py"))
STAGES = [name for name in STAGES if name not in ("__init__", "code", "sources", "opening", "launcher", "run")]


@pytest.fixture
def project(tmp_path):
    """Write a small project: stages a and b; both import `numbers`, only a imports `files`, opening imports params."""
    sources = {
        "stages/__init__.py": "",
        "stages/a.py": (
            "from pipeline.room import numbers\nfrom pipeline.room.files import load\nimport stages.opening\n"
        ),
        "stages/b.py": "def main():\n    from pipeline.room.numbers import add\n    import stages.opening\n",
        "stages/opening.py": "from pipeline.params import Params\n",
        "pipeline/__init__.py": '"""The library."""\n',
        "pipeline/params.py": "from pipeline.room.files import load\n",
        "pipeline/room/__init__.py": "",
        "pipeline/room/numbers.py": (
            '"""Numbers."""\nimport logging\n\nlogger = logging.getLogger(__name__)\n\n\n'
            'def add(a: int, b: int) -> int:\n    """Add."""\n    # a comment\n    if a < 0:\n'
            '        raise ValueError(f"a={a} is negative. Use 0")\n'
            '    logger.info("adding two numbers")\n    return a + b\n'
        ),
        "pipeline/room/files.py": (
            "from pathlib import Path\n\nload = Path(__file__).with_name('data') / 'table.yaml'\n"
        ),
        "pipeline/room/data/table.yaml": "rows: 3\n",
    }
    for path, text in sources.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def fingerprint(project, stage):
    return CodeReader(project).fingerprint_stage(f"stages/{stage}.py")


def changed_stages(project, path, old, new):
    """Return the stages whose fingerprint an edit changes."""
    before = {stage: fingerprint(project, stage) for stage in "ab"}
    text = (project / path).read_text()
    assert text.count(old) == 1
    (project / path).write_text(text.replace(old, new))
    return {stage for stage in "ab" if fingerprint(project, stage) != before[stage]}


def test_a_fingerprint_lists_the_modules_that_a_script_reaches_without_exempt_code(project):
    assert fingerprint(project, "a").keys() == {
        "stages/__init__.py",
        "stages/a.py",
        "pipeline/__init__.py",
        "pipeline/room/__init__.py",
        "pipeline/room/numbers.py",
        "pipeline/room/files.py",
        "pipeline/room/data/table.yaml",
    }
    assert fingerprint(project, "b").keys() == {
        "stages/__init__.py",
        "stages/b.py",
        "pipeline/__init__.py",
        "pipeline/room/__init__.py",
        "pipeline/room/numbers.py",
    }


NUMBERS = "pipeline/room/numbers.py"


@pytest.mark.parametrize(
    ("path", "old", "new", "stages"),
    [
        (NUMBERS, '"""Add."""', '"""Return the sum."""', ""),
        (NUMBERS, '"""Numbers."""', '"""Other words."""', ""),
        (NUMBERS, '    """Add."""\n', "", ""),
        (NUMBERS, "# a comment", "# another one", ""),
        (NUMBERS, "\n\n\n", "\n", ""),
        (NUMBERS, "is negative. Use 0", "is below zero", ""),
        (NUMBERS, 'f"a={a} is negative. Use 0"', '"a is negative"', ""),
        (NUMBERS, "adding two numbers", "a sum of two", ""),
        (NUMBERS, "a + b", "a - b", "ab"),
        (NUMBERS, "if a < 0", "if a < 1", "ab"),
        (NUMBERS, "ValueError", "KeyError", "ab"),
        ("pipeline/room/data/table.yaml", "3", "4", "a"),
        ("pipeline/room/files.py", "table.yaml", "other.yaml", "a"),
        ("pipeline/params.py", "load", "load as read", ""),
        ("stages/opening.py", "Params", "Params as P", ""),
        ("stages/b.py", "main", "start", "b"),
    ],
)
def test_an_edit_changes_the_stages_that_it_can_affect(path, old, new, stages, project):
    assert changed_stages(project, path, old, new) == set(stages)


def test_a_single_word_passed_to_an_exception_is_data(project):
    def describe(argument):
        return describe_tree(ast.parse(f"raise StopError({argument})"))

    assert describe("'after_block'") != describe("'before_block'")
    assert describe("'after the block'") == describe("'before the block'")
    assert describe("f'{name} is missing'") == describe("'no such name' + name")
    assert describe("code") != describe("other")
    assert describe("compute('a b')") != describe("compute('c d')")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("importlib.import_module(name)", r"numbers\.py:1: import_module\(\) imports or runs code that no fingerprint"),
        ("__import__(name)", r"__import__\(\) imports"),
        ("exec(text)", r"exec\(\) imports"),
        ("from . import files", "a relative import. Write the name out"),
        ("from pipeline.room.gone import x", r"numbers\.py:1: there is no module pipeline\.room\.gone"),
        ("import stages.gone", "there is no module stages.gone"),
        ("def broken(:", "is not valid Python"),
    ],
)
def test_code_that_cannot_be_fingerprinted_is_an_error(line, message, project):
    (project / NUMBERS).write_text(line)
    with pytest.raises(CodeError, match=message):
        fingerprint(project, "b")


def test_methods_named_eval_are_not_dynamic_imports(project):
    (project / NUMBERS).write_text("def add(model):\n    return model.eval()\n")
    assert NUMBERS in fingerprint(project, "b")


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_of_the_project_can_be_fingerprinted(name):
    files = CodeReader(ROOT).fingerprint_stage(f"stages/{name}.py")
    assert f"stages/{name}.py" in files
    assert not [path for path in files if path.startswith(("pipeline/runtime/", "pipeline/planning/"))]
    if "run.runner(" in (ROOT / f"stages/{name}.py").read_text():  # opening.py, which makes it, is exempt
        assert "pipeline/blocks/walk.py" in files


def test_no_module_of_the_library_imports_dynamically():
    reader = CodeReader(ROOT)
    for folder in ("pipeline", "stages"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            reader.list_imports(path.relative_to(ROOT).as_posix())


def test_every_file_that_the_library_loads_belongs_to_a_stage():
    covered = set().union(*(CodeReader(ROOT).fingerprint_stage(f"stages/{name}.py") for name in STAGES))
    loaded = [path for path in (ROOT / "pipeline").rglob("*.*") if path.suffix not in (".py", ".pyc")]
    assert {path.relative_to(ROOT).as_posix() for path in loaded} <= covered
    assert "pipeline/kernels/kernels.cpp" in covered


def test_the_stage_starts_without_torch_and_forgets_stages_that_are_gone(tmp_path):
    for folder in ("pipeline", "stages"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "artifacts/code").mkdir(parents=True)
    (tmp_path / "artifacts/code/gone.json").write_text("{}")
    program = (
        "import runpy, sys\n"
        "runpy.run_module('stages.code', run_name='__main__', alter_sys=False)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert sorted(path.stem for path in (tmp_path / "artifacts/code").iterdir()) == STAGES


def test_packages_beside_installed_ones_are_not_this_projects(project):
    (project / "torch").mkdir()
    for name in ("__init__", "functional"):
        (project / f"torch/{name}.py").write_text("import torch._C\n__import__('x')\n")
    (project / "pipeline/room/numbers.py").write_text("import torch\nfrom torch import functional\n")
    assert not [path for path in fingerprint(project, "b") if path.startswith("torch")]
