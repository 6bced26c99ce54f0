"""Run DVC experiments one after the other, and find those that did not finish.

    python -m pipeline.experiments sweep -S quantizer_init.weights.bits=3,4,8 -S prefix.use=none,found
    python -m pipeline.experiments check

`sweep` runs `dvc exp run --temp` for every combination of the values, in order. Every experiment starts from the
present params.yaml, so they do not add up, and params.yaml and artifacts/ stay as they are. A failed one does not stop
the rest. Start an interrupted sweep again with the same command: finished stages come out of DVC's cache.

`check` lists experiments whose stages did not all run. `dvc exp show` shows them with the numbers of an earlier run.
"""

import hashlib
import re
import subprocess
from functools import partial
from pathlib import Path

from dvc.utils.hydra import get_hydra_sweeps

from pipeline.pictures.outdated import read_outdated
from pipeline.runtime.arguments import Parser
from pipeline.runtime.errors import PipelineError, run_main
from pipeline.runtime.git import list_experiments, read_committed

PARAMS = "params.yaml"


def list_combinations(overrides: list[str]) -> list[list[str]]:
    """Return every combination of the overrides' values: ["a=1,2", "b=3"] -> [["a=1", "b=3"], ["a=2", "b=3"]]."""
    combinations = [combination[PARAMS] for combination in get_hydra_sweeps({PARAMS: overrides})]
    # DVC's function writes ~key as ~key=null, which deletes the key only where it is null.
    return [[re.sub("^(~.*)=null$", r"\1", override) for override in combination] for combination in combinations]


def name_experiment(overrides: list[str]) -> str:
    """Return a name that DVC accepts: ["quantizer_init.weights.bits=4"] -> "weights.bits-4".

    Where characters are replaced or left out, a hash is added, so that other overrides have another name:
    ["model.source=../a"] -> "model.source---a-2942ab".
    """
    pairs = [override.partition("=")[::2] for override in overrides]
    plain = "-".join(f"{'.'.join(key.split('.')[-2:])}-{value}" for key, value in pairs)
    # git refuses "..", ".lock" at the end, and names of more than 255 bytes.
    name = re.sub(r"[^\w.-]+|\.\.+", "-", plain)[:60].strip("-.")
    if name == plain and not name.endswith(".lock"):
        return name
    return f"{name}-{hashlib.sha256(repr(overrides).encode()).hexdigest()[:6]}"


def run_sweep(overrides: list[str]) -> list[str]:
    """Run an experiment for every combination of the overrides' values; return the names of those that failed."""
    failed = []
    combinations = list_combinations(overrides)
    for number, combination in enumerate(combinations, 1):
        name = name_experiment(combination)
        print(f"=== experiment {number} of {len(combinations)}: {' '.join(combination)}", flush=True)
        if name in list_experiments():  # DVC would refuse the name, or with --force run all stages
            subprocess.run(["dvc", "exp", "remove", "--quiet", name], check=True)
        settings = [word for override in combination for word in ("-S", override)]
        if subprocess.run(["dvc", "exp", "run", "--temp", "--name", name, *settings], check=False).returncode:
            failed.append(name)
    return failed


def find_unfinished() -> dict[str, str]:
    """Return the experiments of the last commit whose report is of an earlier run, each with the reason."""
    unfinished = {}
    for name, revision in list_experiments().items():
        outdated = read_outdated(partial(_read_committed, revision))
        if "report" in outdated:
            unfinished[name] = outdated["report"]
    return unfinished


def _read_committed(revision: str, name: str) -> str | None:
    return read_committed(Path(name), revision)


def main() -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sweep = commands.add_parser("sweep", help="run an experiment for every combination of values")
    sweep.add_argument("-S", dest="overrides", action="append", required=True, metavar="KEY=VALUE,VALUE")
    commands.add_parser("check", help="list experiments that did not finish")
    arguments = parser.parse_args()
    if arguments.command == "sweep":
        if failed := run_sweep(arguments.overrides):
            raise PipelineError(f"{len(failed)} experiments failed: {', '.join(failed)}. Their messages are above.")
        return
    if unfinished := find_unfinished():
        print("These experiments did not run all stages. Numbers shown for them are of an earlier run:")
        print("\n".join(f"  {name}: {reason}" for name, reason in unfinished.items()))


if __name__ == "__main__":
    run_main(main)
