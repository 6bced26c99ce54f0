"""Fetch one corpus, as raw documents: `python -m stages.corpora NAME`, NAME being a key of `corpora:` in params.yaml.

Reads   the source in corpora.NAME.source
Writes  data/NAME/{train,validation,test}.jsonl, metrics/corpora/NAME.json
packaged:wikipedia: about 10 seconds.
"""

from pathlib import Path

from pipeline.runtime.artifacts import replacing_folder
from pipeline.text.corpora import fetch_corpus
from stages.opening import Run, open_stage

DATA = Path("data")


def main(run: Run) -> None:
    corpus = run.params.corpora[run.variant]
    with replacing_folder(DATA / run.variant) as partial:
        run.metrics.update(fetch_corpus(corpus.source, corpus.max_documents, corpus.text_field, partial))


if __name__ == "__main__":
    open_stage("corpora", main, __doc__, variants=lambda params: params.corpora)
