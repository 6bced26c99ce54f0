"""Print the path of the report of a run.

    prefixquant report quantized
    prefixquant report quantized.work

The argument is a work folder or the folder of a quantized model, whose work folder has .work added.
"""

from pathlib import Path

from pipeline.inference.manifest import MANIFEST
from pipeline.runtime.arguments import ArgumentError, Parser
from pipeline.runtime.errors import PipelineError

PAGE = Path("artifacts/report/report.html")
_STAGES = "dvc.yaml"  # in every work folder, and in a clone of the repository


def main() -> None:
    """Run `prefixquant report`."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="WORK_OR_OUT", help="a work folder, or the --out of a run")
    print(find_report(parser.parse_args().folder))


def find_work_folder(folder: Path) -> Path:
    """Return the work folder that `folder` is, or that belongs to it.

    Raises:
        ArgumentError: there is none.
    """
    beside = folder.absolute().with_name(f"{folder.absolute().name}.work")
    for place in (folder, beside):
        if (place / _STAGES).is_file():
            return place
    if not folder.is_dir():
        raise ArgumentError(f"{folder}: there is no such folder. Give the --out or the work folder of a run.")
    if (folder / MANIFEST).is_file():
        raise ArgumentError(
            f"{folder}: is a quantized model, and its work folder {beside} does not exist. Name the work folder, if it "
            "is elsewhere. A run with --clean leaves none."
        )
    raise ArgumentError(f"{folder}: is neither a work folder nor a quantized model. Name one of a prefixquant run.")


def find_report(folder: Path) -> Path:
    """Return the path of the report.

    Raises:
        PipelineError: there is no work folder, or its run has not reached the report.
    """
    page = find_work_folder(folder) / PAGE
    if not page.is_file():
        raise PipelineError(
            f"{page}: does not exist, because the run has not reached the stage report. Continue it with the same "
            "prefixquant quantize command."
        )
    return page
