"""The base of every error that is the user's to fix: shown as one message, without a traceback, by `run_main`."""

import sys
from collections.abc import Callable


class PipelineError(Exception):
    """Something the user can act on; the message says what is wrong, what is allowed and what to do."""


def run_main(main: Callable[[], None]) -> None:
    """Run a stage's main; an error the user can act on becomes one message and exit code 1."""
    try:
        main()
    except PipelineError as error:
        sys.exit(f"error: {error}")
