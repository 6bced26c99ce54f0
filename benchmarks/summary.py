"""Print what the last `dvc repro` measured: `python -m benchmarks.summary`.

Perplexity of each variant as a table; and, where the artifacts are at hand, what each step changed: the mean difference
of the loss on the same windows, ± its standard error, in nats a token.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.quality import format_table, mean_and_error
from benchmarks.workspace import ROOT
from pipeline.runtime.artifacts import load_tensors
from pipeline.runtime.errors import run_main

VARIANTS = ("original", "original_prefix", "quantizer_init", "finetuning", "export")
STEPS = (("original", "original_prefix"), ("original_prefix", "quantizer_init"), ("quantizer_init", "finetuning"))


def read_evaluations() -> dict[str, Any]:
    """Variant -> its metrics, of those that have been evaluated."""
    paths = {variant: ROOT / "metrics" / "evaluation" / f"{variant}.json" for variant in VARIANTS}
    return {variant: json.loads(path.read_text(encoding="utf-8")) for variant, path in paths.items() if path.is_file()}


def main() -> None:
    rows = read_evaluations()
    if "original" not in rows:
        print("nothing evaluated yet; run: make repro")
        return
    print(format_table(rows))
    folder = ROOT / "artifacts" / "evaluation"
    steps = [step for step in STEPS if all((folder / f"{variant}.safetensors").is_file() for variant in step)]
    if steps:
        print("\nLoss on the same windows, difference ± standard error, nats a token:")
    for before, after in steps:
        differences = paired_differences(*(folder / f"{variant}.safetensors" for variant in (before, after)))
        cells = [f"{corpus} {mean:+.4f} ± {error:.4f}" for corpus, (mean, error) in differences.items()]
        print(f"  {after} - {before}: " + ", ".join(cells))
    prefix = json.loads((ROOT / "metrics" / "prefix_search.json").read_text(encoding="utf-8"))
    print(f"\nPrefix found: {prefix['prefix_texts']} (ids {prefix['prefix_token_ids']}). All metrics: dvc metrics show")


def paired_differences(before: Path, after: Path) -> dict[str, tuple[float, float]]:
    """Corpus -> mean over windows of the loss after less the loss before, and its standard error (nats a token)."""
    first, second = (load_tensors(path, "evaluation")[0] for path in (before, after))
    corpora = [name.removeprefix("loss.") for name in first if name.startswith("loss.")]
    return {corpus: mean_and_error(second[f"loss.{corpus}"] - first[f"loss.{corpus}"]) for corpus in corpora}


if __name__ == "__main__":
    run_main(main)
