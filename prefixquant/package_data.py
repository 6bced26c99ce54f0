"""The files of a project that are not modules: params.yaml, dvc.yaml, presets and the template of plots.

In a source tree they are where `dvc repro` reads them. The build copies them into the package (`setup.py`).
"""

from pathlib import Path

_PACKAGED = Path(__file__).parent / "project"
SOURCE_ROOT = Path(__file__).parents[1]  # the folder that holds the packages prefixquant, pipeline and stages


def find_data(name: str) -> Path:
    """Return the path of a file or folder, such as `params.yaml` or `presets`."""
    return (_PACKAGED if _PACKAGED.is_dir() else SOURCE_ROOT) / name


def is_installed() -> bool:
    """Return whether this is an installed package, and not a source tree."""
    return _PACKAGED.is_dir()
