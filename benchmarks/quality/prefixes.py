"""The worth of each prefix (none, found, trained, discretised) over several calibration seeds, in one table.

    python -m benchmarks.quality.prefixes                           # 16 x 512 calibration tokens, seeds 0, 1, 2
    python -m benchmarks.quality.prefixes --size final --seeds 0 --rows none found trained
    python -m benchmarks.quality.prefixes --json prefixes.json      # keeps finished rows, continues when restarted

Columns, each the mean over seeds ± the standard deviation:

- the largest ratio, over layers, of a window's largest token maximum to the median, and of outlier tokens per window
  (input of down_proj, validation windows)
- perplexity in full precision with the prefix
- perplexity quantized as params.yaml says, with nothing trained but the prefix, and its KL divergence from the original
  model in nats

The second table has ratios to the found prefix with the same seed. The influence of calibration text on both cancels.
"""

import statistics
from typing import Any

from benchmarks.quality.variants import SIZES
from benchmarks.workspace import Workspace, append_row, make_parser, override, read_params, read_rows
from pipeline.pictures.tables import format_markdown
from pipeline.runtime.arguments import whole
from pipeline.runtime.errors import run_main

OUTLIER_LOSS = {
    "loss_type": "outlier",
    "learning_rate": 1e-3,
    "batch_size": 2,
    "weights.kl": 0.0,
    "weights.diversity": 0.05,
    "weights.magnitude": 0.01,
}


def _trained(use: str = "trained", **changes: Any) -> dict[str, Any]:
    training = {"enabled": True} | changes
    return {"prefix.use": use} | {f"prefix_training.{key}": value for key, value in training.items()}


ROWS: dict[str, dict[str, Any]] = {
    "none": {"prefix.use": "none", "prefix_training.enabled": True},
    "found": {"prefix.use": "found", "prefix_training.enabled": True},
    "trained, outlier loss": _trained(**OUTLIER_LOSS),
    "trained": _trained(),
    "discretised": _trained("discretised"),
    # Other settings that were tried.
    "found, repeated to 8": {"prefix.use": "found", "prefix.length": 8, "prefix_training.enabled": True},
    "trained, as many tokens as found": _trained(length=None),
    "trained, 16 tokens": _trained(length=16),
    "trained, two windows a step": _trained(batch_size=2),
    "trained, rate 3e-2": _trained(learning_rate=3e-2),
    "trained, quantizers only measured": _trained(simulate=False, **{"weights.quantization": 1.0, "weights.kl": 0.1}),
    "trained, l2": _trained(**OUTLIER_LOSS | {"loss_type": "l2"}),
    "trained, var": _trained(**OUTLIER_LOSS | {"loss_type": "var"}),
}
MAIN = ("none", "found", "trained, outlier loss", "trained", "discretised")


def main() -> None:
    parser = make_parser(__doc__, ROWS, MAIN)
    parser.add_argument("--size", choices=SIZES, default="screening")
    parser.add_argument("--seeds", nargs="*", type=whole(0), default=[0, 1, 2], help="of calibration")
    arguments = parser.parse_args()
    workspace = Workspace(arguments.work)
    # At the final size one pass is as many steps as three at the other.
    steps = {"prefix_training.epochs": 1} if arguments.size == "final" else {}
    base = override(read_params(), SIZES[arguments.size] | steps)
    rows = read_rows(arguments.json)
    for seed in arguments.seeds:
        for name in arguments.rows:
            if (key := f"{name}/{seed}") not in rows:
                params = override(base, ROWS[name] | {"calibration.seed": seed})
                append_row(arguments.json, rows, key, measure(workspace, params))
    print(format_table(rows))


def measure(workspace: Workspace, params: dict[str, Any]) -> dict[str, Any]:
    """Return a row for one seed: outliers, perplexities, and the time and memory of training."""
    training = workspace.metrics("prefix_training", params)
    candidate = params["prefix"]["use"]
    quantized = workspace.metrics("evaluation@quantizer_init", params)
    return {
        "ratio": training["top1_median_ratio"][candidate],
        "outliers": training["outlier_tokens_per_window"][candidate],
        "full_precision": workspace.metrics("evaluation@original_prefix", params)["perplexity"],
        "quantized": quantized["perplexity"],
        "divergence": quantized["kl"],
        "seconds": training["seconds"],
        "peak_rss_gib": training["peak_rss_gib"],
    }


def format_table(rows: dict[str, Any]) -> str:
    """Return two Markdown tables with a line per prefix, mean ± standard deviation over seeds.

    The second one has ratios to the found prefix with the same seed.
    """
    corpora = list(next(iter(rows.values()))["quantized"])
    by_name: dict[str, dict[str, Any]] = {}
    for key, row in rows.items():
        name, _, seed = key.rpartition("/")
        by_name.setdefault(name, {})[seed] = row
    kinds = {"full_precision": "full precision", "quantized": "quantized", "divergence": "KL"}
    head = ["prefix", "seeds", "top-1 / median", "outliers"]
    head += [f"{title}, {corpus}" for title in kinds.values() for corpus in corpora]
    lines = []
    for name, by_seed in by_name.items():
        cells = [name, str(len(by_seed)), _spread([row["ratio"] for row in by_seed.values()], 0)]
        cells.append(_spread([row["outliers"] for row in by_seed.values()], 2))
        for kind in kinds:
            digits = 3 if kind == "divergence" else 2
            cells += [_spread([row[kind][corpus] for row in by_seed.values()], digits) for corpus in corpora]
        lines.append(cells)
    table = format_markdown(head, lines)
    if "found" not in by_name:
        return table
    compared = {kind: title for kind, title in kinds.items() if kind != "full_precision"}
    head = ["to the found prefix", "seeds"]
    head += [f"{title}, {corpus}" for title in compared.values() for corpus in corpora]
    lines = []
    for name, by_seed in by_name.items():
        pairs = [(row, base) for seed, row in by_seed.items() if (base := by_name["found"].get(seed))]
        cells = [name, str(len(pairs))]
        for kind in compared:
            for corpus in corpora:
                cells.append(_spread([row[kind][corpus] / base[kind][corpus] for row, base in pairs], 3))
        lines.append(cells)
    return f"{table}\n\n{format_markdown(head, lines)}"


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    run_main(main)
