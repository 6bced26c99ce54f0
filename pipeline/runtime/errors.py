"""Errors: a mistake that the user can fix becomes one message, and a bug of this project keeps its traceback.

    raise PipelineError("KEY=VALUE: what is wrong. What to do.")     # where this project finds the mistake
    with reading(lambda reason: PipelineError(f"{path} is damaged ({reason}). Get it again.")):
        …                                  # around another library's code that parses a user's file
    run_main(main)                         # around every command line

Keep the body of `reading` small: every exception inside it is taken for a fault of the file. Failures of the machine (a
full disk, too little memory, a missing file) need no `reading`, because `run_main` knows their types. With
PREFIXQUANT_TRACEBACK=1 in the environment, every error shows its traceback.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TRACEBACK = "PREFIXQUANT_TRACEBACK"
_MACHINE = (OSError, MemoryError, EOFError, ImportError)
_MACHINE_NAMES = {"OutOfMemoryError", "SafetensorError", "CalledProcessError"}  # by name: their packages load slowly
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE}  # the machine's limits, not the file's
_INTERRUPTED = 130  # the exit code that shells use for Ctrl-C


class PipelineError(Exception):
    """A mistake that the user can fix. The message names the mistake, the allowed values and the remedy."""


@contextmanager
def reading(describe: Callable[[str], PipelineError], *modules: str) -> Iterator[None]:
    """Turn exceptions of the body into `describe(reason)`, with the reason in one line.

    These exceptions pass unchanged: PipelineError, a full disk, too little memory and, where `modules` are named, any
    exception that was not raised in one of them.
    """
    try:
        yield
    except (PipelineError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        if modules and not was_raised_in(error, *modules):
            raise
        raise describe(summarise(error)) from error
    except BaseException as error:
        if modules or type(error).__name__ != "PanicException":  # Rust libraries derive it from BaseException
            raise
        raise describe(summarise(error)) from error


def summarise(error: BaseException) -> str:
    """Return an error's message in one line of at most 300 characters."""
    if isinstance(error, KeyError):
        return f"no {error}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def was_raised_in(error: BaseException, *modules: str) -> bool:
    """Return whether the line that raised an error, or the error's type, is in one of `modules` or below one."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    line_module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    origins = f"{line_module}.", f"{type(error).__module__}."
    return any(origin.startswith(f"{module}.") for origin in origins for module in modules)


def run_main(main: Callable[[], None]) -> None:
    """Run the main function of a command line. An error that is not a bug becomes one message and exit code 1."""
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        main()
        return
    try:
        main()
    except PipelineError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:  # the reader of the output has left: the flush at exit must not fail, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if not _is_machine_failure(error):
            raise
        sys.exit(f"error: {_describe(error)} ({TRACEBACK}=1 shows where)")


def _is_machine_failure(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    no_memory = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch on a CPU
    return isinstance(error, _MACHINE) or bool(names & _MACHINE_NAMES) or no_memory


def _describe(error: Exception) -> str:
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return summarise(error)
