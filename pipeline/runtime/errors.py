"""The base of every error that is the user's to fix: shown as one message, without a traceback."""


class PipelineError(Exception):
    """Something the user can act on; the message says what is wrong, what is allowed and what to do."""
