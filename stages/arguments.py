"""Command lines of stages: what a run will take instead of the run, `python -m stages.NAME --plan`."""

import argparse
from collections.abc import Collection


def parse_arguments(description: str | None, variants: Collection[str] = ()) -> argparse.Namespace:
    """`plan`: say what the run will need, and stop; `variant`, of a stage that has several."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if variants:
        parser.add_argument("variant", choices=variants)
    parser.add_argument("--plan", action="store_true", help="say what the run will need, and stop")
    return parser.parse_args()
