"""Perplexity of quantized variants against full precision, in one table.

    python -m benchmarks.quality --size screening                  # 16 x 512 calibration tokens, 4 + 4 windows
    python -m benchmarks.quality --size final --json quality.json  # 64 x 512, 8 + 8 windows of 1,024

Rows are params.yaml with a few keys changed; a finished row is kept in --json and skipped when restarted.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.workspace import Workspace, append_row, override, read_params

SIZES = {
    "screening": {"calibration.train.windows": 16, "calibration.evaluation.windows": 4},
    "final": {
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


MINMAX = {"quantizer_init.scale_search": "minmax"}
NEAREST = {"quantizer_init.weights.rounding": "rtn"}
NO_PREFIX = {"prefix.use": "none"}
ROWS: dict[str, dict[str, Any]] = {
    "W4A4KV4 rtn, minmax, no prefix": _bits(4, 4, 4) | NEAREST | MINMAX | NO_PREFIX,
    "W4A4KV4 rtn, minmax, found prefix": _bits(4, 4, 4) | NEAREST | MINMAX,
    "W4A4KV4 rtn, mse, found prefix": _bits(4, 4, 4) | NEAREST,
    "W4A4KV4 gptq, mse, no prefix": _bits(4, 4, 4) | NO_PREFIX,
    "W4A4KV4 gptq, mse, found prefix": _bits(4, 4, 4),
    "W4A8KV4 gptq, mse, found prefix": _bits(4, 8, 4),
    "W4 gptq, mse": _bits(4, 16, 16),
    "A4 mse, found prefix": _bits(16, 4, 16),
    "KV4 mse, found prefix": _bits(16, 16, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="screening")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="names of rows (default: all)")
    parser.add_argument("--json", type=Path, help="keep finished rows in this file")
    parser.add_argument("--work", type=Path, default=Path(".work/benchmarks"), help="where stages run")
    arguments = parser.parse_args()
    unknown = set(arguments.rows) - set(ROWS)
    if unknown:
        parser.error(f"unknown rows {sorted(unknown)}; there are: {', '.join(ROWS)}")
    workspace = Workspace(arguments.work)
    base = override(read_params(), SIZES[arguments.size])
    rows = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.is_file() else {}
    for variant in ("original", "original_prefix"):
        if variant not in rows:
            append_row(arguments.json, rows, variant, workspace.metrics(f"evaluation@{variant}", base))
    for name in arguments.rows:
        if name not in rows:
            params = override(base, ROWS[name])
            append_row(arguments.json, rows, name, workspace.metrics("evaluation@quantizer_init", params))
    print(format_table(rows))


def format_table(rows: dict[str, Any]) -> str:
    """A Markdown table: perplexity per corpus and its ratio to the original's."""
    exact = rows["original"]["perplexity"]
    corpora = list(exact)
    lines = ["| | " + " | ".join(f"{corpus} | ratio" for corpus in corpora) + " |"]
    lines.append("| --- |" + " ---: |" * 2 * len(corpora))
    for name, metrics in rows.items():
        cells = [f"{metrics['perplexity'][c]:.2f} | {metrics['perplexity'][c] / exact[c]:.2f}" for c in corpora]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
