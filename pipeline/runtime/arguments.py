"""Command-line arguments, checked before any work begins. Each mistake becomes one message.

parser = Parser(description=__doc__)
parser.add_argument("--windows", type=whole(1))
"""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.runtime.errors import PipelineError

if TYPE_CHECKING:
    import torch


class ArgumentError(PipelineError):
    """A command line holds an argument that cannot be used."""


class Parser(argparse.ArgumentParser):
    """An argument parser that shows the module's docstring unchanged and raises an error that `run_main` can show."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message}. --help lists the allowed values.")


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return the `type` of an argument that is a whole number from `least` to `most`."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from {least} to {most}")
        return number

    return parse


def non_negative(value: str) -> float:
    """Parse an argument that is a number of 0 or more. The `type` of such an argument."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of 0 or more")
    return number


def text(value: str) -> str:
    """Check an argument that a model will read. The `type` of such an argument."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not encoded in UTF-8") from None
    return value


def device(name: str) -> "torch.device":
    """Parse the name of a device that can be used. The `type` of such an argument."""
    import torch  # seconds: only commands that take a device need it

    if (problem := find_device_problem(name)) is not None:
        raise argparse.ArgumentTypeError(problem)
    return torch.device(name)


def find_device_problem(name: str) -> str | None:
    """Return why no tensor can be put on the device of this name, or None where it can be used."""
    import torch

    try:
        candidate = torch.device(name)
        torch.empty(0, device=candidate)
    except Exception as error:  # each backend raises its own type where its device is missing
        return f"{name!r} cannot be used ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return f"{name!r} cannot be used (its tensors hold no numbers)" if candidate.type == "meta" else None


def check_writable(path: Path) -> None:
    """Check that a file can be written, before there is anything to write.

    Raises:
        ArgumentError: `path` is a folder, or the folder it would be in cannot be written to.
    """
    if path.is_dir():
        raise ArgumentError(f"{path} cannot be written: it is a folder. Add a file name.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ArgumentError(
            f"{path} cannot be written: {folder} is not a folder that you may write to. Use another path."
        )
