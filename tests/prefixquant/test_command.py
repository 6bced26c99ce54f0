"""The command `prefixquant`: its subcommands, its help, and the work that it hands over."""

import subprocess
import sys

import pytest

from pipeline.runtime.errors import PipelineError
from pipeline.version import VERSION
from prefixquant import command
from tests.conftest import ROOT
from tests.export.test_folder import make_export


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function that runs the command with some words and returns the text that it prints."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["prefixquant", *map(str, words)])
        command.dispatch()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_names_every_subcommand(words, call):
    printed = call(*words)
    for name, subcommand in command.SUBCOMMANDS.items():
        assert f"  {name} " in printed
        assert subcommand.help in printed


def test_the_version_is_the_version_of_the_package(call):
    assert call("--version") == f"prefixquant {VERSION}\n"


def test_a_misspelt_subcommand_is_refused_with_the_nearest(call):
    with pytest.raises(PipelineError, match=r"'qantize': unknown subcommand\. Did you mean quantize\?"):
        call("qantize")
    with pytest.raises(PipelineError, match=r"'xyz': unknown subcommand\. Use one of quantize, plan, generate"):
        call("xyz")


@pytest.mark.parametrize("name", command.SUBCOMMANDS)
def test_every_subcommand_has_help_under_its_own_name(name):
    done = subprocess.run(
        [sys.executable, "-m", "prefixquant", name, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: prefixquant {name} " in done.stdout or name == "lm-eval"


def test_generate_continues_a_text_and_chat_needs_a_template(imported, tmp_path, call, monkeypatch):
    folder = make_export(imported, tmp_path)[0]
    assert call("generate", folder, "The house on", "--max-new-tokens", 4).strip()
    with pytest.raises(PipelineError, match=r"^chat: this model's tokenizer has no chat template\. Use"):
        call("chat", folder, "Hello")


def test_an_error_is_one_line_and_exit_code_1():
    done = subprocess.run(
        [sys.executable, "-m", "prefixquant", "generate", "no-such-folder", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "error: no-such-folder: there is no such folder. Correct the path.\n")
