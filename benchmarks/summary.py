"""Print what the last `dvc repro` measured, as a table: `python -m benchmarks.summary`."""

import json

from benchmarks.quality import print_table
from benchmarks.workspace import ROOT

VARIANTS = ("original", "original_prefix", "quantizer_init")


def main() -> None:
    paths = {variant: ROOT / "metrics" / "evaluation" / f"{variant}.json" for variant in VARIANTS}
    rows = {variant: json.loads(path.read_text(encoding="utf-8")) for variant, path in paths.items() if path.is_file()}
    if "original" not in rows:
        print("nothing evaluated yet; run: make repro")
        return
    print_table(rows)
    prefix = json.loads((ROOT / "metrics" / "prefix_search.json").read_text(encoding="utf-8"))
    print(f"\nPrefix found: {prefix['prefix_texts']} (ids {prefix['prefix_token_ids']}). All metrics: dvc metrics show")


if __name__ == "__main__":
    main()
