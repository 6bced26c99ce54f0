"""Run DVC experiments as a SLURM job array, on several machines that share a file system.

    python -m pipeline.job_array -S quantizer_init.weights.bits=3,4,8 --slurm partition=gpu gpus_per_node=1 time=240
    python -m pipeline.job_array -S prefix.use=none,found --cluster local        # the same on this machine

Every combination of the values is one job. A job clones this project's last commit into a folder of its own, so jobs
share neither a workspace nor DVC's locks. It uses this project's DVC cache, so it reuses finished stages, and later
jobs reuse its own. At its end it pushes the experiment into this project, where `dvc exp show` and `prefixquant
compare` list it. A failed job does not stop the rest. To resume an array, start it again with the same command.

SLURM schedules the jobs, through submitit (pip install 'prefixquant-pipeline[slurm]').
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.experiments import list_combinations, name_experiment
from pipeline.runtime.arguments import ArgumentError, Parser
from pipeline.runtime.errors import PipelineError, run_main

LOGS = Path(".work/jobs")
MINUTES = 24 * 60  # of a job, unless --slurm time= says otherwise


def main() -> None:
    """Run `python -m pipeline.job_array`."""
    parser = Parser(description=__doc__)
    parser.add_argument("-S", dest="overrides", action="append", required=True, metavar="KEY=VALUE,VALUE")
    parser.add_argument("--cluster", choices=("slurm", "local", "debug"), default="slurm", help="default: slurm")
    parser.add_argument(
        "--slurm", nargs="+", default=[], metavar="OPTION=VALUE", help="options of sbatch, such as time=240"
    )
    parser.add_argument("--scratch", type=Path, help="where jobs put their clones; default: the machine's /tmp")
    parser.add_argument("--logs", type=Path, default=LOGS, help=f"where logs of jobs go; default: {LOGS}")
    parser.add_argument("--no-wait", action="store_true", help="submit, and do not wait for the end of the jobs")
    arguments = parser.parse_args()
    failed = run_array(
        arguments.overrides,
        project=Path.cwd(),
        cluster=arguments.cluster,
        slurm=read_options(arguments.slurm),
        scratch=arguments.scratch,
        logs=arguments.logs,
        wait=not arguments.no_wait,
    )
    if failed:
        raise PipelineError(f"{len(failed)} jobs failed: {', '.join(failed)}. Their logs are in {arguments.logs}.")


def read_options(words: Sequence[str]) -> dict[str, int | str]:
    """Return the options of `--slurm`: ["time=240", "partition=gpu"] -> {"time": 240, "partition": "gpu"}.

    Raises:
        ArgumentError: a word has no `=`.
    """
    options: dict[str, int | str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ArgumentError(f"--slurm {word}: expected OPTION=VALUE, such as partition=gpu.")
        options[key] = int(value) if re.fullmatch(r"\d+", value) else value
    return options


def run_array(
    overrides: list[str],
    *,
    project: Path,
    cluster: str,
    slurm: dict[str, int | str],
    scratch: Path | None,
    logs: Path,
    wait: bool = True,
) -> list[str]:
    """Submit a job for every combination of the overrides' values, and return the names of those that failed.

    Args:
        overrides: as of `dvc exp run -S`, with several values between commas.
        project: the folder of the project, a git repository with a commit.
        cluster: slurm, local (processes on this machine), or debug (in this process).
        slurm: options of sbatch without the leading dashes, for `cluster` slurm.
        scratch: parent of the jobs' clones; None: the machine's folder for temporary files.
        logs: the folder of the jobs' logs, on the shared file system.
        wait: whether to wait for the jobs. If not, no name is returned.

    Raises:
        PipelineError: submitit is not installed, or there is no SLURM here.
    """
    try:
        from submitit import AutoExecutor
    except ImportError:
        raise PipelineError("job arrays need submitit. Run: pip install 'prefixquant-pipeline[slurm]'") from None
    try:
        executor = AutoExecutor(folder=logs, cluster=cluster)
        executor.update_parameters(timeout_min=MINUTES)
        if cluster == "slurm":
            executor.update_parameters(**{f"slurm_{key}": value for key, value in slurm.items()})
    except (RuntimeError, AssertionError, NameError) as error:
        raise PipelineError(f"--cluster={cluster}: submitit cannot use it ({error}).") from None
    combinations = list_combinations(overrides)
    jobs = executor.map_array(
        run_experiment,
        combinations,
        [project.resolve()] * len(combinations),
        [scratch] * len(combinations),
    )
    names = [name_experiment(combination) for combination in combinations]
    for name, job in zip(names, jobs, strict=True):
        print(f"{name}: job {job.job_id}", flush=True)
    if not wait:
        return []
    failed = []
    for name, job in zip(names, jobs, strict=True):
        error = job.exception()
        print(f"{name}: {'done' if error is None else 'failed'}", flush=True)
        failed += [] if error is None else [name]
    return failed


def run_experiment(overrides: list[str], project: Path, scratch: Path | None) -> None:
    """Run one experiment in a clone of the project, and push it to the project. Runs on the machine of the job.

    Raises:
        subprocess.CalledProcessError: a command failed. Its output is in the log of the job.
    """
    name = name_experiment(overrides)
    environment = dict(os.environ)
    # dvc.yaml says `python -m stages.NAME`; the job may run without the activated environment.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    dvc = [sys.executable, "-m", "dvc"]
    shown = subprocess.run([*dvc, "cache", "dir"], cwd=project, check=True, stdout=subprocess.PIPE, text=True)
    cache = project / shown.stdout.strip()
    # DVC's daemon may still write into the clone when it is removed.
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=scratch, ignore_cleanup_errors=True) as folder:
        environment["DVC_SITE_CACHE_DIR"] = str(Path(folder) / "site-cache")
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(project), str(clone)], check=True)

        def run(*command: str) -> None:
            subprocess.run([*dvc, *command], cwd=clone, env=environment, check=True)

        settings = Path(".dvc/config.local")
        if (project / settings).is_file():
            shutil.copyfile(project / settings, clone / settings)
        run("config", "--local", "cache.dir", str(cache))
        run("exp", "run", "--name", name, *(word for override in overrides for word in ("-S", override)))
        run("exp", "push", "--no-cache", "--force", "origin", name)


if __name__ == "__main__":
    run_main(main)
