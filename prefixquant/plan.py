"""Say how much time, memory and disk quantizing a model would need, stage by stage, without loading its weights.

    prefixquant plan MODEL
    prefixquant plan MODEL --recipe w4a8kv4 --text my.txt --set calibration.train.windows=64

It takes the arguments of `prefixquant quantize`. Time is estimated from a forward pass of one block with random
weights, measured on this machine. Nothing is written. Exit code 0: every stage fits the model. 1: the model is not
supported, or a setting does not fit it.
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prefixquant.project import Request, choose_params
from prefixquant.quantize_command import make_parser, read_request

if TYPE_CHECKING:
    from pipeline.planning.need import Need
    from pipeline.runtime.errors import PipelineError


def main() -> None:
    """Run `prefixquant plan`."""
    fits, text = plan_request(read_request(make_parser(__doc__, out=Path("quantized")).parse_args()))
    print(text)
    sys.exit(0 if fits else 1)


def plan_request(request: Request) -> tuple[bool, str]:
    """Return whether every stage fits the model, and a text with a row for each stage.

    Raises:
        PipelineError: a choice cannot be read, or the model or a text is missing.
    """
    import yaml

    from pipeline.explain import plan_stages, plan_times
    from pipeline.params import parse_params
    from pipeline.planning.explain import explain_source
    from pipeline.runtime.memory import GIB, memory_limit

    params = parse_params(yaml.safe_load(choose_params(request)))
    explanation = explain_source(params.model.source, params.model.revision)
    if not explanation.supported or explanation.config is None:
        return False, "\n".join(explanation.lines)
    plans = plan_stages(explanation.config, params)
    times = plan_times(explanation.config, params)
    work = request.work_folder
    place = next(folder for folder in (work, *work.parents) if folder.is_dir())
    limits = (
        f"This machine allows {memory_limit(params.runtime) / GIB:.2f} GiB of memory; {place} has "
        f"{shutil.disk_usage(place).free / GIB:.2f} GiB free."
    )
    fits = not any(isinstance(plan, Exception) for plan in plans.values())
    return fits, "\n".join([explanation.lines[0], "", *format_table(plans, times), "", limits])


def format_table(plans: "dict[str, Need | PipelineError]", times: Mapping[str, float]) -> list[str]:
    """Return the lines of a table with a row for each stage and one for the whole run.

    Stages run one after the other. So the run needs the memory of the largest stage, all artifacts, and the work files
    of one stage.

    Args:
        times: stage -> seconds, with those of stages that have no plan of memory; empty where none were measured.
    """
    from pipeline.planning.need import Need
    from pipeline.runtime.memory import GIB
    from pipeline.runtime.pace import format_duration

    needs = {stage: plan for stage, plan in plans.items() if isinstance(plan, Need)}
    rows = {stage: (need.memory, need.gpu, need.artifact, need.work_files) for stage, need in needs.items()}
    seconds = dict(times)
    if needs:
        memory, gpu, artifacts, work_files = zip(*rows.values(), strict=True)
        rows["all"] = (max(memory), max(gpu), sum(artifacts), max(work_files))
        seconds |= {"all": sum(times.values())} if times else {}
    width = max(len(stage) for stage in (*plans, "all"))
    titles = ("time", "memory", "GPU", "artifact", "work files")
    lines = [f"{'stage':{width}}" + "".join(f"  {title:>10}" for title in titles) + "   (h:mm:ss, GiB)"]
    for stage in (*plans, *(["all"] if needs else [])):
        if stage in rows:
            duration = format_duration(seconds[stage]) if stage in seconds else "-"
            lines.append(f"{stage:{width}}  {duration:>10}" + "".join(f"  {size / GIB:10.2f}" for size in rows[stage]))
        else:
            lines.append(f"{stage:{width}}  the settings do not fit this model ({plans[stage]})")
    return [
        *lines,
        "",
        "Time is right within a factor of two. `all` counts pictures too, and tasks with a limit. Artifacts stay; work",
        "files are removed at the end of their stage. The imported model, at most as large as the artifact of",
        "rotation, the export, reports and plots are not counted.",
    ]
