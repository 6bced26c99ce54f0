"""Perplexity of quantized variants against full precision, in one table.

    python -m benchmarks.quality --size screening                  # 16 x 512 calibration tokens, 4 + 4 windows
    python -m benchmarks.quality --size final --json quality.json  # 64 x 512, 8 + 8 windows of 1,024
    python -m benchmarks.quality --table ablations                 # one choice of the default changed at a time
    python -m benchmarks.quality --table finetuning                # the gain of training, and of its parts

Each row is params.yaml with a few keys changed. Finished rows are kept in --json and skipped later. The table of
fine-tuning also pairs each row with another one, window by window: the mean difference of the loss in nats per token,
and its standard error.
"""

from pathlib import Path
from typing import Any

import torch

from benchmarks.workspace import Workspace, append_row, override, read_params, read_rows
from pipeline.pictures.tables import format_markdown, list_result_columns, mean_and_error
from pipeline.runtime.arguments import Parser
from pipeline.runtime.artifacts import load_tensors

SIZES = {
    "screening": {
        "calibration.train.windows": 16,
        "calibration.evaluation.windows": 4,
        "evaluation.tasks": {},
    },
    "final": {
        "evaluation.tasks": {},
        "calibration.search.windows": 64,
        "calibration.search.length": 512,
        "calibration.train.windows": 64,
        "calibration.train.length": 512,
        "calibration.evaluation.windows": 8,
    },
}


def _bits(weights: int, activations: int, kv: int) -> dict[str, Any]:
    return {
        "quantizer_init.weights.bits": weights,
        "quantizer_init.activations.bits": activations,
        "quantizer_init.keys.bits": kv,
        "quantizer_init.values.bits": kv,
    }


GROUPS = ("weights", "activations", "keys", "values")
PREFIX_FREE = {"prefix.use": "none"}
# The method of the paper: no centered quantizers, no equalized channels.
TEXTBOOK = {f"quantizer_init.{group}.centered": False for group in GROUPS} | {"quantizer_init.equalize": []}
NEAREST = {"quantizer_init.weights.rounding": "rtn"}
DYNAMIC = {f"quantizer_init.{group}.mode": "dynamic" for group in GROUPS[1:]}
ROWS: dict[str, dict[str, Any]] = {
    "W4A4KV4 static": {},
    "W4A4KV4 static, no prefix": PREFIX_FREE,
    "W4A4KV4 dynamic": DYNAMIC,
    "W4A4KV4 dynamic, no prefix": DYNAMIC | PREFIX_FREE,
    "W4A8KV4 static": _bits(4, 8, 4),
    "W4A8KV4 static, no prefix": _bits(4, 8, 4) | PREFIX_FREE,
    "W4 only": _bits(4, 16, 16),
    "A4 static only": _bits(16, 4, 16),
    "A4 static only, no prefix": _bits(16, 4, 16) | PREFIX_FREE,
    "KV4 static only": _bits(16, 16, 4),
}


def _each(key: str, value: Any, *groups: str) -> dict[str, Any]:
    return {f"quantizer_init.{group}.{key}": value for group in groups}


# One choice of the default changed at a time.
ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "nothing centered": _each("centered", False, *GROUPS),
    "weights not centered": _each("centered", False, "weights"),
    "activations not centered": _each("centered", False, "activations"),
    "keys and values not centered": _each("centered", False, "keys", "values"),
    "without R5": {"rotation.r5": "identity"},
    "not equalized": {"quantizer_init.equalize": []},
    "neither centered nor equalized": TEXTBOOK,
    "weights: rtn": NEAREST,
    "weights: damping 0.01": _each("damping", 0.01, "weights"),
    "weights: damping 0.3": _each("damping", 0.3, "weights"),
    "weights: asymmetric": _each("symmetric", False, "weights"),
    "weights: range max": _each("range", "max", "weights"),
    "weights: range layer": _each("range", "layer", "weights"),
    "activations: asymmetric": _each("symmetric", False, "activations"),
    "activations: range max": _each("range", "max", "activations"),
    "activations: range percentile": _each("range", "percentile", "activations"),
    "activations: range tensor": _each("range", "tensor", "activations"),
    "activations: range block": _each("range", "block", "activations"),
    "keys: range tensor": _each("range", "tensor", "keys"),
    "keys and values: asymmetric": _each("symmetric", False, "keys", "values"),
    "values: range layer": _each("range", "layer", "values"),
    "mse_samples 8": {"quantizer_init.mse_samples": 8},
    "prefix: outlier_threshold 16": {"prefix_search.choose": "threshold", "prefix_search.outlier_threshold": 16.0},
    "official: rtn, range block, neither centered nor equalized": TEXTBOOK | NEAREST | _each("range", "block", *GROUPS),
}


def _blocks(start: str = "quantizer_init", **changes: Any) -> dict[str, Any]:
    """Return the params of the first phase of fine-tuning alone, of one epoch."""
    values = {"enabled": True, "epochs": 1} | changes
    return {"finetuning.end_to_end.enabled": False, "finetuning.start": start} | {
        f"finetuning.blocks.{key}": value for key, value in values.items()
    }


def _end_to_end(**changes: Any) -> dict[str, Any]:
    """Return the params of the second phase alone."""
    return {"finetuning.end_to_end.enabled": True, "finetuning.blocks.enabled": False} | {
        f"finetuning.end_to_end.{key}": value for key, value in changes.items()
    }


