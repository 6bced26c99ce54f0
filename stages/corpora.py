"""Fetch one corpus, as raw documents: `python -m stages.corpora NAME`, NAME being a key of `corpora:` in params.yaml.

Reads   what corpora.NAME.source names
Writes  data/NAME/{train,validation,test}.jsonl, metrics/corpora/NAME.json
packaged:wikipedia: about 10 seconds.
"""

import argparse
from pathlib import Path

from pipeline.artifacts import replacing_folder
from pipeline.corpora import fetch_corpus
from pipeline.params import ParamsError, load_params
from pipeline.progress import run_main, run_stage

PARAMS = Path("params.yaml")
DATA = Path("data")
METRICS = Path("metrics/corpora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a key of `corpora:` in params.yaml")
    name = parser.parse_args().name
    params = load_params(PARAMS)
    if name not in params.corpora:
        raise ParamsError(f"{name!r} is not under `corpora:` in {PARAMS}; there are: {', '.join(params.corpora)}")
    corpus = params.corpora[name]
    with (
        run_stage(f"corpora@{name}", METRICS / f"{name}.json", params.runtime) as metrics,
        replacing_folder(DATA / name) as partial,
    ):
        metrics |= fetch_corpus(corpus.source, corpus.max_documents, corpus.text_field, partial)


if __name__ == "__main__":
    run_main(main)
