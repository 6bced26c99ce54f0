"""What command lines are given, checked before any work begins; what is wrong is one message.

parser = Parser(description=__doc__)
parser.add_argument("--windows", type=whole(1))
"""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from pipeline.runtime.errors import PipelineError


class ArgumentError(PipelineError):
    """A command line asks for what cannot be."""


class Parser(argparse.ArgumentParser):
    """argparse's, with the module's docstring as it stands, and an error that `run_main` shows."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message}; --help lists what is allowed")


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an argument that is a whole number."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} to {most}")
        return value

    return parse


def positive(text: str) -> float:
    """The type of an argument that is 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 0 or more")
    return value


def text(text: str) -> str:
    """The type of an argument that a model reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not encoded in UTF-8") from None
    return text


def device(text: str) -> torch.device:
    """The type of an argument that names a device that is there."""
    if (problem := find_problem(text)) is not None:
        raise argparse.ArgumentTypeError(problem)
    return torch.device(text)


def find_problem(device: str) -> str | None:
    """Why nothing can be put on a device, or None."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:  # each backend has its own way to say that it is not there
        return f"{device!r} cannot be used ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return f"{device!r} holds no numbers" if found.type == "meta" else None


def check_writable(path: Path) -> None:
    """Raises ArgumentError where a file could not be written, before there is anything to write."""
    if path.is_dir():
        raise ArgumentError(f"{path} cannot be written: it is a folder")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ArgumentError(f"{path} cannot be written: {folder} is no folder that can be written to")
