"""The report of a run: one HTML page with results, samples, settings, prefix, worst sites, pictures and cost.

Pictures and style are inside the file, so it can be sent around alone. It follows the reader's light or dark theme.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from pipeline.evaluation.samples import find_first_difference
from pipeline.pictures.experts import ExpertLists
from pipeline.pictures.page import format_cell, format_page, format_table

_WORST = 10
_CAPTIONS = {  # beginning of a file's name -> a hint for the viewer
    "token_maxima_inputs": "One line far above the others means that single tokens set the range of a quantizer. After "
    "the prefix, the lines should be close together.",
    "token_maxima_outputs": "The same for the outputs of the linears. Keys and values are quantized there.",
    "token_maxima_blocks": "The residual stream between blocks. Rotation does not change it; the prefix does.",
    "site_quality": "Red cells lose most. A red row asks for more bits at that site, a red column for an override of "
    "that block.",
    "histogram": "A few values far out stretch the range, and most values then share one or two levels. Red lines "
    "are the levels of the quantizer.",
    "outlier_counts": "With a prefix that fits, the bars on the right are gone.",
    "outlier_positions": "Outliers at the first position come from the start of a text. Others are tokens that the "
    "prefix should hold.",
    "outlier_contents": "The tokens that occur most often are the candidates of the prefix search.",
    "surface": "Ridges along a token are massive activations. Ridges along a channel are spread by rotation.",
    "finetuning_blocks": "Each block's loss should fall. A block whose loss did not fall kept its initial parameters.",
    "finetuning_end_to_end": "Validation should fall with training. Where it rises, there is too little text.",
    "finetuning_steps": "The divergence of each batch. A jump means that the learning rate is too high.",
    "router_agreement": "A token with other experts is computed by other weights. The curve of the quantized model "
    "should fall slowly, and no block should stand out.",
    "expert_tokens": "Dark cells are experts that few tokens reach. They need more calibration text.",
    "budget": "The estimate for the best bits of all sites at each value of the bound. Where the curve is steep, a "
    "larger budget helps most.",
    "sqnr": "The curves of the heat map above, for exact values.",
}


@dataclass(frozen=True)
class Heading:
    """The facts above the results.

    Attributes:
        model: `model.source`.
        date: date of the run, such as 2026-01-31.
        revision: the commit of the project, or None without git.
        versions: package -> version.
        device: such as cpu, or the name of a GPU.
        size_mib: size of the export's weights.
        original_mib: size of the original's weights.
        corpora: name of a corpus -> its source.
    """

    model: str
    date: str
    revision: str | None
    versions: Mapping[str, str]
    device: str
    size_mib: float
    original_mib: float
    corpora: Mapping[str, str]


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
    heading: Heading,
    evaluations: dict[str, dict[str, Any]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    prefix: dict[str, Any],
    saturation: list[dict[str, Any]],
    costs: dict[str, dict[str, float]],
    settings: dict[str, Any],
    changes: Mapping[str, tuple[Any, Any]] | None,
    pictures: Sequence[Path],
    experts: ExpertLists | None = None,
) -> str:
    """Return the page as HTML.

    Args:
        summary: the result of `summarise_run`.
        samples: variant -> its samples (`evaluation/samples.py`), the original first. Variants without any are left
            out.
        prefix: metrics of prefix_search.
        saturation: rows of quantizer_init's saturation.json.
        settings: groups of params.yaml.
        changes: dotted key -> (default, value), of the settings that differ from the defaults. None: the defaults
            are not known.
        pictures: PNG files, in the order of the page.
        experts: the lists of a model with experts; None for a dense one.
    """
    exact = evaluations["original"]
    windows = exact["settings"]
    counted = ", ".join(f"{count} of {corpus}" for corpus, count in windows["windows"].items())
    shown = {variant: rows for variant, rows in samples.items() if rows}
    sections = {
        "Results": [
            format_table(["", *evaluations], _results(evaluations)),
            f"<p>Held-out windows: {counted}, {windows['targets_per_window']} targets each; special tokens: "
            f"{windows['special_tokens']}. ± is one standard error, from the spread between windows. "
            "Ratios, KL divergence and agreement are to the original.</p>",
        ],
        "Samples": [_samples(shown)] if "original" in shown else [],
        "Settings": [
            *_changes(changes),
            f"<details><summary>All settings</summary><pre>{html.escape(_yaml(settings))}</pre></details>",
        ],
        "Prefix": [
            f"<p>{html.escape(', '.join(map(repr, prefix['prefix_texts'])) or 'none')}. Outlier tokens per window "
            f"{_number(prefix['outlier_tokens_per_window'])}, after the prefix "
            f"{_number(prefix['outlier_tokens_per_window_with_prefix'])}; largest ratio to the median "
            f"{_number(prefix['top1_median_ratio'])}, after it {_number(prefix['top1_median_ratio_with_prefix'])}.</p>"
        ],
        "Worst sites": [
            "<p>Lowest signal-to-quantization-noise ratios of quantizer_init on calibration text.</p>",
            format_table(["site", "SQNR, dB", "beyond the range"], _worst_sites(saturation)),
        ],
        "Experts": [] if experts is None else _experts(experts),
        "Pictures": list(map(_picture, pictures)),
        "Cost": [
            format_table(
                ["stage", "seconds", "peak memory, GiB"],
                [
                    [name, f"{cost['seconds']:.1f}", f"{cost['peak_rss_gib']:.2f}" if "peak_rss_gib" in cost else ""]
                    for name, cost in costs.items()
                ],
            )
        ],
    }
    sections = {title: content for title, content in sections.items() if content}
    title = html.escape(f"{heading.model}, {summary['bits']}, prefix {summary['prefix']}")
    contents = " · ".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in sections)
    parts = [f"<h1>{title}</h1>", _facts(heading), f"<p>{contents}</p>"]
    for name, content in sections.items():
        parts += [f'<h2 id="{_anchor(name)}">{name}</h2>', *content]
    return format_page(title, parts)


def list_changes(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> (default, value) of the settings that differ, in the order of `settings`.

    A key that only one side has counts as None on the other.
    """
    changes: dict[str, tuple[Any, Any]] = {}
    for key in [*settings, *(key for key in defaults if key not in settings)]:
        value, default = settings.get(key), defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            changes |= {f"{key}.{name}": pair for name, pair in list_changes(value, default).items()}
        elif value != default:
            changes[key] = (default, value)
    return changes


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
        errors = [metrics.get("standard_error", {}).get(corpus) for metrics in variants]
        spreads = ["" if error is None else f" ± {error:.2f}" for error in errors]
        cells = [f"{value:.2f}{spread}" for value, spread in zip(values, spreads, strict=True)]
        rows.append([f"{corpus}, perplexity", *cells])
        rows.append([f"{corpus}, ratio", *(f"{value / base:.2f}" for value in values)])
        for key, name in (("kl", "KL, nats"), ("top1_agreement", "top-1 agreement")):
            rows.append([f"{corpus}, {name}", *(_number(metrics.get(key, {}).get(corpus)) for metrics in variants)])
        if any("router_agreement" in metrics for metrics in variants):
            shares = [metrics.get("router_agreement", {}).get(corpus) for metrics in variants]
            rows.append([f"{corpus}, router agreement", *map(_number, shares)])
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


