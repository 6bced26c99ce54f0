"""The cost of choosing ranges and the error that it leaves, by the criterion of the search, on a few blocks in one run.

    python -m benchmarks.quality.search                      # packaged model, 16 x 512 calibration tokens, 3 blocks
    python -m benchmarks.quality.search --json search.json   # keeps the rows

All rows are W4A4KV4 static with weights rounded to nearest, so that they differ by ranges alone. `cost` is the time to
choose all quantizers of a block, as a multiple of a plain forward of the block over all calibration windows, measured
just before. `error` is the error of the block's output on the sampled windows, relative to the block's change of its
input. `block` is the official method: the block runs for every factor of every site.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.workspace import Workspace, make_parser, override, read_params
from pipeline.blocks.quantized import fill_block, load_block
from pipeline.blocks.walk import BlockRunner
from pipeline.models.checkpoint import Checkpoint
from pipeline.params import parse_params
from pipeline.pictures.tables import format_markdown
from pipeline.prefix.candidates import load_prefix
from pipeline.quantization.block_init import choose_quantizers_, measure_block_error
from pipeline.quantization.equalization import Equalizer, scale_prefix
from pipeline.quantization.params import QuantizerInitParams
from pipeline.quantization.quantizer_init import measure_channels, resolve_settings
from pipeline.quantization.statistics import record_block
from pipeline.rotation.matrices import compute_rotated_prefix_kv, load_rotation
from pipeline.runtime.artifacts import make_header, write_json
from pipeline.runtime.errors import run_main
from pipeline.runtime.ranks import ALONE
from pipeline.text.windows import load_windows

BLOCKS = (2, 11, 28)
RANGES = ("max", "tensor", "layer", "block")
GROUPS = ("weights", "activations", "keys", "values")


def main() -> None:
    arguments = make_parser(__doc__, RANGES).parse_args()
    workspace, base = Workspace(arguments.work), read_params()
    rotation = Checkpoint(workspace.run("rotation", base) / "artifacts/rotation", "rotation")
    prefixes = workspace.run("prefix_training", base) / "artifacts/prefix_training/prefix.safetensors"
    train = workspace.run("calibration", base) / "artifacts/calibration/train.safetensors"
    runner = BlockRunner(rotation, torch.device("cpu"), base["runtime"]["batch_size"])
    embeddings = load_prefix(prefixes, "found").embeddings
    prefix_kv = compute_rotated_prefix_kv(rotation, embeddings, runner)
    hidden = rotation.embed(load_windows(train).token_ids)
    with tempfile.TemporaryDirectory() as folder:
        channels = measure_channels(
            rotation,
            hidden,
            prefix_kv,
            params=parse_params(base).quantizer_init,
            runner=runner,
            work_folder=Path(folder),
            header=make_header("quantizer_init", {}),
            ranks=ALONE,
        )
    rows: dict[str, Any] = {name: {"cost": [], "error": []} for name in arguments.rows}
    for index in range(max(BLOCKS) + 1):
        if index in BLOCKS:
            for name, row in rows.items():
                changes = {f"quantizer_init.{group}.range": name for group in GROUPS}
                changes["quantizer_init.weights.rounding"] = "rtn"
                init = parse_params(override(base, changes)).quantizer_init
                cost, error = measure(
                    rotation,
                    index,
                    hidden=hidden,
                    prefix_kv=prefix_kv[index],
                    channels=channels[index],
                    init=init,
                    runner=runner,
                )
                row["cost"].append(cost)
                row["error"].append(error)
        runner.advance_(load_block(rotation, index), hidden, prefix_kv[index])
    if arguments.json is not None:
        write_json(arguments.json, rows)
    head = ["range", *(f"block {index}: {figure}" for index in BLOCKS for figure in ("cost", "error"))]
    lines = []
    for name, row in rows.items():
        pairs = zip(row["cost"], row["error"], strict=True)
        lines.append([name, *(cell for cost, error in pairs for cell in (f"{cost:.2f}", f"{error:.4f}"))])
    print(format_markdown(head, lines))


@torch.no_grad()
def measure(
    rotation: Checkpoint,
    index: int,
    *,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor,
    channels: dict[str, torch.Tensor],
    init: QuantizerInitParams,
    runner: BlockRunner,
) -> tuple[float, float]:
    """Return (cost, error) of choosing the quantizers of one block; see the module's docstring.

    Args:
        rotation: the rotated model.
        index: index of the block.
        hidden: inputs of the block, [N, T, D].
        prefix_kv: keys and values of the prefix in this block.
        channels: measured channels of this block (`measure_channels`).
        init: settings, among them the criterion.
        runner: runs the block.
    """
    plain, copy = load_block(rotation, index), hidden.clone()
    start = time.perf_counter()
    runner.advance_(plain, copy, prefix_kv)
    forward = time.perf_counter() - start
    settings, site_settings = resolve_settings(init, rotation, index)
    block = fill_block(rotation, index, rotation.load_block_tensors(index), settings)
    r2 = load_rotation(rotation.folder, "r2")
    equalizer = Equalizer(block, rotation.architecture, settings, r2, tuple(init.equalize))
    scales = equalizer.choose(channels, runner)
    equalizer.scale_(scales)
    prefix_kv = scale_prefix(prefix_kv, scales, r2)
    statistics = record_block(
        block, rotation.architecture, hidden, prefix_kv, runner=runner, mse_samples=init.mse_samples
    )
    start = time.perf_counter()
    choose_quantizers_(
        block,
        rotation.architecture,
        statistics,
        prefix_kv=prefix_kv,
        site_settings=site_settings,
        runner=runner,
    )
    seconds = time.perf_counter() - start
    return seconds / forward, measure_block_error(block, statistics, prefix_kv, runner) / statistics.energy


if __name__ == "__main__":
    run_main(main)