UNTRAINED = "not trained"
WEIGHTS = {"start": "full_precision", "weight_lr": 3e-4, "epochs": 3}
FINETUNING: dict[str, dict[str, Any]] = {
    UNTRAINED: _blocks(enabled=False),
    "blocks": _blocks(),
    "blocks, 3 epochs": _blocks(epochs=3),
    "blocks, quant_lr 1e-3": _blocks(quant_lr=1e-3),
    "blocks, quant_lr 3e-2": _blocks(quant_lr=3e-2),
    "blocks, target quant_input": _blocks(target="quant_input"),
    "blocks, target fp_input": _blocks(target="fp_input"),
    "blocks, loss normalized_mse": _blocks(loss_type="normalized_mse"),
    "blocks, loss cosine": _blocks(loss_type="cosine"),
    "blocks, loss clamp_mse": _blocks(loss_type="clamp_mse"),
    "blocks, loss skip_mse": _blocks(loss_type="skip_mse"),
    "blocks, weights too, from full precision": _blocks(**WEIGHTS),
    "blocks, weights too, from GPTQ": _blocks(**WEIGHTS | {"start": "quantizer_init"}),
    "end to end": _end_to_end(),
    "blocks and end to end": _end_to_end() | {"finetuning.blocks.enabled": True, "finetuning.blocks.epochs": 1},
    "end to end, quantizers only": _end_to_end(norm_lr=0.0, prefix_lr=0.0),
    "end to end, without norms": _end_to_end(norm_lr=0.0),
    "end to end, without the prefix": _end_to_end(prefix_lr=0.0),
    "end to end, rates of a third": _end_to_end(quant_lr=1e-3, norm_lr=1e-3, prefix_lr=3e-3),
    "end to end, 3 epochs": _end_to_end(epochs=3),
    "end to end, on 64 windows": _end_to_end() | {"calibration.end_to_end.windows": 64},
    "end to end, 3 epochs on train": _end_to_end(epochs=3) | {"calibration.end_to_end": None},
}
TABLES = {"modes": ROWS, "ablations": ABLATIONS, "finetuning": FINETUNING}


def main() -> None:
    parser = Parser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument(
        "--table", choices=TABLES, default="modes", help="bits and modes, choices of the default, or training"
    )
    parser.add_argument("--size", choices=SIZES, default="screening")
    parser.add_argument("--rows", nargs="*", help="names of rows (default: all)")
    parser.add_argument("--json", type=Path, help="keep finished rows in this file")
    parser.add_argument("--work", type=Path, default=Path(".work/benchmarks"), help="where stages run")
    arguments = parser.parse_args()
    table = TABLES[arguments.table]
    names = arguments.rows or list(table)
    unknown = set(names) - set(table)
    if unknown:
        parser.error(f"unknown rows {sorted(unknown)}. There are: {', '.join(table)}")
    workspace = Workspace(arguments.work)
    base = override(read_params(), SIZES[arguments.size])
    rows = read_rows(arguments.json)
    for variant in ("original", "original_prefix"):
        if variant not in rows:
            append_row(arguments.json, rows, variant, workspace.metrics(f"evaluation@{variant}", base))
    for name in names:
        if name not in rows:
            params = override(base, table[name])
            if arguments.table == "finetuning":
                measured = measure_finetuning(workspace, name, params)
            else:
                measured = workspace.metrics("evaluation@quantizer_init", params)
                measured["block_error"] = workspace.metrics("quantizer_init", params)["block_error"]
            append_row(arguments.json, rows, name, measured)
    print(format_table(rows))


def measure_finetuning(workspace: Workspace, name: str, params: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of a row of the table of fine-tuning, and the loss of every window."""
    variant = "quantizer_init" if name == UNTRAINED else "finetuning"
    measured = workspace.metrics(f"evaluation@{variant}", params)
    folder = workspace.run(f"evaluation@{variant}", params)
    tensors, _ = load_tensors(folder / f"artifacts/evaluation/{variant}.safetensors", "evaluation")
    measured["losses"] = {corpus: tensors[f"loss.{corpus}"].tolist() for corpus in measured["perplexity"]}
    return measured


def pair_losses(losses: list[float], paired: list[float]) -> str:
    """Return the mean difference of two rows' losses on the same windows ± its standard error."""
    mean, error = mean_and_error(torch.tensor(losses) - torch.tensor(paired))
    return f"{mean:+.3f} ± {error:.3f}"


def format_table(rows: dict[str, Any]) -> str:
    """Return a Markdown table: perplexity per corpus, its ratio to the original's, accuracies, errors of blocks.

    Columns are left out if no row has them. `block error` is the mean over blocks of the error of the block's output on
    the sampled calibration windows, relative to the block's change of its input. Rows with losses by window are paired
    with "not trained", those that train end to end after the blocks with "blocks".
    """
    corpora = list(rows["original"]["perplexity"])
    head, cells = list_result_columns(rows)
    if any("block_error" in metrics for metrics in rows.values()):
        head.append("block error")
        for name, metrics in rows.items():
            cells[name].append(f"{metrics['block_error']:.4f}" if "block_error" in metrics else "")
    if any("losses" in metrics for metrics in rows.values()):
        head += ["paired with", *(f"less paired row, {corpus}" for corpus in corpora)]
        for name in rows:
            cells[name] += _pair(name, rows, corpora)
    return format_markdown(["", *head], [[name, *row] for name, row in cells.items()])


def _pair(name: str, rows: dict[str, Any], corpora: list[str]) -> list[str]:
    """Return the cells that compare a row with its partner: the partner's name, and a difference per corpus."""
    partners = {"blocks and": "blocks", "end to end,": "end to end"}
    partner = next((partner for start, partner in partners.items() if name.startswith(start)), UNTRAINED)
    if "losses" not in rows[name] or partner not in rows or partner == name:
        return [""] * (1 + len(corpora))
    losses, paired = rows[name]["losses"], rows[partner]["losses"]
    return [partner, *(pair_losses(losses[corpus], paired[corpus]) for corpus in corpora)]
