"""The line that closes a stage: its time, its memory and at most four results, each with its unit.

All results are in the metrics file.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.runtime.pace import format_duration

_MOST = 4  # results; time and memory come on top
# Stage -> keys of its metrics, with dots, and their form. `*` is each name in turn, which the form may show.
_SHOWN: dict[str, dict[str, str]] = {
    "model": {"parameters": "{value:,} parameters", "max_logit_deviation": "largest deviation of a logit {value:.1e}"},
    "corpora": {"train.documents": "{value:,} training documents", "test.documents": "{value:,} held-out documents"},
    "calibration": {"train_tokens": "{value:,} training tokens", "end_to_end_tokens": "{value:,} end-to-end tokens"},
    "rotation": {"max_logit_deviation": "largest deviation of a logit {value:.1e}"},
    "prefix_search": {
        "outlier_tokens_per_window": "{value:.3g} outlier tokens per window",
        "outlier_tokens_per_window_with_prefix": "{value:.3g} outlier tokens with the prefix",
    },
    "prefix_training": {"prefix_tokens": "{value} prefix tokens"},
    "quantizer_init": {
        "prefix_tokens": "{value} prefix tokens",
        "lowest_sqnr.calibration": "lowest signal to noise {value:.1f} dB",
    },
    "finetuning": {
        "end_to_end.kl_before": "KL {value:.3f} nats before",
        "end_to_end.kl_after": "KL {value:.3f} nats after",
    },
    "export": {"size_mib": "{value:.0f} MiB", "original_mib": "original {value:.0f} MiB"},
    "evaluation": {"perplexity.*": "perplexity {value:.2f} on {name}", "kl.*": "KL {value:.3f} nats on {name}"},
    "activation_plots": {"outlier_tokens_per_window": "{value:.3g} outlier tokens per window"},
    "report": {"ppl.*": "perplexity {value:.2f} on {name}", "ratio.*": "{value:.2f} times the original's on {name}"},
}


def describe_end(stage: str, metrics: Mapping[str, Any]) -> str:
    """Return the closing line of a stage, without its name: "done in 3:26, 0.75 GiB, 3 prefix tokens, …"."""
    parts = [f"done in {format_duration(metrics['seconds'])}"]
    if "peak_gpu_gib" in metrics:
        parts.append(f"GPU {metrics['peak_gpu_gib']:.2f} GiB")
    elif "peak_rss_gib" in metrics:
        parts.append(f"{metrics['peak_rss_gib']:.2f} GiB")
    shown = _SHOWN.get(stage.partition("@")[0], {})
    results = [
        form.format(value=value, name=name) for key, form in shown.items() for name, value in _find(metrics, key)
    ]
    return ", ".join([*parts, *results[:_MOST]])


def _find(metrics: Mapping[str, Any], key: str) -> Iterator[tuple[str, int | float]]:
    """Yield (last name, value) of every number that `key` names."""
    name, _, rest = key.partition(".")
    for chosen in metrics if name == "*" else [name]:
        value = metrics.get(chosen)
        if rest and isinstance(value, Mapping):
            yield from _find(value, rest)
        elif not rest and isinstance(value, int | float) and not isinstance(value, bool):
            yield chosen, value
