"""Print what the last `dvc repro` measured, as a table: `python -m benchmarks.summary`."""

import json
from typing import Any

from benchmarks.quality import format_table
from benchmarks.workspace import ROOT

VARIANTS = ("original", "original_prefix", "quantizer_init")


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
    prefix = json.loads((ROOT / "metrics" / "prefix_search.json").read_text(encoding="utf-8"))
    print(f"\nPrefix found: {prefix['prefix_texts']} (ids {prefix['prefix_token_ids']}). All metrics: dvc metrics show")


if __name__ == "__main__":
    main()
