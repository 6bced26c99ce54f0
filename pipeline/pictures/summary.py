"""Print the results of the last run: `make table`, or `python -m pipeline.pictures.summary`.

A table of every variant's perplexity, and, where the artifacts are there, the change of loss with each step: the mean
difference on the same windows ± its standard error, in nats per token. Results that do not belong to the present
params.yaml are marked (see `outdated.py`).
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.pictures.outdated import read_outdated
from pipeline.pictures.tables import format_results, mean_and_error
from pipeline.runtime.artifacts import load_tensors
from pipeline.runtime.errors import run_main

VARIANTS = ("original", "original_prefix", "quantizer_init", "finetuning", "export")
STEPS = (("original", "original_prefix"), ("original_prefix", "quantizer_init"), ("quantizer_init", "finetuning"))
# Measured on several machines (docs/results.md).
_MACHINES = (
    "Another machine, or another number of threads, adds in another order. That alone changes the perplexity of a\n"
    "quantized model by 1 to 3 %. On one machine results repeat exactly."
)


def read_evaluations(metrics: Path) -> dict[str, Any]:
    """Return the metrics of every variant that has been evaluated, from the folder metrics/."""
    paths = {variant: metrics / "evaluation" / f"{variant}.json" for variant in VARIANTS}
    return {variant: json.loads(path.read_text(encoding="utf-8")) for variant, path in paths.items() if path.is_file()}


def format_summary(folder: Path) -> str:
    """Return everything that `main` prints about the project in `folder`."""
    rows = read_evaluations(folder / "metrics")
    if "original" not in rows:
        return "Nothing has been evaluated yet. Run: make repro"
    outdated = read_outdated(partial(_read_text, folder), folder)
    old = {variant: outdated[stage] for variant in rows if (stage := f"evaluation@{variant}") in outdated}
    parts = [format_results({f"{name} (outdated)" if name in old else name: row for name, row in rows.items()})]
    if old:
        reasons = [f"  {name}: {reason}" for name, reason in old.items()]
        parts.append("\n".join(["Outdated rows are results of an earlier run. `make repro` renews them:", *reasons]))
    if steps := _describe_steps(folder / "artifacts/evaluation", old):
        parts.append("\n".join(["Loss on the same windows, difference ± standard error, nats per token:", *steps]))
    prefix = json.loads((folder / "metrics/prefix_search.json").read_text(encoding="utf-8"))
    title = "Prefix found (outdated)" if "prefix_search" in outdated else "Prefix found"
    parts.append(f"{title}: {prefix['prefix_texts']} (ids {prefix['prefix_token_ids']}). All figures: metrics/")
    parts.append(_MACHINES)
    return "\n\n".join(parts)


def paired_differences(before: Path, after: Path) -> dict[str, tuple[float, float]]:
    """Return, for each corpus, the mean over windows of the loss after less the loss before, and its standard error.

    Args:
        before: artifact of `evaluation`, with the losses of the same windows as `after`, in nats per token.
        after: as `before`.
    """
    first, second = (load_tensors(path, "evaluation")[0] for path in (before, after))
    corpora = [name.removeprefix("loss.") for name in first if name.startswith("loss.")]
    return {corpus: mean_and_error(second[f"loss.{corpus}"] - first[f"loss.{corpus}"]) for corpus in corpora}


def _describe_steps(evaluations: Path, outdated: Mapping[str, str]) -> list[str]:
    """Return a line for each step whose two variants are present and not outdated."""
    lines = []
    for step in STEPS:
        before, after = (evaluations / f"{variant}.safetensors" for variant in step)
        if before.is_file() and after.is_file() and not outdated.keys() & set(step):
            differences = paired_differences(before, after)
            cells = [f"{corpus} {mean:+.4f} ± {error:.4f}" for corpus, (mean, error) in differences.items()]
            lines.append(f"  {step[1]} - {step[0]}: {', '.join(cells)}")
    return lines


def _read_text(folder: Path, name: str) -> str | None:
    path = folder / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


def main() -> None:
    print(format_summary(Path()))


if __name__ == "__main__":
    run_main(main)
