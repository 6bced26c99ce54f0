"""One page for a run: results, settings, prefix, worst sites, pictures, cost. Everything is inside the file."""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

_WORST = 10
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1250px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } td, th { border-bottom: 1px solid #ddd; padding: .25em .6em; }
td + td, th + th { text-align: right; } th { background: #f5f5f5; } img { max-width: 100%; margin: .6em 0; }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; } h2 { margin-top: 2em; border-bottom: 2px solid #2166ac; }
"""


def summarise_run(
    bits: str,
    prefix: str,
    evaluations: dict[str, dict[str, Any]],
    costs: dict[str, dict[str, float]],
    size_mib: float,
) -> dict[str, Any]:
    """The numbers a run is compared by, for `dvc exp show`.

    Args:
        evaluations: variant -> its metrics, the last one the deliverable's, `original` among them.
        costs: stage -> {"seconds", "peak_rss_gib"}.
    """
    exact, final = evaluations["original"], list(evaluations.values())[-1]
    accuracies = {task: scores["acc"] for task, scores in final.get("tasks", {}).items() if "acc" in scores}
    found = {
        "bits": bits,
        "prefix": prefix,
        "ppl": final["perplexity"],  # a name that evaluations do not have: DVC shows it without its file's
        "ratio": {name: round(value / exact["perplexity"][name], 3) for name, value in final["perplexity"].items()},
        "accuracy": accuracies,
        "minutes": round(sum(cost["seconds"] for cost in costs.values()) / 60, 1),
        "gib": round(max(cost["peak_rss_gib"] for cost in costs.values()), 2),
        "mib": size_mib,
    }
    if "average" in final:
        found["average_accuracy"] = final["average"]["acc"]
    return {key: value for key, value in found.items() if value != {}}


def build_page(
    summary: dict[str, Any],
    evaluations: dict[str, dict[str, Any]],
    prefix: dict[str, Any],
    saturation: list[dict[str, Any]],
    costs: dict[str, dict[str, float]],
    settings: dict[str, Any],
    pictures: Sequence[Path],
) -> str:
    """The page as HTML.

    Args:
        summary: of `summarise_run`.
        prefix: metrics of prefix_search.
        saturation: rows of quantizer_init's saturation.json.
        settings: groups of params.yaml.
        pictures: PNG files, in the order they are shown in.
    """
    exact = evaluations["original"]
    corpora, tasks = list(exact["perplexity"]), list(exact.get("tasks", {}))
    head = ["", *(f"{c}, perplexity | ratio | KL, nats | top-1 agreement".split(" | ") for c in corpora)]
    columns = [head[0], *(name for part in head[1:] for name in part), *(f"{task}, acc" for task in tasks)]
    rows = []
    for variant, metrics in evaluations.items():
        row = [variant]
        for corpus in corpora:
            value = metrics["perplexity"][corpus]
            row += [f"{value:.2f}", f"{value / exact['perplexity'][corpus]:.2f}"]
            row += [_number(metrics.get(key, {}).get(corpus)) for key in ("kl", "top1_agreement")]
        rows.append(row + [_number(metrics.get("tasks", {}).get(task, {}).get("acc")) for task in tasks])
    windows = exact["settings"]
    counted = ", ".join(f"{count} of {corpus}" for corpus, count in windows["windows"].items())
    parts = [
        f"<h1>{html.escape(summary['bits'])}, prefix {html.escape(summary['prefix'])}</h1>",
        "<h2>Results</h2>",
        _table(columns, rows),
        f"<p>Held-out windows: {counted}, {windows['targets_per_window']} targets each; "
        f"special tokens: {windows['special_tokens']}. Ratios, KL divergence and agreement are to the original.</p>",
        "<h2>Prefix found</h2>",
        f"<p>{html.escape(', '.join(map(repr, prefix['prefix_texts'])) or 'none')}. Outlier tokens per window "
        f"{_number(prefix['outlier_tokens_per_window'])}, behind the prefix "
        f"{_number(prefix['outlier_tokens_per_window_with_prefix'])}; largest ratio to the median "
        f"{_number(prefix['top1_median_ratio'])}, behind it {_number(prefix['top1_median_ratio_with_prefix'])}.</p>",
        "<h2>Worst fitting sites</h2>",
        "<p>Lowest signal-to-quantization-noise ratios of quantizer_init on calibration text.</p>",
        _table(["site", "SQNR, dB", "beyond the range"], _worst_sites(saturation)),
        "<h2>Pictures</h2>",
        *(f'<img alt="{path.stem}" src="data:image/png;base64,{_encode(path)}">' for path in pictures),
        "<h2>Cost</h2>",
        _table(
            ["stage", "seconds", "peak memory, GiB"],
            [[name, f"{cost['seconds']:.1f}", f"{cost['peak_rss_gib']:.2f}"] for name, cost in costs.items()],
        ),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))}</pre>",
    ]
    title = html.escape(f"{summary['bits']}: a run")
    opening = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return "\n".join([opening, *parts, ""])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a table for `dvc plots`; what there is not is None."""
    return json.loads(path.read_text(encoding="utf-8"))


def draw_curves(
    path: Path, rows: list[dict[str, Any]], x: str, columns: Sequence[str], labels: tuple[str, str, str]
) -> bool:
    """Draw columns of a table over `x` into a PNG; `labels`: title, x axis, y axis. False where there are no rows."""
    present = [name for name in columns if any(row.get(name) is not None for row in rows)]
    if not present:
        return False
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axis = figure.subplots()
    for name in present:
        points = [(row[x], row[name]) for row in rows if row[name] is not None]
        axis.plot(*zip(*points, strict=True), label=name, lw=1.4, marker="." if len(points) < 12 else None)
    axis.set_title(labels[0])
    axis.set_xlabel(labels[1])
    axis.set_ylabel(labels[2])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def _worst_sites(saturation: list[dict[str, Any]]) -> list[list[str]]:
    sites = []
    for row in saturation:
        for key, value in row.items():
            if key.endswith("_sqnr") and value is not None:
                site = key.removesuffix("_sqnr")
                sites.append((value, f"block {row['block']} {site}", row[f"{site}_share"]))
    return [[name, f"{sqnr:.1f}", f"{share:.2%}"] for sqnr, name, share in sorted(sites)[:_WORST]]


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _encode(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
