"""Open every stage script: its command line, params.yaml, its ranks, its metrics file.

    def main(run: Run) -> None: …       # the work, which adds to run.metrics
    def plan(run: Run) -> Need: …       # memory and disk, for `python -m stages.NAME --plan`

    if __name__ == "__main__":
        open_stage("NAME", main, __doc__, plan)

A mistake the user can act on becomes one message and exit code 1.
"""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.walk import BlockRunner
from pipeline.models.checkpoint import Checkpoint
from pipeline.params import Params, load_params
from pipeline.planning.need import Need
from pipeline.planning.workload import Workload
from pipeline.runtime.arguments import Parser
from pipeline.runtime.errors import run_main
from pipeline.runtime.params import ParamsError
from pipeline.runtime.progress import return_freed_memory, run_stage, select_device
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.runtime.unfinished import open_work_folder
from stages.launcher import join_ranks, start_ranks

PARAMS = Path("params.yaml")
METRICS = Path("metrics")
COSTS = METRICS / "runtime"  # seconds and memory, which are not in git


@dataclass(frozen=True)
class Run:
    """One run of a stage.

    Attributes:
        params: all of params.yaml.
        device: device of this process.
        variant: name of a stage that has several; "" otherwise.
        ranks: this process among those that share the work; the first one writes.
        metrics: the content of the metrics file.
    """

    params: Params
    device: torch.device
    variant: str = ""
    ranks: Ranks = ALONE
    metrics: dict[str, Any] = field(default_factory=dict)

    def runner(self, checkpoint: Checkpoint) -> BlockRunner:
        """Runs a checkpoint's blocks on this device."""
        return BlockRunner(checkpoint, self.device, self.params.runtime.batch_size)

    def workload(self, *token_ids: torch.Tensor) -> Workload:
        """Return the part of several texts in windows [N, T] that this process gets."""
        length = max(windows.shape[1] for windows in token_ids)
        counts = [len(windows) for windows in token_ids]
        return Workload.of(counts, length, self.params.runtime, self.device.type == "cuda")


def open_stage(
    name: str,
    main: Callable[[Run], None],
    description: str | None,
    plan: Callable[[Run], Need] | None = None,
    variants: Collection[str] | Callable[[Params], Collection[str]] = (),
    shared: bool = False,
    work: Path | None = None,
) -> None:
    """Run a stage as its command line says; see the module's docstring.

    Args:
        name: name of the stage; its metrics go to metrics/NAME.json, or metrics/NAME/VARIANT.json, and its
            cost to the same place in metrics/runtime/.
        variants: its variants, or a function that finds them in params.yaml. The command line then names one.
        shared: whether `runtime.processes` of them share the work.
        work: folder of unfinished work, where a killed run continues.
    """
    run_main(lambda: _open_stage(name, main, description, plan, variants, shared, work))


def _open_stage(
    name: str,
    main: Callable[[Run], None],
    description: str | None,
    plan: Callable[[Run], Need] | None,
    variants: Collection[str] | Callable[[Params], Collection[str]],
    shared: bool,
    work: Path | None,
) -> None:
    parser = Parser(description=description)
    if variants:
        parser.add_argument("variant", choices=None if callable(variants) else variants)
    if plan is not None:
        parser.add_argument("--plan", action="store_true", help="say what the run will need, and stop")
    arguments = parser.parse_args()
    variant = getattr(arguments, "variant", "")
    params = load_params(PARAMS)
    if callable(variants) and variant not in variants(params):
        raise ParamsError(f"{variant!r} is not under `{name}:` in {PARAMS}. Use one of {', '.join(variants(params))}.")
    if plan is not None and arguments.plan:
        print(plan(Run(params, select_device(params.runtime), variant)).describe())
        return
    if shared and start_ranks(params.runtime.processes):
        return
    return_freed_memory()
    title, file = (f"{name}@{variant}", f"{name}/{variant}.json") if variant else (name, f"{name}.json")
    with (
        join_ranks(params.runtime) as (ranks, device),
        run_stage(title, METRICS / file, COSTS / file, params.runtime) as metrics,
        nullcontext() if work is None else open_work_folder(work, ranks),
    ):
        main(Run(params, device, variant, ranks, metrics))
