"""The report of a run: one HTML page with results, settings, prefix, worst sites, pictures and cost.

Pictures and style are inside the file, so it can be sent around alone.
"""

import base64
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

_WORST = 10
# Nothing is wider than the window: pictures shrink, long words break, tables and settings scroll inside a box.
_STYLE = """
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1250px; margin: 2em auto; padding: 0 1em; color: #222;
       overflow-wrap: break-word; }
h2 { margin-top: 2em; border-bottom: 2px solid #2166ac; }
.table, pre { max-width: 100%; overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; } td, th { border-bottom: 1px solid #ddd; padding: .25em .6em; }
th:first-child { text-align: left; } td + td, th + th { text-align: right; } th, pre { background: #f5f5f5; }
img { display: block; max-width: 100%; height: auto; margin: .6em 0; } pre { padding: 1em; }
@media (max-width: 650px) { body { font-size: 13px; } td, th { padding: .25em .4em; } }
"""


def summarise_run(
    bits: str,
    prefix: str,
    evaluations: dict[str, dict[str, Any]],
    costs: dict[str, dict[str, float]],
    size_mib: float,
) -> dict[str, Any]:
    """Return the figures that `dvc exp show` compares runs by.

    Args:
        evaluations: variant -> its metrics, with `original` among them and the exported model last.
        costs: stage -> {"seconds", "peak_rss_gib"}, the latter where the platform gives it.
    """
    exact, final = evaluations["original"], list(evaluations.values())[-1]
    peaks = [cost["peak_rss_gib"] for cost in costs.values() if "peak_rss_gib" in cost]
    accuracies = {task: scores["acc"] for task, scores in final.get("tasks", {}).items() if "acc" in scores}
    summary = {
        "bits": bits,
        "prefix": prefix,
        "ppl": final["perplexity"],  # not named as in evaluations, so that DVC shows it without the file's name
        "ratio": {name: round(value / exact["perplexity"][name], 3) for name, value in final["perplexity"].items()},
        "accuracy": accuracies,
        "minutes": round(sum(cost["seconds"] for cost in costs.values()) / 60, 1),
        **({"gib": round(max(peaks), 2)} if peaks else {}),
        "mib": size_mib,
    }
    if "average" in final:
        summary["average_accuracy"] = final["average"]["acc"]
    return {key: value for key, value in summary.items() if value != {}}


def build_page(
    summary: dict[str, Any],
    *,
    evaluations: dict[str, dict[str, Any]],
    prefix: dict[str, Any],
    saturation: list[dict[str, Any]],
    costs: dict[str, dict[str, float]],
    settings: dict[str, Any],
    pictures: Sequence[Path],
) -> str:
    """Return the page as HTML.

    Args:
        summary: the result of `summarise_run`.
        prefix: metrics of prefix_search.
        saturation: rows of quantizer_init's saturation.json.
        settings: groups of params.yaml.
        pictures: PNG files, in the order of the page.
    """
    exact = evaluations["original"]
    windows = exact["settings"]
    counted = ", ".join(f"{count} of {corpus}" for corpus, count in windows["windows"].items())
    parts = [
        f"<h1>{html.escape(summary['bits'])}, prefix {html.escape(summary['prefix'])}</h1>",
        "<h2>Results</h2>",
        _table(["", *evaluations], _results(evaluations)),
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
            [
                [name, f"{cost['seconds']:.1f}", f"{cost['peak_rss_gib']:.2f}" if "peak_rss_gib" in cost else ""]
                for name, cost in costs.items()
            ],
        ),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))}</pre>",
    ]
    title = html.escape(f"{summary['bits']}: a run")
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    opening = f'<!doctype html><meta charset="utf-8">{viewport}<title>{title}</title><style>{_STYLE}</style>'
    return "\n".join([opening, *parts, ""])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table for `dvc plots`; missing values are None."""
    return json.loads(path.read_text(encoding="utf-8"))


def draw_curves(
    path: Path,
    rows: list[dict[str, Any]],
    *,
    x: str,
    columns: Sequence[str],
    title: str,
    y_label: str,
) -> bool:
    """Draw columns of a table over the column `x` into a PNG file, and return whether there were any values."""
    present = [name for name in columns if any(row.get(name) is not None for row in rows)]
    if not present:
        return False
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axis = figure.subplots()
    for name in present:
        points = [(row[x], row[name]) for row in rows if row[name] is not None]
        axis.plot(*zip(*points, strict=True), label=name, lw=1.4, marker="." if len(points) < 12 else None)
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def _results(evaluations: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return a row for each figure, so that further corpora and tasks make the table longer, not wider."""
    variants, exact = list(evaluations.values()), evaluations["original"]
    rows = []
    for corpus, base in exact["perplexity"].items():
        values = [metrics["perplexity"][corpus] for metrics in variants]
        rows.append([f"{corpus}, perplexity", *(f"{value:.2f}" for value in values)])
        rows.append([f"{corpus}, ratio", *(f"{value / base:.2f}" for value in values)])
        for key, name in (("kl", "KL, nats"), ("top1_agreement", "top-1 agreement")):
            rows.append([f"{corpus}, {name}", *(_number(metrics.get(key, {}).get(corpus)) for metrics in variants)])
    for task in exact.get("tasks", {}):
        scores = [metrics.get("tasks", {}).get(task, {}).get("acc") for metrics in variants]
        rows.append([f"{task}, acc", *map(_number, scores)])
    return rows


def _worst_sites(saturation: list[dict[str, Any]]) -> list[list[str]]:
    sites = []
    for row in saturation:
        for key, value in row.items():
            if key.endswith("_sqnr") and value is not None:
                site = key.removesuffix("_sqnr")
                sites.append((value, f"block {row['block']} {site}", row[f"{site}_share"]))
    return [[name, f"{sqnr:.1f}", f"{share:.2%}"] for sqnr, name, share in sorted(sites)[:_WORST]]


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{_cell(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    """Return an escaped text whose names may break after `_` and `/` in a narrow window."""
    return re.sub(r"(?<=\w)([_/])(?=\w)", r"\1<wbr>", html.escape(text))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _encode(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
