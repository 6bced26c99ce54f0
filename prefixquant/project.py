"""`quantize`: a work folder that is a DVC project of its own, run from beginning to end, and its export copied out.

    DIR.work/params.yaml     written from the recipe and the user's choices
    DIR.work/dvc.yaml        the stages, as in the package
    DIR.work/.dvc/           settings of DVC: no git, no analytics, databases in this folder
    DIR.work/artifacts/ …    written by the stages
    DIR/                     a copy of DIR.work/artifacts/export, put in place when all stages have run

DVC skips stages whose inputs have not changed, and takes results of earlier settings from the cache in the work folder.
So the same call continues an interrupted run, and a call with another recipe reuses everything that it does not change.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.inference.manifest import MANIFEST, read_manifest
from pipeline.runtime.arguments import ArgumentError
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import replacing
from pipeline.runtime.sources import as_path, describe_hub_model, describe_package, find_local_source, read_json
from pipeline.text.hub import HUB_CORPORA
from pipeline.text.params import PACKAGED_CORPORA
from prefixquant.hidden_packages import check_not_hidden
from prefixquant.package_data import SOURCE_ROOT, find_data, is_installed
from prefixquant.recipes import DEFAULT_RECIPE, make_params

check_not_hidden("stages")

from stages.sources import PACKAGES  # noqa: E402

EXPORT = Path("artifacts/export")
MARKER = ".dvc/config"  # by which a work folder is recognized
_COPIED = ("dvc.yaml", ".dvc/plots/curves.json")
_CONFIG = """\
[core]
    no_scm = true
    analytics = false
    check_update = false
[cache]
    type = "reflink,hardlink,copy"
"""


@dataclass(frozen=True)
class Request:
    """The arguments of `prefixquant.quantize`, which describes them."""

    source: str
    out: Path
    texts: tuple[str, ...] = ()
    recipe: str = DEFAULT_RECIPE
    bits: str | None = None
    finetune: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    work: Path | None = None
    clean: bool = False

    @property
    def work_folder(self) -> Path:
        """Return the absolute path of the work folder."""
        out = self.out.absolute()
        return out.with_name(f"{out.name}.work") if self.work is None else self.work.absolute()


def run_request(request: Request) -> Path:
    """Check a request, run it, and return the folder of the quantized model.

    Raises:
        PipelineError: the request cannot be carried out, which is checked before any work, or a stage failed.
    """
    params = prepare_params(request)
    check_folders(request)
    write_project(request.work_folder, params)
    run_project(request.work_folder)
    out = request.out.absolute()
    place_export(request.work_folder / EXPORT, out)
    if request.clean:
        shutil.rmtree(request.work_folder)
    return request.out


def prepare_params(request: Request) -> str:
    """Return the text of the request's params.yaml, for a run.

    Raises:
        PipelineError: a choice cannot be read, the model, a text or a package is missing, the hub does not know the
            model, or the work folder is inside the model or a text.
    """
    if importlib.util.find_spec("dvc") is None:
        raise PipelineError("quantize needs the package dvc. Run: pip install 'prefixquant-pipeline[quantize]'")
    params = choose_params(request)
    model = None if request.source in PACKAGES else find_local_source("MODEL", request.source)
    if model is None and request.source not in PACKAGES:
        # The stage `sources` asks again. Here an unknown id is refused before anything is written.
        last = read_json(request.work_folder / "artifacts/sources/model.json")
        describe_hub_model("MODEL", request.source, yaml.safe_load(params)["model"]["revision"], last)
    for path in (model, *map(as_path, request.texts)):
        if path is not None and request.work_folder.is_relative_to(path.resolve()):
            raise ArgumentError(
                f"the work folder {request.work_folder} is inside {path.resolve()}, which it would change. Use --work, "
                "or another --out."
            )
    return params


def choose_params(request: Request) -> str:
    """Return the text of the params.yaml that a request's source, texts, recipe and settings give.

    Raises:
        PipelineError: a choice cannot be read, or the model, a text or a package is missing.
    """
    model = None if request.source in PACKAGES else find_local_source("MODEL", request.source)
    source = request.source if model is None else str(model.resolve())
    texts = []
    for text in request.texts:
        if text in HUB_CORPORA or text in PACKAGED_CORPORA:
            raise ArgumentError(
                f"--text {text}: a file or folder is expected. For this corpus use --set corpora.NAME.source={text}."
            )
        if not as_path(text).exists():
            raise ArgumentError(f"--text {text}: there is no such file or folder. Correct the path.")
        texts.append(str(as_path(text).resolve()))
    params = make_params(
        source,
        recipe=request.recipe,
        bits=request.bits,
        finetune=request.finetune,
        texts=texts,
        settings=request.settings,
    )
    values = yaml.safe_load(params)
    sources = {"model.source": source} | {
        f"corpora.{name}.source": corpus["source"] for name, corpus in values["corpora"].items()
    }
    for key, value in sources.items():
        if value in PACKAGES:
            describe_package(key, value, PACKAGES[value])
    return params


def check_folders(request: Request) -> None:
    """Check that nothing is lost by writing to `out` and to the work folder, and that both can be written.

    Raises:
        ArgumentError: `out` holds anything but an export, the work folder anything but an earlier run, or a folder
            cannot be written.
    """
    out, work = request.out.absolute(), request.work_folder
    if out == work or out.is_relative_to(work):
        raise ArgumentError(f"--out={request.out}: is inside the work folder {work}. Use another folder.")
    check_replaceable(out)
    if work.exists() and not (work.is_dir() and (not any(work.iterdir()) or (work / MARKER).is_file())):
        raise ArgumentError(f"{work}: exists and is not a work folder. Remove it, or use --work for another one.")
    for folder in (out, work):
        _check_writable_folder(folder)


def check_replaceable(out: Path) -> None:
    """Raise ArgumentError unless `out` is new, an empty folder or an exported one."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ArgumentError(f"--out={out}: is a file. Use a new folder.")
    if not any(out.iterdir()):
        return
    try:
        read_manifest(out)
    except PipelineError:
        raise ArgumentError(
            f"--out={out}: exists and is not an exported model (no valid {MANIFEST}), so it would be lost. Use a new "
            "folder."
        ) from None


