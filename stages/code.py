"""Write a fingerprint of the code that each stage runs, so that a changed line reruns the stages it can affect.

Reads   the scripts in stages/ and the modules of pipeline/ that they import
Writes  artifacts/code/STAGE.json: the path of each of these files -> a hash without comments, docstrings and messages
Runs with every `dvc repro`. Imports no torch, and takes half a second.
"""

import logging
from pathlib import Path

from pipeline.runtime.code import CodeReader
from pipeline.runtime.errors import run_main
from pipeline.runtime.files import write_json

logger = logging.getLogger(__name__)

STAGES = Path(__file__).parent
CODE = Path("artifacts/code")
# These run with every `dvc repro`, or are no stages.
LEFT_OUT = {"__init__", "code", "sources", "opening", "launcher", "run"}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    reader = CodeReader(STAGES.parent)
    names = sorted(path.stem for path in STAGES.glob("*.py") if path.stem not in LEFT_OUT)
    fingerprints = {name: reader.fingerprint_stage(f"stages/{name}.py") for name in names}
    for name, fingerprint in fingerprints.items():
        write_json(CODE / f"{name}.json", fingerprint)
    for path in CODE.glob("*.json"):
        if path.stem not in fingerprints:
            path.unlink()
    logger.info("code: %d stages, %d files", len(names), len(set().union(*fingerprints.values())))


if __name__ == "__main__":
    run_main(main)
