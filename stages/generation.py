"""Sample the corpora whose source is `generated` from the original model.

Reads   artifacts/model/
Writes  artifacts/generation/NAME/{train,validation,test}.jsonl for each such corpus, metrics/generation.json
A corpus that has been sampled from the same model with the same settings stays, so another corpus in params.yaml costs
nothing. Finished batches stay in .work/generation/ until the end, so a killed run continues. Nothing to do without such
a corpus.
"""

import logging
import shutil
from pathlib import Path

from pipeline.inference.prefixed_model import assemble_model
from pipeline.inference.sampling import Sampler, write_corpus
from pipeline.models.checkpoint import Checkpoint
from pipeline.runtime.artifacts import (
    ArtifactError,
    load_json,
    make_header,
    read_header,
    replacing_folder,
    write_folder_header,
    write_json,
)
from pipeline.text.params import GENERATED, GenerationParams
from stages.opening import Run, open_stage

logger = logging.getLogger(__name__)

MODEL = Path("artifacts/model")
WORK = Path(".work/generation")
GENERATION = Path("artifacts/generation")
REPORT = "report.json"  # of one corpus; the folder's own lists the corpora


def main(run: Run) -> None:
    wanted = {
        name: corpus.generation or GenerationParams()
        for name, corpus in run.params.corpora.items()
        if corpus.source == GENERATED
    }
    GENERATION.mkdir(parents=True, exist_ok=True)
    for folder in GENERATION.iterdir():
        if folder.is_dir() and folder.name not in wanted:
            shutil.rmtree(folder)
    write_json(GENERATION / REPORT, sorted(wanted))
    for name, settings in wanted.items():
        checkpoint = Checkpoint(MODEL, "model")
        header = make_header("generation", settings.model_dump(), {"model": checkpoint.header})
        folder = GENERATION / name
        try:
            is_current = folder.is_dir() and read_header(folder, "generation") == header
        except ArtifactError:
            is_current = False
        if is_current:
            logger.info("%s: sampled before, and kept", name)
            run.metrics[name] = load_json(folder / REPORT, "generation")
            continue
        model = assemble_model(checkpoint, device=run.device)
        sampler = Sampler(model, checkpoint.tokenizer, settings, name)
        with replacing_folder(folder) as partial:
            work = WORK / name
            work.mkdir(parents=True, exist_ok=True)
            run.metrics[name] = write_corpus(sampler, partial, work, header)
            # Its speed belongs to this run alone, and would change the artifact's bytes.
            report = {key: value for key, value in run.metrics[name].items() if key != "tokens_per_second"}
            write_json(partial / REPORT, report)
            write_folder_header(partial, header)


if __name__ == "__main__":
    open_stage("generation", main, __doc__, work=WORK)
