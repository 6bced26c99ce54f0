"""Say whether a model can be quantized, and with how much memory, without loading its weights.

    prefixquant explain SOURCE

SOURCE is a folder, a GGUF file, a hub id or `packaged:smollm2-135m`. The answer is one sentence on whether the model is
supported, and if not, why not: which feature, in which layers. Then follow the format of the weights, the parts that an
import would drop and, where params.yaml is in the current folder (or named by --params), the memory and disk that its
stages would need. Exit code 0: supported. 1: not.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from pipeline.models.architectures import find_architecture, find_max_positions
from pipeline.models.checkpoint import Checkpoint, CheckpointWriter
from pipeline.params import Params, load_params
from pipeline.planning.duration import StageTokens, measure_token, plan_seconds
from pipeline.planning.evaluation import plan_evaluation
from pipeline.planning.explain import explain_source
from pipeline.planning.finetuning import plan_finetuning
from pipeline.planning.need import Need
from pipeline.planning.prefix_search import plan_prefix_search
from pipeline.planning.prefix_training import plan_prefix_training
from pipeline.planning.quantizer_init import plan_quantizer_init
from pipeline.planning.rotation import plan_rotation
from pipeline.planning.sizes import Sizes
from pipeline.planning.workload import Workload
from pipeline.runtime.arguments import Parser
from pipeline.runtime.errors import PipelineError, run_main
from pipeline.runtime.memory import gpu_limit, memory_limit
from pipeline.runtime.progress import select_device
from pipeline.text.lengths import choose_length, count_windows

_PARAMS = Path("params.yaml")


def describe_needs(config: PreTrainedConfig, params: Params) -> list[str]:
    """Return a line for each stage of params.yaml, with the memory and disk that it would need."""
    lines = []
    for stage, plan in plan_stages(config, params).items():
        misfit = f"params.yaml does not fit this model ({plan})"
        lines.append(f"{stage:16} {plan.describe().splitlines()[0] if isinstance(plan, Need) else misfit}")
    return ["", "Plan by params.yaml, before the stages ran:", *lines]


@contextmanager
def planned_checkpoint(config: PreTrainedConfig, params: Params) -> Iterator[Checkpoint]:
    """Yield the imported model's checkpoint, without weights, in a temporary folder.

    Args:
        config: config of the imported model, see `Explanation`.
    """
    with tempfile.TemporaryDirectory() as folder:
        values = config.to_dict() | {"dtype": params.model.dtype}
        values.pop("quantization_config", None)
        writer = CheckpointWriter(Path(folder), find_architecture(config), stage="model")
        writer.finish(json.loads(json.dumps(values)), settings={})
        yield Checkpoint(Path(folder), "model")


def plan_stages(config: PreTrainedConfig, params: Params) -> dict[str, Need | PipelineError]:
    """Return the need of each stage, or the error that says why the settings do not fit the model."""
    with planned_checkpoint(config, params) as checkpoint:
        needs: dict[str, Need | PipelineError] = {}
        for stage, plan in _list_plans(checkpoint, params).items():
            try:
                needs[stage] = plan()
            except PipelineError as error:
                needs[stage] = error
        return needs


def plan_times(config: PreTrainedConfig, params: Params) -> dict[str, float]:
    """Return stage -> the seconds that it will take on this machine, from a forward pass that takes about a second.

    Where a block does not fit into half of the memory, nothing is measured, and the result is empty.
    """
    with planned_checkpoint(config, params) as checkpoint:
        sizes, device = Sizes.of(checkpoint), select_device(params.runtime)
        limit = gpu_limit(params.runtime) if device.type == "cuda" else memory_limit(params.runtime)
        if sizes.block > limit / 2:
            return {}
        if params.runtime.threads is not None:
            torch.set_num_threads(params.runtime.threads)
        return plan_seconds(sizes, _count_tokens(checkpoint, params), measure_token(checkpoint, device))


def _count_tokens(checkpoint: Checkpoint, params: Params) -> StageTokens:
    calibration, training = params.calibration, params.finetuning
    end_to_end = "train" if calibration.end_to_end is None else "end_to_end"
    tokens = {
        name: _make_workload(checkpoint, params, name, on_gpu=False).all_tokens
        for name in ("search", "train", end_to_end, "validation", "evaluation")
    }
    search = calibration.search.windows or 1
    return StageTokens(
        search=tokens["search"],
        train=tokens["train"],
        end_to_end=tokens[end_to_end],
        validation=tokens["validation"],
        evaluation=tokens["evaluation"] * len(calibration.evaluation.corpora),
        pictures=tokens["search"] * min(params.activation_plots.windows, search) // search,
        block_epochs=training.blocks.epochs if training.blocks.enabled else 0,
        end_to_end_epochs=training.end_to_end.epochs if training.end_to_end.enabled else 0,
        benefit=params.prefix_search.choose == "benefit",
        task_items=sum(task.limit or 0 for task in params.evaluation.tasks.values()),
    )


def _make_workload(checkpoint: Checkpoint, params: Params, *names: str, on_gpu: bool) -> Workload:
    """Return the workload of splits of `calibration`; those that are left out in params.yaml do not count."""
    calibration = params.calibration
    widest, room = checkpoint.widest_window, find_max_positions(checkpoint.config)
    splits = {name: split for name in names if (split := getattr(calibration, name)) is not None}
    lengths = {name: choose_length(name, split, window=widest, room=room) for name, split in splits.items()}
    counts = [count_windows(name, split, split.windows or 1, lengths[name]) for name, split in splits.items()]
    return Workload.of(counts, max(lengths.values()), params.runtime, on_gpu)


def _list_plans(checkpoint: Checkpoint, params: Params) -> dict[str, Callable[[], Need]]:
    calibration, runtime = params.calibration, params.runtime
    on_gpu = runtime.device != "cpu" and torch.cuda.is_available()

    def load(*names: str) -> Workload:
        return _make_workload(checkpoint, params, *names, on_gpu=on_gpu)

    plans: dict[str, Callable[[], Need]] = {
        "rotation": lambda: plan_rotation(checkpoint, params.rotation, on_gpu),
        "prefix_search": lambda: plan_prefix_search(checkpoint, load("search"), params.prefix_search),
        "quantizer_init": lambda: plan_quantizer_init(checkpoint, load("train"), params.quantizer_init),
        "finetuning": lambda: plan_finetuning(
            checkpoint,
            blocks=load("train", "validation"),
            end_to_end=load("train" if calibration.end_to_end is None else "end_to_end", "validation"),
            params=params.finetuning,
            quantizer_init=params.quantizer_init,
            runtime=runtime,
        ),
        "evaluation": lambda: plan_evaluation(
            checkpoint, load("evaluation"), compared=False, in_memory=False, task_items=0
        ),
    }
    if params.prefix_training.enabled:
        plans["prefix_training"] = lambda: plan_prefix_training(
            checkpoint, load("train", "validation"), params.prefix_training, runtime
        )
    return plans


def main() -> None:
    """Run the command line; see the module's docstring."""
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="SOURCE", help="a folder, a GGUF file or a hub id")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--params", type=Path, help="the params.yaml of the plan (default: that of the current folder)")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    explanation = explain_source(arguments.source, arguments.revision)
    print("\n".join(explanation.lines))
    path = arguments.params or (_PARAMS if _PARAMS.is_file() else None)
    if explanation.config is not None and path is not None:
        print("\n".join(describe_needs(explanation.config, load_params(path))))
    sys.exit(0 if explanation.supported else 1)


if __name__ == "__main__":
    run_main(main)
