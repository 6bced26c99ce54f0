"""Cut the corpora into token windows: for the outlier search, calibration, validation and held-out evaluation.

Reads   data/, artifacts/generation/ (corpora that the model wrote), artifacts/model/ (its tokenizer; the model itself
        where calibration.start_token is auto)
Writes  artifacts/calibration/{search,train,end_to_end,validation}.safetensors and evaluation/CORPUS.safetensors,
        metrics/calibration.json
Says whether a start token belongs before every window. Packaged model: about 10 seconds, 0.7 GiB.
"""

import logging
from pathlib import Path

from pipeline.inspection.start_decision import decide_start_token
from pipeline.models.architectures import find_max_positions
from pipeline.models.checkpoint import Checkpoint
from pipeline.params import count_prefix_positions
from pipeline.runtime.artifacts import replacing_folder
from pipeline.runtime.params import ParamsError, list_problems
from pipeline.text.calibration import (
    check_token_ids,
    count_conversations,
    count_overlapping_windows,
    cut_calibration_windows,
    cut_evaluation_windows,
    load_tokenizer,
)
from pipeline.text.corpora import SPLITS, find_corpus, read_documents
from pipeline.text.lengths import choose_length, count_windows, find_short_windows
from pipeline.text.params import SplitParams, find_misfits
from pipeline.text.windows import save_windows
from stages.opening import Run, open_stage

logger = logging.getLogger(__name__)

DATA = Path("data")
GENERATION = Path("artifacts/generation")
MODEL = Path("artifacts/model")
CALIBRATION = Path("artifacts/calibration")


def main(run: Run) -> None:
    calibration = run.params.calibration
    tokenizer, tokenizer_id = load_tokenizer(MODEL)
    checkpoint = Checkpoint(MODEL, "model")
    max_positions, window = find_max_positions(checkpoint.config), checkpoint.widest_window
    room = max_positions - count_prefix_positions(run.params) - 1
    splits = calibration.splits()
    used = sorted({corpus for split in splits.values() for corpus in split.corpora})
    folders = {corpus: find_corpus(corpus, DATA, GENERATION) for corpus in used}
    lengths = {name: choose_length(name, split, window=window, room=room) for name, split in splits.items()}
    for problem in find_short_windows(calibration, window):
        logger.warning(problem)
    cuts = {
        name: cut_calibration_windows(
            name,
            corpora=split.corpora,
            windows=count_windows(name, split, split.windows, lengths[name]),
            length=lengths[name],
            seed=calibration.seed,
            folders=folders,
            tokenizer=tokenizer,
            tokenizer_id=tokenizer_id,
        )
        for name, split in splits.items()
        if isinstance(split, SplitParams)
    }
    if "end_to_end" in cuts and (
        overlapping := count_overlapping_windows(cuts["end_to_end"].token_ids, cuts["train"].token_ids)
    ):
        logger.warning("%d windows of calibration.end_to_end share text with calibration.train", overlapping)
    cuts.setdefault("end_to_end", cuts["train"])
    held_out, length = calibration.evaluation, lengths["evaluation"]
    windows = held_out.windows and count_windows("evaluation", held_out, held_out.windows, length)
    for corpus in held_out.corpora:
        cuts[f"evaluation/{corpus}"] = cut_evaluation_windows(
            corpus,
            windows=windows,
            length=length,
            folders=folders,
            tokenizer=tokenizer,
            tokenizer_id=tokenizer_id,
        )
    for name, cut in cuts.items():
        check_token_ids(cut.token_ids, checkpoint.config.vocab_size, tokenizer, f"calibration.{name}")
    token_ids = cuts["train"].token_ids
    decision = decide_start_token(calibration.start_token, checkpoint, token_ids, run.runner(checkpoint))
    logger.info("start token before every window: %s (%s)", decision.token, decision.why)
    if decision.token is not None:
        problems = find_misfits(calibration, max_positions, tokens_before=1)
        if problems:
            raise ParamsError(list_problems("params", problems))
    with replacing_folder(CALIBRATION) as partial:
        for name, cut in cuts.items():
            save_windows(partial / f"{name}.safetensors", cut.with_start_token(decision.token))
            run.metrics[f"{name.replace('/', '_')}_tokens"] = cut.token_ids.numel()
    run.metrics["lengths"] = lengths
    if window is not None:
        run.metrics["sliding_window"] = window
    run.metrics["start_token"] = decision.summary()
    files = (folders[corpus] / f"{split}.jsonl" for corpus in used for split in SPLITS)
    if conversations := sum(count_conversations(read_documents(path)) for path in files):
        run.metrics["chat_template"] = f"the tokenizer's, for {conversations} conversations"


if __name__ == "__main__":
    open_stage("calibration", main, __doc__)