def _experts(experts: ExpertLists) -> list[str]:
    """Return the section about experts."""
    parts = [
        "<p>Experts with the largest outputs. A prefix that fits takes the massive activations of super experts "
        "away.</p>",
        format_table(
            ["expert", "largest output", "after the prefix"],
            [[name, _number(peak), _number(with_prefix)] for name, peak, with_prefix in experts.super_experts],
        ),
    ]
    if not experts.starved:
        return [*parts, "<p>Every expert got enough calibration tokens.</p>"]
    columns = ["expert", "calibration tokens", "added"]
    rows = [[name, str(tokens), str(added)] for name, tokens, added in experts.starved]
    return [
        *parts,
        "<p>Experts with few calibration tokens. Their scales and Hessians are also of the tokens that came next in "
        "the routing score. More calibration text makes them better.</p>",
        format_table(columns, rows),
    ]


def _facts(heading: Heading) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in heading.versions.items())
    corpora = ", ".join(f"{name} ({source})" if name != source else name for name, source in heading.corpora.items())
    facts = {
        "model": heading.model,
        "date": heading.date,
        "revision": heading.revision or "no git repository",
        "versions": versions,
        "device": heading.device,
        "weights": f"{heading.size_mib} MiB; the original's {heading.original_mib} MiB",
        "corpora": corpora,
    }
    rows = "".join(f"<tr><td>{name}</td><td>{format_cell(text)}</td></tr>" for name, text in facts.items())
    return f'<div class="table"><table class="facts">{rows}</table></div>'


def _samples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the continuations of every prompt; the first token that differs from the original's is marked."""
    parts = ["<p>Greedy continuations. The first token that differs from the original's is marked.</p>"]
    for number, original in enumerate(samples["original"]):
        parts.append(f'<h3>{html.escape(original["prompt"])}</h3><div class="samples">')
        for variant, rows in samples.items():
            row = rows[number]
            place = find_first_difference(original["token_ids"], row["token_ids"])
            pieces = [html.escape(piece) for piece in row["pieces"]]
            if place is not None:
                marked = "".join(pieces[place : place + 1]) or "(end)"  # a special token has no text
                pieces[place : place + 1] = [f"<mark>{marked}</mark>"]
            parts.append(f'<div><div>{format_cell(variant)}</div><div class="sample">{"".join(pieces)}</div></div>')
        parts.append("</div>")
    return "\n".join(parts)


def _picture(path: Path) -> str:
    caption = next((text for name, text in _CAPTIONS.items() if path.stem.startswith(name)), "")
    image = f'<img alt="{path.stem}" src="data:image/png;base64,{_encode(path)}">'
    return f"<figure><figcaption>{caption}</figcaption>{image}</figure>"


def _changes(changes: Mapping[str, tuple[Any, Any]] | None) -> list[str]:
    if changes is None:
        return []
    if not changes:
        return ["<p>All settings are the defaults.</p>"]
    rows = [[key, _yaml(default), _yaml(value)] for key, (default, value) in changes.items()]
    return [format_table(["key", "default", "this run"], rows)]


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _yaml(value: Any) -> str:
    """Return a value as YAML, on one line unless it is a mapping."""
    if isinstance(value, Mapping):
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return json.dumps(value, ensure_ascii=False)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _encode(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
