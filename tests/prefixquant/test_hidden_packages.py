"""A user's pipeline.py, or another module with a name of this project, is named where it hides the project's."""

import subprocess
import sys

import pytest

from prefixquant.hidden_packages import check_not_hidden, find_place
from tests.conftest import ROOT

USE = """
import sys
sys.path.insert(1, {root!r})  # after the script's folder
import prefixquant
import prefixquant.{module}
print("imported", prefixquant.__file__)
"""


@pytest.mark.parametrize(
    ("hiding", "module", "message"),
    [
        ("pipeline.py", "registration", "pipeline.py hides the package pipeline of prefixquant"),
        ("pipeline/__init__.py", "registration", "pipeline hides the package pipeline of prefixquant"),
        ("stages.py", "project", "stages.py hides the package stages of prefixquant"),
        ("stages.py", "registration", None),  # only `quantize` uses it
        ("pipeline/notes.txt", "project", None),  # a folder without modules gives way
        ("presets.py", "project", None),
    ],
)
def test_a_module_next_to_the_script_that_hides_a_package_is_named(hiding, module, message, tmp_path):
    (tmp_path / hiding).parent.mkdir(exist_ok=True)
    (tmp_path / hiding).write_text("")
    (tmp_path / "script.py").write_text(USE.format(root=str(ROOT), module=module))
    done = subprocess.run([sys.executable, "-E", "script.py"], cwd=tmp_path, capture_output=True, text=True)
    if message is None:
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"imported {ROOT / 'prefixquant/__init__.py'}\n"
    else:
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"ImportError: {tmp_path / message}, because Python finds it first. Rename it")


def test_a_module_that_was_imported_before_counts(monkeypatch):
    monkeypatch.setitem(sys.modules, "pipeline", pytest)
    with pytest.raises(ImportError, match="hides the package pipeline of prefixquant"):
        check_not_hidden("pipeline")


def test_the_places_are_those_of_this_project():
    assert find_place("pipeline") == ROOT / "pipeline"
    assert find_place("stages") == ROOT / "stages"
    assert find_place("nothing_of_this_name") is None
    assert find_place("sys") is None
