"""The cost of fine-tuning a block, against a plain forward and backward of the same block on the same windows.

    python -m benchmarks.speed.finetuning                        # packaged model, 16 x 512 tokens, one epoch
    python -m benchmarks.speed.finetuning --json finetuning.json

The first table has the seconds of one epoch of one block, and their ratio to a plain epoch. The epoch rounds weights,
runs quantizers, loss and AdamW. The plain one trains all weights of the rotated block in full precision with the mean
squared error, without an optimizer. Both take turns in one process; figures are medians. The second table has the peak
memory of the first phase, with streams in memory and in files, and the value of `--plan`.
"""

import statistics
import time
from typing import Any

import torch
from torch import nn

from benchmarks.workspace import Workspace, append_row, make_parser, override, read_params, read_rows
from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.blocks.quantized import load_block
from pipeline.blocks.walk import BlockRunner, batches
from pipeline.models.checkpoint import Checkpoint
from pipeline.params import parse_params
from pipeline.runtime.errors import run_main
from pipeline.runtime.ranks import Ranks, shuffle
from pipeline.text.windows import load_windows
from pipeline.training.block_wise import BlockData, BlockTrainer
from pipeline.training.trainables import unfreeze_

ROWS = ("epoch", "never", "always")
BLOCK = 15
ROUNDS = 5


def main() -> None:
    arguments = make_parser(__doc__, ROWS).parse_args()
    rows = read_rows(arguments.json)
    workspace = Workspace(arguments.work)
    params = override(read_params(), {"finetuning.blocks.enabled": True, "finetuning.blocks.epochs": 1})
    for name in arguments.rows:
        if name in rows:
            continue
        measured = measure_epoch(workspace, params) if name == "epoch" else measure_memory(workspace, params, name)
        append_row(arguments.json, rows, name, measured)
    print(format_tables(rows))


def measure_epoch(workspace: Workspace, values: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of an epoch of block `BLOCK`: "trained", and "plain" for a plain forward and backward."""
    params = parse_params(values).finetuning
    folders = {stage: workspace.run(stage, values) for stage in ("calibration", "rotation", "quantizer_init")}
    rotated = Checkpoint(folders["rotation"] / "artifacts/rotation", "rotation")
    initial = Checkpoint(folders["quantizer_init"] / "artifacts/quantizer_init", "quantizer_init")
    windows = load_windows(folders["calibration"] / "artifacts/calibration/train.safetensors").token_ids
    runner = BlockRunner(rotated, torch.device("cpu"), params.blocks.batch_size)
    prefix_kv = load_prefix_kv(initial.folder, initial.stage)[BLOCK]
    inputs = rotated.embed(windows)
    plain = load_block(rotated, BLOCK)
    target = torch.empty_like(inputs)
    runner.advance_(plain, inputs, prefix_kv, into=target)
    block = load_block(initial, BLOCK)
    weights = {name: block.get_submodule(name).dense_weight(torch.float32) for name in initial.architecture.linears}
    trainables = unfreeze_(block, initial.architecture, weights=weights)
    trainer = BlockTrainer(block, trainables, prefix_kv=prefix_kv, runner=runner, params=params, ranks=Ranks())
    data = BlockData(inputs, [target], len(inputs))
    parameters = [_make_parameter(plain.get_submodule(name)) for name in initial.architecture.linears]
    order = shuffle(len(inputs), torch.Generator().manual_seed(0))

    def run_trainer() -> None:
        for rows in batches(len(inputs), params.blocks.batch_size):
            trainer.step(data, order[rows], 0, 1)

    def run_plain() -> None:
        for rows in batches(len(inputs), params.blocks.batch_size):
            output = runner.run(plain, inputs[order[rows]], prefix_kv)
            nn.functional.mse_loss(output, target[order[rows]]).backward()
            for parameter in parameters:
                parameter.grad = None

    seconds: dict[str, list[float]] = {"trained": [], "plain": []}
    for _ in range(ROUNDS):
        for name, epoch in (("trained", run_trainer), ("plain", run_plain)):
            start = time.perf_counter()
            epoch()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_memory(workspace: Workspace, values: dict[str, Any], offload: str) -> dict[str, float]:
    """Return the stage's peak memory in GiB, measured and planned."""
    changes = {"runtime.offload": offload, "finetuning.seed": 1 if offload == "always" else 0}
    changed = override(values, changes | {"finetuning.end_to_end.enabled": False})
    peak = workspace.metrics("finetuning", changed)["peak_rss_gib"]
    return {"peak": peak, "planned": workspace.plan("finetuning", changed)}


def _make_parameter(linear: nn.Module) -> nn.Parameter:
    value = linear.weight
    del linear._buffers["weight"]
    linear.weight = nn.Parameter(value.clone())
    return linear.weight


def format_tables(rows: dict[str, Any]) -> str:
    """Return the Markdown tables of the rows."""
    lines = []
    if "epoch" in rows:
        trained, plain = rows["epoch"]["trained"], rows["epoch"]["plain"]
        lines += [
            "| | seconds | ratio |",
            "| --- | ---: | ---: |",
            f"| plain forward and backward | {plain:.2f} | 1.00 |",
        ]
        lines += [f"| an epoch of fine-tuning | {trained:.2f} | {trained / plain:.2f} |", ""]
    memory = {name: rows[name] for name in ("never", "always") if name in rows}
    if memory:
        lines += ["| runtime.offload | peak, GiB | planned, GiB |", "| --- | ---: | ---: |"]
        lines += [f"| {name} | {row['peak']:.2f} | {row['planned']:.2f} |" for name, row in memory.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