def _check_writable_folder(folder: Path) -> None:
    places = [folder, *folder.parents] if folder.is_dir() else list(folder.parents)
    parent = next(place for place in places if place.exists())
    for place in {parent, folder.parent} if folder.is_dir() else {parent}:
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise ArgumentError(f"{folder}: cannot be written, because {place} is not a folder that you may write to.")


def write_project(folder: Path, params: str) -> None:
    """Write the files of a DVC project without git into `folder`, and leave everything else there as it is."""
    texts = {name: find_data(name).read_text(encoding="utf-8") for name in _COPIED}
    for name, text in (texts | {"params.yaml": params, MARKER: _CONFIG}).items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def run_project(folder: Path) -> None:
    """Run all stages of the project in `folder` that are not up to date.

    Raises:
        PipelineError: a stage failed. Its message has been shown.
    """
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=folder, env=make_environment(folder), check=False)
    if done.returncode:
        raise PipelineError(
            f"the run in {folder} stopped, for the reason above. Correct it and run this command again."
        )


def make_environment(folder: Path) -> dict[str, str]:
    """Return the environment of DVC and the stages: this Python and this code, with all caches in `folder`."""
    environment = dict(os.environ)
    # dvc.yaml says `python -m stages.NAME`.
    environment["PATH"] = os.pathsep.join([str(_find_python_folder(folder)), environment.get("PATH", "")])
    if not is_installed():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SOURCE_ROOT), environment.get("PYTHONPATH")]))
    caches = folder / ".dvc/tmp"
    environment["DVC_SITE_CACHE_DIR"] = str(caches / "site-cache")
    environment["DVC_GLOBAL_CONFIG_DIR"] = environment["DVC_SYSTEM_CONFIG_DIR"] = str(caches / "config")
    environment["DVC_NO_ANALYTICS"] = "1"
    environment["MPLCONFIGDIR"] = str(caches / "matplotlib")
    environment.setdefault("HF_DATASETS_CACHE", str(caches / "datasets"))
    return environment


def _find_python_folder(folder: Path) -> Path:
    """Return the folder of a program `python` that is this one; make one in the work folder where there is none."""
    beside = Path(sys.executable).parent
    if (beside / "python").exists() or (beside / "python.exe").exists():
        return beside
    made = folder / ".dvc/tmp/bin"
    made.mkdir(parents=True, exist_ok=True)
    if not (made / "python").exists():
        (made / "python").symlink_to(sys.executable)
    return made


def place_export(export: Path, out: Path) -> None:
    """Copy an exported folder to `out`, which is replaced in one step once the copy is complete.

    Raises:
        ArgumentError: `out` has become something else than an export in the meantime.
    """
    check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, earlier = (out.with_name(f".{out.name}.{ending}") for ending in ("partial", "earlier"))
    for leftover in (partial, earlier):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        # Files in DVC's cache are read-only. The copy is the user's.
        shutil.copytree(export, partial, copy_function=shutil.copyfile)
        if out.exists():
            os.replace(out, earlier)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(earlier, ignore_errors=True)
