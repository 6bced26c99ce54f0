"""Errors, and what becomes of them: what is the user's to fix is one message, a bug of ours keeps its traceback.

    raise PipelineError("what is wrong, what is allowed, what to do")      where this project sees it
    with reading(lambda why: PipelineError(f"{path} is damaged ({why}); get it again")):
        …                                          around the code of others that takes apart what a user handed in
    run_main(main)                                 around every command line

In the frame of `reading` whatever is raised is a matter of what was read, so keep it narrow. What the machine does to
anyone (a full disk, no memory, a file that is not there) needs no frame: `run_main` knows those by their types. With
PREFIXQUANT_TRACEBACK=1 in the environment, everything shows its traceback.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TRACEBACK = "PREFIXQUANT_TRACEBACK"
_MACHINE = (OSError, MemoryError, EOFError, ImportError)
_MACHINE_NAMES = {"OutOfMemoryError", "SafetensorError", "CalledProcessError"}  # known without importing their packages
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE}  # no matter of what is read
_INTERRUPTED = 130  # as shells have it


class PipelineError(Exception):
    """Something the user can act on; the message says what is wrong, what is allowed and what to do."""


@contextmanager
def reading(describe: Callable[[str], PipelineError], *modules: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes `describe(reason)`, the reason being one line.

    PipelineErrors pass, and so do a full disk and a want of memory; with `modules`, what was not raised in one of them.
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
        if modules or type(error).__name__ != "PanicException":  # of libraries in Rust: an error, though it claims more
            raise
        raise describe(summarise(error)) from error


def summarise(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    if isinstance(error, KeyError):
        return f"no {error}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def was_raised_in(error: BaseException, *modules: str) -> bool:
    """Whether the line that raised it, or its type, is of one of `modules` (or of a module inside of one)."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    line = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    places = f"{line}.", f"{type(error).__module__}."
    return any(place.startswith(f"{module}.") for place in places for module in modules)


def run_main(main: Callable[[], None]) -> None:
    """Run what a command line asks for; an error that is no bug of ours becomes one message and exit code 1."""
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
    except BrokenPipeError:  # who read the output has left; nothing more can be said there, not even at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if not _is_of_the_machine(error):
            raise
        sys.exit(f"error: {_describe(error)} ({TRACEBACK}=1 shows where)")


def _is_of_the_machine(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    no_memory = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch, on a CPU
    return isinstance(error, _MACHINE) or bool(names & _MACHINE_NAMES) or no_memory


def _describe(error: Exception) -> str:
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return summarise(error)
