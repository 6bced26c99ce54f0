"""The packages `pipeline` and `stages` of this project, which other modules of these names can hide.

Python looks for a module in the folder of the script first, and many scripts are named pipeline.py.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path


def check_not_hidden(name: str) -> None:
    """Raise ImportError if Python would import another module in place of this project's package. Imports nothing."""
    place = find_place(name)
    if place is not None and place != Path(__file__).resolve().parents[1] / name:
        raise ImportError(
            f"{place} hides the package {name} of prefixquant, because Python finds it first. Rename it, or run Python "
            "where it is not on sys.path."
        )


def find_place(name: str) -> Path | None:
    """Return the folder of a package, or the file of a module; None if there is none or it has neither."""
    module = sys.modules.get(name)
    spec: ModuleSpec | None = find_spec(name) if module is None else module.__spec__
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or []) or ([spec.origin] if spec.has_location else [])
    return Path(str(places[0])).resolve() if places else None
