"""Read from the git repository around the current folder. Nothing here changes it."""

import re
import subprocess
from pathlib import Path


def read_committed(path: Path, revision: str = "HEAD") -> str | None:
    """Return the text of a file in a commit; None without git, a repository, such a commit, or such a file in it."""
    return _run("show", f"{revision}:./{path}")


def list_experiments() -> dict[str, str]:
    """Return the commit of each DVC experiment that started from the last commit, by the experiment's name."""
    head = (_run("rev-parse", "HEAD") or "").strip()
    refs = _run("for-each-ref", "--format=%(refname) %(objectname)", f"refs/exps/{head[:2]}/{head[2:]}/") or ""
    named = re.findall(r"^refs/exps/\w{2}/\w{38}/(\S+) (\w+)$", refs, re.MULTILINE)
    return dict(named) if head else {}


def _run(*words: str) -> str | None:
    """Return the output of a git command, or None if it fails."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.decode("utf-8") if done.returncode == 0 else None
